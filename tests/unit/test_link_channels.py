"""The core of a link, message by message: what leaves in which order, and what a peer may not do."""

from __future__ import annotations

import json
import struct

import pytest

from dr_cloud.link import channels as c
from dr_cloud.link.channels import FRAGMENT_BYTES, HEAD_BYTES, WINDOW_BYTES, Channel, Channels
from dr_cloud.link.fault import Fault
from dr_cloud.link.messages import MESSAGE_BYTES_MAX
from dr_cloud.link.purpose import replication_arguments, replication_scope
from dr_cloud.model.errors import LimitError, NotFoundError, ProtocolError
from dr_cloud.model.ids import Scope
from dr_cloud.model.replication import Throttle
from dr_cloud.model.units import SECOND_NS

HEAD = struct.Struct("<IB3xI")


class Clock:
    now_ns = 10**18

    def __call__(self) -> int:
        return self.now_ns


def pair() -> tuple[Channels, Channels]:
    clock = Clock()
    return Channels(dialled=True, clock_ns=clock), Channels(dialled=False, clock_ns=clock)


def step(source: Channels) -> str | bytes | None:
    message = source.next()
    return message if message is None or isinstance(message, str) else b"".join(message)


def flow(one: Channels, other: Channels) -> list[tuple[str, str | bytes]]:
    """Carry everything both ways until nothing is left; return what was carried."""
    carried: list[tuple[str, str | bytes]] = []
    moved = True
    while moved:
        moved = False
        for name, source, sink in (("→", one, other), ("←", other, one)):
            while (message := step(source)) is not None:
                carried.append((name, message))
                sink.take(message if isinstance(message, str) else memoryview(message))
                moved = True
    return carried


def opened(one: Channels, other: Channels) -> tuple[Channel, Channel]:
    """Open a channel, accepted; return both its ends."""
    here = one.open("test", {})
    flow(one, other)
    there = other.opened.popleft()
    other.accept(there)
    flow(one, other)
    assert here.accepted
    return here, there


def test_a_message_is_cut_into_fragments_as_the_layout_says() -> None:
    one, other = pair()
    here, there = opened(one, other)
    body = bytes(range(256)) * 600
    one.send(here, [body[:7], b"", body[7:70_000], body[70_000:]])
    one.send(here, "zwölf")
    fragments = []
    while (message := step(one)) is not None:
        assert isinstance(message, bytes)
        fragments.append((*HEAD.unpack_from(message), message[HEAD_BYTES:]))
    text = "zwölf".encode()
    assert fragments == [
        (here.number, 2, 153_600, body[:65_536]),
        (here.number, 2, 88_064, body[65_536:131_072]),
        (here.number, 2, 22_528, body[131_072:]),
        (here.number, 1, len(text), text),
    ]
    for number, kind, left, part in fragments:
        other.take(memoryview(HEAD.pack(number, kind, left) + part))
    assert other.taken(there) == body
    assert other.taken(there) == "zwölf"
    assert other._unread_bytes == 0


def test_control_and_calls_leave_before_data_that_waits() -> None:
    """R6: control traffic is apart from replication traffic."""
    one, other = pair()
    bulk = [opened(one, other)[0] for _ in range(3)]
    for channel in bulk:
        one.send(channel, bytes(3 << 20))
    assert isinstance(step(one), bytes)
    one.send(one.calls, "call")
    one.ping()
    one.open("late", {})
    after = [step(one) for _ in range(4)]
    assert [json.loads(text)["type"] for text in after[:2]] == ["ping", "open"]  # type: ignore[arg-type]
    assert after[2] == HEAD.pack(0, 1, 4) + b"call"
    assert isinstance(after[3], bytes) and HEAD.unpack_from(after[3])[0] in {channel.number for channel in bulk}


def test_channels_take_turns_fragment_by_fragment() -> None:
    one, other = pair()
    channels = [opened(one, other)[0] for _ in range(3)]
    for channel in channels:
        one.send(channel, bytes(5 * FRAGMENT_BYTES))
    one.send(channels[1], b"last")
    order = [HEAD.unpack_from(message)[0] for message in iter(lambda: step(one), None)]  # type: ignore[arg-type]
    numbers = [channel.number for channel in channels]
    assert order == numbers * 5 + [numbers[1]]


def test_a_reader_that_does_not_read_stops_its_own_channel_only() -> None:
    one, other = pair()
    (slow, slow_end), (fast, fast_end) = opened(one, other), opened(one, other)
    for _ in range(20):
        one.send(slow, bytes(1 << 20))
        one.send(fast, bytes(1 << 20))
    got = 0
    while True:
        flow(one, other)
        if not fast_end.inbox:
            break
        got += len(other.taken(fast_end))
    assert got == 20 << 20
    in_flight = sum(len(message) for message, *_ in slow_end.inbox) + sum(map(len, slow_end._parts))
    assert WINDOW_BYTES - 2 * FRAGMENT_BYTES < in_flight <= WINDOW_BYTES
    got = 0
    while slow_end.inbox or slow.queued_bytes:
        got += len(other.taken(slow_end))
        flow(one, other)
    assert got == 20 << 20


