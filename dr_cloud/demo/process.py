"""Processes of the product, started and stopped from here: for the demonstration and for measurements."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from dr_cloud.model.errors import DrCloudError

_STOP_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 0.25


class Process:
    """One process. What it says on stderr is kept in a file."""

    def __init__(
        self, name: str, directory: Path, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start `python -m` with `arguments`, in a process group of its own: Ctrl-C does not reach it.

        Args:
            name: What it is, for errors and for its log.
            directory: Where its log is.
            arguments: The module, and what it is given.
            environment: What is added to this process's own.
        """
        self._log = directory / f"{name}.log"
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        self.name = name
        self._asked = False

    def wait_ready(self) -> str:
        """Return the line that the process prints when it is ready. Raises `DrCloudError` if it ends without."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode().strip()
        if not line:
            raise DrCloudError(f"{self.name} did not start: {self._log.read_text()[-500:]}")
        return line

    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def ended_by_itself(self) -> bool:
        """Whether it ended though nobody asked it to."""
        return not self._asked and not self.alive()

    def ask_to_stop(self) -> None:
        """Ask it to stop, and do not wait for it."""
        self._asked = True
        if self.alive():
            self._process.send_signal(signal.SIGTERM)

    def stop(self, timeout_seconds: float = _STOP_SECONDS) -> None:
        """Ask it to stop; after `timeout_seconds`, make it. What it started and left running ends with it."""
        if not self._asked:
            self.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_seconds)
        if self.alive():
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.stdout is not None:
            self._process.stdout.close()


class Processes:
    """All that was started in one directory, to be stopped as a whole."""

    def __init__(self, directory: Path) -> None:
        """Keep logs in `directory`."""
        self.directory = directory
        self._running: list[Process] = []

    def start(self, name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Process:
        """Start a process; see `Process`."""
        process = Process(name, self.directory, *arguments, environment=environment)
        self._running.append(process)
        return process

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_seconds: float = 60.0) -> None:
        """Wait for `condition`; `DrCloudError` that says what did not happen."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise DrCloudError(f"after {timeout_seconds:g} s still waiting: {what}")
            time.sleep(_LOOK_SECONDS)

    def check(self) -> None:
        """Raise `DrCloudError` if a process ended that nobody asked to."""
        dead = [process.name for process in self._running if process.ended_by_itself()]
        if dead:
            raise DrCloudError(f"{', '.join(dead)} ended by itself", "Run it again; if it does so again, tell us.")

    def stop(self) -> None:
        """Stop everything at once."""
        for process in self._running:
            process.ask_to_stop()
        for process in reversed(self._running):
            process.stop()
        self._running.clear()
