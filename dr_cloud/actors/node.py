"""What the actors of one node share: where its keys, cache and sockets are; an event loop for guest I/O; stores."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from pydantic import BaseModel, ConfigDict, Field

from dr_cloud.store.open import open_store
from dr_cloud.store.store import Store

T = TypeVar("T")


class NodeSettings(BaseModel):
    """One node of the provider. Paths are local to the node; secrets are not in here, only where they are."""

    model_config = ConfigDict(frozen=True)

    keyring: Path
    """The enterprises' keys. Each node has the file, from its own secret or a shared one."""
    work_dir: Path
    """Digest indexes and write logs."""
    cache_dir: Path
    """The object cache of the node's stacks: tmpfs or NVMe."""
    run_dir: Path
    """Unix sockets."""
    cache_limit_bytes: int = 4 << 30
    probes_at_once: int | None = Field(default=None, ge=1)
    """Of all tests on the node; None is one for each of its processors."""
    kernel_mounts: bool = True
    """Whether probes may have this node's kernel mount file systems of tenants."""

    @property
    def probes_dir(self) -> Path:
        """What probes work with, while they run."""
        return self.work_dir / "probes"

    def make_folders(self) -> None:
        """Make what is not there yet; none but the owner may look into them."""
        for folder in (self.work_dir, self.cache_dir, self.run_dir):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def socket(self, name: str) -> Path:
        """Return the path of the unix socket of the actor `name`. It is short: the kernel takes 107 bytes."""
        return self.run_dir / f"{hashlib.blake2s(name.encode(), digest_size=8).hexdigest()}.sock"

    def taps_socket(self, data_center: str, host: str, enterprise: str) -> Path:
        """Return where an enterprise's taps on a data center's host find their VDSA."""
        return self.run_dir / "taps" / data_center / host / f"{enterprise}.sock"


class Stores:
    """The stores that an actor has open, one for each URL."""

    def __init__(self) -> None:
        """Begin with none."""
        self._open: dict[str, Store] = {}

    def at(self, url: str) -> Store:
        """Return the store at `url`, the same object each time. Raises `DrCloudError`."""
        if url not in self._open:
            self._open[url] = open_store(url)
        return self._open[url]


class LoopThread:
    """A uvloop event loop in a thread of its own: guest I/O stays apart from Ray's threads."""

    def __init__(self, name: str) -> None:
        """Start the loop."""
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def call(self, coroutine: Coroutine[Any, Any, T], timeout_seconds: float | None = None) -> T:
        """Run a coroutine on the loop and return what it returns; called from any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_seconds)
