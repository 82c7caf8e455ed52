"""A whole replication in one thread, step by step: tap cores, source core, link queues, target core, writer, all real.

Every queue between two parts is explicit, so a test chooses what moves next, what is delivered twice, and what breaks.
The oracle is the list of all guest writes with the times that the taps gave them.
"""

from __future__ import annotations

import itertools
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from vdsa_images import ImageReader

from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.journal.writer import JournalWriter
from dr_cloud.link.messages import (
    FRAME,
    KNOWN,
    CheckpointItem,
    Durable,
    Taps,
    Welcome,
    decode_control,
    decode_data,
    encode_control,
    encode_data,
)
from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store.open import open_store
from dr_cloud.tap import wire
from dr_cloud.tap.bitmap import IntentBitmap
from dr_cloud.tap.copy import State
from dr_cloud.tap.tap import Tap
from dr_cloud.vdsa.actions import (
    Answer,
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
from dr_cloud.vdsa.batch import prepare, seal
from dr_cloud.vdsa.feed import FeedParser, Record
from dr_cloud.vdsa.source import SourceCore
from dr_cloud.vdsa.taps import Announced
from dr_cloud.vdsa.target import FrameItem, Pending, TargetCore

SCOPE = Scope("acme", "shop", "dc1")
KEYS = VpgKeys(bytes(range(32)), SCOPE)
DISK_BLOCKS = 12
ZERO = bytes(BLOCK_SIZE)


class WorldTap:
    """A real tap core with a disk in memory; `wire` is its socket to the source, None while it is not connected."""

    def __init__(self, world: World, name: str, path: Path) -> None:
        self.world = world
        self.bitmap = IntentBitmap(path, [(name, DISK_BLOCKS * BLOCK_SIZE)], boot=bytes(16))
        self.index = len(world.taps)
        """Of its disk in the VPG; its own index is 0."""
        self.server = f"s{self.index}"
        self.core = Tap(
            self.server, [self.bitmap], queue_bytes_max=40 * BLOCK_SIZE, now=world.clock, monotonic=world.clock
        )
        self.tap = self.core.copies[0]
        self.bits = self.bitmap.disks[0]
        self.disk = [ZERO] * DISK_BLOCKS
        self.member = True
        self.connection: int | None = None
        self.outgoing = bytearray()

    def write(self, first: int, blocks: list[bytes]) -> None:
        self.bits.set(first, len(blocks))
        self.disk[first : first + len(blocks)] = blocks
        self.core.stamp()
        for at, block in enumerate(blocks):
            self.world.history.append((self.core.clock.time_ns, self.index, first + at, block))
        if any(block != ZERO for block in blocks):
            self.core.wrote(self.core.disks[0], first, b"".join(blocks))
        else:
            self.core.zeroed(self.core.disks[0], first, len(blocks))

    def push(self) -> None:
        while self.connection is not None and (batch := self.tap.take()) is not None:
            self.outgoing += b"".join(batch)

    def synchronise(self) -> None:
        if self.tap.state is not State.TRACKING or self.connection is None or not self.tap.begin_sync():
            return
        number = self.tap.sync_number
        for bits, first, stop in list(self.tap.sync_runs()):
            watch = self.tap.watch(bits, first, stop - first)
            self.tap.send_sync(watch, memoryview(b"".join(self.disk[first:stop])))
            if self.tap.sync_number != number:
                return
        self.tap.end_sync()


class World:
    """See the module's docstring."""

    def __init__(self, folder: Path, taps: int, connections: int, limits: SourceLimits) -> None:
        self.now_ns = 1_000_000
        self.folder = folder
        self.store = open_store("memory:")
        self.limits = limits
        self.history: list[tuple[int, int, int, bytes]] = []
        self.connection_count = connections
        self.streams = itertools.count(1)
        self.tap_connections = itertools.count(1)
        self.restarts = itertools.count(1)
        self.taps: list[WorldTap] = []
        for number in range(taps):
            self.taps.append(WorldTap(self, f"disk{number}", folder / f"tap{number}"))
        self.answers: list[Durable] = []
        self.repeats = 0
        self.writer: JournalWriter | None = None
        self.source: SourceCore
        self.start_target()
        self.start_source()

    def clock(self) -> int:
        self.now_ns += 1
        return self.now_ns

    # Parts come and go.

    def start_source(self) -> None:
        """Kill the source, if there is one, and start another."""
        self.cut_link()
        for tap in self.taps:
            self.drop_tap(tap, tell=False)
        self.parsers: dict[int, FeedParser] = {}
        self.by_connection: dict[int, WorldTap] = {}
        self.paused: set[int] = set()
        self.jobs: list[Any] = []
        self.source = SourceCore(
            self.limits,
            self.members(),
            lambda: next(self.streams).to_bytes(16, "big"),
            self.now_ns,
            self.clock,
        )

    def start_target(self) -> None:
        """Kill the target, if there is one, and start another on the same store."""
        if self.writer is not None:
            self.cut_link()
            self.writer.close()
        self.writer = JournalWriter.open(self.store, KEYS, SCOPE, clock_ns=self.clock, work_dir=self.folder / "index")
        self.target = TargetCore(self.writer)
        self.commits: deque[Pending] = deque()
        if not hasattr(self, "up"):
            self.links: list[tuple[deque[Any], deque[Any]]] = []
            self.up = False
            self.turn = 0

    def members(self) -> dict[str, dict[str, int]]:
        return {tap.server: {"d": tap.index} for tap in self.taps if tap.member}

    def set_member(self, tap: WorldTap, member: bool) -> None:
        """The server is taken out of the VPG, or comes back."""
        if tap.member != member:
            tap.member = member
            self.drop_tap(tap)
            self.do(self.source.configure(self.limits, self.members()))

    def connect_tap(self, tap: WorldTap) -> None:
        if tap.connection is None and tap.member:
            tap.connection = next(self.tap_connections)
            tap.outgoing.clear()
            parser = self.parsers[tap.connection] = FeedParser()
            self.by_connection[tap.connection] = tap
            self.paused.add(tap.connection)
            tap.tap.connected()
            tap.push()
            # The hub reads HELLO, whatever its length.
            self.feed(tap, parser, 1 << 20)
            assert parser.hello is not None
            parser.attach({0: tap.index})
            disk = parser.hello.disks[0].model_copy(update={"index": tap.index, "name": f"{tap.server}/d"})
            announced = Announced(parser.hello.tap, tap.server, "host", parser.hello.durable, {0: disk})
            self.do(self.source.tap_connected(tap.connection, announced))

    def feed(self, tap: WorldTap, parser: FeedParser, count: int) -> list[Record]:
        data = bytes(tap.outgoing[:count])[: len(parser.buffer())]
        del tap.outgoing[: len(data)]
        parser.buffer()[: len(data)] = data
        return parser.advance(len(data))

    def drop_tap(self, tap: WorldTap, tell: bool = True) -> None:
        """The connection breaks; with it goes what is in the socket."""
        connection, tap.connection = tap.connection, None
        if connection is not None:
            tap.tap.lost()
            self.by_connection.pop(connection, None)
            if tell:
                self.do(self.source.tap_closed(connection))

    def connect_link(self) -> None:
        if self.up:
            return
        self.links = [(deque(), deque()) for _ in range(self.connection_count)]
        welcome = self.target.hello(self.source.stream.hex())
        if welcome == "stream":
            # A target that was started again takes no stream that a former one took.
            self.do(self.source.lost_stream())
            self.links = [(deque(), deque()) for _ in range(self.connection_count)]
            welcome = self.target.hello(self.source.stream.hex())
        assert isinstance(welcome, Welcome)
        self.up = True
        for durable in self.target.durables:
            self.links[0][1].append(encode_control(durable))
        self.do(self.source.welcomed(welcome))

    def cut_link(self) -> None:
        if getattr(self, "up", False):
            self.up = False
            self.links = []
            self.do(self.source.unlinked())

    # What the source wants done.

    def do(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Send():
                    self.links[self.turn % len(self.links)][0].append(action.message)
                    self.turn += 1
                case Prepare() | Seal():
                    self.jobs.append(action)
                case SendTap():
                    self.tell_tap(action)
                case ReadTap():
                    (self.paused.discard if action.reading else self.paused.add)(action.connection)
                case CloseTap():
                    if (tap := self.by_connection.get(action.connection)) is not None:
                        self.drop_tap(tap, tell=False)
                case NewStream():
                    self.up = False
                    self.links = []
                case Answer():
                    self.answers.append(action.durable)
                case FlushSoon() | EndHold():
                    pass

    def tell_tap(self, action: SendTap) -> None:
        tap = self.by_connection.get(action.connection)
        if tap is None:
            return
        kind, flags, disk, _, sequence, time_ns, _, asked = wire.HEAD.unpack(action.data)
        match kind:
            case wire.MARK:
                tap.tap.mark(asked)
            case wire.DURABLE:
                tap.tap.durable(sequence)
            case wire.HOLD:
                tap.tap.hold(asked, time_ns)
            case wire.RELEASE:
                tap.tap.release(asked)
            case wire.ORDER:
                tap.tap.order(time_ns)
            case wire.RESYNC if flags & wire.FLAG_WHOLE:
                tap.tap.send_whole(disk)
            case wire.RESYNC:
                tap.tap.drop("asked")

    # Steps.

    def read_tap(self, tap: WorldTap, count: int) -> None:
        """The source reads up to `count` bytes of a tap's socket."""
        tap.push()
        if tap.connection is None or tap.connection in self.paused:
            return
        self.do(self.source.received(tap.connection, self.feed(tap, self.parsers[tap.connection], count)))

    def run_job(self, choice: int) -> None:
        """One thread finishes, in any order."""
        if not self.jobs:
            return
        job = self.jobs.pop(choice % len(self.jobs))
        if isinstance(job, Prepare):
            self.do(self.source.prepared(job.stream, job.number, prepare(KEYS, job.batch)))
        else:
            message = seal(KEYS, job.stream, job.number, job.prepared, job.locs, job.level)
            self.do(self.source.sealed(job.stream, job.number, message))

    def deliver(self, choice: int, twice: bool = False) -> None:
        """One message arrives at the target, over any connection."""
        ways = [(here, back) for here, back in self.links if here]
        if not ways:
            return
        here, back = ways[choice % len(ways)]
        message = here.popleft()
        for _ in range(1 + twice):
            self.repeats += twice
            if isinstance(message, str):
                control = decode_control(message)
                assert isinstance(control, Taps | CheckpointItem)
                ready = self.target.receive(control)
            else:
                whole = message if isinstance(message, bytes) else b"".join(message)
                kind, number, body = decode_data(whole)
                if kind != FRAME:
                    assert self.writer is not None
                    locs = self.writer.known(bytes(body))
                    back.append(encode_data(KNOWN, number, locs.astype("<u8").tobytes()))
                    continue
                ready = self.target.receive(FrameItem(number, body))
            for item in ready:
                assert self.target.stream is not None
                pending = self.target.apply(self.target.stream, item)
                if pending is not None:
                    self.commits.append(pending)

    def answer(self, choice: int) -> None:
        """One message arrives at the source, over any connection."""
        ways = [back for _, back in self.links if back]
        if not ways:
            return
        message = ways[choice % len(ways)].popleft()
        if isinstance(message, str):
            durable = decode_control(message)
            assert isinstance(durable, Durable)
            self.do(self.source.durable(durable))
        else:
            _, number, body = decode_data(message)
            self.do(self.source.known(number, np.frombuffer(body, "<u8")))

    def commit(self) -> None:
        """The oldest cut becomes durable."""
        if self.commits:
            pending = self.commits.popleft()
            durable = self.target.commit(pending)
            if self.target.committed(pending, durable) and self.up:
                self.links[-1][1].append(encode_control(durable))

    def tick(self) -> None:
        self.now_ns += int(self.limits.checkpoint_seconds * 1e9) + 1
        self.do(self.source.tick(self.now_ns, True))

    def settle(self) -> None:
        """Let everything come back, connect and come to rest, and make a last checkpoint."""
        for tap in self.taps:
            self.set_member(tap, True)
        for _ in range(400):
            for tap in self.taps:
                self.connect_tap(tap)
            self.connect_link()
            self.tick()
            for _ in range(6):
                for tap in self.taps:
                    self.read_tap(tap, 1 << 20)
                    if not tap.outgoing:
                        tap.synchronise()
                self.do(self.source.flush())
                while self.jobs:
                    self.run_job(0)
                while any(here for here, _ in self.links):
                    self.deliver(0)
                while self.commits:
                    self.commit()
                while any(back for _, back in self.links):
                    self.answer(0)
            if not any(tap.bitmap.dirty for tap in self.taps) and self.newest().testable:
                return
        raise AssertionError(f"no rest: {self.source.tap_states()}, {[tap.tap.status() for tap in self.taps]}")

    # The truth.

    def newest(self) -> Checkpoint:
        assert self.writer is not None
        return self.writer.newest

    def expected(self, at_ns: int) -> dict[tuple[int, int], bytes]:
        image: dict[tuple[int, int], bytes] = {}
        for time_ns, disk, block, data in self.history:
            if time_ns <= at_ns:
                image[disk, block] = data
        return {place: data for place, data in image.items() if data != ZERO}

    def check(self, choices: list[int]) -> int:
        """Compare images with the oracle, from the store alone; return how many were compared."""
        catalogue = Catalogue.load(self.store, KEYS, SCOPE)
        reader = ImageReader(self.store, KEYS)
        times = set()
        for checkpoint in catalogue.checkpoints:
            if checkpoint.testable:
                times.add(checkpoint.time_ns)
                span = checkpoint.time_ns - checkpoint.exact_from_ns + 1
                times.update(checkpoint.exact_from_ns + choice % span for choice in choices)
        written = [time_ns for time_ns, *_ in self.history]
        for at_ns in sorted({*times, *(t for t in written for c in catalogue.checkpoints if _holds(c, t))}):
            plan = catalogue.plan(at_ns)
            assert plan.at_ns == at_ns
            there = {disk.index for disk in plan.disks}
            image, expected = reader.image(plan), self.expected(at_ns)
            assert all(image.get(place) == expected.get(place) for place in {*image, *expected} if place[0] in there), (
                f"image({at_ns}) is wrong"
            )
        newest = reader.image(catalogue.plan(catalogue.newest_ns or 0))
        disks = {(tap.index, block): data for tap in self.taps for block, data in enumerate(tap.disk) if data != ZERO}
        assert newest == disks, "the newest image is not the disks"
        return len(times)

    def close(self) -> None:
        assert self.writer is not None
        self.writer.close()
        for tap in self.taps:
            tap.bitmap.abandon()


def _holds(checkpoint: Checkpoint, at_ns: int) -> bool:
    return checkpoint.testable and checkpoint.exact_from_ns <= at_ns <= checkpoint.time_ns
