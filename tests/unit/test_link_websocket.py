"""The link over real sockets and TLS: who gets in, who does not, and what happens to those who are in."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from dr_cloud.link.session import ChannelStream, Session
from dr_cloud.link.websocket import LinkServer, dial, serve
from dr_cloud.model.errors import DrCloudError, ForbiddenError
from dr_cloud.model.units import SECOND_NS
from dr_cloud.seal.authority import Authority
from dr_cloud.seal.identity import Credentials, Peer, check_site, new_key_and_csr, trust_context

pytestmark = pytest.mark.timeout(60)
ENTERPRISE = "acme-us"


async def echo(purpose: str, arguments: dict[str, Any], stream: ChannelStream) -> None:
    while (message := await stream.receive()) is not None:
        await stream.send(message)


class Provider:
    """A CA and the link's end of one enterprise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.open(folder / "ca", "provider")
        self.revoked: set[str] = set()
        self.seen: list[Peer] = []
        self.server: LinkServer

    async def start(self, credentials: Credentials | None = None) -> None:
        credentials = credentials or self.authority.service_credentials("connector", ["localhost", "127.0.0.1"])
        self.server = await serve("127.0.0.1", 0, credentials.server_context(), self.on_session, self.admit)

    async def admit(self, peer: Peer) -> None:
        check_site(peer, "provider", ENTERPRISE, self.revoked.__contains__)

    async def on_session(self, session: Session) -> None:
        assert session.peer is not None
        self.seen.append(session.peer)
        session.on_channel = echo
        async with session:
            await session.wait_closed()

    @property
    def url(self) -> str:
        return f"wss://127.0.0.1:{self.server.port}/link"

    def site(self, enterprise: str = ENTERPRISE, **options: Any) -> Credentials:
        key, csr = new_key_and_csr()
        issued = self.authority.issue_site(csr, enterprise, "chicago", **options)
        return Credentials(key, issued.certificate, self.authority.certificate)

    async def works(self) -> None:
        """A site that may come in still can."""
        async with await dial(self.url, self.site().client_context()) as session:
            stream = await session.open("replication", {})
            await stream.send("hello")
            assert await stream.receive() == "hello"
            stream.end()


@pytest.fixture
async def provider(tmp_path: Path) -> AsyncIterator[Provider]:
    provider = Provider(tmp_path)
    await provider.start()
    yield provider
    await provider.server.close()
    assert not provider.server.sessions


async def refused(provider: Provider, credentials: Credentials, url: str = "") -> Exception:
    with pytest.raises((OSError, DrCloudError)) as caught:
        async with await dial(url or provider.url, credentials.client_context()):
            pass
    assert not provider.seen, "nobody was let in"
    await provider.works()
    return caught.value


async def test_both_ends_know_who_the_other_is(provider: Provider) -> None:
    """R11: sites authenticate each other; the traffic is TLS 1.3."""
    site = provider.site()
    async with await dial(provider.url, site.client_context()) as session:
        assert session.peer is not None and session.peer.service == "connector"
        stream = await session.open("replication", {})
        body = bytes(range(256)) * 20_000
        await stream.send(body)
        assert await stream.receive() == body
        transport = session._carrier._connection.transport  # type: ignore[attr-defined]
        assert transport.get_extra_info("ssl_object").version() == "TLSv1.3"
    assert provider.seen == [site.peer]


async def test_a_certificate_of_another_authority_is_refused(provider: Provider, tmp_path: Path) -> None:
    """R11: even one that says the same names."""
    other = Authority.open(tmp_path / "other", "provider")
    key, csr = new_key_and_csr()
    foreign = Credentials(key, other.issue_site(csr, ENTERPRISE, "chicago").certificate, other.certificate)
    foreign.ca = provider.authority.certificate
    error = await refused(provider, foreign)
    assert isinstance(error, OSError)


async def test_a_server_of_another_authority_is_refused(provider: Provider, tmp_path: Path) -> None:
    impostor = Provider(tmp_path / "impostor")
    await impostor.start()
    with pytest.raises(ssl.SSLCertVerificationError):
        await dial(impostor.url, provider.site().client_context())
    assert not impostor.seen
    await impostor.server.close()


async def test_a_site_cannot_pose_as_the_provider(provider: Provider) -> None:
    """R11: a stolen certificate of a site opens no trap for others."""
    trap = Provider(provider.folder)
    await trap.start(provider.site())
    with pytest.raises(ssl.SSLCertVerificationError):
        await dial(trap.url, provider.site().client_context())
    await trap.server.close()


async def test_a_server_under_another_name_is_refused(provider: Provider) -> None:
    other = Provider(provider.folder)
    await other.start(provider.authority.service_credentials("connector", ["elsewhere.example"]))
    with pytest.raises(ssl.SSLCertVerificationError):
        await dial(other.url, provider.site().client_context())
    await other.server.close()


async def test_another_enterprise_is_refused_and_learns_nothing(provider: Provider) -> None:
    """R11: valid credentials of B open nothing of A's."""
    error = await refused(provider, provider.site("brit-uk"))
    assert isinstance(error, ForbiddenError) and "opens nothing here" in str(error)
    assert ENTERPRISE not in str(error)


