"""Operations on tasks, and the collection of logs, which is one."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Query, Response
from starlette.concurrency import run_in_threadpool

from dr_cloud.api.deps import AnyTenant, GzipResponse, IdPart, Linked, Manager, Narrowed, OnlyOnce, Waiting, Who, part
from dr_cloud.model import cloud as c
from dr_cloud.model.provider import Name
from dr_cloud.model.task import CompletionCode, Task, TaskStatus

router = APIRouter()


class TaskQuery(Narrowed):
    """Which tasks are wanted. Newest first."""

    vpg: Name | None = None
    status: TaskStatus | None = None


@router.get("/tasks", tags=["tasks"])
def tasks(cloud: Manager, who: Who, query: Annotated[TaskQuery, Query()], links: Linked) -> c.Page[Task]:
    """List tasks."""
    page = part(query, c.PageRequest)
    return links.of(cloud.tasks(who, query.enterprise, page, query.vpg, query.status))


@router.get("/tasks/{task}", tags=["tasks"])
def task(cloud: Manager, who: Who, task: IdPart) -> Task:
    """Show one task: type, inputs, group, status, completion code, result, the text of an exception."""
    return cloud.task(who, task)


@router.get("/tasks/{task}/wait", tags=["tasks"])
async def wait_task(cloud: Manager, who: Who, task: IdPart, query: Annotated[Waiting, Query()]) -> Task:
    """Wait until a task has ended, or the time is over; tells how it stands then."""
    deadline = time.monotonic() + query.timeout_seconds
    while True:
        # A thread is held only while it is asked, so that many may wait.
        seen = await run_in_threadpool(cloud.task, who, task)
        left = deadline - time.monotonic()
        if seen.completion is not CompletionCode.NOT_AVAILABLE or left <= 0:
            return seen
        await asyncio.sleep(min(query.poll_seconds, left))


@router.post("/tasks/{task}/abort", tags=["tasks"])
def abort_task(cloud: Manager, who: Who, task: IdPart) -> Task:
    """Abort a task, if it has not gone too far."""
    return cloud.abort_task(who, task)


@router.post("/enterprises/{enterprise}/logs", status_code=202, tags=["logs"])
def collect_logs(cloud: Manager, who: Who, once: OnlyOnce, enterprise: AnyTenant, body: c.LogRequest) -> Task:
    """Collect logs into one archive. `-` by the provider's own people: the logs of the provider's processes."""
    return once.task(lambda: cloud.collect_logs(who, enterprise, body))


@router.get("/tasks/{task}/archive", response_class=GzipResponse, tags=["logs"])
def log_archive(cloud: Manager, who: Who, task: IdPart) -> Response:
    """Download the archive that a collection of logs has made (tar.gz)."""
    headers = {"Content-Disposition": f'attachment; filename="logs-{task}.tar.gz"'}
    return GzipResponse(cloud.log_archive(who, task), headers=headers)
