"""The server as real clients see it: libnbd's tools, qemu's, fio; over a unix socket and TCP, plain and with TLS."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nbd_serving import make_certificates, serving

from dr_cloud.nbd import protocol as p
from dr_cloud.nbd.client import NbdClient
from dr_cloud.nbd.handshake import TlsMode
from dr_cloud.nbd.memory import PIECE_BYTES, MemoryExport
from dr_cloud.nbd.server import NbdServer
from dr_cloud.nbd.table import ExportTable, Peer
from dr_cloud.nbd.tls import client_context, server_context

pytestmark = pytest.mark.system
DISK_BYTES = 64 << 20
Run = Callable[..., str]


@pytest.fixture
def run(require_tool: Callable[[str], str], tmp_path: Path) -> Run:
    def call(program: str, *arguments: str, fails: bool = False) -> str:
        done = subprocess.run(
            [require_tool(program), *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    return call


@pytest.fixture
def disk() -> MemoryExport:
    return MemoryExport("disk", DISK_BYTES, description="database of acme")


@pytest.fixture
def server(disk: MemoryExport, tmp_socket_dir: Path) -> Iterator[NbdServer]:
    table = ExportTable(lambda peer, name: name != "hidden")
    table.add(disk)
    table.add(MemoryExport("ro", 1 << 20, read_only=True))
    table.add(MemoryExport("hidden", 1 << 20))
    with serving(table, tmp_socket_dir / "nbd.sock") as server:
        yield server


@pytest.fixture(params=["unix", "tcp"])
def uri(request: pytest.FixtureRequest, server: NbdServer) -> str:
    return server.uris("disk")[request.param == "tcp"]


def test_nbdinfo_sees_everything_offered(run: Run, uri: str, server: NbdServer) -> None:
    told = json.loads(run("nbdinfo", "--json", uri))
    export = told["exports"][0]
    assert told["protocol"] == "newstyle-fixed" and told["structured"] is True and told["TLS"] is False
    assert export["export-name"] == "disk" and export["description"] == "database of acme"
    assert export["export-size"] == DISK_BYTES
    assert export["contexts"] == ["base:allocation"]
    assert (export["block_size_minimum"], export["block_size_preferred"]) == (1, 4096)
    assert export["block_size_maximum"] == 32 << 20
    for feature in ("df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{feature}"] is True, feature
    assert export["is_read_only"] is False
    read_only = json.loads(run("nbdinfo", "--json", server.uris("ro")[0]))["exports"][0]
    assert read_only["is_read_only"] is True and read_only["can_trim"] is False


def test_nbdinfo_lists_what_is_allowed(run: Run, server: NbdServer) -> None:
    """R11: an export that is not allowed is not listed and cannot be told from one that is not there."""
    for address in server.addresses:
        listed = json.loads(run("nbdinfo", "--list", "--json", address))["exports"]
        assert [export["export-name"] for export in listed] == ["disk", "ro"]
    hidden = run("nbdinfo", server.uris("hidden")[0], fails=True)
    absent = run("nbdinfo", server.uris("absent")[0], fails=True)
    assert hidden.replace("hidden", "absent") == absent


def test_nbdcopy_there_and_back(run: Run, uri: str, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    with source.open("wb") as file:
        file.truncate(DISK_BYTES)
        for offset in (0, 5 << 20, 33 << 20, DISK_BYTES - 4096):
            file.seek(offset)
            file.write(os.urandom(min(3 << 20, DISK_BYTES - offset)))
    run("nbdcopy", "--flush", str(source), uri)
    run("nbdcopy", "--connections=4", uri, str(copy))
    assert source.read_bytes() == copy.read_bytes()
    mapped = json.loads(run("nbdinfo", "--map", "--json", uri))
    assert {extent["type"] for extent in mapped} == {0, 3}, "holes stay holes"


def test_maps_agree_with_what_was_written(run: Run, uri: str, disk: MemoryExport) -> None:
    disk.pwrite(PIECE_BYTES, memoryview(b"x" * 4096))
    disk.pwrite(5 * PIECE_BYTES, memoryview(b"x" * 4096))
    expected = [(0, 1, 3), (1, 1, 0), (2, 3, 3), (5, 1, 0), (6, 58, 3)]
    mapped = json.loads(run("nbdinfo", "--map", "--json", uri))
    found = [(run["offset"], run["length"], run["type"]) for run in mapped]
    assert found == [(start * PIECE_BYTES, length * PIECE_BYTES, kind) for start, length, kind in expected]
    seen = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri))
    assert [(run["start"], run["length"], run["data"]) for run in seen] == [
        (start * PIECE_BYTES, length * PIECE_BYTES, kind == 0) for start, length, kind in expected
    ]


def test_qemu_io_patterns(run: Run, uri: str, server: NbdServer) -> None:
    commands = [
        "write -P 1 0 1M", "write -f -P 2 512 512", "write -z -u 64k 64k", "discard 128k 64k", "flush",
        "aio_write -P 3 2M 1M", "aio_write -P 4 4M 64k", "aio_flush",
        "read -P 1 0 512", "read -P 2 512 512", "read -P 1 1k 63k", "read -P 0 64k 128k", "read -P 1 192k 832k",
        "read -P 3 2M 1M", "read -P 4 4M 64k", "read -P 0 8M 4M",
    ]  # fmt: skip
    arguments = [part for command in commands for part in ("-c", command)]
    # qemu-io tells a failed pattern only in its output.
    assert "Pattern verification failed" not in run("qemu-io", "-f", "raw", uri, *arguments)
    run("qemu-io", "-f", "raw", server.uris("ro")[0], "-c", "write 0 4k", fails=True)


def test_qemu_img_convert_and_compare(run: Run, uri: str, tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(os.urandom(7 << 20) + bytes(DISK_BYTES - (7 << 20)))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), uri)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, str(tmp_path / "back.qcow2"))
    assert "identical" in run("qemu-img", "compare", "-F", "qcow2", str(source), str(tmp_path / "back.qcow2"))


@pytest.mark.parametrize(("block", "depth"), [("4k", 16), ("512", 4), ("1m", 4)])
def test_fio_verifies_what_it_wrote(run: Run, uri: str, block: str, depth: int) -> None:
    size = {"4k": "16m", "512": "1m", "1m": "32m"}[block]
    run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", f"--bs={block}",
        f"--iodepth={depth}", f"--size={size}", "--verify=crc32c", "--verify_fatal=1", "--randseed=7",
    )  # fmt: skip


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls") / "acme")


def tls_uri(uri: str, certificates: Path) -> str:
    """Ask for TLS with these certificates, by the name that the server's certificate carries."""
    uri = uri if uri.startswith("nbds") else uri.replace("nbd", "nbds", 1)
    uri = uri.replace("127.0.0.1", "localhost")
    return f"{uri}{'&' if '?' in uri else '?'}tls-certificates={certificates}"


