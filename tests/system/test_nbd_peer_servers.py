"""Our clients against servers that others wrote, and against ours: the same calls, the same answers."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from nbd_serving import make_certificates, serving

from dr_cloud.model.errors import DrCloudError
from dr_cloud.nbd.async_client import AsyncNbdClient
from dr_cloud.nbd.client import NbdClient
from dr_cloud.nbd.memory import MemoryExport
from dr_cloud.nbd.table import ExportTable
from dr_cloud.nbd.tls import client_context

pytestmark = pytest.mark.system
DISK_BYTES = 64 << 20


def started(command: list[str], socket_path: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while not socket_path.exists():
        assert process.poll() is None and time.monotonic() < deadline, command
        time.sleep(0.02)
    time.sleep(0.05)
    return process


def ended(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(10)


@pytest.fixture(params=["ours", "nbdkit", "nbdkit-old", "qemu-nbd"])
def uri(
    request: pytest.FixtureRequest, tmp_socket_dir: Path, tmp_path: Path, require_tool: Callable[[str], str]
) -> Iterator[str]:
    path = tmp_socket_dir / "s"
    if request.param == "ours":
        table = ExportTable()
        table.add(MemoryExport("disk", DISK_BYTES))
        with serving(table, path) as server:
            yield server.uris("disk")[0]
        return
    if request.param == "qemu-nbd":
        raw = tmp_path / "raw"
        raw.touch()
        os.truncate(raw, DISK_BYTES)
        command = [require_tool("qemu-nbd"), "-k", str(path), "-f", "raw", "-t", "-e", "4", "-x", "disk", str(raw)]
    else:
        # --no-sr: neither structured replies nor block status.
        old = ["--no-sr"] if request.param == "nbdkit-old" else []
        command = [require_tool("nbdkit"), "-f", *old, "-U", str(path), "memory", str(DISK_BYTES)]
    process = started(command, path)
    try:
        yield f"nbd+unix:///disk?socket={path}"
    finally:
        ended(process)


def test_blocking_client(uri: str) -> None:
    data = os.urandom(3 << 20)
    with NbdClient.connect(uri) as client:
        assert client.size_bytes == DISK_BYTES
        client.pwrite(1 << 20, data)
        client.pwrite((1 << 20) + 512, b"f" * 512, fua=True)
        client.flush()
        assert client.pread(1 << 20, 512) == data[:512]
        assert client.pread((1 << 20) + 512, 512) == b"f" * 512
        assert client.pread((1 << 20) + 1024, len(data) - 1024) == data[1024:]
        client.write_zeroes(1 << 20, 1 << 20)
        client.write_zeroes(2 << 20, 4096, fua=True, may_trim=False)
        client.trim(3 << 20, 1 << 20)
        assert client.pread(1 << 20, (1 << 20) + 4096) == bytes((1 << 20) + 4096)
        status = client.block_status(0, DISK_BYTES)
        assert sum(extent.length for extent in status) == DISK_BYTES
        at = 0
        for extent in status:
            assert not extent.hole or client.pread(at, extent.length) == bytes(extent.length)
            at += extent.length
        assert client.info.contexts == any(extent.hole for extent in status)
        with pytest.raises(OSError) as caught:
            client.pread(DISK_BYTES, 512)
        assert caught.value.errno == errno.EINVAL
        large = os.urandom(40 << 20)  # over one request's limit
        client.pwrite(0, large)
        assert client.pread(0, len(large)) == large
    with pytest.raises(ConnectionError):
        client.pread(0, 512)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_many_requests_in_flight(uri: str, run: Callable[..., None]) -> None:
    async def work() -> None:
        client = await AsyncNbdClient.connect(uri)

        async def one(worker: int) -> None:
            for turn in range(40):
                offset = (turn * 32 + worker) * 8192
                data = os.urandom(8192)
                await client.pwrite(offset, data)
                assert await client.pread(offset, 8192) == data

        await asyncio.gather(*[one(worker) for worker in range(32)])
        await client.flush()
        large = os.urandom(40 << 20)
        await client.pwrite(0, large, fua=True)
        assert await client.pread(0, len(large)) == large
        assert sum(extent.length for extent in await client.block_status(0, DISK_BYTES)) == DISK_BYTES
        pending = [asyncio.create_task(client.pread(0, 1 << 20)) for _ in range(8)]
        await asyncio.sleep(0)
        await client.close()
        for result in await asyncio.gather(*pending, return_exceptions=True):
            assert isinstance(result, ConnectionError)

    run(work())


def test_the_server_dies(tmp_socket_dir: Path, require_tool: Callable[[str], str]) -> None:
    path = tmp_socket_dir / "k"
    process = started(
        [require_tool("nbdkit"), "-f", "-U", str(path), "--filter=delay", "memory", "1M", "rdelay=9"], path
    )
    uri = f"nbd+unix:///?socket={path}"

    async def work() -> None:
        client = await AsyncNbdClient.connect(uri)
        reads = [asyncio.create_task(client.pread(0, 512)) for _ in range(4)]
        await asyncio.sleep(0.1)
        process.kill()
        for result in await asyncio.gather(*reads, return_exceptions=True):
            assert isinstance(result, ConnectionError)
        with pytest.raises(ConnectionError):
            await client.pwrite(0, b"late")
        await client.close()

    blocking = NbdClient.connect(uri, timeout_seconds=5)
    asyncio.run(work())
    process.wait(10)
    with pytest.raises(ConnectionError):
        blocking.pread(0, 512)
    with pytest.raises(OSError):
        NbdClient.connect(uri)


def test_qemu_tells_of_a_missing_export(
    tmp_socket_dir: Path, tmp_path: Path, require_tool: Callable[[str], str]
) -> None:
    raw, path = tmp_path / "raw", tmp_socket_dir / "q"
    raw.write_bytes(bytes(4096))
    process = started([require_tool("qemu-nbd"), "-k", str(path), "-f", "raw", "-t", "-x", "disk", str(raw)], path)
    try:
        with pytest.raises(DrCloudError, match="'other'"):
            NbdClient.connect(f"nbd+unix:///other?socket={path}")
    finally:
        ended(process)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_tls_against_nbdkit(
    tmp_socket_dir: Path, tmp_path: Path, require_tool: Callable[[str], str], run: Callable[..., None]
) -> None:
    certificates = make_certificates(tmp_path / "tls")
    path = tmp_socket_dir / "k"
    secure = ["--tls=require", f"--tls-certificates={certificates}", "--tls-verify-peer"]
    process = started([require_tool("nbdkit"), "-f", "-U", str(path), *secure, "memory", "8M"], path)
    uri = f"nbds+unix:///?socket={path}"
    data = os.urandom(3 << 20)

    async def work() -> None:
        client = await AsyncNbdClient.connect(uri, tls=client_context(certificates, check_hostname=False))
        await asyncio.gather(
            *[client.pwrite(index << 16, data[index << 16 : (index + 1) << 16]) for index in range(48)]
        )
        assert await client.pread(0, len(data)) == data
        await client.close()

    try:
        run(work())
        with NbdClient.connect(f"{uri}&tls-certificates={certificates}") as client:
            assert client.pread(0, len(data)) == data
        with pytest.raises(DrCloudError):
            NbdClient.connect(uri.replace("nbds", "nbd"))
        with pytest.raises(ValueError, match="needs certificates"):
            NbdClient.connect(uri)
    finally:
        ended(process)
