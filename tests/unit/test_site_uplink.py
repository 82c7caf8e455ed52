"""The link's outer end over memory: when it dials, what it takes for orders, over what a stream goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from link_carrier import MemoryCarrier, carriers

from dr_cloud.link.purpose import REPLICATION, replication_scope
from dr_cloud.link.session import Session, refuse_channels
from dr_cloud.model.errors import NotFoundError, ProtocolError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.provider import Architecture
from dr_cloud.model.replication import SiteOrders, Throttle
from dr_cloud.site import uplink as module
from dr_cloud.site.uplink import Uplink

SCOPE = Scope("acme", "shop", "dc1")


class FakeCredentials:
    """Dialling is replaced, so nothing is proven here; the tests of the link and of the process do."""

    peer = SimpleNamespace(expires_ns=1 << 63)

    def client_context(self) -> None:
        return None


class Provider:
    """The other end of every dial."""

    def __init__(self) -> None:
        self.up = True
        self.dials = 0
        self.orders: Any = {"revision": 5, "hosts": []}
        self.sessions: list[Session] = []
        self.carriers: list[MemoryCarrier] = []
        self.seen: list[Any] = []
        self.served: list[tuple[Session, Scope]] = []
        self.uplink = Uplink(
            "wss://x/link",
            FakeCredentials(),  # type: ignore[arg-type]
            None,
            methods={},
            on_channel=refuse_channels,
            on_orders=self.on_orders,
        )

    async def on_orders(self, document: Any) -> None:
        if "hosts" not in document:
            raise ProtocolError("no orders")
        self.seen.append(document["revision"])
        self.uplink.set_orders(SiteOrders.model_validate(document))

    async def dial(self, *_: Any) -> Session:
        self.dials += 1
        if not self.up:
            raise ConnectionRefusedError("nobody is there")
        near, far = carriers()
        session = Session(far, dialled=False)

        async def give(_: Any) -> Any:
            return self.orders

        async def on_channel(purpose: str, arguments: Any, stream: Any) -> None:
            assert purpose == REPLICATION
            if arguments["scope"][1] == "unknown":
                raise NotFoundError("there is no such VPG", "Name another.")
            self.served.append((session, replication_scope(arguments, "acme")))
            while (message := await stream.receive()) is not None:
                await stream.send(message)

        session.methods["orders"] = give
        session.on_channel = on_channel
        await session.__aenter__()
        self.sessions.append(session)
        self.carriers.append(near)
        return Session(near, dialled=True)


@asynccontextmanager
async def running(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Provider]:
    provider = Provider()
    monkeypatch.setattr(module, "dial", provider.dial)
    monkeypatch.setattr(module, "WAIT_SECONDS_MIN", 0.005)
    monkeypatch.setattr(module, "WAIT_SECONDS_MAX", 0.02)
    task = asyncio.create_task(provider.uplink.run())
    try:
        yield provider
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for session in provider.sessions:
            session.close("the test is over")
            await session.wait_closed()


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def test_it_dials_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as provider:
        uplink = provider.uplink
        await until(lambda: uplink.linked)
        provider.up = False
        provider.carriers[0].close()
        await until(lambda: not uplink.linked)
        with pytest.raises(UnavailableError, match="no link"):
            await uplink.call("report", {})
        await until(lambda: provider.dials > 5)
        assert "nobody is there" in uplink.problem
        provider.up = True
        await until(lambda: uplink.linked)
        assert provider.seen == [5, 5], "orders are asked for in each session"


async def test_an_older_revision_never_replaces_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as provider:
        await until(lambda: provider.uplink.linked)
        session = provider.sessions[0]
        await session.call("orders", {"revision": 7, "hosts": []})
        await session.call("orders", {"revision": 6, "hosts": []})
        assert provider.seen == [5, 7]
        provider.orders = {"revision": 1, "hosts": []}
        provider.carriers[0].close()
        await until(lambda: provider.seen == [5, 7, 1])


async def test_orders_that_are_none_cost_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as provider:
        await until(lambda: provider.uplink.linked)
        with pytest.raises(ProtocolError, match="no orders"):
            await provider.sessions[0].call("orders", {"revision": 8})
        provider.orders = {"revision": 9}
        provider.carriers[0].close()
        await until(lambda: len(provider.sessions) == 2 and provider.uplink.linked)


async def test_one_connection_for_all_where_connectors_are_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch) as provider:
        opening = asyncio.create_task(provider.uplink.open(SCOPE))
        stream = await opening
        await stream.send("hello")
        assert await stream.receive() == "hello"
        stream.close()
        assert provider.served == [(provider.sessions[0], SCOPE)]
        assert provider.dials == 1


@pytest.mark.parametrize("how", ["end", "close"])
async def test_a_connection_for_each_stream_elsewhere(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(module, "_END_SECONDS", 0.05)
    async with running(monkeypatch) as provider:
        provider.orders["architecture"] = Architecture.CLOUD_CONNECTOR.value
        provider.orders["throttle"] = Throttle(bytes_per_second=12345).model_dump()
        stream = await provider.uplink.open(SCOPE)
        other = await provider.uplink.open(SCOPE._replace(vpg="erp"))
        assert len(provider.sessions) == 3
        assert [scope.vpg for _, scope in provider.served] == ["shop", "erp"]
        assert {session for session, _ in provider.served} == set(provider.sessions[1:])
        assert stream._session.throttle is other._session.throttle, "the limit holds for all of them together"  # type: ignore[attr-defined]
        assert stream._session.throttle.bytes_per_second == 12345  # type: ignore[attr-defined]
        await other.send("still here")
        getattr(stream, how)()
        async with asyncio.timeout(5):
            await provider.sessions[1].wait_closed()
        assert await other.receive() == "still here"
        with pytest.raises(NotFoundError, match="no such VPG"):
            await provider.uplink.open(SCOPE._replace(vpg="unknown"))
        async with asyncio.timeout(5):
            await provider.sessions[3].wait_closed()
        assert provider.uplink.linked