async def test_a_revoked_certificate_is_refused(provider: Provider) -> None:
    site = provider.site()
    provider.revoked.add(site.peer.serial)
    error = await refused(provider, site)
    assert isinstance(error, ForbiddenError) and "revoked" in str(error)


async def test_revoking_closes_the_sessions_that_stand(provider: Provider) -> None:
    site, other = provider.site(), provider.site()
    async with (
        await dial(provider.url, site.client_context()) as session,
        await dial(provider.url, other.client_context()) as bystander,
    ):
        while len(provider.server.sessions) < 2:
            await asyncio.sleep(0.01)
        provider.revoked.add(site.peer.serial)
        provider.server.revoke(site.peer.serial)
        assert "revoked" in await asyncio.wait_for(session.wait_closed(), 5)
        assert not bystander.reason


async def test_an_expired_certificate_is_refused(provider: Provider) -> None:
    past = Authority.open(
        provider.folder / "ca", "provider", clock_ns=lambda: time.time_ns() - 100 * 86_400 * SECOND_NS
    )
    key, csr = new_key_and_csr()
    await refused(provider, Credentials(key, past.issue_site(csr, ENTERPRISE, "x").certificate, past.certificate))


async def test_a_session_ends_with_its_certificate(provider: Provider) -> None:
    """A link that is never cut does not outlive its certificate."""
    site = provider.site(life=timedelta(seconds=2))
    async with await dial(provider.url, site.client_context()) as session:
        assert "expired" in await asyncio.wait_for(session.wait_closed(), 5)


async def test_who_has_no_certificate_is_refused(provider: Provider) -> None:
    with pytest.raises(OSError, match=r"certificate required|closed"):
        await dial(provider.url, trust_context(provider.authority.certificate))
    assert not provider.seen
    await provider.works()


async def test_tls_1_2_is_refused(provider: Provider) -> None:
    context = provider.site().client_context()
    assert await asyncio.to_thread(_handshake, provider.server.port, context) is None
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert isinstance(await asyncio.to_thread(_handshake, provider.server.port, context), ssl.SSLError)
    await provider.works()


def _handshake(port: int, context: ssl.SSLContext) -> Exception | None:
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as plain:
            context.wrap_socket(plain, server_hostname="127.0.0.1").close()
    except OSError as error:
        return error
    return None


@pytest.mark.parametrize("path", ["/", "/link/x", "/v1/sites"])
async def test_there_is_nothing_but_the_link(provider: Provider, path: str) -> None:
    context = provider.site().client_context()
    with pytest.raises(InvalidStatus) as caught:
        await connect(provider.url.replace("/link", path), ssl=context, subprotocols=["dr-cloud-link.1"], proxy=None)  # type: ignore[list-item]
    assert caught.value.response.status_code == 404


async def test_another_version_of_the_link_is_refused(provider: Provider) -> None:
    context = provider.site().client_context()
    for protocols in (None, ["dr-cloud-link.2"]):
        with pytest.raises(WebSocketException):
            await connect(provider.url, ssl=context, subprotocols=protocols, proxy=None)  # type: ignore[arg-type]
    assert not provider.seen


async def test_frames_are_not_compressed_and_a_large_message_is_refused(provider: Provider) -> None:
    context = provider.site().client_context()
    options: dict[str, Any] = {"ssl": context, "subprotocols": ["dr-cloud-link.1"], "proxy": None}
    async with connect(provider.url, compression="deflate", **options) as raw:
        assert raw.response is not None and "Sec-WebSocket-Extensions" not in raw.response.headers
        await raw.send(bytes(70_000))
        with pytest.raises(ConnectionClosed, match="1009"):
            while True:
                await raw.recv()
    await provider.works()


@pytest.mark.parametrize("garbage", [b"GET /link HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(400), b""])
async def test_strangers_do_not_disturb(provider: Provider, garbage: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", provider.server.port)
    writer.write(garbage)
    await provider.works()
    writer.write_eof()
    await asyncio.wait_for(reader.read(), 15)
    writer.close()


async def test_closing_the_server_tells_the_sites(provider: Provider) -> None:
    async with await dial(provider.url, provider.site().client_context()) as session:
        while not provider.server.sessions:
            await asyncio.sleep(0.01)
        await asyncio.wait_for(provider.server.close("going down for a moment"), 10)
        assert "going down for a moment" in await session.wait_closed()
        with pytest.raises(OSError):
            await dial(provider.url, provider.site().client_context())


@pytest.mark.parametrize("url", ["https://localhost/link", "ws://localhost:1/link", "nonsense", "wss://"])
async def test_a_wrong_url_says_how_to_write_one(provider: Provider, url: str) -> None:
    with pytest.raises(DrCloudError, match="no link can be made"):
        await dial(url, provider.site().client_context())


async def test_the_link_is_not_served_to_the_unproven(provider: Provider) -> None:
    context = provider.authority.service_credentials("connector", ["localhost"]).server_context(clients=False)
    with pytest.raises(ValueError, match="client certificates"):
        await serve("127.0.0.1", 0, context, provider.on_session, provider.admit)