def test_a_message_longer_than_the_window_passes_when_its_reader_waits() -> None:
    one, other = pair()
    here, there = opened(one, other)
    one.send(here, bytes(MESSAGE_BYTES_MAX))
    flow(one, other)
    assert not there.inbox and here.queued_bytes
    other.hunger(there)
    flow(one, other)
    assert len(other.taken(there)) == MESSAGE_BYTES_MAX
    with pytest.raises(LimitError):
        one.send(here, bytes(MESSAGE_BYTES_MAX + 1))


def test_the_end_comes_after_what_was_sent_and_ends_both_directions() -> None:
    one, other = pair()
    here, there = opened(one, other)
    for number in range(3):
        one.send(here, f"message {number}")
    other.send(there, "crossing")
    one.end(here)
    with pytest.raises(ConnectionResetError):
        one.send(here, "late")
    flow(one, other)
    assert [other.taken(there) for _ in range(3)] == [f"message {number}" for number in range(3)]
    assert there.over and there.fault is None and not there.inbox
    with pytest.raises(ConnectionResetError):
        other.send(there, "late")
    assert here.over and not here.inbox, "what came after the end is dropped"
    assert set(one._table) == set(other._table) == {0}
    assert one._unread_bytes == other._unread_bytes == 0


def test_a_refused_channel_tells_the_kind_and_the_remedy() -> None:
    one, other = pair()
    here = one.open("test", {})
    flow(one, other)
    other.close(other.opened.popleft(), Fault.of(NotFoundError("no such VPG", "Name another.")))
    flow(one, other)
    assert here.over and not here.accepted and here.fault is not None
    error = here.fault.error()
    assert isinstance(error, NotFoundError) and error.remedy == "Name another."


def test_late_messages_for_a_closed_channel_are_no_breach() -> None:
    one, other = pair()
    here, there = opened(one, other)
    one.send(here, bytes(200_000))
    late = [step(one) for _ in range(2)]
    other.close(there, None)
    text = step(other)
    assert isinstance(text, str)
    one.take(text)
    assert here.over and here.queued_bytes == 0 and step(one) is None
    for message in late:
        other.take(memoryview(message))  # type: ignore[arg-type]
    other.take(json.dumps({"type": "credit", "channel": here.number, "bytes": 5}))
    assert other._unread_bytes == 0


def test_windows_are_smaller_when_very_many_channels_are_open() -> None:
    """A peer cannot make this end keep memory without bound."""
    one, other = pair()
    ends = [opened(one, other)[1] for _ in range(c.CHANNELS_MAX)]
    assert ends[0]._allowed_bytes == WINDOW_BYTES and ends[-1]._allowed_bytes == c.WINDOW_BYTES_MIN
    assert sum(end._allowed_bytes for end in ends) <= c.UNREAD_BYTES_MAX
    with pytest.raises(LimitError):
        one.open("one-more", {})
    number = one._next_number
    other.take(json.dumps({"type": "open", "channel": number, "purpose": "x", "arguments": {}, "credit": 1}))
    text = step(other)
    assert isinstance(text, str) and json.loads(text)["fault"]["kind"] == "LimitError"
    one.end(one._table[1])
    flow(one, other)
    one._next_number += 2
    assert opened(one, other)


def test_what_waits_unread_over_all_channels_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c, "UNREAD_BYTES_MAX", 1 << 20)
    one, other = pair()
    first, second = opened(one, other)[0], opened(one, other)[0]
    one.send(first, bytes(900 << 10))
    flow(one, other)
    one.send(second, bytes(900 << 10))
    with pytest.raises(ProtocolError, match="wait to be read"):
        flow(one, other)


def test_a_throttled_channel_waits_and_the_others_do_not() -> None:
    one, other = pair()
    slow, fast = opened(one, other)[0], opened(one, other)[0]
    slow.bucket.throttle = Throttle(bytes_per_second=FRAGMENT_BYTES)
    for channel in (slow, fast):
        one.send(channel, bytes(10 * FRAGMENT_BYTES))
    order = [HEAD.unpack_from(message)[0] for message in iter(lambda: step(one), None)]  # type: ignore[arg-type]
    assert order.count(slow.number) == 1 and order.count(fast.number) == 10
    assert one.wait_seconds is not None and 0.7 < one.wait_seconds < 1.1
    clock = one._clock_ns
    assert isinstance(clock, Clock)
    clock.now_ns += int(1.1 * SECOND_NS)
    assert isinstance(step(one), bytes) and step(one) is None


