"""Many channels over one carrier: the pure core of a link between sites.

Purpose
    The streams of all VPGs and the calls of both managers share one connection, and none waits for another: control
    leaves before data, data in turns of one fragment, each channel at the pace of its own reader. `Channels` is told
    what came (`take`) and asked what is to leave (`next`); sockets and tasks are in `dr_cloud.link.session`.

Layout
    The carrier keeps two kinds of message apart, as WebSocket does. Text is control (`dr_cloud.link.control`).
    Binary is one fragment of a channel's message, a 12-byte little-endian head and at most 65,536 bytes::

        offset  size  field
             0     4  channel
             4     1  kind of the message: 1 text (UTF-8), 2 binary, 3 end of the channel
             5     3  zero
             8     4  bytes that are left of the message, with this fragment
            12     …  the fragment: 65,536 bytes, or all that is left

    Channel 0 stands from the start and carries calls (`dr_cloud.link.rpc`); it too begins without credit. The end that
    dialled gives its channels odd numbers, the other one even numbers, both ascending and never used again.

Order
    Within a channel messages arrive whole, once and in order, or not at all: the carrier is a TCP stream. Between
    channels there is no order; `close` and `credit` overtake data, the end of a channel does not.

Flow
    A fragment costs its bytes with the head, but 256 at least, for that is what a small one takes up. Each end gives a
    channel up to 4 MiB (less when very many are open) and gives again what its reader has taken. While a reader waits,
    the parts of its next message count as taken, so a message may be longer than the window.

Broken or hostile peers
    Everything the peer chooses has a limit here, and whatever breaks the rules raises `ProtocolError`: the session is
    closed with that reason, others are not touched. Messages for a channel that has just ended are no breach.

Cuts
    A cut ends every channel with an error; nothing is sent twice by this layer and nothing is kept. Whoever needs
    what was under way sends it again: a source resumes from the last durable frame (`dr_cloud.link.messages`).
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import Final

from pydantic import JsonValue

from dr_cloud.link.control import (
    CONTROL_BYTES_MAX,
    CREDIT_BYTES_MAX,
    Bye,
    Close,
    Control,
    Credit,
    Open,
    Ping,
    Pong,
    decode,
)
from dr_cloud.link.fault import Fault
from dr_cloud.link.messages import MESSAGE_BYTES_MAX
from dr_cloud.link.stream import Message, Parts, Received, parts_of
from dr_cloud.link.throttle import Bucket
from dr_cloud.model.errors import LimitError, ProtocolError, UnavailableError

_HEAD: Final = struct.Struct("<IB3xI")
HEAD_BYTES: Final = _HEAD.size
FRAGMENT_BYTES: Final = 64 << 10
CARRIED_BYTES_MAX: Final = HEAD_BYTES + FRAGMENT_BYTES
"""No message on the carrier is longer."""
WINDOW_BYTES: Final = 4 << 20
WINDOW_BYTES_MIN: Final = 256 << 10
WINDOWS_BYTES: Final = 256 << 20
"""What channels get together before their windows become smaller."""
UNREAD_BYTES_MAX: Final = 1 << 30
"""Received over all channels and not taken by their readers."""
CHANNELS_MAX: Final = 1024
"""Open at a time, of either end."""
_CONTROL_WAITING_MAX: Final = 4 * CHANNELS_MAX
_COST_BYTES_MIN: Final = 256
_TEXT: Final = 1
_BINARY: Final = 2
_END: Final = 3

_REFUSED_NUMBER: Final = "the peer used the number of a channel that it cannot have"


class _Leaving:
    """A message on its way out: what is left of it, cut as it goes."""

    __slots__ = ("kind", "left_bytes", "parts")

    def __init__(self, kind: int, parts: Parts) -> None:
        self.kind = kind
        self.parts = deque(view for part in parts if len(view := memoryview(part).cast("B")))
        self.left_bytes = sum(map(len, self.parts))

    def cut(self, size_bytes: int) -> list[memoryview]:
        """Take the next `size_bytes`, without copying."""
        self.left_bytes -= size_bytes
        pieces = []
        while size_bytes:
            view = self.parts.popleft()
            if len(view) > size_bytes:
                self.parts.appendleft(view[size_bytes:])
                view = view[:size_bytes]
            size_bytes -= len(view)
            pieces.append(view)
        return pieces


class Channel:
    """The state of one channel. Read it freely; change it through `Channels`."""

    def __init__(self, number: int, purpose: str, arguments: dict[str, JsonValue]) -> None:
        """Make a channel that nobody has accepted yet."""
        self.number = number
        self.purpose = purpose
        self.arguments = arguments
        self.accepted = False
        self.over = False
        """No message will be added to `inbox`, and none may be sent."""
        self.fault: Fault | None = None
        """Why it is over; None for a clean end."""
        self.queued_bytes = 0
        """Given to `send` and not yet given to the carrier."""
        self.inbox: deque[tuple[Received, int, int]] = deque()
        """Messages to be taken, the credit that each sets free, and what it costs to keep it."""
        self.bucket = Bucket()
        self.on_change: Callable[[], None] = lambda: None
        """Called after anything above has changed."""
        self.hungry = False
        """Its reader waits: the parts of a message count as taken."""
        self._outbox: deque[_Leaving] = deque()
        self._window_bytes = 0
        self._in_turns = False
        self._allowed_bytes = 0
        self._taken_bytes = 0
        self._step_bytes = 1
        self._parts: list[memoryview] = []
        self._part_kind = 0
        self._part_left_bytes = 0
        self._part_due_bytes = 0
        self._part_cost_bytes = 0
        self._unread_bytes = 0

    @property
    def _can_send(self) -> bool:
        if not self._outbox:
            return False
        leaving = self._outbox[0]
        return leaving.kind == _END or _cost(min(leaving.left_bytes, FRAGMENT_BYTES)) <= self._window_bytes


def _cost(size_bytes: int) -> int:
    """Return what a fragment takes of its channel's window."""
    return max(size_bytes + HEAD_BYTES, _COST_BYTES_MIN)


