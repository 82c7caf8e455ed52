"""The site's log: lines for people on stderr, the same as JSON in files that take turns, and one archive of them.

Purpose
    `start` sends what structlog and the libraries say to two places. Neither can hold up the event loop: a thread
    writes each, and lines that it cannot keep up with are left out and counted.

Layout
    `log.jsonl` is written; full (8 MiB), it becomes `log.jsonl.1`, and so on up to 7. A line is a JSON object with
    `time` (RFC 3339), `level`, `event`, `logger`. An archive (tar.gz) has `log.jsonl` (the lines asked for),
    `about.json`, and if asked for `vdsa.json` and `core.json`.

No secret is logged: keys, tokens and proxies' passwords are in no line and no record of an archive. A line holds names,
addresses, counts and reasons.
"""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
import logging.handlers
import os
import queue
import resource
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.replication import LogRequest
from dr_cloud.model.units import format_time, parse_time

FILE: Final = "log.jsonl"
FILE_BYTES_MAX: Final = 8 << 20
FILES_KEPT: Final = 7
_QUEUE_LINES_MAX: Final = 10_000
_LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


class _Never(logging.handlers.QueueHandler):
    """Never waits: a line for which there is no room is counted."""

    left_out = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.left_out += 1


def _stamp(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    event["time"] = format_time(time.time_ns())
    return event


class SiteLog:
    """Where log lines go while the site runs. `close` puts everything back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listeners: list[logging.handlers.QueueListener] = []
        self._handlers: list[_Never] = []

    @classmethod
    def start(cls, folder: Path) -> Self:
        """Write to stderr and into `folder` from now on."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = cls(folder)
        shared: list[Processor] = [
            structlog.stdlib.add_logger_name,
            structlog.stdlib.add_log_level,
            structlog.processors.format_exc_info,
            _stamp,
        ]
        structlog.configure(
            processors=[
                structlog.stdlib.filter_by_level,
                *shared,
                structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
            ],
            logger_factory=structlog.stdlib.LoggerFactory(),
        )
        file = logging.handlers.RotatingFileHandler(
            folder / FILE, maxBytes=FILE_BYTES_MAX, backupCount=FILES_KEPT, encoding="utf-8"
        )
        people: Processor = structlog.dev.ConsoleRenderer(colors=False, timestamp_key="time")
        log._add(file, shared, structlog.processors.JSONRenderer(default=str), logging.DEBUG)
        log._add(logging.StreamHandler(sys.stderr), shared, people, logging.INFO)
        # Libraries tell of each connection and request; only what is wrong belongs here.
        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger("dr_cloud").setLevel(logging.DEBUG)
        return log

    def _add(self, sink: logging.Handler, shared: list[Processor], renderer: Processor, level: int) -> None:
        lines: queue.Queue[Any] = queue.Queue(_QUEUE_LINES_MAX)
        handler = _Never(lines)
        handler.setLevel(level)
        handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=shared,
                processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            )
        )
        listener = logging.handlers.QueueListener(lines, sink)
        listener.start()
        logging.getLogger().addHandler(handler)
        self._handlers.append(handler)
        self._listeners.append(listener)

    @property
    def left_out(self) -> int:
        """How many lines were left out because the disk or the terminal was slow."""
        return sum(handler.left_out for handler in self._handlers)

    def close(self) -> None:
        """Write what waits and let go."""
        for handler, listener in zip(self._handlers, self._listeners, strict=True):
            logging.getLogger().removeHandler(handler)
            listener.stop()
            for sink in listener.handlers:
                sink.close()
        structlog.reset_defaults()

    def lines(self, request: LogRequest) -> Iterator[str]:
        """Return the kept lines of that level or above within that time, oldest first."""
        least = _LEVELS[request.level]
        for number in range(FILES_KEPT, -1, -1):
            path = self.folder / (f"{FILE}.{number}" if number else FILE)
            try:
                file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115
            except FileNotFoundError:
                continue
            with file:
                for line in file:
                    if _wanted(line, least, request.since_ns, request.until_ns):
                        yield line


def _wanted(line: str, least: int, since_ns: int, until_ns: int) -> bool:
    try:
        record = json.loads(line)
        return _LEVELS.get(record["level"], 20) >= least and since_ns <= parse_time(record["time"]) <= until_ns
    except (ValueError, KeyError, TypeError, DrCloudError):
        # The end of a file that a crash left.
        return False


def archive(log: SiteLog, request: LogRequest, documents: dict[str, Any]) -> bytes:
    """Return the archive: the lines asked for, and `documents` (file name → what JSON can say). Blocks."""
    files = {"log.jsonl": "".join(log.lines(request)).encode()}
    files |= {name: json.dumps(document, indent=1, default=str).encode() for name, document in documents.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as packed:
        for name, data in files.items():
            about = tarfile.TarInfo(name)
            about.size, about.mtime, about.mode = len(data), int(time.time()), 0o600
            packed.addfile(about, io.BytesIO(data))
    return buffer.getvalue()


def core_state() -> dict[str, Any]:
    """Return what this process is doing: threads, tasks, memory, open files. Code places only, no values."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "pid": os.getpid(),
        "python": sys.version,
        "cpu_seconds": {"user": usage.ru_utime, "system": usage.ru_stime},
        "memory_bytes_max": usage.ru_maxrss * 1024,
        "open_files": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None,
        "collector": gc.get_stats(),
        "threads": {
            f"{names.get(ident, '?')} {ident}": [_place(frame) for frame in traceback.extract_stack(stack)]
            for ident, stack in sys._current_frames().items()
        },
        "tasks": [
            {"name": task.get_name(), "at": [f"{_name(s.f_code)}:{s.f_lineno}" for s in task.get_stack(limit=8)]}
            for task in asyncio.all_tasks()
        ],
    }


def _name(code: Any) -> str:
    return f"{Path(code.co_filename).name}:{code.co_name}"


def _place(frame: traceback.FrameSummary) -> str:
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
