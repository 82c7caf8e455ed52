"""What channels are opened for, and the arguments that come with each purpose.

replication   {"scope": [enterprise, vpg, target]}   the messages of `dr_cloud.link.messages`, source to target
logs          {"id": …}                              the archive that a call of `logs` asked for, binary, then the end
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pydantic import JsonValue

from dr_cloud.model.errors import DrCloudError, NotFoundError
from dr_cloud.model.ids import Scope

REPLICATION: Final = "replication"
LOGS: Final = "logs"


def replication_arguments(scope: Scope) -> dict[str, JsonValue]:
    """Return the arguments of a channel that replicates `scope`."""
    return {"scope": list(scope)}


def replication_scope(arguments: Mapping[str, JsonValue], enterprise: str) -> Scope:
    """Return the scope that a peer names. Raises `NotFoundError` unless it is a scope of `enterprise`."""
    try:
        match arguments:
            case {"scope": [str(owner), str(vpg), str(target)]} if owner == enterprise and len(arguments) == 1:
                return Scope(owner, vpg, target).checked()
    except DrCloudError:
        pass
    raise NotFoundError("there is no such VPG and target", "Name one of your own.")
