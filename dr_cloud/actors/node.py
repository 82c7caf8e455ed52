"""What the actors of one node share: where its store, keys, cache and sockets are; and an event loop for guest I/O."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from pydantic import BaseModel, ConfigDict

T = TypeVar("T")


class NodeSettings(BaseModel):
    """One node of the provider. Paths are local to the node; secrets are not in here, only where they are."""

    model_config = ConfigDict(frozen=True)

    store_url: str
    keyring: Path
    work_dir: Path
    """Digest indexes and write logs."""
    cache_dir: Path
    """The object cache of the node's stacks: tmpfs or NVMe."""
    run_dir: Path
    """Unix sockets."""
    cache_limit_bytes: int = 4 << 30


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
