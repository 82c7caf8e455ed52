"""Operations on protection groups and their checkpoints."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from dr_cloud.api.deps import AnyTenant, IdPart, Linked, Manager, NamePart, OnlyOnce, Tenant, Waiting, Who, part
from dr_cloud.model import cloud as c
from dr_cloud.model.journal import Write
from dr_cloud.model.provider import Name
from dr_cloud.model.task import Task
from dr_cloud.model.units import TIME_NS_MAX
from dr_cloud.model.vpg import ProtectedServer, VpgSettings, VpgState, VpgStatus

router = APIRouter()
_VPGS = "/enterprises/{enterprise}/vpgs"
_VPG = _VPGS + "/{vpg}"
Force = Annotated[bool, Query(description="Also where it could not be done otherwise; what is lost is told.")]
TargetQuery = Annotated[Name | None, Query(description="Only at this target.")]


class VpgQuery(c.VpgFilter, c.PageRequest):
    """Which VPGs are wanted."""


class CheckpointQuery(c.CheckpointFilter, c.PageRequest):
    """Which checkpoints are wanted. Newest last."""

    target: Name | None = None
    """None: the only one there is, or all."""


class WriteQuery(c.PageRequest):
    """Which writes are wanted. Oldest first."""

    since_ns: c.TimeNs = 0
    until_ns: c.TimeNs = TIME_NS_MAX
    target: Name | None = None
    """None: the only one there is."""


class Pause(BaseModel):
    """Why replication is paused."""

    model_config = ConfigDict(extra="forbid")

    reason: c.ShortText = ""


class StatusAnswer(BaseModel):
    """The status of a protection group."""

    status: VpgStatus


class StateAnswer(BaseModel):
    """The state of a protection group: 0 protected, 1 recovered."""

    state: VpgState


class ActiveTask(BaseModel):
    """The task that is at work on a protection group, if there is one."""

    task: Task | None


@router.get(_VPGS, tags=["protection groups"])
def vpgs(
    cloud: Manager, who: Who, enterprise: AnyTenant, query: Annotated[VpgQuery, Query()], links: Linked
) -> c.Page[c.Vpg]:
    """List protection groups."""
    return links.of(cloud.vpgs(who, enterprise, part(query, c.PageRequest), part(query, c.VpgFilter)))


@router.post(_VPGS, status_code=202, tags=["protection groups"])
def create_vpg(cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, body: VpgSettings) -> Task:
    """Create a protection group; replication begins."""
    return once.task(lambda: cloud.create_vpg(who, enterprise, body))


@router.get(_VPG, tags=["protection groups"])
def vpg(cloud: Manager, who: Who, enterprise: Tenant, vpg: NamePart) -> c.Vpg:
    """Show one protection group: settings, status, targets with lag and history, disks."""
    return cloud.vpg(who, enterprise, vpg)


@router.put(_VPG, status_code=202, tags=["protection groups"])
def update_vpg(
    cloud: Manager,
    who: Who,
    once: OnlyOnce,
    enterprise: Tenant,
    vpg: NamePart,
    body: VpgSettings,
    force: Force = False,
) -> Task:
    """Change a protection group's settings."""
    return once.task(lambda: cloud.update_vpg(who, enterprise, vpg, body, force))


@router.delete(_VPG, status_code=202, tags=["protection groups"])
def remove_vpg(
    cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, vpg: NamePart, force: Force = False
) -> Task:
    """Remove a protection group. Not during a test or a failover, unless forced."""
    return once.task(lambda: cloud.remove_vpg(who, enterprise, vpg, force))


@router.post(_VPG + "/servers", status_code=202, tags=["protection groups"])
def add_server(
    cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, vpg: NamePart, body: ProtectedServer
) -> Task:
    """Add a virtual server to a protection group."""
    return once.task(lambda: cloud.add_server(who, enterprise, vpg, body))


@router.delete(_VPG + "/servers/{server}", status_code=202, tags=["protection groups"])
def remove_server(
    cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, vpg: NamePart, server: NamePart
) -> Task:
    """Take a virtual server out of a protection group."""
    return once.task(lambda: cloud.remove_server(who, enterprise, vpg, server))


@router.get(_VPG + "/status", tags=["protection groups"])
def vpg_status(cloud: Manager, who: Who, enterprise: Tenant, vpg: NamePart) -> StatusAnswer:
    """Tell the status of a protection group."""
    return StatusAnswer(status=cloud.vpg_status(who, enterprise, vpg))


@router.get(_VPG + "/state", tags=["protection groups"])
def vpg_state(cloud: Manager, who: Who, enterprise: Tenant, vpg: NamePart) -> StateAnswer:
    """Tell whether a protection group is protected (0) or recovered (1)."""
    return StateAnswer(state=cloud.vpg_state(who, enterprise, vpg))


