"""What all commands that call the REST API share: profile, enterprise, --json, waiting for tasks.

A command is a function whose first parameter is its `Call`; `command` registers it with the common options added, so
that each group says only what is its own.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import structlog
import typer
from pydantic import ValidationError

from dr_cloud.cli.output import Json, Output
from dr_cloud.cli.profiles import Profiles
from dr_cloud.client.client import Client
from dr_cloud.model.errors import DrCloudError, InvalidError, LimitError
from dr_cloud.model.task import CompletionCode, Task
from dr_cloud.model.units import parse_time

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


def write_new(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read. Raises `DrCloudError` if it is there already."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
    except OSError as error:
        raise DrCloudError(f"{path} cannot be written: {error.strerror}", "Name a new file.") from None


def check_new(path: Path | None) -> None:
    """Raise `DrCloudError` if a file that is to be written is there already, before anything is done for it."""
    if path is not None and (path.exists() or not path.parent.is_dir()):
        raise DrCloudError(f"{path} cannot be a new file", "Name one that is not there, in a folder that is.")


class Call:
    """One command's way to the provider and to what it prints."""

    def __init__(self, profile: str, enterprise: str, as_json: bool) -> None:
        known = Profiles.load().get(profile)
        self.out = Output(as_json)
        self.client = Client(known.url, known.token, ca_pem=known.ca, enterprise=enterprise or known.enterprise)

    def wait(self, task: Task, timeout_seconds: float = _WAIT_SECONDS_MAX, poll_seconds: float = 0.5) -> Task:
        """Wait until a task has ended, with a bar on a terminal. Raises `DrCloudError` if it failed or takes longer."""
        with self.out.progress(task.type) as show:
            ended = self.client.wait_task(task.id, timeout_seconds, poll_seconds, lambda seen: show(seen.progress))
        what = f"task {task.id} ({task.type})"
        if ended.completion is CompletionCode.NOT_AVAILABLE:
            raise LimitError(f"{what} has not ended in time", f"Wait again: dr-cloud task wait {task.id}")
        if ended.completion is not CompletionCode.SUCCESS:
            raise DrCloudError(f"{what} ended {ended.completion.value}: {ended.exception or 'no reason'}", ended.remedy)
        return ended

    def task(self, task: Task, *, no_wait: bool, done: str) -> None:
        """Print a task, once it has ended or at once."""
        if no_wait:
            self.out.said(task, f"task {task.id} ({task.type}) is begun")
        else:
            self.out.said(self.wait(task), done)


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
            # Standard output belongs to the answer; a request that is tried again is no news.
            quiet = structlog.make_filtering_bound_logger(logging.ERROR)
            structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr), wrapper_class=quiet)
            call = Call(profile, in_enterprise, as_json)
            try:
                function(call, **given)
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(str(part) for part in first["loc"]) or error.title
                raise InvalidError(f"{where}: {first['msg']}", "See what the command takes: --help.") from None
            finally:
                call.client.close()

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + common
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__ = function.__doc__
        app.command(name)(run)
        return function

    return register
