"""What the manager shows of the cloud, and what it takes: the records of the REST API, the client and the manager.

Views are frozen and say what is; requests refuse fields they do not know. Times are nanoseconds since the epoch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import islice
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint, CheckpointKind
from dr_cloud.model.principal import Role
from dr_cloud.model.provider import Jurisdiction, Name
from dr_cloud.model.replication import Throttle
from dr_cloud.model.vpg import VpgSettings, VpgState, VpgStatus

PAGE_LIMIT_MAX = 1000

Text = Annotated[str, Field(max_length=4096)]
ShortText = Annotated[str, Field(max_length=255)]
Port = Annotated[int, Field(ge=0, le=65535)]
TimeNs = Annotated[int, Field(ge=0, lt=1 << 63)]


class _View(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


T = TypeVar("T")


class Page(_View, Generic[T]):
    """Some of a list, in its order."""

    items: list[T]
    next_cursor: str | None = None
    """Ask with it for what follows; None at the end. It says nothing to anyone but the manager."""


class PageRequest(_Request):
    """Which part of a list is wanted."""

    limit: int = Field(default=100, ge=1, le=PAGE_LIMIT_MAX)
    cursor: str | None = Field(default=None, max_length=1024)


class Enterprise(_View):
    """A tenant."""

    name: str
    title: str
    owner: str
    jurisdiction: str
    created_ns: int
    sites: list[str]
    link: str
    """Where its sites dial (wss://…); empty before its connector is up."""


class EnterpriseUpdate(_Request):
    """What of an enterprise may be changed. None leaves it."""

    title: ShortText | None = None
    owner: ShortText | None = None


class Site(_View):
    """A site of an enterprise."""

    enterprise: str
    name: str
    jurisdiction: str
    location: str
    contact: str
    address: str
    """Where its manager is, as an administrator told; the link does not need it."""
    port: int
    vdsa_port: int
    """The TCP port of its VDSAs; 0 if they listen on sockets of their hosts only."""
    paired: bool
    certificate: str
    """Serial of the certificate it holds; empty if it is not paired."""
    connected: bool
    last_seen_ns: int | None
    version: str
    orders_revision: int
    followed_revision: int
    throttle: Throttle
    denied: str = ""
    """Why its link is refused by policy; empty if it is not."""


class SiteUpdate(_Request):
    """What of a site may be changed. None leaves it."""

    location: ShortText | None = None
    contact: ShortText | None = None
    address: ShortText | None = None
    port: Port | None = None
    vdsa_port: Port | None = None
    throttle: Throttle | None = None


VdsaState = Literal["installed", "not installed", "installing", "removing", "failed"]


class VdsaDeployment(_Request):
    """How a VDSA is put on a host."""

    datastore: ShortText = ""
    network: Literal["dhcp", "static"] = "dhcp"
    ip: str = Field(default="", max_length=64)
    mask: str = Field(default="", max_length=64)
    gateway: str = Field(default="", max_length=64)


class Host(_View):
    """One host of a site, and its VDSA."""

    site: str
    name: str
    vdsa: VdsaState
    deployment: VdsaDeployment
    problem: str
    servers: int
    last_seen_ns: int | None


class ServerDisk(_View):
    """One disk of a virtual server, as its tap tells it."""

    name: str
    size_bytes: int


class Server(_View):
    """A virtual server that a tap has announced."""

    site: str
    name: str
    host: str
    connected: bool
    disks: list[ServerDisk]
    vpgs: list[str]
    last_seen_ns: int


class Place(_View):
    """Something of a data center that a VPG's target may name: a host or cluster, a datastore or pool."""

    name: str
    kind: Literal["host", "cluster", "datastore", "pool"]
    members: list[str] = []
    """What a cluster or pool is made of: shown to the provider's own people only."""


class DataCenter(_View):
    """One of the provider's sites, as far as the caller may see it."""

    name: str
    jurisdiction: str
    location: str
    contact: str
    hosts: list[Place]
    datastores: list[Place]
    denied: str = ""
    """Why no data of the caller's enterprise may come here; empty if it may, or if the caller is of none."""


class VpgDisk(_View):
    """One disk of a VPG. The index is never used again in that VPG, also after the disk is gone."""

    server: str
    name: str
    index: int
    size_bytes: int
    """0 until a tap has told it."""


class VpgTarget(_View):
    """How a VPG stands at one of its targets."""

    name: str
    site: str
    host: str
    datastore: str
    placed_host: str | None = None
    """The host that was chosen: shown to the provider's own people only."""
    placed_datastore: str | None = None
    linked: bool = False
    denied: str = ""
    """Why policy has stopped it; empty if it has not. It goes on by itself when it is allowed again."""
    problem: str = ""
    lag_seconds: float | None = None
    """None before the first checkpoint."""
    lag_bytes: int = 0
    newest_ns: int | None = None
    """The latest time that has an image."""
    horizon_ns: int | None = None
    """The earliest."""
    journal_bytes: int = 0
    history_seconds: float = 0.0
    history_promised_seconds: float = 0.0
    history_forecast_seconds: float | None = None
    """How much history there will be once the journal is full, at the present rate; None while it cannot be told."""
    servers: dict[str, str] = {}
    """By server: `whole`, `synchronising` or `absent`."""
    checkpoints: int = 0
    skipped: int = 0
    resyncs: int = 0


class Vpg(_View):
    """A virtual protection group."""

    enterprise: str
    name: str
    settings: VpgSettings
    status: VpgStatus
    state: VpgState
    paused: str
    """Why it is paused; empty if it runs."""
    problem: str
    """What is missing or wrong, in words; empty if nothing is."""
    created_ns: int
    last_passed_test_ns: int | None
    """When the newest recovery test began that has passed and is not discarded; None: there is none."""
    targets: list[VpgTarget]
    disks: list[VpgDisk]


class VpgFilter(_Request):
    """Which VPGs are wanted; what is None selects nothing."""

    status: VpgStatus | None = None
    source_site: Name | None = None
    target_site: Name | None = None
    name_begins: str | None = Field(default=None, max_length=63)


class CheckpointView(_View):
    """One checkpoint of a VPG at one target."""

    target: str
    number: int
    kind: CheckpointKind
    time_ns: int
    exact_from_ns: int
    """Every time from here to `time_ns` has an image of its own."""
    created_ns: int
    tag: str
    description: str
    testable: bool
    request: str = ""
    """The id that `insert_checkpoint` gave, if it was made by hand."""


class CheckpointFilter(_Request):
    """Which checkpoints are wanted."""

    since_ns: TimeNs | None = None
    until_ns: TimeNs | None = None
    tag: str | None = Field(default=None, max_length=256)
    testable: bool | None = None

    def newest(self, checkpoints: Sequence[Checkpoint], before: int | None, limit: int | None) -> list[Checkpoint]:
        """Return the newest `limit` of a journal's checkpoints that are wanted, ascending.

        Args:
            checkpoints: Ascending, as journals have them, by number and by time.
            before: Only those with lower numbers; None: all.
            limit: None: all.
        """
        first, last = 0, len(checkpoints)
        if before is not None:
            last = bisect_left(checkpoints, before, key=lambda one: one.number)
        if self.since_ns is not None:
            first = bisect_left(checkpoints, self.since_ns, key=lambda one: one.time_ns)
        if self.until_ns is not None:
            last = min(last, bisect_right(checkpoints, self.until_ns, key=lambda one: one.time_ns))
        found = (
            checkpoints[at]
            for at in reversed(range(first, last))
            if self.tag in (None, checkpoints[at].tag) and self.testable in (None, checkpoints[at].testable)
        )
        return list(islice(found, limit))[::-1]


class CheckpointOrder(_Request):
    """A checkpoint by hand."""

    tag: str = Field(min_length=1, max_length=256)
    description: str = Field(default="", max_length=4096)


class InsertedCheckpoint(_View):
    """A checkpoint that was asked for; whether it has arrived says `wait_checkpoint`."""

    id: str
    enterprise: str
    vpg: str
    tag: str
    description: str
    inserted_ns: int
    targets: list[str]
    arrived: dict[str, CheckpointView] = {}
    """By target: the checkpoint, durable in its journal."""

    @property
    def complete(self) -> bool:
        """Whether it is in the journal of every target."""
        return set(self.targets) <= set(self.arrived)


class Token(_View):
    """A bearer token, without its secret."""

    id: str
    name: str
    role: Role
    enterprise: str | None
    place: str
    """The jurisdiction its bearer sits in; empty if that is not known."""
    created_ns: int
    expires_ns: int
    revoked_ns: int | None
    last_used_ns: int | None


class TokenRequest(_Request):
    """A token to be made."""

    name: str = Field(min_length=1, max_length=255)
    role: Role
    enterprise: Name | None = None
    place: Jurisdiction | None = None
    """The jurisdiction its bearer sits in; None: an enterprise's own; of the provider's people it is then not known."""
    lifetime_seconds: int = Field(default=90 * 86400, ge=60, le=366 * 86400)


class NewToken(_View):
    """A token that was just made."""

    token: Token
    secret: str = Field(repr=False)
    """Shown this once; only its hash is kept."""


class NewPairing(_View):
    """A pairing token: one site may pair with it, once."""

    enterprise: str
    site: str
    expires_ns: int
    token: str = Field(repr=False)
    """`drp1.…`: shown this once."""


class LogRequest(_Request):
    """Which logs are wanted."""

    site: Name | None = None
    """An enterprise's site or a data center; None: the provider's own processes."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    vdsa: bool = True
    """Whether what the VDSAs say is included."""
    core: bool = False
    """Whether the state of their cores is included."""
    since_ns: TimeNs | None = None
    until_ns: TimeNs | None = None


class ServerReport(_View):
    """What is known of one virtual server: what it is, and what the analyzer infers from its writes."""

    enterprise: str
    server: Server
    at_ns: int | None
    """When the analyzer last told; None if it has not."""
    analysis: dict[str, Any] = {}


class Route(_View):
    """Where the target of a scope is."""

    scope: Scope
    kind: Literal["data center", "site"]
    site: str
    """The data center, or the enterprise's site."""
    host: str
    """The host whose VDSA it is."""
    store: str
    """URL of the store of its journal (of a site's own datastore: the datastore's name)."""
    jurisdiction: Jurisdiction
    grant: str = Field(default="", repr=False)
    """At a data center: the rights manager's signed word that the scope may lie there; as in `TargetOrders`."""
