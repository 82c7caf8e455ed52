"""Sessions over carriers in memory: channels, calls, cuts, silence, hostile and slow peers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from link_carrier import LIMIT, MemoryCarrier, carriers, linked
from pydantic import BaseModel

from dr_cloud.link import rpc as rpc_module
from dr_cloud.link.channels import FRAGMENT_BYTES
from dr_cloud.link.rpc import SERVED_MAX, Rpc
from dr_cloud.link.session import ChannelStream, Session
from dr_cloud.model.errors import DrCloudError, LimitError, NotFoundError, ProtocolError, UnavailableError
from dr_cloud.model.replication import Throttle

pytestmark = pytest.mark.timeout(60)


async def echo(purpose: str, arguments: dict[str, Any], stream: ChannelStream) -> None:
    while (message := await stream.receive()) is not None:
        await stream.send(message)


async def swallow(purpose: str, arguments: dict[str, Any], stream: ChannelStream) -> None:
    while await stream.receive() is not None:
        pass


def carrier_of(session: Session) -> MemoryCarrier:
    carrier = session._carrier
    assert isinstance(carrier, MemoryCarrier)
    return carrier


# Channels.


async def test_channels_open_both_ways_and_keep_kind_and_order() -> None:
    async with linked() as (site, provider):
        for one, other in ((site, provider), (provider, site)):
            other.on_channel = echo
            stream = await one.open("replication", {"scope": ["e", "v", "t"]})
            sent = ["text ü", b"", b"data", "", bytes(3 << 20)]
            for message in sent:
                await stream.send(message)
            assert [await stream.receive() for _ in sent] == sent
            stream.end()
            assert await stream.receive() is None
            with pytest.raises(OSError):
                await stream.send("late")


async def test_a_refused_channel_raises_where_it_was_opened() -> None:
    async with linked() as (site, provider):
        with pytest.raises(NotFoundError, match="'replication' are not served"):
            await site.open("replication", {})

        async def refuse(purpose: str, arguments: dict[str, Any], stream: ChannelStream) -> None:
            raise LimitError("full", "Come back later.")

        provider.on_channel = refuse
        with pytest.raises(LimitError) as caught:
            await site.open("replication", {})
        assert caught.value.remedy == "Come back later."


@pytest.mark.parametrize("error", [ConnectionRefusedError("/secret/socket"), RuntimeError("secret bug")])
async def test_what_fails_inside_is_not_told_outside(error: Exception) -> None:
    """R11: a tenant learns nothing of the provider's insides."""
    async with linked() as (site, provider):

        async def fail(purpose: str, arguments: dict[str, Any], stream: ChannelStream) -> None:
            raise error

        provider.on_channel = fail
        with pytest.raises(DrCloudError) as caught:
            await site.open("replication", {})
        assert "secret" not in f"{caught.value} {caught.value.remedy}"
        provider.on_channel = echo
        stream = await site.open("replication", {})
        await stream.send("still here")
        assert await stream.receive() == "still here"


async def test_a_handler_that_only_sends_accepts_and_its_return_is_the_end() -> None:
    async with linked() as (site, provider):

        async def archive(purpose: str, arguments: dict[str, Any], stream: ChannelStream) -> None:
            for number in range(100):
                await stream.send(bytes([number]) * 100_000)

        provider.on_channel = archive
        stream = await site.open("logs", {"id": "1"})
        got = []
        while (message := await stream.receive()) is not None:
            assert not isinstance(message, str)
            got.append((message[0], len(message)))
        assert got == [(number, 100_000) for number in range(100)]


async def test_a_closed_channel_fails_at_the_other_end() -> None:
    async with linked() as (site, provider):
        failed = asyncio.Event()

        async def serve(purpose: str, arguments: dict[str, Any], stream: ChannelStream) -> None:
            await stream.send("one")
            try:
                await stream.receive()
            except OSError:
                failed.set()

        provider.on_channel = serve
        stream = await site.open("replication", {})
        assert await stream.receive() == "one"
        stream.close()
        await asyncio.wait_for(failed.wait(), 5)
        with pytest.raises(OSError):
            await stream.receive()


async def test_a_channel_that_nobody_answers_is_given_up() -> None:
    async with linked() as (site, provider):
        held = asyncio.Event()

        async def hold(purpose: str, arguments: dict[str, Any], stream: ChannelStream) -> None:
            await held.wait()

        provider.on_channel = hold
        with pytest.raises(UnavailableError, match="did not answer"):
            await site.open("replication", {}, timeout_seconds=0.05)
        assert set(site._core._table) == {0}
        held.set()


