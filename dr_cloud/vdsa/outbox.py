"""The items of one stream of a source VDSA, from their number until they are durable at the target. No I/O.

The way of a batch: open ▸ closed and numbered ▸ prepared (hashed, in a thread) ▸ offered ▸ known ▸ sealed (in a thread)
▸ sent, in order of numbers, as far as the target's credit goes ▸ durable, forgotten. Tap lists and checkpoints are
items between them. After a break of the link the target says what it has received; the rest is sent again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dr_cloud.link.messages import HEAD_BYTES, OFFER, Welcome, encode_data
from dr_cloud.model.errors import ProtocolError
from dr_cloud.vdsa.actions import Action, FlushSoon, Prepare, Seal, Send
from dr_cloud.vdsa.batch import Batch, Prepared
from dr_cloud.vdsa.feed import Record
from dr_cloud.vdsa.gear import Gear


@dataclass(eq=False)
class _Item:
    """One numbered item, kept until it is durable."""

    prepared: Prepared | None = None
    offered: bool = False
    message: str | list[bytes] = ""
    """Empty until it can be sent."""
    bytes_sealed: int = 0
    testable_ns: int = 0
    """Of a checkpoint to recover to: its time."""


class Outbox:
    """One stream. Appends its actions to the source's list.

    Attributes:
        stream: 16 random bytes; the items' numbers count within it.
        linked: Whether the target is connected.
        numbered: The last number given out.
        under_way: Batches that are closed and not sealed.
        in_threads: Those of them that a thread has to work on now.
        kept_bytes: Sealed bytes that are not durable.
        bytes_since_cut: Sealed bytes since the last checkpoint.
    """

    def __init__(self, out: list[Action], gear: Gear, stream: bytes) -> None:
        self.stream = stream
        self.linked = False
        self.numbered = 0
        self.under_way = 0
        self.in_threads = 0
        self.kept_bytes = 0
        self.bytes_since_cut = 0
        self.cut_number = 0
        self._out = out
        self._gear = gear
        self._items: dict[int, _Item] = {}
        self._batch: Batch | None = None
        self._sent = 0
        self._durable = 0
        self._credit_bytes = 0
        self._unacknowledged_bytes = 0

    @property
    def has_room(self) -> bool:
        """Whether the target would take much more."""
        return self.linked and self._unacknowledged_bytes < self._credit_bytes // 2

    # In.

    def add(self, place: int, record: Record) -> None:
        """Add a WRITE or ZERO of the tap at `place` to the open batch."""
        batch = self._batch
        if batch is None or not batch.fits(record):
            self.close_batch()
            batch = self._batch = Batch()
            self._out.append(FlushSoon())
        batch.add(place, record)

    def close_batch(self) -> None:
        """Number the open batch, if there is one, and have it hashed."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        self.numbered += 1
        self._items[self.numbered] = _Item()
        self.under_way += 1
        self.in_threads += 1
        self._out.append(Prepare(self.stream, self.numbered, batch))

    @property
    def cut_sent(self) -> bool:
        """Whether the last checkpoint has left, and with it all that was to be sealed before it."""
        return self._sent >= self.cut_number

    def next_number(self) -> int:
        """Return the number of the message that comes next; the batch before it is closed."""
        self.close_batch()
        return self.numbered + 1

    def put(self, message: str, testable_ns: int = 0) -> None:
        """Add a control message as the next item. It carries `next_number`."""
        self.numbered += 1
        self._items[self.numbered] = _Item(message=message, testable_ns=testable_ns)

    def cut(self) -> None:
        """The last item was a checkpoint."""
        self.cut_number = self.numbered
        self.bytes_since_cut = 0

    # Threads and the target answer.

    def prepared(self, stream: bytes, number: int, prepared: Prepared) -> None:
        """A `Prepare` is done."""
        if stream != self.stream:
            return
        item = self._items[number]
        item.prepared = prepared
        self.in_threads -= 1
        if prepared.digests:
            self._offer(number, item)
        else:
            self._seal(number, prepared, np.zeros(0, np.uint64))

    def _offer(self, number: int, item: _Item) -> None:
        item.offered = True
        if self.linked and item.prepared is not None:
            self._out.append(Send(encode_data(OFFER, number, item.prepared.digests)))

    def known(self, number: int, locs: NDArray[np.uint64]) -> None:
        """The target answered an offer. A second answer (after a break both offers may be answered) is left alone."""
        item = self._items.get(number)
        if item is not None and item.offered and item.prepared is not None:
            if len(locs) != len(item.prepared.blocks):
                raise ProtocolError(f"the answer to offer {number} has {len(locs)} locs")
            item.offered = False
            self._seal(number, item.prepared, locs)

    def _seal(self, number: int, prepared: Prepared, locs: NDArray[np.uint64]) -> None:
        self.in_threads += 1
        self._out.append(Seal(self.stream, number, prepared, locs, self._gear.level))

    def sealed(self, stream: bytes, number: int, message: list[bytes]) -> None:
        """A `Seal` is done. `message` (in parts, the head first) is sent as it is, however often."""
        if stream != self.stream:
            return
        item = self._items[number]
        item.prepared = None
        item.message = message
        item.bytes_sealed = sum(map(len, message)) - HEAD_BYTES
        self.under_way -= 1
        self.in_threads -= 1
        self.kept_bytes += item.bytes_sealed
        if number > self.cut_number:
            self.bytes_since_cut += item.bytes_sealed

    # The link.

    def link(self, welcome: Welcome) -> bool:
        """The target is connected; return False if it has forgotten what it had called durable."""
        if welcome.received < self._durable:
            return False
        self._credit_bytes = welcome.credit_bytes
        self.linked = True
        self._sent = welcome.received
        self._unacknowledged_bytes = sum(item.bytes_sealed for n, item in self._items.items() if n <= self._sent)
        for number, item in self._items.items():
            if item.offered:
                self._offer(number, item)
        return True

    def pump(self) -> None:
        """Send items in order, as far as they are ready and the credit goes."""
        while self.linked and (item := self._items.get(self._sent + 1)) is not None and item.message:
            if self._unacknowledged_bytes + item.bytes_sealed > self._credit_bytes:
                return
            self._sent += 1
            self._unacknowledged_bytes += item.bytes_sealed
            self._out.append(Send(item.message))

    def durable(self, number: int) -> int:
        """Forget the items up to `number`; return the time of the last checkpoint to recover to among them, or 0."""
        if number > self._sent:
            raise ProtocolError(f"item {number} cannot be durable: it was not sent")
        testable_ns = 0
        while self._durable < number:
            self._durable += 1
            item = self._items.pop(self._durable)
            self.kept_bytes -= item.bytes_sealed
            self._unacknowledged_bytes -= item.bytes_sealed
            testable_ns = max(testable_ns, item.testable_ns)
        return testable_ns
