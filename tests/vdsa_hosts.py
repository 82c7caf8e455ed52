"""Taps on several hosts with clocks of their own, and their source: all real cores, in a time that is only simulated.

Every message takes its time on the way. The oracle knows when each write was begun and when it was acknowledged, by the
true time that no host has.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dr_cloud.link.messages import CheckpointItem, Durable, Welcome, data_head, decode_control
from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Disk
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.tap import wire
from dr_cloud.tap.bitmap import IntentBitmap
from dr_cloud.tap.copy import State
from dr_cloud.tap.tap import Tap
from dr_cloud.vdsa.actions import (
    CloseTap,
    EndHold,
    FlushSoon,
    NewStream,
    Prepare,
    ReadTap,
    Seal,
    Send,
    SendTap,
    SourceLimits,
)
from dr_cloud.vdsa.batch import prepare
from dr_cloud.vdsa.feed import FeedParser
from dr_cloud.vdsa.source import SourceCore
from dr_cloud.vdsa.taps import Announced

KEYS = VpgKeys(bytes(32), Scope("acme", "shop", "dc1"))
BLOCKS = 64
_EPOCH_NS = 1_800_000_000 * 10**9


class _Selector(selectors.EpollSelector):
    """Does not wait: time passes at once instead."""

    loop: SimulatedLoop

    def select(self, timeout: float | None = None) -> Any:
        if timeout:
            self.loop.now += timeout
        return super().select(0)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop in which waiting takes no time."""

    def __init__(self) -> None:
        selector = _Selector()
        selector.loop = self
        self.now = 0.0
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def run_simulated(work: Coroutine[Any, Any, Any]) -> None:
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(work)


class HostWrite(NamedTuple):
    """One write: when it was begun and acknowledged in true seconds, and what its tap called it."""

    begun: float
    acked: float
    disk: int
    sequence: int
    time_ns: int


