"""The two sides of the demonstration: an enterprise's host as processes, and a provider on local Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dr_cloud.actors.node import NodeSettings
from dr_cloud.actors.provider import LocalProvider
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.seal.keyring import Keyring

SCOPE: Final = Scope("acme", "shop", "dc-east")
CHECKPOINT_SECONDS: Final = 1.0


class Process:
    """A process of the enterprise's site. What it says on stderr is kept in a file."""

    def __init__(self, name: str, directory: Path, *arguments: str) -> None:
        """Start `python -m` with `arguments`."""
        self._log = directory / f"{name}.log"
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        self.name = name
        self._asked = False

    def wait_ready(self) -> str:
        """Return the line that the process prints when it is ready."""
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

    def stop(self) -> None:
        """Ask it to stop; after ten seconds, make it."""
        self._asked = True
        if self.alive():
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        if self.alive():
            self._process.kill()
            self._process.wait()


class Demonstration:
    """Everything that runs, started step by step and stopped as a whole."""

    def __init__(self, directory: Path, stacks: int) -> None:
        """Use `directory` for all files."""
        self.directory = directory
        self.image = directory / "production.img"
        self._processes: list[Process] = []
        for folder in ("run", "work", "cache", "site"):
            (directory / folder).mkdir(mode=0o700)
        self.settings = NodeSettings(
            keyring=directory / "keyring.json",
            work_dir=directory / "work",
            cache_dir=_cache_dir(directory),
            run_dir=directory / "run",
        )
        Keyring.open(self.settings.keyring).create(SCOPE.enterprise)
        self.uri = f"nbd+unix:///shop?socket={directory}/run/tap.sock"
        self._stacks = stacks
        self._provider: LocalProvider | None = None

    def start_provider(self) -> None:
        """Start Ray, the target VDSA and the pool of idle stacks."""
        self._provider = LocalProvider(
            self.settings,
            f"file://{self.directory}/store",
            [SCOPE],
            self.directory / "run" / "vdsa.sock",
            self._stacks,
        )

    @property
    def provider(self) -> LocalProvider:
        """The provider, once it is started."""
        assert self._provider is not None, "start_provider comes first"
        return self._provider

    def start_site(self) -> None:
        """Start the source VDSA and the tap in front of the production disk."""
        run = self.directory / "run"
        source = self._start(
            "source", "dr_cloud.cli.main", "vdsa", "source",
            "--scope", "/".join(SCOPE), "--member", "shop/shop=0", "--target", f"unix:{run}/vdsa.sock", "--socket", f"{run}/source.sock",
            "--keyring", str(self.settings.keyring), "--checkpoint-seconds", str(CHECKPOINT_SECONDS),
        )  # fmt: skip
        tap = self._start(
            "tap", "dr_cloud.cli.main", "tap", "--server", "shop",
            "--disk", f"shop={self.image}", "--socket", f"{run}/tap.sock", "--vdsa", f"{run}/source.sock",
            "--state", str(self.directory / "site" / "tap.state"),
        )  # fmt: skip
        source.wait_ready()
        tap.wait_ready()

    def start_workload(self, from_seconds: float, to_seconds: float) -> Process:
        """Start the production database; it corrupts itself between the two times from now."""
        return self._start(
            "workload", "dr_cloud.demo.workload", self.uri, str(self.directory / "site"),
            "--from-seconds", str(from_seconds), "--to-seconds", str(to_seconds),
        )  # fmt: skip

    def _start(self, name: str, *arguments: str) -> Process:
        process = Process(name, self.directory, *arguments)
        self._processes.append(process)
        return process

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_seconds: float = 60.0) -> None:
        """Wait for `condition`; `DrCloudError` that says what did not happen."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            dead = [process.name for process in self._processes if process.ended_by_itself()]
            if dead:
                raise DrCloudError(f"{', '.join(dead)} ended while the demonstration waited: {what}")
            if time.monotonic() > deadline:
                raise DrCloudError(f"after {timeout_seconds:g} s still waiting: {what}")
            time.sleep(0.1)

    def newest_ns(self) -> int:
        """Return the latest time that has an image, 0 if there is none yet."""
        try:
            return self.provider.status(SCOPE).newest_ns or 0
        except DrCloudError:
            return 0

    def stop(self) -> None:
        """Stop everything, the site first."""
        for process in reversed(self._processes):
            process.stop()
        if self._provider is not None:
            self._provider.close()
        with contextlib.suppress(OSError):
            _remove_cache(self.settings.cache_dir, self.directory)


def _cache_dir(directory: Path) -> Path:
    """Return a folder for the object cache: in shared memory where there is room, else beside the rest."""
    shared = Path("/dev/shm")
    if directory.is_relative_to(shared):
        return directory / "cache"
    if shared.is_dir() and os.access(shared, os.W_OK) and os.statvfs(shared).f_bavail * 4096 > 1 << 30:
        return shared / directory.name
    return directory / "cache"


def _remove_cache(cache: Path, directory: Path) -> None:
    if cache.parent != directory:
        subprocess.run(["rm", "-rf", str(cache)], check=False)
