"""The messages between a source VDSA and a target VDSA.

Purpose. One replication stream carries the writes of one VPG to one target. What must be journaled in order (the
*items*: taps, frame, checkpoint) is numbered 1, 2, 3 … by the source; items may travel over several connections and
arrive twice or in any order. Everything else refers to those numbers.

Layout. A transport keeps two kinds of message apart, as WebSocket does: text is control (one JSON object with a
`type`), binary is data (a 16-byte little-endian head, then a body)::

    type                direction  kind    what                                              limit in bytes
    hello               S → T      text    who speaks: scope, stream, which connection       65,536
    taps                S → T      text    item: the taps and disks that later frames name   1,048,576
    checkpoint          S → T      text    item: cut here, at this time                      1,048,576
    ping                S → T      text    are you there                                     65,536
    offer               S → T      binary  digests of a frame's new blocks, n x 16           16 + 65,536
    frame               S → T      binary  item: sealed bytes                                16 + 8,388,608
    welcome             T → S      text    answer to hello: generation, items received       1,048,576
    durable             T → S      text    a checkpoint is durable, and what it holds        1,048,576
    request_checkpoint  T → S      text    please make a checkpoint by hand                  65,536
    refused             T → S      text    why the connection is closed, and what to do      65,536
    pong                T → S      text    answer to ping                                    65,536
    known               T → S      binary  a loc (or 0) for each digest of an offer, n x 8   16 + 32,768

    binary head:  offset 0  u8   kind (1 offer, 2 frame, 3 known)
                  offset 1  7 B  zero
                  offset 8  u64  number of the frame

Retries. After a break the source connects again and says hello with the same stream; `welcome.received` tells the
last item received in order, later ones are sent again. A target of another generation has forgotten what was not
durable: the source then begins a new stream and has its taps synchronise.
"""

from __future__ import annotations

import struct
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dr_cloud.model.errors import ProtocolError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import CheckpointKind, Disk

LINK_VERSION: Final = 1
DIGEST_BYTES: Final = 16
LOC_BYTES: Final = 8
OFFER_DIGESTS_MAX: Final = 4096
FRAME_BYTES_MAX: Final = 8 << 20
CONNECTIONS_MAX: Final = 64
TAPS_MAX: Final = 1024
DISKS_MAX: Final = 4096
SMALL_TEXT_BYTES_MAX: Final = 64 << 10
TEXT_BYTES_MAX: Final = 1 << 20
TAG_LENGTH_MAX: Final = 256
DESCRIPTION_LENGTH_MAX: Final = 4096

OFFER: Final = 1
FRAME: Final = 2
KNOWN: Final = 3
_HEAD: Final = struct.Struct("<B7xQ")
HEAD_BYTES: Final = _HEAD.size
MESSAGE_BYTES_MAX: Final = HEAD_BYTES + FRAME_BYTES_MAX

_BODY_RULES: Final = {
    OFFER: (DIGEST_BYTES, OFFER_DIGESTS_MAX * DIGEST_BYTES),
    FRAME: (1, FRAME_BYTES_MAX),
    KNOWN: (LOC_BYTES, OFFER_DIGESTS_MAX * LOC_BYTES),
}
"""For each binary kind: the size its body is a multiple of, and its greatest length."""

TapId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
StreamId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_U63 = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Hello(_Message):
    """First message of every connection, from the source."""

    type: Literal["hello"] = "hello"
    version: int = LINK_VERSION
    scope: Scope
    stream: StreamId
    """16 random bytes in hexadecimal, drawn anew whenever the source starts from nothing."""
    connection: int = Field(ge=0, lt=CONNECTIONS_MAX)
    connections: int = Field(gt=0, le=CONNECTIONS_MAX)


class TapDisks(_Message):
    """One tap of the VPG and its disks."""

    tap: TapId
    disks: list[Disk] = Field(max_length=DISKS_MAX)


class Taps(_Message):
    """Item: all taps that frames after this one may name by their place, and all disks of the VPG from here on."""

    type: Literal["taps"] = "taps"
    number: _U63
    taps: list[TapDisks] = Field(max_length=TAPS_MAX)
    gone: list[TapId] = Field(default=[], max_length=TAPS_MAX)
    """Taps that have left for good: what the journal holds of them is no base for their bitmaps any more."""


class CheckpointItem(_Message):
    """Item: every write with time ≤ `time_ns` came in an item before this one; cut the journal there.

    `cuts` gives, for each tap whose image is whole, a sequence up to which all its writes have a time ≤ `time_ns`. It
    may lag behind the last such write; what it leaves out stays marked at the tap until the next checkpoint.
    """

    type: Literal["checkpoint"] = "checkpoint"
    number: _U63
    kind: CheckpointKind
    time_ns: _U63
    exact: bool
    """Whether any time between this checkpoint and the one before has an image."""
    cuts: dict[TapId, _U63] = Field(max_length=TAPS_MAX)
    tag: str = Field(default="", max_length=TAG_LENGTH_MAX)
    description: str = Field(default="", max_length=DESCRIPTION_LENGTH_MAX)
    request: str = Field(default="", max_length=64)
    """The id of the request that this checkpoint fulfils, or empty."""