class _Line:
    """One direction of a connection: in order, each message with its delay."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._free = 0.0

    def send(self, deliver: Any, *what: Any) -> None:
        loop = asyncio.get_running_loop()
        self._free = max(self._free + 1e-7, loop.time() + self._hosts.delay())
        loop.call_at(self._free, deliver, *what)


class HostTap:
    """A tap on a host of its own, whose clock is off by `skew_ns`."""

    def __init__(self, hosts: Hosts, number: int, path: Path, skew_ns: int) -> None:
        self.hosts = hosts
        self.number = number
        self.bitmap = IntentBitmap(path, [("d", BLOCKS * BLOCK_SIZE)], boot=bytes(16))
        self.core = Tap(
            f"s{number}",
            [self.bitmap],
            now=lambda: _EPOCH_NS + skew_ns + hosts.true_ns(),
            monotonic=hosts.true_ns,
        )
        self.copy = self.core.copies[0]
        self.to_vdsa, self.to_tap = _Line(hosts), _Line(hosts)
        self.parser = FeedParser()
        self.pending = False

    def connect(self) -> None:
        self.copy.on_batch = self.copy.on_full = self.push_soon
        self.copy.connected()
        self.push()

    def push_soon(self) -> None:
        if not self.pending:
            self.pending = True
            asyncio.get_running_loop().call_later(0.0003, self.push)

    def push(self) -> None:
        self.pending = False
        while (batch := self.copy.take()) is not None:
            self.to_vdsa.send(self.arrive, b"".join(batch))

    def arrive(self, data: bytes) -> None:
        while data:
            room = self.parser.buffer()
            count = min(len(room), len(data))
            room[:count] = data[:count]
            data = data[count:]
            greeted = self.parser.hello is not None
            records = self.parser.advance(count)
            if not greeted and (hello := self.parser.hello) is not None:
                self.parser.attach({0: self.number})
                disk = Disk(index=self.number, name=f"s{self.number}/d", size_bytes=BLOCKS * BLOCK_SIZE)
                announced = Announced(hello.tap, hello.server, f"host{self.number}", 0, {0: disk})
                self.hosts.do(self.hosts.source.tap_connected(self.number, announced))
                records = self.parser.advance(0)
            self.hosts.do(self.hosts.source.received(self.number, records))

    def hear(self, data: bytes) -> None:
        kind, _, _, _, sequence, time_ns, _, asked = wire.HEAD.unpack(data)
        match kind:
            case wire.MARK:
                self.copy.mark(asked)
            case wire.DURABLE:
                self.copy.durable(sequence)
            case wire.HOLD:
                self.copy.hold(asked, time_ns)
            case wire.RELEASE:
                self.copy.release(asked)
            case wire.ORDER:
                self.copy.order(time_ns)
        if self.copy.state is State.TRACKING and self.copy.begin_sync():
            for bits, first, stop in list(self.copy.sync_runs()):
                self.copy.send_sync(self.copy.watch(bits, first, stop - first), None)
            self.copy.end_sync()
        self.push_soon()

    async def write(self, block: int) -> HostWrite:
        begun = asyncio.get_running_loop().time()
        disk = self.core.disks[0]
        disk.set(block, 1)
        await asyncio.sleep(self.hosts.chance.uniform(0.00002, 0.001))
        self.core.stamp()
        sequence, time_ns = self.core.clock.sequence, self.core.clock.time_ns
        self.core.wrote(disk, block, sequence.to_bytes(8, "big") * (BLOCK_SIZE // 8))
        if self.core.gate.shut:
            await self.core.gate.acknowledge(time_ns)
        return HostWrite(begun, asyncio.get_running_loop().time(), self.number, sequence, time_ns)


class Hosts:
    """Hosts, their taps and one source. `checkpoints` are the items in order; `sent` tells how many items before."""

    def __init__(
        self, folder: Path, skews_ns: list[int], limits: SourceLimits, delay_seconds: float, seed: int
    ) -> None:
        self.chance = random.Random(seed)
        self.delay_seconds = delay_seconds
        self.writes: list[HostWrite] = []
        self.checkpoints: list[CheckpointItem] = []
        self.held: dict[tuple[int, int], int] = {}
        """The item that carries each write, by disk and sequence."""
        self.taps = [HostTap(self, number, folder / f"tap{number}", skew) for number, skew in enumerate(skews_ns)]
        members = {f"s{number}": {"d": number} for number in range(len(skews_ns))}
        self.source = SourceCore(limits, members, lambda: bytes(16), self.true_ns(), lambda: _EPOCH_NS + self.true_ns())
        self.target = _Line(self)

    def true_ns(self) -> int:
        try:
            return int(asyncio.get_running_loop().time() * 1e9)
        except RuntimeError:
            return 0

    def delay(self) -> float:
        # Now and then a message is much later than the others.
        return self.chance.uniform(0.00005, self.delay_seconds) * (20 if self.chance.random() < 0.01 else 1)

    async def run(self, seconds: float, clients: int) -> None:
        """Let clients write for so long, each one write after another, on any host."""
        self.do(self.source.welcomed(Welcome(generation=1, received=0, time_ns=0, credit_bytes=1 << 30)))
        for tap in self.taps:
            tap.connect()
        ticker = asyncio.create_task(self._tick())
        await asyncio.sleep(0.5)
        await asyncio.gather(*(self._client(seconds + 0.5) for _ in range(clients)))
        await asyncio.sleep(0.5)
        ticker.cancel()
        for tap in self.taps:
            tap.bitmap.abandon()

    async def _client(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < seconds:
            self.writes.append(await self.chance.choice(self.taps).write(self.chance.randrange(BLOCKS)))
            if self.chance.random() < 0.3:
                await asyncio.sleep(self.chance.uniform(0, 0.005))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.02)
            self.do(self.source.tick(self.true_ns(), True))

    def do(self, actions: list[Any]) -> None:
        loop = asyncio.get_running_loop()
        for action in actions:
            match action:
                case SendTap():
                    tap = self.taps[action.connection]
                    tap.to_tap.send(tap.hear, action.data)
                case Prepare():
                    for record in action.batch.records:
                        self.held[record.disk, record.sequence] = action.number
                    prepared = prepare(KEYS, action.batch)
                    loop.call_soon(lambda a, p: self.do(self.source.prepared(a.stream, a.number, p)), action, prepared)
                case Seal():
                    message = [data_head(2, action.number), bytes(8)]
                    loop.call_soon(lambda a, m: self.do(self.source.sealed(a.stream, a.number, m)), action, message)
                case Send(message=str() as text):
                    self.target.send(self.take, text)
                case Send(message=bytes() as offer):
                    locs = np.zeros((len(offer) - 16) // 16, np.uint64)
                    number = int.from_bytes(offer[8:16], "little")
                    self.target.send(lambda n, k: self.do(self.source.known(n, k)), number, locs)
                case FlushSoon():
                    loop.call_later(0.001, lambda: self.do(self.source.flush()))
                case EndHold():
                    loop.call_later(0.02, lambda question: self.do(self.source.end_hold(question)), action.id)
                case CloseTap() | NewStream():
                    raise AssertionError(action)
                case Send() | ReadTap():
                    pass

    def take(self, text: str) -> None:
        item = decode_control(text)
        if isinstance(item, CheckpointItem):
            self.checkpoints.append(item)
            self.do(
                self.source.durable(Durable(number=item.number, cuts=item.cuts, checkpoint=1, time_ns=item.time_ns))
            )

    # The oracle.

    def check_cut(self, at_ns: int, item: CheckpointItem) -> None:
        """Fail if a write is in the image at a time, and one that was acknowledged before it was begun is not."""
        begun = max((write.begun for write in self.writes if write.time_ns <= at_ns), default=-1.0)
        missing = [write for write in self.writes if write.time_ns > at_ns and write.acked < begun]
        assert not missing, f"{len(missing)} acknowledged writes are not in the image at {at_ns}"
        late = [w for w in self.writes if w.time_ns <= at_ns and self.held[w.disk, w.sequence] > item.number]
        assert not late, "a write of the checkpoint comes after it"

    def check(self, between: bool) -> int:
        """Check every checkpoint to recover to, and `between` them where they say so; return how many times."""
        count, before_ns = 0, 0
        for item in self.checkpoints:
            if item.kind == "auto":
                times = {item.time_ns}
                if item.exact and between:
                    inside = [write.time_ns for write in self.writes if before_ns <= write.time_ns <= item.time_ns]
                    times |= {*self.chance.sample(inside, min(len(inside), 30))}
                assert between or not item.exact
                for at_ns in times:
                    self.check_cut(at_ns, item)
                count += len(times)
            before_ns = item.time_ns
        return count
