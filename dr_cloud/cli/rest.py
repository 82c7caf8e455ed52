"""What all commands that call the REST API share: profile, enterprise, --json, waiting for tasks.

A command is a function whose first parameter is its `Call`; `command` registers it with the common options added, so
that each group says only what is its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from dr_cloud.cli.output import Json, Output
from dr_cloud.cli.profiles import Profiles
from dr_cloud.client.client import Client
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.task import CompletionCode, Task
from dr_cloud.model.units import format_time, parse_time

_Profile = Annotated[
    str,
    typer.Option(
        "--profile",
        envvar="DR_CLOUD_PROFILE",
        help="Which provider; see dr-cloud profile.",
        autocompletion=lambda: sorted(Profiles.load().profiles),
    ),
]
_Enterprise = Annotated[
    str,
    typer.Option(
        "--enterprise", envvar="DR_CLOUD_ENTERPRISE", help="Whose; the profile's, or the token's own, if not given."
    ),
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return with the task at once.")]
Since = Annotated[str, typer.Option(help="From this time on (RFC 3339 with a zone).")]
Until = Annotated[str, typer.Option(help="Up to this time (RFC 3339 with a zone).")]
_WAIT_SECONDS_MAX = 24 * 3600.0


def time_or_none(text: str) -> int | None:
    """Return nanoseconds for an option that may be empty."""
    return parse_time(text) if text else None


class Call:
    """One command's way to the provider and to what it prints."""

    def __init__(self, profile: str, enterprise: str, as_json: bool) -> None:
        known = Profiles.load().get(profile)
        self.out = Output(as_json)
        self.client = Client(known.url, known.token, ca_pem=known.ca, enterprise=enterprise or known.enterprise)

    def task(self, task: Task, *, no_wait: bool, done: str = "") -> Task:
        """Wait for a task, print it, and fail as it failed."""
        if no_wait:
            self.out.said(task, f"task {task.id}: {task.type}")
            return task
        with self.out.progress(task.type) as show:
            ended = self.client.wait_task(
                task.id, timeout_seconds=_WAIT_SECONDS_MAX, on_progress=lambda seen: show(seen.progress)
            )
        self.ended(ended, done)
        return ended

    def ended(self, task: Task, done: str = "") -> None:
        """Print a task that has ended; raise what it failed with."""
        if task.completion is not CompletionCode.SUCCESS:
            if self.out.as_json:
                self.out.json(task.model_dump(mode="json"))
            reason = task.exception or task.completion.value
            raise DrCloudError(f"task {task.id} ({task.type}) ended {task.completion.value}: {reason}", task.remedy)
        at = f" at {format_time(task.ended_ns)}" if task.ended_ns else ""
        self.out.said(task, done or f"task {task.id} ({task.type}) is done{at}")


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function of (call, its own arguments and options) as the command `name` of a group."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(function).parameters.values()][1:]
        common = [
            inspect.Parameter(word, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for word, default, kind in (
                ("profile", "", _Profile),
                ("in_enterprise", "", _Enterprise),
                ("as_json", False, Json),
            )
        ]

        def run(*, profile: str, in_enterprise: str, as_json: bool, **given: Any) -> None:
            call = Call(profile, in_enterprise, as_json)
            try:
                function(call, **given)
            finally:
                call.client.close()

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + common
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__ = function.__doc__
        app.command(name)(run)
        return function

    return register
