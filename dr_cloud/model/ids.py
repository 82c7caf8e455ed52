"""Names of tenants and what they own. A name is also a part of an object key, so its letters are restricted."""

from __future__ import annotations

import re
from typing import NamedTuple

from dr_cloud.model.errors import DrCloudError

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")


def check_name(name: str, what: str) -> str:
    """Return `name` if it may name a `what`; else raise `DrCloudError` that says which letters may be used."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise DrCloudError(
            f"{what} name {name!r} cannot be used",
            "Use 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning and ending with a letter or digit, without '..'.",
        )
    return name


class Scope(NamedTuple):
    """Whose data it is: one enterprise's VPG at one replication target. Keys (of both kinds) are made from it."""

    enterprise: str
    vpg: str
    target: str

    @property
    def prefix(self) -> str:
        """The prefix of every object key of this scope, without a trailing slash."""
        return f"{self.enterprise}/{self.vpg}/{self.target}"

    def checked(self) -> Scope:
        """Return itself, or raise `DrCloudError` if a part is no valid name."""
        check_name(self.enterprise, "enterprise")
        check_name(self.vpg, "VPG")
        check_name(self.target, "target")
        return self
