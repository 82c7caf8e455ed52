"""What the source VDSA's core asks its shell to do, and the bounds it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dr_cloud.link.messages import Durable
from dr_cloud.model.vpg import Order
from dr_cloud.vdsa.batch import Batch, Prepared

_BATCH_SECONDS_MAX: Final = 5.0


@dataclass(frozen=True)
class SourceLimits:
    """The bounds of a source and its rhythm."""

    checkpoint_seconds: float = 5.0
    batches_max: int = 8
    """Batches under way: being hashed, offered or sealed."""
    kept_bytes_max: int = 256 << 20
    """Sealed bytes that are not durable yet."""
    cut_bytes: int = 40 << 20
    """Sealed bytes after which a checkpoint is made early."""
    cut_bytes_max: int = 80 << 20
    """Sealed bytes beyond which only taps that hold the checkpoint back are read."""
    hung_seconds: float = 30.0
    """How long a tap may leave a MARK unanswered."""
    order: Order = "barrier"
    """How writes of taps on several hosts are ordered."""
    hold_seconds: float = 0.02
    """A barrier that has not closed by then is given up."""
    uncertainty_ns: int = 10_000_000
    """By how much the clocks of two hosts of a site may differ (for commit-wait)."""

    @property
    def batch_seconds(self) -> float:
        """How long a batch may stay open. A checkpoint closes it, so nothing becomes durable later for a longer one.

        Each batch is three messages over the link, whatever it holds: what writes seldom sends one for a checkpoint.
        """
        return min(_BATCH_SECONDS_MAX, self.checkpoint_seconds)


class Prepare(NamedTuple):
    """Hash this batch; answer with `prepared`."""

    stream: bytes
    number: int
    batch: Batch


class Seal(NamedTuple):
    """Seal this batch; answer with `sealed`."""

    stream: bytes
    number: int
    prepared: Prepared
    locs: NDArray[np.uint64]
    level: int


class Send(NamedTuple):
    """Send this message to the target, over any connection."""

    message: str | bytes | list[bytes]


class SendTap(NamedTuple):
    """Send these bytes to a tap."""

    connection: int
    data: bytes


class CloseTap(NamedTuple):
    """Close a tap's connection."""

    connection: int
    reason: str


class ReadTap(NamedTuple):
    """Read from a tap's connection, or stop to."""

    connection: int
    reading: bool


class FlushSoon(NamedTuple):
    """Call `flush` after `SourceLimits.batch_seconds`."""


class EndHold(NamedTuple):
    """Call `end_hold` with this id after `SourceLimits.hold_seconds`."""

    id: int


class NewStream(NamedTuple):
    """Drop the link and connect again: the core's stream is a new one."""


class Answer(NamedTuple):
    """A checkpoint asked for with `request_checkpoint` is durable."""

    durable: Durable


Action = Prepare | Seal | Send | SendTap | CloseTap | ReadTap | FlushSoon | EndHold | NewStream | Answer
