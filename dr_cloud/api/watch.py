"""Operations that watch: health, alerts, audit, and the stream of events.

The stream is Server-Sent Events. Each event's id is its number: a client that comes back with `Last-Event-ID` misses
nothing that is still kept. A comment every 15 seconds keeps proxies awake. The stream ends when the caller's token
does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Header, Query
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.concurrency import run_in_threadpool

from dr_cloud.api.deps import Linked, Manager, Narrowed, OfEnterprise, Secret, Who, part
from dr_cloud.manager.cloud import Cloud
from dr_cloud.model import cloud as c
from dr_cloud.model import watch as w
from dr_cloud.model.errors import UnauthenticatedError
from dr_cloud.model.principal import Principal

router = APIRouter()
EVENTS_POLL_SECONDS: Final = 0.5
TOKEN_CHECK_SECONDS: Final = 5.0
KEEP_ALIVE_SECONDS: Final = 15.0
_Number = Annotated[int | None, Query(ge=0, lt=1 << 63, description="Only later ones; 0: all that are kept.")]


class AlertQuery(Narrowed):
    """Which alerts are wanted."""

    cleared: bool = False
    """Whether those that are over are told too."""


@router.get("/health", tags=["health"])
def health(cloud: Manager, who: Who, enterprise: OfEnterprise = None) -> w.Health:
    """Tell how everything stands that the caller may see: sites, links, groups, alerts."""
    return cloud.health(who, enterprise)


@router.get("/alerts", tags=["health"])
def alerts(cloud: Manager, who: Who, query: Annotated[AlertQuery, Query()], links: Linked) -> c.Page[w.Alert]:
    """List alerts."""
    return links.of(cloud.alerts(who, query.enterprise, part(query, c.PageRequest), query.cleared))


@router.get("/audit", tags=["audit"])
def audit(cloud: Manager, who: Who, query: Annotated[Narrowed, Query()], links: Linked) -> c.Page[w.AuditEntry]:
    """List what was changed, or tried to be: who, what, on what, when, and how it went."""
    return links.of(cloud.audit(who, query.enterprise, part(query, c.PageRequest)))


def _after(
    cloud: Manager,
    who: Who,
    after: _Number = None,
    last_event_id: Annotated[int | None, Header(ge=0, lt=1 << 63)] = None,
) -> int:
    if last_event_id is not None:
        return last_event_id
    return cloud.newest_event(who) if after is None else after


class EventStream(StreamingResponse):
    """Server-Sent Events."""

    media_type = "text/event-stream"


async def _stream(cloud: Cloud, secret: str, who: Principal, after: int) -> AsyncIterator[bytes]:
    checked = told = time.monotonic()
    yield format_sse_event(id=str(after), comment="where the stream begins")
    while True:
        now = time.monotonic()
        if now - checked >= TOKEN_CHECK_SECONDS:
            checked = now
            try:
                await run_in_threadpool(cloud.authenticate, secret)
            except UnauthenticatedError:
                return
        some = await run_in_threadpool(cloud.events, who, after)
        for event in some:
            after, told = event.number, now
            yield format_sse_event(data_str=event.model_dump_json(), event=event.kind, id=str(after))
        if now - told >= KEEP_ALIVE_SECONDS:
            told = now
            yield KEEPALIVE_COMMENT
        if not some:
            await asyncio.sleep(EVENTS_POLL_SECONDS)


@router.get("/events", response_class=EventStream, tags=["health"])
async def events(cloud: Manager, who: Who, secret: Secret, after: Annotated[int, Depends(_after)]) -> EventStream:
    """Stream what changes: tasks, checkpoints, health, alerts. Resumes after the header Last-Event-ID."""
    return EventStream(_stream(cloud, secret, who, after), headers={"X-Accel-Buffering": "no"})
