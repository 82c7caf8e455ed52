"""Log lines that never make a guest wait: a thread writes them; what it cannot keep up with is counted and left out.

A log that nobody reads (a full pipe, a hung terminal) would otherwise stop the event loop and the guest with it.
"""

from __future__ import annotations

import queue
import threading
from typing import Final, Self, TextIO

LINES_MAX: Final = 1000
CLOSE_SECONDS_MAX: Final = 1.0


class LogThread:
    """A logger factory for structlog, and its one logger."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(LINES_MAX)
        self._left_out = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def __call__(self, *names: object) -> Self:
        """Return the logger."""
        return self

    def msg(self, message: str) -> None:
        """Hand over a line."""
        try:
            self._lines.put_nowait(message)
        except queue.Full:
            self._left_out += 1

    debug = info = warning = warn = error = critical = fatal = exception = failure = log = msg

    def close(self) -> None:
        """Write what is left, for a second at most."""
        try:
            self._lines.put(None, timeout=CLOSE_SECONDS_MAX)
        except queue.Full:
            return
        self._thread.join(CLOSE_SECONDS_MAX)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            left_out, self._left_out = self._left_out, 0
            try:
                if left_out:
                    self._stream.write(f"{left_out} log lines were left out: the log was not read\n")
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                # Nobody reads the log any more; the tap goes on.
                continue