@pytest.mark.parametrize("mode", [TlsMode.ALLOW, TlsMode.REQUIRE])
def test_tls_with_libnbd(run: Run, tmp_socket_dir: Path, tmp_path: Path, certificates: Path, mode: TlsMode) -> None:
    table = ExportTable()
    table.add(MemoryExport("disk", DISK_BYTES))
    source = tmp_path / "source"
    source.write_bytes(os.urandom(DISK_BYTES))
    with serving(table, tmp_socket_dir / "s", tls=server_context(certificates), tls_mode=mode) as server:
        for address in server.uris("disk"):
            uri = tls_uri(address, certificates)
            assert json.loads(run("nbdinfo", "--json", uri))["TLS"] is True
            run("nbdcopy", str(source), uri)
            run("nbdcopy", uri, str(tmp_path / "copy"))
            assert source.read_bytes() == (tmp_path / "copy").read_bytes()
            plain = address.replace("nbds", "nbd", 1)
            if mode is TlsMode.ALLOW:
                assert json.loads(run("nbdinfo", "--json", plain))["TLS"] is False
            else:
                run("nbdinfo", plain, fails=True)
                run("nbdinfo", "--list", plain, fails=True)
            with NbdClient.connect(uri) as client:
                client.pwrite(4096, b"over TLS" * 100_000)
                assert client.pread(4096, 800_000) == b"over TLS" * 100_000