class Ping(_Message):
    """Asks whether the peer is there."""

    type: Literal["ping"] = "ping"


class Pong(_Message):
    """Answers `Ping`."""

    type: Literal["pong"] = "pong"


class Welcome(_Message):
    """Answer to `Hello`."""

    type: Literal["welcome"] = "welcome"
    generation: int = Field(gt=0)
    received: _U63
    """The last item of this stream that was received in order; 0 for a stream not heard of before."""
    time_ns: _U63
    """Time of the newest cut: later writes must carry later times."""
    credit_bytes: int = Field(gt=0)
    """How many bytes of frames may be sent and not yet durable."""
    cuts: dict[TapId, _U63] = Field(default={}, max_length=TAPS_MAX)
    """The last sequence of each tap that the journal holds."""
    disks: list[Disk] = Field(default=[], max_length=DISKS_MAX)
    """The disks that the journal holds now."""
    testable_ns: _U63 = 0
    """The latest time that has an image; 0 if there is none."""


class Durable(_Message):
    """A checkpoint is durable, with every item up to `number`."""

    type: Literal["durable"] = "durable"
    number: _U63
    cuts: dict[TapId, _U63]
    checkpoint: int = Field(ge=0)
    time_ns: _U63
    request: str = ""


class RequestCheckpoint(_Message):
    """Please make a checkpoint by hand; the `CheckpointItem` carries `id` as its `request`."""

    type: Literal["request_checkpoint"] = "request_checkpoint"
    id: str = Field(min_length=1, max_length=64)
    tag: str = Field(max_length=TAG_LENGTH_MAX)
    description: str = Field(default="", max_length=DESCRIPTION_LENGTH_MAX)


RefusedCode = Literal["replaced", "fenced", "stream", "denied"]
"""`replaced`: another source has taken the VPG over, stop. `fenced`: another target has; look for it.
`stream`: this stream cannot go on, begin a new one. `denied`: wrong version, scope or keys; someone must act."""


class Refused(_Message):
    """Why the connection is closed."""

    type: Literal["refused"] = "refused"
    code: RefusedCode
    reason: str
    remedy: str = ""


Control = Hello | Taps | CheckpointItem | Ping | Pong | Welcome | Durable | RequestCheckpoint | Refused
_CONTROL: Final[TypeAdapter[Control]] = TypeAdapter(Annotated[Control, Field(discriminator="type")])
_LARGE: Final = (Taps, CheckpointItem, Welcome, Durable)


class Data(NamedTuple):
    """A binary message: `kind` is OFFER, FRAME or KNOWN; `body` is a view of the received bytes."""

    kind: int
    number: int
    body: memoryview


def encode_control(message: Control) -> str:
    """Return the text of a control message."""
    return message.model_dump_json()


def decode_control(text: str) -> Control:
    """Return the control message in `text`, or raise `ProtocolError` that says what is wrong with it."""
    if len(text) > TEXT_BYTES_MAX:
        raise ProtocolError(f"a control message of {len(text)} characters is over the limit of {TEXT_BYTES_MAX}")
    try:
        message = _CONTROL.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProtocolError(f"bad control message: {where}: {first['msg']}") from None
    if len(text) > SMALL_TEXT_BYTES_MAX and not isinstance(message, _LARGE):
        raise ProtocolError(f"{message.type} message of {len(text)} characters: the limit is {SMALL_TEXT_BYTES_MAX}")
    return message


def data_head(kind: int, number: int) -> bytes:
    """Return the 16-byte head of a binary message."""
    return _HEAD.pack(kind, number)


def encode_data(kind: int, number: int, body: bytes | bytearray | memoryview) -> bytes:
    """Return a whole binary message."""
    return b"".join((_HEAD.pack(kind, number), body))


def decode_data(data: bytes | bytearray | memoryview) -> Data:
    """Return the binary message in `data` without copying, or raise `ProtocolError`."""
    if len(data) < HEAD_BYTES:
        raise ProtocolError(f"a binary message of {len(data)} bytes is shorter than its head of {HEAD_BYTES}")
    kind, number = _HEAD.unpack_from(data)
    unit, limit = _BODY_RULES.get(kind, (0, 0))
    body = memoryview(data)[HEAD_BYTES:]
    if not unit:
        raise ProtocolError(f"binary message of the unknown kind {kind}")
    if len(body) > limit or len(body) % unit or not number:
        raise ProtocolError(f"binary message of kind {kind}, number {number}: {len(body)} bytes cannot be its body")
    return Data(kind, number, body)
