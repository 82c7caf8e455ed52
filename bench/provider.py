"""A provider without a manager (local Ray, target VDSA, idle stacks), with histories to open stacks on."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from bench.chain import memory_directory
from bench.history import History
from dr_cloud.actors.node import NodeSettings
from dr_cloud.actors.pool import StackPool
from dr_cloud.actors.provider import LocalProvider, RunningStack
from dr_cloud.link.messages import Hello, encode_control
from dr_cloud.link.stream import connect
from dr_cloud.model.ids import Scope
from dr_cloud.nbd.client import NbdClient
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.open import open_store

STACKS: Final = 8
_SCOPE: Final = Scope("acme", "shop", "dc-east")


class Provider:
    """One provider; use `running`."""

    def __init__(self, directory: Path) -> None:
        """Start it, with all its files in `directory`."""
        self.directory = directory
        self.settings = NodeSettings(
            keyring=directory / "keyring.json",
            work_dir=directory / "work",
            cache_dir=directory / "cache",
            run_dir=directory / "run",
        )
        self.settings.make_folders()
        Keyring.open(self.settings.keyring).create(_SCOPE.enterprise)
        store = f"file://{directory}/store"
        self.local = LocalProvider(self.settings, store, [_SCOPE], directory / "run" / "vdsa.sock", STACKS)

    def close(self) -> None:
        """Stop it."""
        self.local.close()

    def history(self, name: str, size_bytes: int) -> History:
        """Begin the history of a VPG's only disk."""
        store = open_store(self.local.store_url)
        return History(store, Keyring.open(self.settings.keyring), _SCOPE._replace(vpg=name), size_bytes)

    def take_over(self, scope: Scope) -> None:
        """Have the target VDSA open a scope, as a source's hello makes it do."""
        self.local.admit([scope])
        asyncio.run(self._hello(scope))

    async def _hello(self, scope: Scope) -> None:
        stream = await connect(self.local.address)
        hello = Hello(scope=scope, stream=secrets.token_hex(16), connection=0, connections=1)
        await stream.send(encode_control(hello))
        await stream.receive()
        stream.close()

    def renew_pool(self) -> list[int]:
        """Replace the idle stacks by new ones that have served nobody; return their processes' ids, in turn."""
        self.local.pool.close()
        self.local.pool = StackPool(self.local.placement, self.settings, "renewed", STACKS)
        self.local.pool.refill()
        return self.local.pool.wait_until_ready()

    def empty_cache(self) -> None:
        """Remove every file of the node's object cache. Stacks that were open before still have theirs mapped."""
        shutil.rmtree(self.settings.cache_dir, ignore_errors=True)
        self.settings.cache_dir.mkdir(mode=0o700)

    def first_bytes(self, scope: Scope, asked: Sequence[tuple[int, int]]) -> list[float]:
        """Open a stack at each (time, offset), read 4 KiB there; return the seconds from the request to the bytes.

        That is the whole path: plans, calls of actors, the image, a connection, the read.
        """
        asked_ns = time.monotonic_ns()
        stacks = self.local.open_stacks(scope, [at_ns for at_ns, _ in asked])

        def first_read(stack: RunningStack, offset: int) -> float:
            with NbdClient.connect(uri_of(stack)) as client:
                client.pread(offset, 4096)
                return (time.monotonic_ns() - asked_ns) / 1e9

        with ThreadPoolExecutor(len(stacks)) as threads:
            seconds = list(threads.map(first_read, stacks, [offset for _, offset in asked]))
        for stack in stacks:
            stack.close()
        return seconds


def uri_of(stack: RunningStack) -> str:
    """Return where the disk of a stack is, once it serves."""
    return stack.wait_open().uris["disk"][0]


@contextlib.contextmanager
def running() -> Iterator[Provider]:
    """Start a provider, and stop it with every file of it removed."""
    directory = Path(tempfile.mkdtemp(prefix="drc-bench-", dir=memory_directory()))
    provider: Provider | None = None
    try:
        provider = Provider(directory)
        yield provider
    finally:
        if provider is not None:
            provider.close()
        shutil.rmtree(directory, ignore_errors=True)