def test_tls_client_certificates(run: Run, tmp_socket_dir: Path, tmp_path: Path, certificates: Path) -> None:
    """R11: sites authenticate each other; what a certificate says decides which exports there are."""
    peers: list[Peer] = []

    def allow(peer: Peer, name: str) -> bool:
        peers.append(peer)
        return peer.subject == f"commonName={name}"

    table = ExportTable(allow)
    table.add(MemoryExport("acme", 1 << 20))
    table.add(MemoryExport("rival", 1 << 20))
    stranger = make_certificates(tmp_path / "stranger", "rival")
    shutil.copy(certificates / "ca-cert.pem", stranger / "ca-cert.pem")  # trusts the server; is not trusted by it
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    shutil.copy(certificates / "ca-cert.pem", nameless)
    context = server_context(certificates, require_client_certificate=True)
    with serving(table, tmp_socket_dir / "s", tls=context) as server:
        unix = server.uris("acme")[0]
        assert json.loads(run("nbdinfo", "--json", tls_uri(unix, certificates)))["TLS"] is True
        assert peers[-1].names == ("DNS:acme.example",) and peers[-1].tls and peers[-1].uid == os.getuid()
        run("nbdinfo", tls_uri(server.uris("rival")[0], certificates), fails=True)
        run("nbdinfo", tls_uri(unix, nameless), fails=True)
        run("nbdinfo", tls_uri(unix, stranger), fails=True)
        for folder in (stranger, nameless):
            with pytest.raises(OSError):
                NbdClient.connect(unix, tls=client_context(folder, check_hostname=False))
        with NbdClient.connect(unix, tls=client_context(certificates, check_hostname=False)) as client:
            assert client.size_bytes == 1 << 20
    impostor = server_context(make_certificates(tmp_path / "impostor"))
    with serving(table, tmp_socket_dir / "i", tls=impostor) as server, pytest.raises(OSError, match="CERTIFICATE"):
        NbdClient.connect(tls_uri(server.uris("acme")[1], certificates))


def take_acknowledgement(client: socket.socket) -> None:
    """Take the greeting and the answer to STARTTLS.

    Raises:
        ConnectionError: The server closed instead.
    """
    left = p.GREETING.size + p.OPTION_REPLY.size
    while left:
        data = client.recv(left)
        if not data:
            raise ConnectionResetError
        left -= len(data)


@pytest.mark.parametrize("after", [b"", b"\x16\x03\x01garbage instead of a hello" * 40], ids=["silence", "garbage"])
def test_tls_that_does_not_come_is_closed(tmp_socket_dir: Path, certificates: Path, after: bytes) -> None:
    """Silence or garbage: closed, and the next client is served."""
    table = ExportTable()
    table.add(MemoryExport("disk", 1 << 20))
    with serving(table, tmp_socket_dir / "s", tls=server_context(certificates), handshake_seconds_max=0.5) as server:
        with socket.socket(socket.AF_UNIX) as hostile:
            hostile.settimeout(5)
            hostile.connect(str(tmp_socket_dir / "s"))
            start = p.CLIENT_FLAGS.pack(3) + p.OPTION.pack(p.OPTION_MAGIC, p.OPT_STARTTLS, 0)
            hostile.sendall(start)
            take_acknowledgement(hostile)
            hostile.sendall(after)
            begun = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while hostile.recv(4096):
                    pass
            assert time.monotonic() - begun < 3
        with NbdClient.connect(tls_uri(server.uris("disk")[0], certificates)) as client:
            client.pwrite(0, b"served")


def test_bytes_in_the_clear_behind_starttls_are_never_taken_for_encrypted_ones(
    tmp_socket_dir: Path, certificates: Path
) -> None:
    with (
        serving(ExportTable(), tmp_socket_dir / "s", tls=server_context(certificates)),
        socket.socket(socket.AF_UNIX) as hostile,
    ):
        hostile.settimeout(5)
        hostile.connect(str(tmp_socket_dir / "s"))
        injected = p.OPTION.pack(p.OPTION_MAGIC, p.OPT_LIST, 0)
        hostile.sendall(p.CLIENT_FLAGS.pack(3) + p.OPTION.pack(p.OPTION_MAGIC, p.OPT_STARTTLS, 0) + injected)
        with pytest.raises(OSError):
            take_acknowledgement(hostile)
            client_context(certificates, check_hostname=False).wrap_socket(hostile).recv(1)
