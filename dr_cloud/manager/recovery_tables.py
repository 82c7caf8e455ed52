"""Tables of recovery: tests, what their probes said, drills."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ForeignKeyConstraint, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from dr_cloud.manager.base import Base, Json, Owned
from dr_cloud.model.recovery import Verdict


class RecoveryTest(Owned, Base):
    """A recovery test, or a failover before its commit. Its id is its stack's name."""

    __tablename__ = "recovery_tests"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    vpg: Mapped[str] = mapped_column(String(63))
    target: Mapped[str]
    kind: Mapped[str]
    task: Mapped[str]
    status: Mapped[str] = mapped_column(String(16))
    asked_ns: Mapped[int]
    at_ns: Mapped[int | None]
    note: Mapped[str]
    quota_bytes: Mapped[int | None]
    uris: Mapped[Json] = mapped_column(default=dict)
    started_ns: Mapped[int]
    running_ns: Mapped[int | None]
    stopped_ns: Mapped[int | None]
    verdict: Mapped[str | None]
    verdict_note: Mapped[str] = mapped_column(default="")
    statistics: Mapped[Json] = mapped_column(default=dict)
    problem: Mapped[str] = mapped_column(default="")
    denied: Mapped[str] = mapped_column(default="")
    """Why policy has stopped it; empty if it has not."""
    started_by: Mapped[str]
    origin: Mapped[str] = mapped_column(default="")
    probes: Mapped[list[Any]] = mapped_column(default=list)
    results: Mapped[list[Any]] = mapped_column(default=list)
    keep: Mapped[bool] = mapped_column(default=False)
    remote: Mapped[bool] = mapped_column(default=False)
    expires_ns: Mapped[int | None]
    ended: Mapped[str] = mapped_column(default="")
    then: Mapped[str] = mapped_column(default="")
    """Of a failover: what happens at `expires_ns`, `commit` or `rollback`; empty for nothing."""

    __table_args__ = (
        ForeignKeyConstraint(["enterprise", "vpg"], ["vpgs.enterprise", "vpgs.name"], ondelete="CASCADE"),
        Index(None, "enterprise", "vpg", "started_ns"),
        Index(None, "enterprise", "vpg", "kind", "verdict", "started_ns"),  # the newest that has passed
    )


class ProbeVerdict(Owned, Base):
    """What probes said of one time: a time's image never changes, so it is not asked again."""

    __tablename__ = "probe_verdicts"
    vpg: Mapped[str] = mapped_column(String(63), primary_key=True)
    target: Mapped[str] = mapped_column(String(63), primary_key=True)
    probes: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Digest of the list of probes."""
    at_ns: Mapped[int] = mapped_column(primary_key=True)
    """The time that was served."""
    clean: Mapped[bool]
    reason: Mapped[str]
    test: Mapped[str] = mapped_column(String(32))

    __table_args__ = (
        ForeignKeyConstraint(["enterprise", "vpg"], ["vpgs.enterprise", "vpgs.name"], ondelete="CASCADE"),
    )


class Drill(Owned, Base):
    """Recovery tests of a VPG that come by themselves."""

    __tablename__ = "drills"
    vpg: Mapped[str] = mapped_column(String(63), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    settings: Mapped[Json]
    """`dr_cloud.model.recovery.DrillSettings`."""
    maker: Mapped[Json]
    """`dr_cloud.model.principal.Principal` of whoever put it: its tests are started as if by them, from there."""
    next_ns: Mapped[int | None]
    """When it is due; None while it is not enabled."""
    last_ns: Mapped[int | None]
    last_tests: Mapped[list[Any]] = mapped_column(default=list)
    last_verdict: Mapped[Verdict | None] = mapped_column(String(8))
    problem: Mapped[str] = mapped_column(default="")

    __table_args__ = (
        ForeignKeyConstraint(["enterprise", "vpg"], ["vpgs.enterprise", "vpgs.name"], ondelete="CASCADE"),
    )