async def test_a_slow_reader_holds_up_neither_other_channels_nor_calls() -> None:
    """R11: the data path of one VPG never waits for another's."""
    async with linked() as (site, provider):
        never = asyncio.Event()

        async def serve(purpose: str, arguments: dict[str, Any], stream: ChannelStream) -> None:
            if arguments.get("slow"):
                await stream.send("ready")
                await never.wait()
            await echo(purpose, arguments, stream)

        async def hello(params: dict[str, Any]) -> str:
            return "hello"

        provider.on_channel = serve
        provider.methods["hello"] = hello
        slow = await site.open("replication", {"slow": True})
        sent = 0

        async def push() -> None:
            nonlocal sent
            while True:
                await slow.send(bytes(1 << 20))
                sent += 1

        pushing = asyncio.create_task(push())
        fast = await site.open("replication", {})
        for _ in range(30):
            await fast.send(bytes(1 << 20))
            assert len(await fast.receive() or b"") == 1 << 20
            assert await site.call("hello") == "hello"
        assert sent <= 6, "the sender of a channel that is not read waits"
        pushing.cancel()
        never.set()


async def test_control_does_not_wait_while_data_saturates() -> None:
    """R6: between a call and the carrier stands at most what the carrier itself already holds."""
    async with linked() as (site, provider):
        provider.on_channel = swallow

        async def hello(params: dict[str, Any]) -> str:
            return "hello"

        provider.methods["hello"] = hello
        streams = [await site.open("replication", {}) for _ in range(5)]

        async def push(stream: ChannelStream) -> None:
            while True:
                await stream.send(bytes(1 << 20))

        pushing = [asyncio.create_task(push(stream)) for stream in streams]
        while len(carrier_of(site).sent) < 100:
            await asyncio.sleep(0)
        for _ in range(20):
            before = len(carrier_of(site).sent)
            called = asyncio.create_task(site.call("hello"))
            await asyncio.sleep(0)
            before = max(before, len(carrier_of(site).sent))
            assert await called == "hello"
            at = next(
                n
                for n, m in enumerate(carrier_of(site).sent[before:])
                if b'"call"' in (m if isinstance(m, bytes) else b"")
            )
            assert at <= LIMIT
        for task in pushing:
            task.cancel()


async def test_a_throttle_holds_data_back_and_can_be_lifted() -> None:
    async with linked() as (site, provider):
        provider.on_channel = swallow
        site.throttle = Throttle(bytes_per_second=1)
        stream = await site.open("replication", {})
        await stream.send(bytes(2 * FRAGMENT_BYTES))
        await asyncio.sleep(0.05)
        assert stream._channel.queued_bytes
        site.throttle = Throttle()
        stream.throttle = Throttle(bytes_per_second=10 << 30)
        for _ in range(300):
            if not stream._channel.queued_bytes:
                break
            await asyncio.sleep(0.01)
        assert not stream._channel.queued_bytes


# The link as a whole.


async def test_a_cut_fails_every_stream_and_call() -> None:
    async with linked() as (site, provider):
        never = asyncio.Event()

        async def hang(params: dict[str, Any]) -> str:
            await never.wait()
            return ""

        provider.on_channel = echo
        provider.methods["hang"] = hang
        reading, blocked = await site.open("replication", {}), await site.open("replication", {})

        async def push() -> None:
            while True:
                await blocked.send(bytes(1 << 20))

        work = [asyncio.create_task(part) for part in (reading.receive(), push(), site.call("hang"))]
        await asyncio.sleep(0.05)
        carrier_of(site).close()
        results = await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), 5)
        assert [type(result) for result in results] == [ConnectionResetError, ConnectionResetError, UnavailableError]
        assert "lost" in await site.wait_closed() and "lost" in await provider.wait_closed()
        with pytest.raises(UnavailableError):
            await site.open("replication", {})
        with pytest.raises(UnavailableError):
            await site.call("hang")
        assert not site._handlers and not provider._handlers


async def test_closing_tells_the_other_end_why() -> None:
    async with linked() as (site, provider):
        provider.close("the certificate is revoked")
        assert await site.wait_closed() == "the other end closed the link: the certificate is revoked"
        assert await provider.wait_closed() == "the certificate is revoked"


async def test_a_peer_that_has_gone_without_a_word_is_noticed() -> None:
    """The connection is half-open: nothing fails, and nothing comes."""
    one, _ = carriers()
    async with Session(one, dialled=True, ping_seconds=0.02) as session:
        assert await asyncio.wait_for(session.wait_closed(), 5) == "nothing came for 0.08 s"


async def test_a_peer_that_takes_nothing_is_noticed_too() -> None:
    async with linked(ping_seconds=0.02) as (site, provider):
        provider.on_channel = swallow
        stream = await site.open("replication", {})
        carrier_of(site).open_gate.clear()
        carrier_of(provider).open_gate.clear()
        with pytest.raises(OSError):
            while True:
                await asyncio.wait_for(stream.send(bytes(1 << 20)), 5)
        assert "nothing came" in await site.wait_closed()


async def test_an_idle_link_lives() -> None:
    async with linked(ping_seconds=0.01) as (site, provider):
        await asyncio.sleep(0.3)
        assert not site.reason and not provider.reason


