"""Tasks: what an operation that takes time returns at once (R19). The words are those of the command tracker."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict


class TaskStatus(StrEnum):
    """Where a task is."""

    ACTIVE = "Active"
    """Accepted; waits for its turn."""
    RUNNING = "Running"
    ABORTED = "Aborted"
    COMPLETED = "Completed"


class CompletionCode(StrEnum):
    """How a task ended."""

    SUCCESS = "Success"
    ABORTED = "Aborted"
    FAILED = "Failed"
    """It found that it cannot be done; the reason is in `exception`."""
    HAD_EXCEPTION = "HadException"
    """It broke; the text is in `exception`."""
    NOT_AVAILABLE = "NotAvailable"
    """It still runs."""


class Task(BaseModel):
    """One task. Times are nanoseconds since the epoch."""

    model_config = ConfigDict(frozen=True)

    id: str
    enterprise: str
    """Whose it is; empty for the provider's own."""
    type: str
    """The command: `vpg.create`, `vpg.remove`, `failover`, `test.start`, `vdsa.deploy` …"""
    vpg: str | None = None
    site: str | None = None
    inputs: dict[str, Any] = {}
    status: TaskStatus = TaskStatus.ACTIVE
    completion: CompletionCode = CompletionCode.NOT_AVAILABLE
    progress: float = 0.0
    """0 to 1."""
    result: dict[str, Any] | None = None
    exception: str = ""
    remedy: str = ""
    created_ns: int
    started_ns: int | None = None
    ended_ns: int | None = None
    created_by: str = ""
