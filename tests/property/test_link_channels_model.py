"""Two ends of a link under any order of wishes, deliveries and cuts, against a model that is two lists per channel."""

from __future__ import annotations

from collections import deque
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dr_cloud.link import channels as c
from dr_cloud.link.channels import Channel, Channels

SMALL = {"FRAGMENT_BYTES": 1000, "WINDOW_BYTES": 6000, "WINDOW_BYTES_MIN": 4000, "MESSAGE_BYTES_MAX": 20_000}
SIDES = (0, 1)


class End:
    """One direction of one channel in the model: what went in here, and what came out there."""

    def __init__(self) -> None:
        self.sent: list[str | bytes] = []
        self.received: list[str | bytes] = []
        self.finished = False
        """Either end has ended or closed the channel: what is under way may be dropped."""


class Links(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patches = [patch.object(c, name, value) for name, value in SMALL.items()]
        for part in self.patches:
            part.start()

    def teardown(self) -> None:
        try:
            if not self.is_cut:
                self.settle()
        finally:
            for part in self.patches:
                part.stop()

    @initialize()
    def begin(self) -> None:
        self.now_ns = 10**18
        self.cores = [Channels(dialled=side == 0, clock_ns=lambda: self.now_ns) for side in SIDES]
        self.wires: list[deque[Any]] = [deque(), deque()]
        self.ends: list[dict[int, Channel]] = [{}, {}]
        self.model: list[dict[int, End]] = [{}, {}]
        self.is_cut = False
        self.counter = 0
        for side in SIDES:
            self.open(side, "first")
            self.flow()
            self.accept(1 - side, side)
            self.flow()

    def pick(self, side: int, index: int) -> tuple[int, Channel] | None:
        numbers = sorted(self.ends[side])
        if not numbers:
            return None
        number = numbers[index % len(numbers)]
        return number, self.ends[side][number]

    @rule(side=st.sampled_from(SIDES), purpose=st.sampled_from(["a", "b"]))
    def open(self, side: int, purpose: str) -> None:
        if self.is_cut:
            return
        channel = self.cores[side].open(purpose, {"n": self.counter})
        self.ends[side][channel.number] = channel
        for one in SIDES:
            self.model[one][channel.number] = End()

    @rule(side=st.sampled_from(SIDES), index=st.integers(0, 9), size=st.integers(0, 20_000), text=st.booleans())
    def send(self, side: int, index: int, size: int, text: bool) -> None:
        if (picked := self.pick(side, index)) is None:
            return
        number, channel = picked
        self.counter += 1
        message: str | bytes = (
            (f"{self.counter} " + "ä" * (size // 2))[: size // 2] if text else bytes([self.counter % 251]) * size
        )
        try:
            parts = message if isinstance(message, str) else [message[: size // 3], message[size // 3 :]]
            self.cores[side].send(channel, parts)
        except ConnectionResetError:
            assert channel.over
        else:
            self.model[side][number].sent.append(message)

    @rule(side=st.sampled_from(SIDES), count=st.integers(1, 30))
    def put_on_wire(self, side: int, count: int) -> None:
        core = self.cores[side]
        for _ in range(count):
            control_waits = bool(core._control or core._credits)
            calls_wait = core.calls._can_send
            message = core.next()
            if message is None:
                assert not control_waits and not calls_wait
                assert not any(channel._can_send for channel in core._table.values())
                return
            if isinstance(message, str):
                assert control_waits
                self.wires[side].append(message)
                continue
            assert not control_waits, "control leaves first"
            data = b"".join(message)
            assert len(data) <= c.HEAD_BYTES + c.FRAGMENT_BYTES
            assert not calls_wait or data[:4] == bytes(4), "then calls"
            self.wires[side].append(data)

    @rule(side=st.sampled_from(SIDES), count=st.integers(1, 60))
    def deliver(self, side: int, count: int) -> None:
        core = self.cores[1 - side]
        for _ in range(min(count, len(self.wires[side]))):
            message = self.wires[side].popleft()
            core.take(message if isinstance(message, str) else memoryview(message))
            while core.opened:
                channel = core.opened.popleft()
                self.ends[1 - side][channel.number] = channel

    @rule()
    def flow(self) -> None:
        for side in SIDES:
            self.put_on_wire(side, 100)
            self.deliver(side, 100)

    @rule(side=st.sampled_from(SIDES), index=st.integers(0, 9))
    def accept(self, side: int, index: int) -> None:
        if (picked := self.pick(side, index)) is not None:
            self.cores[side].accept(picked[1])

    @rule(side=st.sampled_from(SIDES), index=st.integers(0, 9), count=st.integers(1, 5))
    def receive(self, side: int, index: int, count: int) -> None:
        if (picked := self.pick(side, index)) is None:
            return
        number, channel = picked
        for _ in range(count):
            if not channel.inbox:
                self.cores[side].hunger(channel)
                return
            message = self.cores[side].taken(channel)
            direction = self.model[1 - side][number]
            direction.received.append(message if isinstance(message, str) else bytes(message))
            assert direction.received == direction.sent[: len(direction.received)], "whole, once, in order"

    @rule(side=st.sampled_from(SIDES), index=st.integers(0, 9), gently=st.booleans())
    def finish(self, side: int, index: int, gently: bool) -> None:
        if (picked := self.pick(side, index)) is None:
            return
        number, channel = picked
        was_over = channel.over
        if gently:
            self.cores[side].end(channel)
            # What this end had sent still arrives, unless the other end finishes too.
            if not was_over:
                self.model[1 - side][number].finished = True
        else:
            self.cores[side].close(channel, None)
            for one in SIDES:
                self.model[one][number].finished = True
        if was_over:
            for one in SIDES:
                self.model[one][number].finished = True
        assert channel.over and not channel.inbox

    @precondition(lambda self: not self.is_cut)
    @rule(keep=st.integers(0, 20))
    def cut(self, keep: int) -> None:
        """The carrier breaks: some of what is under way arrives, the rest does not."""
        self.deliver(0, keep + 1)
        self.deliver(1, keep + 1)
        self.is_cut = True
        for side in SIDES:
            self.cores[side].cut("cut")
            self.wires[side].clear()

    @invariant()
    def memory_is_bounded(self) -> None:
        for side in SIDES:
            core = self.cores[side]
            seen = {0: core.calls} | self.ends[side]
            assert core._unread_bytes == sum(channel._unread_bytes for channel in seen.values())
            for channel in seen.values():
                waiting = sum(cost for *_, cost in channel.inbox) + channel._part_cost_bytes
                assert waiting <= c.WINDOW_BYTES + c.MESSAGE_BYTES_MAX * 2
                assert channel._allowed_bytes <= c.WINDOW_BYTES
            if self.is_cut:
                assert all(channel.over for channel in seen.values())
                assert core.next() is None or not core._table

    def settle(self) -> None:
        """With readers that read, everything that was sent on channels that live arrives; nothing stays behind."""
        quiet_rounds = 0
        while quiet_rounds < 4:
            before = self.progress()
            for side in SIDES:
                for number in list(self.ends[side]):
                    self.cores[side].accept(self.ends[side][number])
                    self.receive(side, sorted(self.ends[side]).index(number), 100)
                self.put_on_wire(side, 1000)
                self.deliver(side, 1000)
            quiet_rounds = 0 if before != self.progress() else quiet_rounds + 1
        for side in SIDES:
            for direction in self.model[side].values():
                if not direction.finished:
                    assert direction.received == direction.sent
            assert self.cores[side]._unread_bytes == 0
            for number, channel in self.ends[side].items():
                if not self.model[side][number].finished and not self.model[1 - side][number].finished:
                    other = self.ends[1 - side][number]
                    assert channel._window_bytes == other._allowed_bytes, "no credit is lost on the way"
                    assert other._allowed_bytes + other._taken_bytes == c.WINDOW_BYTES

    def progress(self) -> int:
        received = sum(len(direction.received) for side in SIDES for direction in self.model[side].values())
        return received - sum(channel.queued_bytes for side in SIDES for channel in self.ends[side].values())


TestLinks = Links.TestCase
TestLinks.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