async def test_nobody_is_asked_whether_he_is_there_while_he_is_heard() -> None:
    async with linked(ping_seconds=0.1) as (site, provider):
        provider.on_channel = echo
        stream = await site.open("replication", {})
        for _ in range(40):
            await stream.send("here")
            assert await stream.receive() == "here"
            await asyncio.sleep(0.01)
        assert '{"type":"ping"}' not in carrier_of(site).sent + carrier_of(provider).sent
        await asyncio.sleep(0.4)
        assert '{"type":"ping"}' in carrier_of(site).sent + carrier_of(provider).sent


@pytest.mark.parametrize("garbage", [b"garbage", "garbage", b"\x00" * 12, '{"type":"close","channel":0,"fault":null}'])
async def test_a_malformed_peer_is_told_and_the_other_sessions_go_on(garbage: str | bytes) -> None:
    """R11: one tenant's broken end touches nobody else's link."""
    async with linked() as (site, provider):
        provider.on_channel = echo
        stream = await site.open("replication", {})
        one, other = carriers()
        async with Session(one, dialled=False) as victim:
            await other.send(garbage)
            reason = await asyncio.wait_for(victim.wait_closed(), 5)
            assert reason.startswith("the other end broke the protocol: ")
            told = [await other.receive() for _ in range(2)][-1]
            assert isinstance(told, str) and json.loads(told) == {"type": "bye", "reason": reason}
            assert await other.receive() is None
        await stream.send("alive")
        assert await stream.receive() == "alive"


# Calls.


class Size(BaseModel):
    size: int


async def test_calls_run_at_the_same_time_and_errors_cross_with_their_remedy() -> None:
    async with linked() as (site, provider):
        gate = asyncio.Event()

        async def wait(params: dict[str, Any]) -> int:
            await gate.wait()
            return 1

        async def go(params: dict[str, Any]) -> dict[str, Any]:
            gate.set()
            return {"params": params}

        async def deny(params: dict[str, Any]) -> None:
            raise NotFoundError("no such VPG", "Name another.")

        async def bug(params: dict[str, Any]) -> None:
            raise RuntimeError("secret")

        async def typed(params: dict[str, Any]) -> int:
            return Size.model_validate(params).size

        site.methods.update(wait=wait, go=go, deny=deny, bug=bug, typed=typed)
        waiting = asyncio.create_task(provider.call("wait"))
        assert await provider.call("go", {"ü": [1, None]}) == {"params": {"ü": [1, None]}}
        assert await waiting == 1
        with pytest.raises(NotFoundError) as denied:
            await provider.call("deny")
        assert (str(denied.value), denied.value.remedy) == ("no such VPG", "Name another.")
        with pytest.raises(DrCloudError) as failed:
            await provider.call("bug")
        assert "secret" not in str(failed.value)
        with pytest.raises(DrCloudError, match="bad parameters of 'typed': size"):
            await provider.call("typed", {"size": "large"})
        with pytest.raises(NotFoundError, match="no method 'other'"):
            await provider.call("other")
        assert not site.reason


async def test_a_call_that_is_not_answered_in_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with linked() as (site, provider):
        never = asyncio.Event()

        async def hang(params: dict[str, Any]) -> None:
            await never.wait()

        provider.methods["hang"] = hang
        with pytest.raises(UnavailableError, match=r"'hang' was not answered within 0\.05 s"):
            await site.call("hang", timeout_seconds=0.05)
        monkeypatch.setattr(rpc_module, "SERVED_SECONDS_MAX", 0.05)
        with pytest.raises(UnavailableError, match="took too long"):
            await site.call("hang", timeout_seconds=5)


async def test_calls_are_served_up_to_a_limit() -> None:
    async with linked() as (site, provider):
        never = asyncio.Event()

        async def hang(params: dict[str, Any]) -> None:
            await never.wait()

        provider.methods["hang"] = hang
        hanging = [asyncio.create_task(site.call("hang")) for _ in range(SERVED_MAX)]
        await asyncio.sleep(0.05)
        with pytest.raises(LimitError):
            await site.call("hang")
        never.set()
        await asyncio.gather(*hanging)
        await site.call("hang")


@pytest.mark.parametrize(
    "messages",
    [
        [b"binary"],
        ["{"],
        ['{"type": "answer", "id": 1}'],
        ['{"type": "call", "id": 0, "method": "hang"}'],
        ['{"type": "call", "id": 1, "method": "__class__"}'],
        ['{"type": "call", "id": 1, "method": "hang", "params": []}'],
        ['{"type": "call", "id": 1, "method": "hang"}'] * 2,
    ],
    ids=range(7),
)
async def test_a_breach_of_the_calls_ends_the_link(messages: list[str | bytes]) -> None:
    one, other = carriers()

    async def hang(params: dict[str, Any]) -> None:
        await asyncio.Event().wait()

    for message in messages:
        await other.send(message)
    with pytest.raises(ProtocolError):
        await asyncio.wait_for(Rpc(one, {"hang": hang}).run(), 5)
