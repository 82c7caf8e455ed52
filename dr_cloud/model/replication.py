"""What a manager tells a site to do, and what the site tells of itself. Both are whole states, never changes.

The manager sends `SiteOrders`, all of what the site is to do, whenever it changes and when the site connects; the site
makes itself so, as often as it is told. The site sends a `SiteReport` every few seconds, and when something changes.
Whatever is lost on the way is made good by the next one.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dr_cloud.model.analysis import ServerAnalysis
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint, Disk
from dr_cloud.model.provider import Architecture
from dr_cloud.model.vpg import Order


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class ThrottleWindow(_Record):
    """A limit at certain hours (UTC). `until` before `since` goes over midnight."""

    since: str = Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")
    until: str = Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")
    bytes_per_second: int = Field(gt=0)


class Throttle(_Record):
    """Bytes per second over a link or a stream; 0 is no limit. A window that applies comes before the general limit."""

    bytes_per_second: int = Field(default=0, ge=0)
    windows: list[ThrottleWindow] = []


class SourceOrders(_Record):
    """Replicate one VPG to one of its targets."""

    scope: Scope
    copy_number: int = Field(ge=0, le=2)
    """Which of its copies each tap gives to this target."""
    members: dict[str, dict[str, int]]
    """By the server's name: the index in the VPG of each of its disks, by the disk's name."""
    checkpoint_seconds: float = Field(default=5.0, gt=0)
    order: Order = "barrier"
    throttle: Throttle = Throttle()
    sync_number: int = Field(default=0, ge=0)
    """Raised to have every block of every disk sent again."""
    paused: str = ""
    """Why it is paused; the taps go on by bitmap. Empty: it runs."""


class TargetOrders(_Record):
    """Be the target of one scope, whose journal lies in `store`."""

    scope: Scope
    store: str
    """At a data center the store's URL, at an enterprise's site the name of one of its datastores."""
    grant: str = Field(default="", repr=False)
    """At a data center: the rights manager's signed word that the scope may lie there (`dr_cloud.rights.grant`)."""


class SiteOrders(_Record):
    """All of what one site is to do."""

    revision: int = Field(ge=0)
    hosts: list[str]
    """The hosts that are to have a VDSA."""
    sources: list[SourceOrders] = []
    targets: list[TargetOrders] = []
    throttle: Throttle = Throttle()
    """Of the link as a whole."""
    architecture: Architecture = Architecture.PAIRED_CONNECTORS
    """Says how the site dials: one connection for all where connectors are paired, else one for each stream."""


class SeenServer(_Record):
    """A virtual server that a tap has announced."""

    name: str
    host: str
    tap: str
    disks: list[Disk]
    """Indexes here are the tap's own."""
    connected: bool
    enterprise: str = ""
    """Whose it is, where several enterprises' servers run: on a data center's host. A site leaves it empty."""


class SourceReport(_Record):
    """How one VPG's replication to one target stands, at the source."""

    scope: Scope
    linked: bool
    problem: str = ""
    paused: str = ""
    taps: dict[str, Literal["whole", "synchronising", "absent"]]
    """By the server's name."""
    kept_bytes: int
    """Sealed and not yet durable."""
    durable_ns: int
    """Time of the newest checkpoint that is durable at the target; 0 if none."""
    lag_seconds: float
    """Age of that checkpoint, or of what waits to be sent."""
    checkpoints: int
    skipped: int
    """Checkpoints that were due and not made."""
    resyncs: int


class TargetReport(_Record):
    """How one scope stands at its target."""

    scope: Scope
    generation: int
    connections: int
    newest: Checkpoint | None
    horizon_ns: int | None
    newest_ns: int | None
    journal_bytes: int = 0
    problem: str = ""


class HostReport(_Record):
    """One host and its VDSA."""

    host: str
    vdsa: Literal["installed", "not installed", "installing", "removing", "failed"]
    servers: list[SeenServer] = []
    problem: str = ""


class SiteReport(_Record):
    """All that a site tells of itself."""

    revision: int
    """Of the orders it follows; 0 before the first."""
    time_ns: int
    version: str
    hosts: list[HostReport] = []
    sources: list[SourceReport] = []
    targets: list[TargetReport] = []
    datastores: list[str] = []
    """Those of the site's own configuration: what a `TargetOrders.store` may name."""
    analyses: list[ServerAnalysis] = []
    """Of some of its servers: each in its turn, every half a minute or so."""
    problems: list[str] = []
    """Orders that could not be followed and belong to no report above."""


class LogRequest(_Record):
    """Parameters of the rpc `logs`. The archive comes in a channel of purpose `logs` with the argument `id`."""

    id: str = Field(pattern=r"^[0-9a-zA-Z-]{1,64}$")
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Lines below it are left out."""
    since_ns: int = 0
    until_ns: int = 1 << 62
    vdsa: bool = True
    """With the state of every VPG, tap and target."""
    core: bool = False
    """With the state of the process: threads, tasks, memory, files."""


class LogAnswer(_Record):
    """Result of the rpc `logs`: what the channel carried."""

    size_bytes: int
    sha256: str
