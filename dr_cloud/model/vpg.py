"""Virtual protection groups: their settings, and their status as one table of transitions (R8, R18).

A VPG is known by (enterprise, name). Its servers may be on any of the source site's hosts; each disk has an index that
never changes and is never used again in that VPG.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dr_cloud.model.blocks import DISK_INDEX_MAX
from dr_cloud.model.errors import ConflictError
from dr_cloud.model.provider import Jurisdiction, Name

Order = Literal["barrier", "commit-wait"]
"""How writes of several hosts are ordered. `barrier`: exact at checkpoints. `commit-wait`: at any time; each write is
acknowledged only when the site's clock uncertainty has passed."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ProtectedDisk(_Record):
    """One disk of a VPG."""

    name: str = Field(min_length=1, max_length=255)
    index: int = Field(ge=0, le=DISK_INDEX_MAX)
    size_bytes: int = Field(ge=0)
    """0 until a tap has told it."""


class ProtectedServer(_Record):
    """One virtual server of a VPG. An empty list of disks stands for all the server has, also later ones."""

    name: Name
    disks: list[str] = []
    boot_order: int = Field(default=0, ge=0)


class TargetConfig(_Record):
    """Where a VPG is replicated to: a host or a cluster, a datastore or a pool, of one site."""

    name: Name
    """The target's name in the VPG; the third part of its scope."""
    site: Name
    """A data center of the provider, or a site of the enterprise."""
    host: Name
    """A host or a cluster."""
    datastore: Name
    """A datastore or a pool."""


TARGETS_MAX: Final = 3


class VpgSettings(_Record):
    """What an administrator says of a VPG."""

    name: Name
    source_site: Name
    """A site of the enterprise, or a data center of the provider where its recovered servers run."""
    servers: list[ProtectedServer] = Field(min_length=1)
    targets: list[TargetConfig] = Field(min_length=1, max_length=TARGETS_MAX)
    checkpoint_seconds: float = Field(default=5.0, ge=0.5, le=3600)
    order: Order = "barrier"
    history_hours: float = Field(default=24.0, ge=1, le=720)
    territory: list[Jurisdiction] = []
    """If not empty: the only jurisdictions whose data centers may be a target (R13.2)."""
    throttle_bytes_per_second: int = Field(default=0, ge=0)
    """0 is no limit."""
    description: str = Field(default="", max_length=4096)

    @model_validator(mode="after")
    def _names_once(self) -> VpgSettings:
        for kind, names in (("server", [s.name for s in self.servers]), ("target", [t.name for t in self.targets])):
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{kind} {min(twice)} is named twice")
        return self


class VpgStatus(StrEnum):
    """The status of a protection group, in the words of its web service."""

    PROTECTING = "Protecting"
    NEED_REVERSE_CONFIGURATION = "NeedReverseConfiguration"
    PROMOTING = "Promoting"
    PROMOTING_AND_NEED_REVERSE_CONFIGURATION = "PromotingAndNeedReverseConfiguration"
    TEST = "Test"
    FAILOVER = "Failover"
    PROMOTION_COMPLETE_MIRRORS_NOT_YET_ACTIVATED = "PromotionCompleteMirrorsNotYetActivated"
    MISSING_CONFIGURATION = "MissingConfiguration"
    PROMOTING_AND_MISSING_CONFIGURATION = "PromotingAndMissingConfiguration"
    REMOVE_IN_PROGRESS = "RemoveInProgress"


class VpgState(IntEnum):
    """What the group's servers are: protected at their source, or recovered at their target."""

    PROTECTED = 0
    RECOVERED = 1


class VpgEvent(StrEnum):
    """What changes a VPG's status."""

    CONFIGURATION_LOST = "configuration lost"
    """Something it names is gone: a host, a datastore, a server."""
    CONFIGURATION_FOUND = "configuration found"
    TEST_STARTED = "test started"
    TESTS_ENDED = "tests ended"
    FAILOVER_STARTED = "failover started"
    """Before its commit or rollback."""
    FAILOVER_ROLLED_BACK = "failover rolled back"
    FAILOVER_COMMITTED = "failover committed"
    """The recovered disks begin to become disks of their own (promotion); reverse replication is known."""
    FAILOVER_COMMITTED_ALONE = "failover committed without reverse replication"
    PROMOTION_ENDED = "promotion ended"
    REVERSE_CONFIGURED = "reverse replication configured"
    MIRRORS_ACTIVATED = "mirrors activated"
    """Reverse replication runs: source and target have changed places."""
    REMOVE_STARTED = "remove started"


