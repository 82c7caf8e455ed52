"""Inner connections: over a unix socket, and over TLS where only the provider's own services are let in."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dr_cloud.actors.inner import Inner
from dr_cloud.link.stream import PlainStream
from dr_cloud.model.errors import DrCloudError
from dr_cloud.seal.authority import Authority
from dr_cloud.seal.identity import Credentials, new_key_and_csr

HOST = "127.0.0.1"
FRAME = bytes(range(256)) * 8192


async def echo(stream: PlainStream) -> None:
    while (message := await stream.receive()) is not None:
        await stream.send(message)


@asynccontextmanager
async def echoing(inner: Inner, path: Path) -> AsyncIterator[str]:
    server, address = await inner.listen(path, echo)
    yield address
    server.close()


async def exchange(inner: Inner, address: str) -> None:
    stream = await inner.connect(address)
    for message in ("hello", FRAME):
        await stream.send(message)
        answer = await asyncio.wait_for(stream.receive(), 10)
        assert (answer if isinstance(answer, str) else bytes(answer or b"")) == message
    stream.end()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.open(tmp_path / "ca", "provider")


async def test_one_machine(tmp_socket_dir: Path) -> None:
    inner = Inner()
    async with echoing(inner, tmp_socket_dir / "v.sock") as address:
        assert address.startswith("unix:")
        await exchange(inner, address)


async def test_several_machines(authority: Authority, tmp_path: Path) -> None:
    """R10: between machines the provider's own streams are TLS with certificates on both ends."""
    vdsa = Inner(HOST, authority.service_credentials("vdsa", [HOST]))
    connector = Inner(HOST, authority.service_credentials("connector", [HOST]))
    async with echoing(vdsa, tmp_path / "unused") as address:
        assert address.startswith("tcp:")
        await exchange(connector, address)
        with pytest.raises(DrCloudError, match="certificate"):
            await Inner().connect(address)


def site_of(authority: Authority) -> Credentials:
    key, csr = new_key_and_csr()
    return Credentials(key, authority.issue_site(csr, "acme", "hq").certificate, authority.certificate)


def stranger_of(authority: Authority, tmp_path: Path) -> Credentials:
    """A service of another provider that has got hold of nothing but the CA's certificate."""
    other = Authority.open(tmp_path / "other", "provider").service_credentials("vdsa", [HOST])
    key_and_own = Credentials(other.key, other.certificate, other.ca)
    key_and_own.ca = authority.certificate
    return key_and_own


@pytest.mark.parametrize("who", ["site", "stranger", "nobody"])
async def test_an_enterprise_has_no_way_in_but_its_connector(authority: Authority, tmp_path: Path, who: str) -> None:
    """R6: a site's certificate, another provider's and none at all are refused; nothing that they send is read."""
    got: list[object] = []

    async def note(stream: PlainStream) -> None:
        got.append(await stream.receive())

    vdsa = Inner(HOST, authority.service_credentials("vdsa", [HOST]))
    server, address = await vdsa.listen(tmp_path / "unused", note)
    port = int(address.rpartition(":")[2])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority.certificate)
    if who != "nobody":
        mine = site_of(authority) if who == "site" else stranger_of(authority, tmp_path)
        context = mine.client_context()
    with pytest.raises((OSError, ssl.SSLError)):
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(PlainStream, HOST, port, ssl=context)
        await stream.send("hello")
        assert await asyncio.wait_for(stream.receive(), 10) is None
        raise ConnectionResetError
    await asyncio.sleep(0.05)
    assert got == []
    server.close()


async def test_a_service_is_not_fooled_by_a_sites_server(authority: Authority, tmp_path: Path) -> None:
    """R6: who is dialled must be a service too."""
    site = Inner(HOST, site_of(authority))
    server, address = await site.listen(tmp_path / "unused", echo)
    with pytest.raises(OSError):
        stream = await Inner(HOST, authority.service_credentials("connector", [HOST])).connect(address)
        await stream.send("hello")
    server.close()
