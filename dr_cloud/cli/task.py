"""`dr-cloud task`: long work, watched and aborted."""

from __future__ import annotations

from typing import Annotated

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, command
from dr_cloud.model.task import TaskStatus

app = group("Tasks: long work.")
TaskId = Annotated[str, typer.Argument(help="The task's id.")]


@command(app, "list")
def list_tasks(
    call: Call,
    vpg: Annotated[str | None, typer.Option(help="Only of this protection group.")] = None,
    status: Annotated[TaskStatus | None, typer.Option(help="Only in this status.")] = None,
) -> None:
    """List tasks."""
    call.out.rows(
        call.client.tasks(vpg, status), "id type enterprise vpg status completion created_ns ended_ns exception"
    )


@command(app, "show")
def show(call: Call, task: TaskId) -> None:
    """Show one task: type, inputs, status, completion code, result, exception."""
    call.out.record(call.client.task(task))


@command(app, "wait")
def wait(
    call: Call,
    task: TaskId,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait.")] = 600.0,
    poll: Annotated[float, typer.Option(min=0.05, max=60, help="Seconds between looks.")] = 0.5,
) -> None:
    """Wait until a task has ended. Fails as the task fails, and if it has not ended in time."""
    ended = call.wait(call.client.task(task), timeout, poll)
    call.out.said(ended, f"task {task} ({ended.type}) is done")


@command(app, "abort")
def abort(call: Call, task: TaskId) -> None:
    """Abort a task, if it has not gone too far."""
    call.out.record(call.client.abort_task(task))