class Channels:
    """All channels of one link. No method waits; none is safe in two threads at a time."""

    def __init__(self, *, dialled: bool, clock_ns: Callable[[], int]) -> None:
        """Begin.

        Args:
            dialled: Whether this end made the connection; exactly one end did.
            clock_ns: Nanoseconds since the epoch, for throttles.
        """
        self.bucket = Bucket()
        """Of the link as a whole."""
        self.wait_seconds: float | None = None
        """After `next` returned None: when to ask again though nothing happens; None if there is nothing to send."""
        self.opened: deque[Channel] = deque()
        """Opened by the peer, to be taken up."""
        self.calls = Channel(0, "calls", {})
        self.bye: str | None = None
        """The reason that the peer gave for closing the link."""
        self._clock_ns = clock_ns
        self._table = {0: self.calls}
        self._next_number = 1 if dialled else 2
        self._peer_parity = 0 if dialled else 1
        self._peer_number = 0
        self._peer_open = 0
        self._unread_bytes = 0
        self._control: deque[Control] = deque()
        self._credits: dict[int, int] = {}
        self._turns: deque[Channel] = deque()
        self.accept(self.calls)

    # What this end wants.

    def open(self, purpose: str, arguments: dict[str, JsonValue]) -> Channel:
        """Open a channel. What is sent before the peer accepts waits. Raises `LimitError` beyond 1,024 open ones."""
        if len(self._table) - 1 - self._peer_open >= CHANNELS_MAX:
            raise LimitError(f"{CHANNELS_MAX} channels are open", "Close some of them first.")
        channel = Channel(self._next_number, purpose, arguments)
        credit = self._allow(channel)
        control = Open(channel=channel.number, purpose=purpose, arguments=arguments, credit=credit)
        if len(control.model_dump_json().encode()) > CONTROL_BYTES_MAX:
            raise LimitError("the arguments of a channel are too long", "Send them on the channel.")
        self._put(control)
        self._table[channel.number] = channel
        self._next_number += 2
        return channel

    def accept(self, channel: Channel) -> None:
        """Let the peer send on the channel that it opened; without effect on any other one."""
        if not channel.accepted and not channel.over and not (channel.number and self._mine(channel.number)):
            channel.accepted = True
            self._credits[channel.number] = self._allow(channel)

    def send(self, channel: Channel, message: Message) -> None:
        """Queue a message; its parts must not change before it has left. Raises `OSError` if the channel is over."""
        text, parts = parts_of(message)
        leaving = _Leaving(_TEXT if text else _BINARY, parts)
        if leaving.left_bytes > MESSAGE_BYTES_MAX:
            raise LimitError(f"a message of {leaving.left_bytes} bytes is over the limit of {MESSAGE_BYTES_MAX}")
        if channel.over:
            raise ConnectionResetError(channel.fault.message if channel.fault else "the channel has ended")
        channel.queued_bytes += leaving.left_bytes
        channel._outbox.append(leaving)
        self._take_turn(channel)

    def taken(self, channel: Channel) -> Received:
        """Take the next message out of `channel.inbox`."""
        message, due_bytes, cost_bytes = channel.inbox.popleft()
        self._forget(channel, cost_bytes)
        self._give(channel, due_bytes)
        return message

    def hunger(self, channel: Channel) -> None:
        """Note that the channel's reader waits and its inbox is empty."""
        channel.hungry = True
        due_bytes, channel._part_due_bytes = channel._part_due_bytes, 0
        self._give(channel, due_bytes)

    def end(self, channel: Channel) -> None:
        """End a channel after what was queued. What the peer sends from now on is dropped."""
        if not channel.over:
            self._over(channel, None)
            channel._outbox.append(_Leaving(_END, ()))
            self._take_turn(channel)
        self._drop_inbox(channel)

    def close(self, channel: Channel, fault: Fault | None) -> None:
        """Close a channel at once, and tell the peer why; what was queued is dropped."""
        if channel.number in self._table:
            self._put(Close(channel=channel.number, fault=fault))
            self._over(channel, fault or Fault(message="the channel was closed"))
            self._remove(channel)
        self._drop_inbox(channel)

    def ping(self) -> None:
        """Ask the peer for a sign of life."""
        self._put(Ping())

    def shut(self, reason: str) -> str:
        """End everything. Returns the last text for the peer."""
        self.cut(reason)
        return Bye(reason=reason[:4096]).model_dump_json()

    def cut(self, reason: str) -> None:
        """Note that the carrier is gone: every channel is over."""
        fault = Fault.of(UnavailableError(reason))
        for channel in list(self._table.values()):
            self._over(channel, fault)
            self._remove(channel)
        self._control.clear()
        self._turns.clear()

    # What leaves.

    @property
    def busy(self) -> bool:
        """Whether there is something to send, now or when a throttle allows it."""
        return bool(self._control or self._credits or self._turns or self.calls._can_send)

    def next(self) -> str | Parts | None:
        """Return what the carrier is to send next, or None; then see `wait_seconds`."""
        now_ns = self._clock_ns()
        self.wait_seconds = None
        if (control := self._next_control()) is not None:
            text = control.model_dump_json()
            self.bucket.spend(len(text), now_ns)
            return text
        if self.calls._can_send:
            return self._fragment(self.calls, now_ns)
        wait_seconds = self.bucket.wait_seconds(now_ns)
        for _ in range(len(self._turns)):
            channel = self._turns.popleft()
            channel._in_turns = channel._can_send
            if not channel._in_turns:
                continue
            self._turns.append(channel)
            if not (pause := wait_seconds or channel.bucket.wait_seconds(now_ns)):
                return self._fragment(channel, now_ns)
            self.wait_seconds = min(pause, self.wait_seconds or pause)
        return None

    def _next_control(self) -> Control | None:
        if self._control:
            return self._control.popleft()
        if self._credits:
            number = next(iter(self._credits))
            return Credit(channel=number, bytes=self._credits.pop(number))
        return None

    def _fragment(self, channel: Channel, now_ns: int) -> Parts:
        leaving = channel._outbox[0]
        head = _HEAD.pack(channel.number, leaving.kind, leaving.left_bytes)
        size_bytes = min(leaving.left_bytes, FRAGMENT_BYTES)
        pieces = leaving.cut(size_bytes)
        if leaving.kind == _END:
            self._remove(channel)
        elif not leaving.left_bytes:
            channel._outbox.popleft()
        channel._window_bytes -= _cost(size_bytes)
        channel.queued_bytes -= size_bytes
        channel.bucket.spend(size_bytes + HEAD_BYTES, now_ns)
        self.bucket.spend(size_bytes + HEAD_BYTES, now_ns)
        channel.on_change()
        return [head, *pieces]

    # What comes.

    def take(self, message: Received) -> None:
        """Take in what the carrier brought. Raises `ProtocolError`: the link must then be closed."""
        if not isinstance(message, str):
            self._take_fragment(message)
            return
        control = decode(message)
        match control:
            case Open():
                self._take_open(control)
            case Credit():
                self._take_credit(control)
            case Close():
                if control.channel == 0:
                    raise ProtocolError(_REFUSED_NUMBER)
                if (channel := self._find(control.channel)) is not None:
                    self._over(channel, control.fault or Fault(message="the peer closed the channel"))
                    self._remove(channel)
            case Ping():
                self._put(Pong())
            case Bye():
                self.bye = control.reason
            case Pong():
                pass

    def _take_open(self, control: Open) -> None:
        if control.channel % 2 != self._peer_parity or control.channel <= self._peer_number:
            raise ProtocolError(_REFUSED_NUMBER)
        self._peer_number = control.channel
        if self._peer_open >= CHANNELS_MAX:
            fault = Fault.of(LimitError(f"{CHANNELS_MAX} channels are open", "Close some of them first."))
            self._put(Close(channel=control.channel, fault=fault))
            return
        channel = Channel(control.channel, control.purpose, control.arguments)
        channel._window_bytes = control.credit
        self._peer_open += 1
        self._table[channel.number] = channel
        self.opened.append(channel)

    def _take_credit(self, control: Credit) -> None:
        if (channel := self._find(control.channel)) is None:
            return
        channel._window_bytes += control.bytes
        if channel._window_bytes > CREDIT_BYTES_MAX:
            raise ProtocolError("the peer gave a channel more credit than there can be")
        if self._mine(channel.number):
            channel.accepted = True
        self._take_turn(channel)
        channel.on_change()

    def _take_fragment(self, data: memoryview) -> None:
        if len(data) < HEAD_BYTES:
            raise ProtocolError(f"a fragment of {len(data)} bytes is shorter than its head of {HEAD_BYTES}")
        number, kind, left = _HEAD.unpack_from(data)
        channel = self._find(number)
        if channel is None:
            return
        body = data[HEAD_BYTES:]
        size = len(body)
        under_way = bool(channel._parts)
        if kind == _END:
            if left or size or under_way or number == 0:
                raise ProtocolError("the peer ended a channel in the middle of a message")
            self._over(channel, None)
            self._remove(channel)
            return
        if kind not in (_TEXT, _BINARY) or left > MESSAGE_BYTES_MAX or size != min(left, FRAGMENT_BYTES):
            raise ProtocolError(f"a fragment of kind {kind} and {size} bytes with {left} left is not of this protocol")
        if under_way and (kind != channel._part_kind or left != channel._part_left_bytes):
            raise ProtocolError("a fragment does not go on where the one before it ended")
        cost = _cost(size)
        channel._allowed_bytes -= cost
        if channel._allowed_bytes < 0:
            raise ProtocolError("the peer sent more than a channel's credit")
        if channel.over:
            return
        channel._parts.append(body)
        channel._part_kind = kind
        channel._part_left_bytes = left - size
        channel._part_due_bytes += cost
        channel._part_cost_bytes += cost
        channel._unread_bytes += cost
        self._unread_bytes += cost
        if self._unread_bytes > UNREAD_BYTES_MAX:
            raise ProtocolError(f"more than {UNREAD_BYTES_MAX} bytes wait to be read")
        if left == size:
            self._complete(channel)
        elif channel.hungry:
            self.hunger(channel)

    def _complete(self, channel: Channel) -> None:
        parts, channel._parts = channel._parts, []
        body = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
        message: Received = body
        if channel._part_kind == _TEXT:
            try:
                message = str(body, "utf-8")
            except UnicodeDecodeError as error:
                raise ProtocolError(f"a text message is not UTF-8: {error}") from None
        channel.hungry = False
        channel.inbox.append((message, channel._part_due_bytes, channel._part_cost_bytes))
        channel._part_due_bytes = channel._part_cost_bytes = 0
        channel.on_change()

    # Book-keeping.

    def _mine(self, number: int) -> bool:
        return number % 2 != self._peer_parity

    def _find(self, number: int) -> Channel | None:
        """Return the channel, or None if it is over; a number that never was is a breach."""
        channel = self._table.get(number)
        if channel is None and number >= (self._next_number if self._mine(number) else self._peer_number + 1):
            raise ProtocolError(_REFUSED_NUMBER)
        return channel

    def _allow(self, channel: Channel) -> int:
        """Give a new channel its window; return how large it is."""
        channel._allowed_bytes = max(WINDOW_BYTES_MIN, min(WINDOW_BYTES, WINDOWS_BYTES // len(self._table)))
        channel._step_bytes = channel._allowed_bytes // 4
        return channel._allowed_bytes

    def _give(self, channel: Channel, size_bytes: int) -> None:
        """Set credit free; it is told to the peer in steps of a quarter of the window."""
        channel._taken_bytes += size_bytes
        if channel._taken_bytes >= channel._step_bytes and not channel.over:
            channel._allowed_bytes += channel._taken_bytes
            self._credits[channel.number] = self._credits.get(channel.number, 0) + channel._taken_bytes
            channel._taken_bytes = 0

    def _forget(self, channel: Channel, size_bytes: int) -> None:
        channel._unread_bytes -= size_bytes
        self._unread_bytes -= size_bytes

    def _drop_inbox(self, channel: Channel) -> None:
        channel.inbox.clear()
        self._forget(channel, channel._unread_bytes)

    def _take_turn(self, channel: Channel) -> None:
        if not channel._in_turns and channel.number and channel._can_send:
            channel._in_turns = True
            self._turns.append(channel)

    def _put(self, control: Control) -> None:
        if len(self._control) >= _CONTROL_WAITING_MAX:
            raise ProtocolError("the peer does not read what it is told")
        self._control.append(control)

    def _over(self, channel: Channel, fault: Fault | None) -> None:
        if not channel.over:
            channel.over, channel.fault = True, fault
            channel._parts.clear()
            self._forget(channel, channel._part_cost_bytes)
            channel._part_due_bytes = channel._part_cost_bytes = 0
            channel.on_change()

    def _remove(self, channel: Channel) -> None:
        if self._table.pop(channel.number, None) is None:
            return
        if channel.number and not self._mine(channel.number):
            self._peer_open -= 1
        channel._outbox.clear()
        channel.queued_bytes = 0
        self._credits.pop(channel.number, None)
        channel.on_change()
