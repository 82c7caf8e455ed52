"""The target VDSA's core for one scope: items in any order to a journal in order. No event loop, no sockets.

Purpose
    Puts the items of a source's stream in order, hands them to the journal's one writer, and says what is durable.

Consistency
    An item is applied once: a number that was applied or waits already is dropped. The writer sees frames in the order
    in which the source numbered them, and is cut where the source says. `durable` is said only of a checkpoint that
    the store has.

Bounds
    `CREDIT_BYTES` of frames may be on the way and not durable. A source that sends more breaks the protocol.

Retries
    A source that connects again is told the last item received in order. Its last durables are said again: they may
    have been lost on the way.

Another stream
    A new stream for the scope takes the place of the old one, whose connections are closed and whose items are refused
    from then on. What was received of the old one in order stays with the writer and becomes durable with the next
    cut; the new stream's taps synchronise, so nothing that was lost with the old one is missing then.

Crash recovery
    A new writer, with a new generation, begins at the newest checkpoint. The checkpoints name every stream that was
    taken; none of them is taken again. A source that comes back begins a new one.

Threads: `hello` and `receive` belong to one thread (the event loop), `apply` to one, `commit` to one.
"""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple

from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.journal.frame import HEAD
from dr_cloud.journal.writer import Cut, JournalWriter
from dr_cloud.link.messages import (
    CheckpointItem,
    Durable,
    RefusedCode,
    Taps,
    Welcome,
)
from dr_cloud.model.errors import DrCloudError, ProtocolError

CREDIT_BYTES: Final = 192 << 20
FILLING_BYTES_MAX: Final = 64 << 20
"""While one interval is on its way to the store, the next fills up to this; then it waits."""
_ITEMS_HELD_MAX: Final = 1 << 16
_DURABLES_KEPT: Final = 64


class FrameItem(NamedTuple):
    """A frame and its number."""

    number: int
    data: memoryview


Item = FrameItem | Taps | CheckpointItem


class Pending(NamedTuple):
    """A cut on its way to the store."""

    stream: str
    item: CheckpointItem
    cut: Cut


class TargetCore:
    """See the module's docstring.

    Attributes:
        stream: The stream that is taken in, or None.
        received: The last item of it that was received in order.
        duplicates: Items dropped because they had come before.
    """

    def __init__(self, writer: JournalWriter) -> None:
        """Serve the journal of `writer`."""
        self.writer = writer
        self.stream: str | None = None
        self.received = 0
        self.duplicates = 0
        self.durables: deque[Durable] = deque(maxlen=_DURABLES_KEPT)
        # Every stream that a former target took: what was recorded of it must not be taken for new.
        self._retired: dict[str, RefusedCode] = {
            checkpoint.stream: "stream" for checkpoint in self.catalogue.checkpoints if checkpoint.stream
        }
        self._held: dict[int, Item] = {}
        self._bytes: dict[int, int] = {}
        self._unacknowledged_bytes = 0
        self._taps: list[str] = []
        self._last_ns = writer.newest.time_ns

    @property
    def catalogue(self) -> Catalogue:
        """The catalogue of the durable checkpoints."""
        return self.writer.catalogue

    def hello(self, stream: str) -> Welcome | RefusedCode:
        """Answer a source's hello; the reason if its stream has ended here and must not come back."""
        if stream in self._retired:
            return self._retired[stream]
        if stream != self.stream:
            self.retire("replaced")
            self.stream = stream
            self.received = 0
            self.durables.clear()
            self._bytes.clear()
            self._unacknowledged_bytes = 0
        return Welcome(
            generation=self.writer.generation,
            received=self.received,
            time_ns=self._last_ns,
            credit_bytes=CREDIT_BYTES,
            cuts=self.writer.cuts,
            disks=self.writer.newest.disks,
            testable_ns=self.catalogue.newest_ns or 0,
        )

    def retire(self, code: RefusedCode) -> None:
        """Take nothing more of the stream there is, for this reason. What came in order stays."""
        if self.stream is not None:
            self._retired[self.stream] = code
        self.stream = None
        self._held.clear()

    def receive(self, item: Item) -> list[Item]:
        """Take one item of the stream and return those that are in order now, to be applied in this order.

        Raises `ProtocolError` if the source breaks a bound or sends a frame of another place: refuse the stream.
        """
        number = item.number
        if number <= self.received or number in self._held:
            self.duplicates += 1
            return []
        if isinstance(item, FrameItem):
            if len(item.data) < HEAD.size:
                raise ProtocolError(f"item {number} is no frame")
            _, _, _, stream, frame_number, *_ = HEAD.unpack_from(item.data)
            if stream.hex() != self.stream or frame_number != number:
                raise ProtocolError(f"item {number} holds frame {frame_number} of stream {stream.hex()}")
            self._bytes[number] = len(item.data)
            self._unacknowledged_bytes += len(item.data)
        self._held[number] = item
        if self._unacknowledged_bytes > CREDIT_BYTES or len(self._held) > _ITEMS_HELD_MAX:
            raise ProtocolError("the source sends more than its credit")
        ready = []
        while (following := self._held.pop(self.received + 1, None)) is not None:
            self.received += 1
            ready.append(following)
            if isinstance(following, CheckpointItem):
                self._last_ns = max(self._last_ns, following.time_ns)
        return ready

    def apply(self, stream: str, item: Item) -> Pending | None:
        """Hand one item to the writer; a checkpoint gives what is to be committed. Raises `DamagedError`."""
        if isinstance(item, FrameItem):
            self.writer.append(item.data, self._taps)
            return None
        if isinstance(item, Taps):
            self._set_taps(item)
            return None
        cut = self.writer.cut(
            item.time_ns,
            item.kind,
            item.cuts,
            exact=item.exact,
            tag=item.tag,
            description=item.description,
            request=item.request,
            stream=stream,
        )
        return Pending(stream, item, cut)

    def _set_taps(self, item: Taps) -> None:
        """Take the source's list of taps, and with it the disks of the VPG."""
        known = {disk.index: disk for disk in self.writer.disks}
        disks = [disk for tap in item.taps for disk in tap.disks]
        for disk in disks:
            before = known.get(disk.index)
            if before is not None and before.name != disk.name:
                raise DrCloudError(
                    f"disk index {disk.index} of {self.writer.scope.prefix} is {before.name}, not {disk.name}",
                    "Give the disk an index of its own.",
                )
        self.writer.set_disks(disks)
        self.writer.forget_taps(item.gone)
        self._taps = [tap.tap for tap in item.taps]

    def commit(self, pending: Pending) -> Durable:
        """Make a cut durable. Raises what `JournalWriter.commit` does."""
        checkpoint = self.writer.commit(pending.cut)
        return Durable(
            number=pending.item.number,
            cuts=pending.item.cuts,
            checkpoint=checkpoint.number,
            time_ns=checkpoint.time_ns,
            request=pending.item.request,
        )

    def committed(self, pending: Pending, durable: Durable) -> bool:
        """Note that `durable` may be said; returns whether its stream is still the one there is."""
        if pending.stream != self.stream:
            return False
        self.durables.append(durable)
        for number in [number for number in self._bytes if number <= durable.number]:
            self._unacknowledged_bytes -= self._bytes.pop(number)
        return True
