"""Writes the pages of docs/ that are made from the code, so that they cannot drift from it.

    python infra/docs.py            write docs/formats.md and docs/requirements.md
    python infra/docs.py --check    exit with 1 if they are not what the code and the tests say

Every format has one module that owns it; its docstring is the specification. Here they are put together in the order in
which data meets them.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Final

import requirements

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "formats.md"
FORMATS: Final = (
    ("The feed between a tap and its VDSA", "dr_cloud/tap/wire.py"),
    ("The intent bitmap of a tap", "dr_cloud/tap/bitmap.py"),
    ("Messages between the two VDSAs", "dr_cloud/link/messages.py"),
    ("Blocks and locs", "dr_cloud/model/blocks.py"),
    ("Keys of the object store", "dr_cloud/store/layout.py"),
    ("The sealed frame", "dr_cloud/journal/frame.py"),
    ("The envelope of every object", "dr_cloud/journal/envelope.py"),
    ("Journal objects", "dr_cloud/journal/objects.py"),
    ("Keyframes of the replica map", "dr_cloud/journal/keyframe.py"),
    ("Checkpoints and writers' claims", "dr_cloud/journal/checkpoint.py"),
    ("Artefacts of probes", "dr_cloud/recovery/artefacts.py"),
    ("The registry's objects", "dr_cloud/manager/registry.py"),
    ("The keyring file", "dr_cloud/seal/keyring.py"),
)
HEAD: Final = """# Formats

Made by `make docs` from the modules that own the formats; change it there. All integers are little-endian unless told.
"""


def page() -> str:
    """Return the page as the code has it now; `ValueError` names a module without a docstring."""
    parts = [HEAD]
    for title, path in FORMATS:
        text = ast.get_docstring(ast.parse((ROOT / path).read_text()))
        if not text:
            raise ValueError(f"{path} has no docstring")
        # A literal block of a docstring begins with `::`; in Markdown its indentation is enough.
        parts.append(f"## {title}\n`{path}`\n\n" + text.replace("::\n", ":\n") + "\n")
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    """Write or check; return the exit code."""
    pages = {PAGE: page(), ROOT / "docs" / "requirements.md": requirements.page(ROOT)}
    if arguments == ["--check"]:
        stale = [path for path, text in pages.items() if not path.is_file() or path.read_text() != text]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the code says; run: make docs", file=sys.stderr)
        return 1 if stale else 0
    PAGE.parent.mkdir(exist_ok=True)
    for path, text in pages.items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