def test_control_counts_against_the_link_but_never_waits() -> None:
    one, other = pair()
    here, _ = opened(one, other)
    one.bucket.throttle = Throttle(bytes_per_second=1000)
    one.send(here, b"x" * 100)
    for _ in range(100):
        one.ping()
    texts = [step(one) for _ in range(100)]
    assert all(isinstance(text, str) for text in texts)
    one.send(one.calls, "call")
    assert isinstance(step(one), bytes), "calls do not wait either"
    assert step(one) is None
    assert one.wait_seconds is not None and one.wait_seconds > 0.5
    one.bucket.throttle = Throttle()
    assert isinstance(step(one), bytes)


def fragment(number: int, kind: int, left: int, body: bytes) -> bytes:
    return HEAD.pack(number, kind, left) + body


OPEN = {"type": "open", "channel": 3, "purpose": "x", "arguments": {}, "credit": 100}


@pytest.mark.parametrize(
    "messages",
    [
        [b""],
        [b"\x00" * 11],
        [fragment(0, 0, 1, b"x")],
        [fragment(0, 4, 1, b"x")],
        [fragment(0, 1, 5, b"x")],
        [fragment(0, 1, 1, b"xx")],
        [fragment(0, 2, FRAGMENT_BYTES + 1, bytes(FRAGMENT_BYTES - 1))],
        [fragment(0, 2, MESSAGE_BYTES_MAX + 1, bytes(FRAGMENT_BYTES))],
        [fragment(0, 2, (1 << 32) - 1, bytes(FRAGMENT_BYTES))],
        [fragment(0, 3, 0, b"")],
        [fragment(1, 1, 1, b"x")],
        [fragment(1, 2, 100_000, bytes(FRAGMENT_BYTES)), fragment(1, 2, 100_000, bytes(FRAGMENT_BYTES))],
        [fragment(9, 1, 1, b"x")],
        [fragment(2, 1, 1, b"x")],
        [fragment(0, 1, 2, b"\xff\xff")],
        [fragment(0, 2, 100_000, bytes(FRAGMENT_BYTES)), fragment(0, 1, 34_464, bytes(34_464))],
        [fragment(0, 2, 100_000, bytes(FRAGMENT_BYTES)), fragment(0, 2, 34_465, bytes(34_465))],
        [fragment(0, 2, FRAGMENT_BYTES, bytes(FRAGMENT_BYTES))] * 65,
        [fragment(0, 1, 0, b"")] * (WINDOW_BYTES // 256 + 1),
        ["nonsense"],
        ["[" * 60_000],
        ["{}"],
        ['{"type": "nothing"}'],
        ['{"type": "ping", "more": 1}'],
        [" " * 65_537],
        [json.dumps(OPEN | {"channel": 4})],
        [json.dumps(OPEN | {"channel": 1})],
        [json.dumps(OPEN), json.dumps(OPEN)],
        [json.dumps(OPEN | {"channel": 5}), json.dumps(OPEN)],
        [json.dumps(OPEN | {"channel": 1 << 32})],
        [json.dumps(OPEN | {"channel": -1})],
        [json.dumps(OPEN | {"purpose": "Über"})],
        [json.dumps(OPEN | {"purpose": "x" * 64})],
        [json.dumps(OPEN | {"credit": 0})],
        [json.dumps(OPEN | {"arguments": {str(n): n for n in range(33)}})],
        [json.dumps(OPEN), fragment(3, 1, 1, b"x")],
        ['{"type": "close", "channel": 0, "fault": null}'],
        ['{"type": "close", "channel": 5, "fault": null}'],
        ['{"type": "credit", "channel": 2, "bytes": 1}'],
        ['{"type": "credit", "channel": 0, "bytes": -1}'],
        ['{"type": "credit", "channel": 0, "bytes": 2147483648}'] * 2,
        ['{"type": "ping"}'] * 5000,
    ],
    ids=range(42),
)
def test_a_breach_is_told_and_ends_the_link(messages: list[str | bytes]) -> None:
    """R11: whatever the peer sends, this end keeps its bounds and says what was wrong."""
    other = Channels(dialled=False, clock_ns=Clock())
    other.take(json.dumps(OPEN | {"channel": 1}))
    while other.next() is not None:
        pass
    with pytest.raises(ProtocolError):
        for message in messages:
            other.take(message if isinstance(message, str) else memoryview(message))


def test_a_scope_of_another_enterprise_is_refused_as_a_missing_one() -> None:
    """R11: foreign and missing are told in the same words."""
    scope = Scope("acme-us", "erp", "t1")
    assert replication_scope(replication_arguments(scope), "acme-us") == scope
    words = set()
    for arguments in (
        replication_arguments(Scope("brit-uk", "erp", "t1")),
        replication_arguments(Scope("acme-us", "../brit-uk", "t1")),
        {"scope": ["acme-us", "erp"]},
        {"scope": ["acme-us", "erp", 1]},
        {"scope": "acme-us"},
        {"scope": ["acme-us", "erp", "t1"], "more": 1},
        {},
    ):
        with pytest.raises(NotFoundError) as caught:
            replication_scope(arguments, "acme-us")
        words.add((str(caught.value), caught.value.remedy))
    assert len(words) == 1
