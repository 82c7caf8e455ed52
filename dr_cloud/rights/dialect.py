"""Rego that the embedded engine misunderstands, found before it decides.

rego-cpp takes a function's argument for a free variable where it is the index of something (`data.sites[name]` with the
argument `name`): in a comprehension it then runs over everything, which can turn a no into a yes; elsewhere it searches
where it should look up. Fields of arguments and local variables are taken as they should be, so the way out is short::

    spots(name) := [s | s := data.sites[name][_]]                    # refused
    spots(place) := [s | s := data.sites[place.name][_]]             # good
"""

from __future__ import annotations

import re

from dr_cloud.model.errors import InvalidError

_NOISE = re.compile(r'"(?:[^"\\\n]|\\.)*"|`[^`]*`|#[^\n]*')
_RULE = re.compile(r"^\S", re.MULTILINE)
_FUNCTION = re.compile(r"(?:default\s+)?(\w+)\(([^)]*)\)")
_NAME = re.compile(r"[A-Za-z_]\w*")


def check_dialect(name: str, module: str) -> None:
    """Refuse a module that the embedded engine would misunderstand. Raises `InvalidError` that names the function."""
    text = _NOISE.sub(lambda noise: '""' if noise[0][0] != "#" else "", module)
    # A rule goes from its first letter in column 0 to the next one; a closing bracket or an `else` belongs to it.
    starts = [match.start() for match in _RULE.finditer(text)]
    starts = [start for start in starts if text[start] not in "]})" and not text.startswith("else", start)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        rule = text[start:end]
        head = _FUNCTION.match(rule)
        if head is None:
            continue
        for argument in set(_NAME.findall(head[2])) - {"_"}:
            if re.search(rf"[\w\])]\[\s*{argument}\s*\]", rule[head.end() :]):
                raise InvalidError(
                    f"{name}: function {head[1]} uses its argument {argument} as an index, which the embedded engine "
                    "misunderstands",
                    f"Hand over an object and use a field of it, or say first: key := {argument}",
                )