@router.get(_VPG + "/reverse-settings", tags=["protection groups"])
def reverse_settings(
    cloud: Manager, who: Who, enterprise: Tenant, vpg: NamePart, target: TargetQuery = None
) -> VpgSettings:
    """Tell the settings that reverse replication would begin with."""
    return cloud.reverse_settings(who, enterprise, vpg, target)


@router.post(_VPG + "/pause", tags=["protection groups"])
def pause(cloud: Manager, who: Who, enterprise: Tenant, vpg: NamePart, body: Pause) -> c.Vpg:
    """Pause replication. What is written meanwhile is remembered, and sent after `resume`."""
    return cloud.pause(who, enterprise, vpg, body.reason)


@router.post(_VPG + "/resume", tags=["protection groups"])
def resume(cloud: Manager, who: Who, enterprise: Tenant, vpg: NamePart) -> c.Vpg:
    """Let replication go on."""
    return cloud.resume(who, enterprise, vpg)


@router.post(_VPG + "/force-sync", status_code=202, tags=["protection groups"])
def force_sync(
    cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, vpg: NamePart, target: TargetQuery = None
) -> Task:
    """Compare all disks with the target and send what differs."""
    return once.task(lambda: cloud.force_sync(who, enterprise, vpg, target))


@router.get(_VPG + "/active-task", tags=["tasks"])
def active_task(cloud: Manager, who: Who, enterprise: Tenant, vpg: NamePart) -> ActiveTask:
    """Tell the task that is at work on a protection group."""
    return ActiveTask(task=cloud.active_task(who, enterprise, vpg))


@router.get("/enterprises/{enterprise}/sites/{site}/vpgs/{vpg}/active-task", tags=["tasks"])
def active_task_at_site(cloud: Manager, who: Who, enterprise: Tenant, site: NamePart, vpg: NamePart) -> ActiveTask:
    """Tell the task that is at work on a protection group at one site."""
    return ActiveTask(task=cloud.active_task_at_site(who, enterprise, vpg, site))


@router.get(_VPG + "/checkpoints", tags=["checkpoints"])
def checkpoints(
    cloud: Manager,
    who: Who,
    enterprise: Tenant,
    vpg: NamePart,
    query: Annotated[CheckpointQuery, Query()],
    links: Linked,
) -> c.Page[c.CheckpointView]:
    """List a protection group's checkpoints."""
    which, page = part(query, c.CheckpointFilter), part(query, c.PageRequest)
    return links.of(cloud.checkpoints(who, enterprise, vpg, query.target, which, page))


@router.get(_VPG + "/writes", tags=["checkpoints"])
def writes(
    cloud: Manager, who: Who, enterprise: Tenant, vpg: NamePart, query: Annotated[WriteQuery, Query()], links: Linked
) -> c.Page[Write]:
    """List when was written, as a journal tells it: the times to choose from when the last clean one is searched."""
    page = part(query, c.PageRequest)
    return links.of(cloud.writes(who, enterprise, vpg, query.target, query.since_ns, query.until_ns, page))


@router.post(_VPG + "/checkpoints", status_code=202, tags=["checkpoints"])
def insert_checkpoint(
    cloud: Manager,
    who: Who,
    once: OnlyOnce,
    enterprise: Tenant,
    vpg: NamePart,
    body: c.CheckpointOrder,
    response: Response,
) -> c.InsertedCheckpoint:
    """Ask for a tagged checkpoint. Returns at once; whether it arrived tells the operation that waits for it."""
    made = once(c.InsertedCheckpoint, lambda: cloud.insert_checkpoint(who, enterprise, vpg, body))
    response.headers["Location"] = f"/v1/enterprises/{enterprise}/vpgs/{vpg}/inserted-checkpoints/{made.id}"
    return made


@router.get(_VPG + "/inserted-checkpoints/{id}", tags=["checkpoints"])
def inserted_checkpoint(
    cloud: Manager, who: Who, enterprise: Tenant, vpg: NamePart, id: IdPart
) -> c.InsertedCheckpoint:
    """Tell whether a checkpoint by hand has arrived in the journals."""
    return cloud.inserted_checkpoint(who, enterprise, vpg, id)


@router.get(_VPG + "/inserted-checkpoints/{id}/wait", tags=["checkpoints"])
async def wait_checkpoint(
    cloud: Manager,
    who: Who,
    enterprise: Tenant,
    vpg: NamePart,
    id: IdPart,
    query: Annotated[Waiting, Query()],
) -> c.InsertedCheckpoint:
    """Wait until a checkpoint by hand has arrived at every target, or the time is over; tells how it stands then."""
    deadline = time.monotonic() + query.timeout_seconds
    while True:
        # A thread is held only while it is asked, so that many may wait.
        seen = await run_in_threadpool(cloud.inserted_checkpoint, who, enterprise, vpg, id)
        left = deadline - time.monotonic()
        if seen.complete or left <= 0:
            return seen
        await asyncio.sleep(min(query.poll_seconds, left))
