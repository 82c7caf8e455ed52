"""Real processes whose store notes every request in a file: `python -m bench.noted target|stack …`.

Each line of the file: nanoseconds since the epoch, verb, key, bytes. All processes append to the same file.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import uvloop

from dr_cloud.journal.reader import JournalReader
from dr_cloud.link.stream import listen
from dr_cloud.model.journal import ImagePlan
from dr_cloud.seal.keyring import Keyring
from dr_cloud.stack.cache import ObjectCache
from dr_cloud.stack.folder import CacheFolder
from dr_cloud.stack.serve import serve_stack
from dr_cloud.stack.stack import Stack
from dr_cloud.store.faults import CountingStore, Verb
from dr_cloud.store.open import open_store
from dr_cloud.store.store import Data
from dr_cloud.vdsa.target_io import TargetVdsa

T = TypeVar("T")
CACHE_BYTES = 4 << 30


class Request(NamedTuple):
    """One noted request."""

    time_ns: int
    verb: str
    key: str
    bytes: int


class NotedStore(CountingStore):
    """Notes every request of a store."""

    def __init__(self, url: str, path: Path) -> None:
        """Use the store at `url`; append to the file at `path`."""
        super().__init__(open_store(url))
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._put_bytes = 0

    def put_new(self, key: str, data: Data) -> None:
        """See `Store.put_new`."""
        super().put_new(key, data)
        self._note("put-bytes", key, len(data))

    def _do(self, verb: Verb, key: str, action: Callable[[], T]) -> T:
        result = super()._do(verb, key, action)
        self._note(verb, key, len(result) if isinstance(result, bytes) else 0)
        return result

    def _note(self, verb: str, key: str, count: int) -> None:
        os.write(self._file, f"{time.time_ns()} {verb} {key} {count}\n".encode())


def read_notes(path: Path) -> list[Request]:
    """Return what was noted so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Request(int(t), verb, key, int(count)) for t, verb, key, count in map(str.split, lines)]


async def _target(options: argparse.Namespace) -> None:
    keyring = Keyring.open(options.keyring)
    store = NotedStore(options.store, options.notes)
    vdsa = TargetVdsa(keyring, options.work, lambda scope: store)
    server = await listen(options.listen, vdsa.serve)
    print("target ready", flush=True)
    await _until_stopped()
    server.close()
    await vdsa.close()


async def _stack(options: argparse.Namespace) -> None:
    plan = ImagePlan.model_validate_json(options.plan.read_text())
    keys = Keyring.open(options.keyring).vpg_keys(plan.scope)
    reader = JournalReader(NotedStore(options.store, options.notes), keys, plan.scope, plan.generations)
    cache = ObjectCache(CacheFolder(options.work / "cache", plan.scope, plan.journal, CACHE_BYTES), reader)
    stack = await asyncio.to_thread(Stack.open, plan, cache, options.work, clock_ns=time.monotonic_ns)
    server = await serve_stack(stack, cache, unix_path=options.listen)
    print(next(iter(server.uris.values()))[0], flush=True)
    await _until_stopped()
    await server.close()
    cache.close()


async def _until_stopped() -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()


def main(arguments: list[str]) -> None:
    """Run one process until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m bench.noted")
    parser.add_argument("what", choices=["target", "stack"])
    parser.add_argument("--notes", type=Path, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--keyring", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--name")
    parser.add_argument("--plan", type=Path)
    options = parser.parse_args(arguments)
    uvloop.run(_target(options) if options.what == "target" else _stack(options))


if __name__ == "__main__":
    main(sys.argv[1:])
