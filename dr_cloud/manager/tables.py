"""The tables of the manager's database: the one reference for the schema.

Names are keys: an enterprise's things are keyed by (enterprise, name), so that no row can refer to another tenant's.
Every table of `Owned` rows has the column `enterprise`; the empty string is the provider's own. Tables without it are
listed in `PROVIDER_ONLY`. Times are nanoseconds since the epoch. JSON columns hold a record's `model_dump`.

What changes every second (how each target stands) lies in columns of its row, written when a site reports; what it
says is at most a few seconds old, and `reported_ns` tells how old.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import ForeignKeyConstraint, Index, String, and_, false, func, select
from sqlalchemy.orm import Mapped, column_property, foreign, mapped_column, relationship

from dr_cloud.manager.base import Base as Base
from dr_cloud.manager.base import Json as Json
from dr_cloud.manager.base import Owned as Owned
from dr_cloud.manager.recovery_tables import Drill as Drill
from dr_cloud.manager.recovery_tables import ProbeVerdict as ProbeVerdict
from dr_cloud.manager.recovery_tables import RecoveryTest as RecoveryTest


class Enterprise(Owned, Base):
    """A tenant."""

    __tablename__ = "enterprises"
    title: Mapped[str]
    owner: Mapped[str]
    jurisdiction: Mapped[str]
    created_ns: Mapped[int]
    link: Mapped[str]


class RegistryState(Owned, Base):
    """How often what the registry holds has changed, and which of these states is in the store."""

    __tablename__ = "registry"
    changed: Mapped[int]
    written: Mapped[int]


class Site(Owned, Base):
    """A site of an enterprise."""

    __tablename__ = "sites"
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    jurisdiction: Mapped[str]
    location: Mapped[str]
    contact: Mapped[str]
    address: Mapped[str] = mapped_column(default="")
    port: Mapped[int] = mapped_column(default=0)
    vdsa_port: Mapped[int] = mapped_column(default=0)
    throttle: Mapped[Json] = mapped_column(default=dict)
    certificate: Mapped[str] = mapped_column(default="")
    """Serial of the one it was given last; empty if it is not paired."""
    connected: Mapped[bool] = mapped_column(default=False)
    last_seen_ns: Mapped[int | None]
    version: Mapped[str] = mapped_column(default="")
    orders_revision: Mapped[int] = mapped_column(default=0)
    followed_revision: Mapped[int] = mapped_column(default=0)
    problems: Mapped[list[Any]] = mapped_column(default=list)
    datastores: Mapped[list[Any]] = mapped_column(default=list)
    """Their names, as the site tells them."""
    denied: Mapped[str] = mapped_column(default="")
    """Why policy refuses its link; empty if it does not."""

    __table_args__ = (ForeignKeyConstraint(["enterprise"], ["enterprises.enterprise"], ondelete="CASCADE"),)


class Certificate(Owned, Base):
    """A certificate that a site was given."""

    __tablename__ = "certificates"
    serial: Mapped[str] = mapped_column(String(80), primary_key=True)
    site: Mapped[str]
    issued_ns: Mapped[int]
    revoked_ns: Mapped[int | None]

    # No foreign key: a removed enterprise's certificates stay revoked.
    __table_args__ = (Index(None, "serial", unique=True),)


class Pairing(Owned, Base):
    """A one-time pairing token, by the hash of its secret."""

    __tablename__ = "pairings"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    site: Mapped[str]
    created_ns: Mapped[int]
    expires_ns: Mapped[int]
    used_ns: Mapped[int | None]
    csr_digest: Mapped[str] = mapped_column(default="")
    """Of the request that used it: a site that crashed may send the same again."""
    certificate: Mapped[str] = mapped_column(default="")
    serial: Mapped[str] = mapped_column(default="")

    __table_args__ = (
        ForeignKeyConstraint(["enterprise", "site"], ["sites.enterprise", "sites.name"], ondelete="CASCADE"),
    )


class Token(Owned, Base):
    """A bearer token, by the hash of its secret. `enterprise` is empty for the provider's own people."""

    __tablename__ = "tokens"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    name: Mapped[str]
    role: Mapped[str]
    place: Mapped[str] = mapped_column(default="")
    """The jurisdiction its bearer sits in; empty if that is not known."""
    created_ns: Mapped[int]
    expires_ns: Mapped[int]
    revoked_ns: Mapped[int | None]
    last_used_ns: Mapped[int | None]

    __table_args__ = (Index(None, "digest", unique=True),)


