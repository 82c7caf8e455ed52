"""What one enterprise sees of another with a token that is good: nothing, in the words for what does not exist."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from dr_cloud.client.client import Client
from dr_cloud.demo.enterprise import VPG, Enterprise
from dr_cloud.model.errors import DrCloudError, NotFoundError
from dr_cloud.model.recovery import StopTest, TestsRequest

_NOBODY: Final = "nobody"
_NO_ID: Final = "0" * 32


class _Names(NamedTuple):
    """What is aimed at."""

    enterprise: str
    site: str
    test: str


def _count(items: Iterable[object]) -> int:
    return sum(1 for _ in items)


_IN_ENTERPRISE: Final[tuple[Callable[[Client, _Names], object], ...]] = (
    lambda client, names: client.enterprise(),
    lambda client, names: client.vpg(VPG),
    lambda client, names: _count(client.vpgs()),
    lambda client, names: _count(client.sites()),
    lambda client, names: _count(client.servers(names.site)),
    lambda client, names: _count(client.checkpoints(VPG)),
    lambda client, names: _count(client.writes(VPG)),
    lambda client, names: _count(client.tests()),
    lambda client, names: client.start_tests(VPG, TestsRequest(times_ns=[1])),
    lambda client, names: client.stop_test(names.test, StopTest()),
    lambda client, names: client.remove_vpg(VPG, force=True),
)
"""Aimed at another enterprise by its name."""
_AMONG_OWN: Final[tuple[Callable[[Client, _Names], object], ...]] = (
    lambda client, names: client.test(names.test),
    lambda client, names: client.site(names.site),
    lambda client, names: _count(client.servers(names.site)),
)
"""Another's thing looked for among one's own."""


def aim(stranger: Enterprise, owner: Enterprise, test: str) -> tuple[int, list[str]]:
    """Aim with one enterprise's token at another's things; return how often, and what it could tell from nothing.

    Args:
        stranger: Whose token is used.
        owner: Whose things are aimed at.
        test: The id of a recovery test of the owner.
    """
    real, none = _Names(owner.name, owner.site, test), _Names(_NOBODY, _NOBODY, _NO_ID)
    client = stranger.client
    leaks = []
    for calls, inside in ((_IN_ENTERPRISE, True), (_AMONG_OWN, False)):
        for call in calls:
            answers = []
            for names in (real, none):
                client.enterprise_name = names.enterprise if inside else "-"
                answers.append(_answer(client, names, call))
            if answers[0] != answers[1]:
                leaks.append(answers[0])
    client.enterprise_name = "-"
    return len(_IN_ENTERPRISE) + len(_AMONG_OWN), leaks


def _answer(client: Client, names: _Names, call: Callable[[Client, _Names], object]) -> str:
    """Return what a call that finds nothing says, with the names that it was given taken out."""
    try:
        found = call(client, names)
    except NotFoundError as error:
        said = f"{error}. {error.remedy}"
        for name in names:
            said = said.replace(name, "…")
        return said
    except DrCloudError as error:
        return f"{names.enterprise}: {type(error).__name__}: {error}"
    return f"{names.enterprise}: {found!r}"
