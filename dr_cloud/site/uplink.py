"""The link's outer end: the site dials, for ever, and says and hears everything over what it dialled.

Purpose
    `run` keeps the control session. `open` gives a source the stream of one scope: a channel of that same session where
    connectors are paired, else the one channel of a session of its own.

Retries
    After a break: 0.2 s, doubling to 15 s, each with ±20 % of chance so that a provider that comes back does not meet
    all its sites at once. A session over which orders came begins again at 0.2 s. What was sent and not yet durable is
    the source's to send again; calls carry whole states, and the next one makes good what was lost.

Orders
    Asked for when a session begins; the provider sends them by itself when they change. Within a session an older
    revision never replaces a newer one. While there is no session the last ones hold.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from pydantic import JsonValue

from dr_cloud.link.purpose import REPLICATION, replication_arguments
from dr_cloud.link.rpc import Method, Params
from dr_cloud.link.session import ChannelStream, OnChannel, Session
from dr_cloud.link.stream import Message, MessageStream, Received
from dr_cloud.link.throttle import Bucket
from dr_cloud.link.websocket import dial
from dr_cloud.model.errors import DrCloudError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.provider import Architecture
from dr_cloud.model.replication import SiteOrders
from dr_cloud.seal.identity import Credentials

WAIT_SECONDS_MIN: Final = 0.2
WAIT_SECONDS_MAX: Final = 15.0
_END_SECONDS: Final = 2.0

_log = structlog.get_logger(__name__)


class Uplink:
    """See the module's docstring. All methods belong to one event loop.

    Attributes:
        credentials: Who this site is; a change counts from the next dial on.
        problem: Why there is no link; empty while there is one.
    """

    def __init__(
        self,
        url: str,
        credentials: Credentials,
        proxy: str | None,
        *,
        methods: dict[str, Method],
        on_channel: OnChannel,
        on_orders: Callable[[Params], Awaitable[None]],
    ) -> None:
        """Prepare; `run` dials.

        Args:
            url: The enterprise's connector, wss://host:port/link.
            credentials: Who this site is.
            proxy: An HTTP proxy to go through, or None.
            methods: What the provider may call, besides `orders`.
            on_channel: Serves channels that the provider opens.
            on_orders: Follows a `SiteOrders` document. Raises `DrCloudError` if it is none.
        """
        self.credentials = credentials
        self.problem = "not dialled yet"
        self._url = url
        self._proxy = proxy
        self._methods: dict[str, Method] = {**methods, "orders": self._ordered}
        self._on_channel = on_channel
        self._on_orders = on_orders
        self._session: Session | None = None
        self._up = asyncio.Event()
        self._revision = -1
        self._architecture = Architecture.PAIRED_CONNECTORS
        self._bucket = Bucket()
        """All sessions take their bytes from it: the limit is the link's, however it is dialled."""

    @property
    def linked(self) -> bool:
        """Whether there is a session over which orders came."""
        return self._up.is_set()

    def set_orders(self, orders: SiteOrders) -> None:
        """Send, and dial from now on, as the orders say. Streams that stand stay where they are."""
        self._architecture = orders.architecture
        self._bucket.throttle = orders.throttle

    async def run(self) -> None:
        """Keep the control session until cancelled."""
        wait_seconds = WAIT_SECONDS_MIN
        while True:
            try:
                problem = await self._once()
            except (DrCloudError, OSError, TimeoutError) as error:
                problem = f"{error}. {getattr(error, 'remedy', '')}".strip()
            except Exception:
                # A bug here must not end the site: its taps and what it has ordered stand without a link too.
                _log.exception("site.link_failed")
                problem = "internal error"
            if self.linked:
                wait_seconds = WAIT_SECONDS_MIN
            self._session = None
            self._up.clear()
            if problem != self.problem:
                _log.warning("site.link_down", url=self._url, reason=problem)
            self.problem = problem
            await asyncio.sleep(wait_seconds * random.uniform(0.8, 1.2))
            wait_seconds = min(wait_seconds * 2, WAIT_SECONDS_MAX)

    async def _once(self) -> str:
        """Dial, and stay until the session closes; return why it did."""
        if self.credentials.peer.expires_ns <= time.time_ns():
            raise DrCloudError("this site's certificate has expired", "Ask the provider for a new pairing token.")
        session = await self._dial()
        session.methods.update(self._methods)
        session.on_channel = self._on_channel
        async with session:
            self._session = session
            self._revision = -1
            orders = await session.call("orders")
            if isinstance(orders, dict):
                try:
                    await self._ordered(orders)
                except DrCloudError as error:
                    # The report says so; what was ordered before still holds.
                    _log.error("site.orders_refused", reason=str(error))
            self.problem = ""
            self._up.set()
            _log.info("site.linked", url=self._url)
            return await session.wait_closed()

    async def _dial(self) -> Session:
        session = await dial(self._url, self.credentials.client_context(), self._proxy)
        session.share(self._bucket)
        return session

    async def _ordered(self, document: Params) -> JsonValue:
        revision = document.get("revision")
        if isinstance(revision, int) and revision >= self._revision:
            self._revision = revision
            await self._on_orders(document)
        return {}

    async def call(self, method: str, params: Params) -> JsonValue:
        """Call a method of the provider. Raises `DrCloudError`."""
        return await self._linked().call(method, params)

    async def channel(self, purpose: str, arguments: Params) -> ChannelStream:
        """Open a channel of the control session. Raises `DrCloudError`."""
        return await self._linked().open(purpose, arguments)

    def _linked(self) -> Session:
        if self._session is None:
            raise UnavailableError(f"there is no link to the provider: {self.problem}", "Try again when it is back.")
        return self._session

    async def open(self, scope: Scope) -> MessageStream:
        """Return the stream of a scope to its target; waits for the link. Raises `DrCloudError` or `OSError`."""
        await self._up.wait()
        arguments = replication_arguments(scope)
        if self._architecture is Architecture.PAIRED_CONNECTORS:
            return await self._linked().open(REPLICATION, arguments)
        session = await (await self._dial()).__aenter__()
        try:
            stream = await session.open(REPLICATION, arguments)
        except BaseException:
            session.close("not wanted any more")
            raise
        return _OwnStream(session, stream)


class _OwnStream:
    """`MessageStream` over the only channel of a session, which ends with it."""

    def __init__(self, session: Session, stream: ChannelStream) -> None:
        self._session = session
        self._stream = stream

    async def send(self, message: Message) -> None:
        """Send one message; waits while the peer is slow."""
        await self._stream.send(message)

    async def receive(self) -> Received | None:
        """Return the next message, None at a clean end."""
        return await self._stream.receive()

    def end(self) -> None:
        """Close after what was sent has left, which is given two seconds."""
        self._stream.end()
        asyncio.get_running_loop().call_later(_END_SECONDS, self._session.close, "the stream has ended")

    def close(self) -> None:
        """Close at once."""
        self._stream.close()
        self._session.close("the stream was closed")