class Host(Owned, Base):
    """A host of an enterprise's site."""

    __tablename__ = "hosts"
    site: Mapped[str] = mapped_column(String(63), primary_key=True)
    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    wanted: Mapped[bool]
    """Whether it is to have a VDSA."""
    vdsa: Mapped[str]
    """As the site tells."""
    present: Mapped[bool]
    """Whether the site's last report named it."""
    deployment: Mapped[Json] = mapped_column(default=dict)
    problem: Mapped[str] = mapped_column(default="")
    last_seen_ns: Mapped[int | None]

    __table_args__ = (
        ForeignKeyConstraint(["enterprise", "site"], ["sites.enterprise", "sites.name"], ondelete="CASCADE"),
    )


class Server(Owned, Base):
    """A virtual server that a tap has announced, at a site of its enterprise or at a data center."""

    __tablename__ = "servers"
    site: Mapped[str] = mapped_column(String(63), primary_key=True)
    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    host: Mapped[str]
    connected: Mapped[bool]
    disks: Mapped[list[Any]]
    """[[name, size in bytes] …]"""
    last_seen_ns: Mapped[int]
    analysis: Mapped[Json] = mapped_column(default=dict)
    analysed_ns: Mapped[int | None]


class VpgTarget(Owned, Base):
    """One replication of a VPG: what was chosen, where it was put, and how it stands."""

    __tablename__ = "vpg_targets"
    vpg: Mapped[str] = mapped_column(String(63), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    position: Mapped[int]
    copy_number: Mapped[int]
    site: Mapped[str] = mapped_column(String(63))
    host: Mapped[str]
    datastore: Mapped[str]
    in_center: Mapped[bool]
    """Whether `site` is a data center of the provider's."""
    placed_host: Mapped[str]
    placed_datastore: Mapped[str]
    sync_number: Mapped[int] = mapped_column(default=0)
    denied: Mapped[str] = mapped_column(default="")
    """Why policy has stopped it; empty if it has not."""
    # How it stands; from the source, then from the target.
    reported_ns: Mapped[int] = mapped_column(default=0)
    linked: Mapped[bool] = mapped_column(default=False)
    problem: Mapped[str] = mapped_column(default="")
    durable_ns: Mapped[int] = mapped_column(default=0)
    lag_seconds: Mapped[float | None]
    lag_bytes: Mapped[int] = mapped_column(default=0)
    taps: Mapped[Json] = mapped_column(default=dict)
    checkpoints: Mapped[int] = mapped_column(default=0)
    skipped: Mapped[int] = mapped_column(default=0)
    resyncs: Mapped[int] = mapped_column(default=0)
    target_reported_ns: Mapped[int] = mapped_column(default=0)
    target_problem: Mapped[str] = mapped_column(default="")
    newest_ns: Mapped[int | None]
    horizon_ns: Mapped[int | None]
    journal_bytes: Mapped[int] = mapped_column(default=0)
    forecast_seconds: Mapped[float | None]
    """How much history there will be when the datastore is full, at the present rate."""

    __table_args__ = (
        ForeignKeyConstraint(["enterprise", "vpg"], ["vpgs.enterprise", "vpgs.name"], ondelete="CASCADE"),
        Index(None, "site", "placed_host"),
        Index(None, "enterprise", "site"),
    )


class VpgMember(Owned, Base):
    """A virtual server of a VPG."""

    __tablename__ = "vpg_members"
    vpg: Mapped[str] = mapped_column(String(63), primary_key=True)
    server: Mapped[str] = mapped_column(String(63), primary_key=True)
    site: Mapped[str] = mapped_column(String(63))
    all_disks: Mapped[bool]

    __table_args__ = (
        ForeignKeyConstraint(["enterprise", "vpg"], ["vpgs.enterprise", "vpgs.name"], ondelete="CASCADE"),
        Index(None, "enterprise", "site", "server"),
    )


class VpgDisk(Owned, Base):
    """A disk index that was given, for ever.

    The row stays when the disk leaves the VPG (`removed`) and even when the VPG goes: another VPG of that name finds
    the old journal at its target, and must not use its indexes.
    """

    __tablename__ = "vpg_disks"
    vpg: Mapped[str] = mapped_column(String(63), primary_key=True)
    index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    server: Mapped[str] = mapped_column(String(63))
    name: Mapped[str]
    size_bytes: Mapped[int]
    removed: Mapped[bool]


class Vpg(Owned, Base):
    """A virtual protection group."""

    __tablename__ = "vpgs"
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    settings: Mapped[Json]
    source_site: Mapped[str] = mapped_column(String(63))
    source_in_center: Mapped[bool]
    source_host: Mapped[str] = mapped_column(default="")
    """The host whose VDSA is the source, if the servers run in a data center."""
    status: Mapped[str] = mapped_column(String(63))
    paused: Mapped[str] = mapped_column(default="")
    problem: Mapped[str] = mapped_column(default="")
    created_ns: Mapped[int]

    targets: Mapped[list[VpgTarget]] = relationship(order_by=VpgTarget.position, cascade="all, delete-orphan")
    members: Mapped[list[VpgMember]] = relationship(order_by=VpgMember.server, cascade="all, delete-orphan")
    disks: Mapped[list[VpgDisk]] = relationship(
        primaryjoin=lambda: and_(
            foreign(VpgDisk.enterprise) == Vpg.enterprise,
            foreign(VpgDisk.vpg) == Vpg.name,
            VpgDisk.removed == false(),
        ),
        order_by=VpgDisk.index,
        viewonly=True,
    )

    if TYPE_CHECKING:
        last_passed_test_ns: Mapped[int | None]

    __table_args__ = (
        ForeignKeyConstraint(["enterprise"], ["enterprises.enterprise"], ondelete="CASCADE"),
        Index(None, "enterprise", "source_site"),
        Index(None, "enterprise", "status"),
        Index(None, "source_site", "source_host"),
    )


Vpg.last_passed_test_ns = column_property(
    select(func.max(RecoveryTest.started_ns))
    .where(
        RecoveryTest.enterprise == Vpg.enterprise,
        RecoveryTest.vpg == Vpg.name,
        RecoveryTest.kind == "test",
        RecoveryTest.verdict == "pass",
    )
    .correlate_except(RecoveryTest)
    .scalar_subquery(),
    deferred=True,
)


class InsertedCheckpoint(Owned, Base):
    """A checkpoint that was asked for by hand."""

    __tablename__ = "inserted_checkpoints"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    vpg: Mapped[str] = mapped_column(String(63))
    tag: Mapped[str]
    description: Mapped[str]
    inserted_ns: Mapped[int]
    requests: Mapped[Json]
    """By target: the id of the request, as the checkpoint carries it."""
    arrived: Mapped[Json] = mapped_column(default=dict)
    """By target: the checkpoint (`CheckpointView`)."""

    __table_args__ = (
        ForeignKeyConstraint(["enterprise", "vpg"], ["vpgs.enterprise", "vpgs.name"], ondelete="CASCADE"),
        Index(None, "enterprise", "vpg", "inserted_ns"),
    )


class Task(Owned, Base):
    """A task (`dr_cloud.model.task`)."""

    __tablename__ = "tasks"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    type: Mapped[str]
    vpg: Mapped[str | None] = mapped_column(String(63))
    site: Mapped[str | None] = mapped_column(String(63))
    inputs: Mapped[Json]
    state: Mapped[Json] = mapped_column(default=dict)
    """What its steps remember."""
    status: Mapped[str] = mapped_column(String(16))
    completion: Mapped[str] = mapped_column(String(16))
    progress: Mapped[float] = mapped_column(default=0.0)
    result: Mapped[Json | None]
    exception: Mapped[str] = mapped_column(default="")
    remedy: Mapped[str] = mapped_column(default="")
    created_ns: Mapped[int]
    started_ns: Mapped[int | None]
    ended_ns: Mapped[int | None]
    due_ns: Mapped[int] = mapped_column(default=0)
    """When its next step is to be taken."""
    abort: Mapped[bool] = mapped_column(default=False)
    created_by: Mapped[str]

    __table_args__ = (Index(None, "status", "due_ns"), Index(None, "enterprise", "created_ns"), Index(None, "id"))


class Alert(Owned, Base):
    """Something that someone should look at."""

    __tablename__ = "alerts"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    kind: Mapped[str]
    subject: Mapped[str]
    message: Mapped[str]
    remedy: Mapped[str]
    raised_ns: Mapped[int]
    cleared_ns: Mapped[int | None]

    __table_args__ = (Index(None, "enterprise", "raised_ns"),)


class Audit(Owned, Base):
    """One mutating call. Rows are added and never changed; the number only orders them."""

    __tablename__ = "audit"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    at_ns: Mapped[int]
    principal: Mapped[str]
    principal_name: Mapped[str]
    role: Mapped[str]
    operation: Mapped[str]
    subject: Mapped[str]
    outcome: Mapped[str]
    reason: Mapped[str]

    __table_args__ = (Index(None, "enterprise", "at_ns"),)


class Decision(Owned, Base):
    """One decision of the rights manager (`dr_cloud.model.decision`). Rows are added and never changed or removed."""

    __tablename__ = "decisions"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    id: Mapped[str] = mapped_column(String(32))
    at_ns: Mapped[int]
    point: Mapped[str] = mapped_column(String(16))
    action: Mapped[str] = mapped_column(String(16))
    subject: Mapped[str]
    revision: Mapped[str]
    input: Mapped[Json]
    allow: Mapped[bool]
    reasons: Mapped[list[Any]]
    previous: Mapped[str]
    hash: Mapped[str]


class DecisionHead(Owned, Base):
    """The last decision of an enterprise: whoever adds one holds this row."""

    __tablename__ = "decision_heads"
    number: Mapped[int]
    hash: Mapped[str]


class Event(Owned, Base):
    """Something that changed, for those who watch. A bounded number is kept for each enterprise."""

    __tablename__ = "events"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at_ns: Mapped[int]
    kind: Mapped[str]
    subject: Mapped[str]
    data: Mapped[Json]

    __table_args__ = (Index(None, "number"),)


class Idempotency(Owned, Base):
    """The answer to a creating call that carried a key."""

    __tablename__ = "idempotency"
    principal: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    digest: Mapped[str]
    answer: Mapped[str]
    created_ns: Mapped[int]

    __table_args__ = (Index(None, "created_ns"),)


class CenterHost(Base):
    """A host of a data center of the provider's."""

    __tablename__ = "center_hosts"
    data_center: Mapped[str] = mapped_column(String(63), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    wanted: Mapped[bool] = mapped_column(default=True)
    deployment: Mapped[Json] = mapped_column(default=dict)
    problem: Mapped[str] = mapped_column(default="")
    last_seen_ns: Mapped[int | None]
    orders_revision: Mapped[int] = mapped_column(default=0)
    followed_revision: Mapped[int] = mapped_column(default=0)


class PolicyRevision(Base):
    """Policies and regulation that were put in force; the greatest number is."""

    __tablename__ = "policy_revisions"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at_ns: Mapped[int]
    by: Mapped[str]
    revision: Mapped[str]
    sources: Mapped[Json]
    """`dr_cloud.model.rights.PolicySources`"""


PROVIDER_ONLY: Final = (CenterHost, PolicyRevision)
"""The tables that no tenant's session may touch at all."""