_S, _E = VpgStatus, VpgEvent
TRANSITIONS: Final[dict[tuple[VpgStatus, VpgEvent], VpgStatus]] = {
    (_S.PROTECTING, _E.TEST_STARTED): _S.TEST,
    (_S.TEST, _E.TEST_STARTED): _S.TEST,
    (_S.TEST, _E.TESTS_ENDED): _S.PROTECTING,
    (_S.TEST, _E.FAILOVER_STARTED): _S.FAILOVER,
    (_S.PROTECTING, _E.FAILOVER_STARTED): _S.FAILOVER,
    (_S.MISSING_CONFIGURATION, _E.FAILOVER_STARTED): _S.FAILOVER,
    (_S.FAILOVER, _E.FAILOVER_ROLLED_BACK): _S.PROTECTING,
    (_S.FAILOVER, _E.FAILOVER_COMMITTED): _S.PROMOTING,
    (_S.FAILOVER, _E.FAILOVER_COMMITTED_ALONE): _S.PROMOTING_AND_NEED_REVERSE_CONFIGURATION,
    (_S.PROMOTING, _E.PROMOTION_ENDED): _S.PROMOTION_COMPLETE_MIRRORS_NOT_YET_ACTIVATED,
    (_S.PROMOTION_COMPLETE_MIRRORS_NOT_YET_ACTIVATED, _E.MIRRORS_ACTIVATED): _S.PROTECTING,
    (_S.PROMOTING_AND_NEED_REVERSE_CONFIGURATION, _E.PROMOTION_ENDED): _S.NEED_REVERSE_CONFIGURATION,
    (_S.PROMOTING_AND_NEED_REVERSE_CONFIGURATION, _E.REVERSE_CONFIGURED): _S.PROMOTING,
    (_S.NEED_REVERSE_CONFIGURATION, _E.REVERSE_CONFIGURED): _S.PROMOTION_COMPLETE_MIRRORS_NOT_YET_ACTIVATED,
    (_S.PROTECTING, _E.CONFIGURATION_LOST): _S.MISSING_CONFIGURATION,
    (_S.MISSING_CONFIGURATION, _E.CONFIGURATION_FOUND): _S.PROTECTING,
    (_S.PROMOTING, _E.CONFIGURATION_LOST): _S.PROMOTING_AND_MISSING_CONFIGURATION,
    (_S.PROMOTING_AND_MISSING_CONFIGURATION, _E.CONFIGURATION_FOUND): _S.PROMOTING,
    (_S.PROMOTING_AND_MISSING_CONFIGURATION, _E.PROMOTION_ENDED): _S.MISSING_CONFIGURATION,
    (_S.PROTECTING, _E.REMOVE_STARTED): _S.REMOVE_IN_PROGRESS,
    (_S.MISSING_CONFIGURATION, _E.REMOVE_STARTED): _S.REMOVE_IN_PROGRESS,
    (_S.NEED_REVERSE_CONFIGURATION, _E.REMOVE_STARTED): _S.REMOVE_IN_PROGRESS,
}
"""Every pair that is not here is refused. A forced removal is no event: it takes the VPG away from any status."""

RECOVERED: Final = frozenset(
    {
        VpgStatus.PROMOTING,
        VpgStatus.PROMOTING_AND_NEED_REVERSE_CONFIGURATION,
        VpgStatus.PROMOTING_AND_MISSING_CONFIGURATION,
        VpgStatus.PROMOTION_COMPLETE_MIRRORS_NOT_YET_ACTIVATED,
        VpgStatus.NEED_REVERSE_CONFIGURATION,
    }
)
"""The servers run at the target, for good."""


def next_status(status: VpgStatus, event: VpgEvent) -> VpgStatus:
    """Return the status after `event`. Raises `ConflictError` if the group must not do that now."""
    following = TRANSITIONS.get((status, event))
    if following is None:
        allowed = sorted(before.value for before, what in TRANSITIONS if what is event)
        raise ConflictError(
            f"the group is {status.value}: {event.value} is not possible now",
            f"It is possible when it is {' or '.join(allowed)}.",
        )
    return following


def state_of(status: VpgStatus) -> VpgState:
    """Return whether a group in this status is protected or recovered."""
    return VpgState.RECOVERED if status in RECOVERED else VpgState.PROTECTED
