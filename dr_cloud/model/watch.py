"""What those who watch see: health, alerts, the audit log, events. Times are nanoseconds since the epoch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from dr_cloud.model.vpg import VpgStatus


class _View(BaseModel):
    model_config = ConfigDict(frozen=True)


AlertKind = Literal[
    "lag", "history", "history-critical", "link", "vdsa", "checkpoint", "replication", "rights", "drill", "untested"
]


class Alert(_View):
    """Something that someone should look at."""

    id: str
    enterprise: str
    kind: AlertKind
    subject: str
    """What it is about: `vpg/erp/dc1`, `site/leeds`, `host/leeds/h1`."""
    message: str
    remedy: str
    raised_ns: int
    cleared_ns: int | None


class SiteHealth(_View):
    """How a site and its link stand."""

    enterprise: str
    site: str
    connected: bool
    last_seen_ns: int | None
    hosts: int
    hosts_failed: int


class Health(_View):
    """How all that the caller may see stands."""

    at_ns: int
    sites: list[SiteHealth]
    vpgs: dict[VpgStatus, int]
    alerts: list[Alert]
    """Those that are raised, newest first, at most a thousand."""
    lag_seconds_max: float | None
    tasks_running: int


class AuditEntry(_View):
    """One mutating call."""

    id: str
    at_ns: int
    principal: str
    principal_name: str
    role: str
    enterprise: str
    """On whose things; empty for the provider's own."""
    operation: str
    subject: str
    outcome: Literal["done", "denied", "refused"]
    reason: str = ""


class Event(_View):
    """Something that changed."""

    number: int
    """Ascending; ask for what comes after the last one seen."""
    at_ns: int
    enterprise: str
    kind: Literal["task", "checkpoint", "health", "alert", "vpg", "test", "site"]
    subject: str
    data: dict[str, Any]
