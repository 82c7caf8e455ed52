"""An NBD server in a thread of its own, and certificates, for tests that run outside clients against it."""

from __future__ import annotations

import asyncio
import datetime
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dr_cloud.nbd.server import NbdServer
from dr_cloud.nbd.table import ExportTable


@contextmanager
def serving(table: ExportTable, unix_path: Path, **options: Any) -> Iterator[NbdServer]:
    """Serve `table` on a unix socket and on TCP until the block ends."""
    loop = uvloop.new_event_loop()
    server = NbdServer(table, **options)
    started: list[BaseException | None] = []
    ready = threading.Event()
    stop = asyncio.Event()

    async def run() -> None:
        try:
            await server.start(unix_path=str(unix_path), host="127.0.0.1")
            started.append(None)
        except BaseException as error:
            started.append(error)
            return
        finally:
            ready.set()
        await stop.wait()
        await server.close(1)

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        assert ready.wait(10)
        if started[0] is not None:
            raise started[0]
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        assert not thread.is_alive(), "the server does not end"
        loop.close()


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def make_certificates(folder: Path, enterprise: str = "acme") -> Path:
    """Make an authority, a server certificate for localhost and a client certificate for `enterprise`."""
    folder.mkdir(parents=True)
    now = datetime.datetime.now(datetime.UTC)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority of {enterprise}")])

    def issue(name: x509.Name, key: ec.EllipticCurvePrivateKey, *extensions: Any) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(authority_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(authority_key, hashes.SHA256())

    authority = issue(authority_name, authority_key, x509.BasicConstraints(ca=True, path_length=0))
    (folder / "ca-cert.pem").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    for role, name, usage, names in (
        ("server", "localhost", ExtendedKeyUsageOID.SERVER_AUTH, [x509.DNSName("localhost")]),
        ("client", enterprise, ExtendedKeyUsageOID.CLIENT_AUTH, [x509.DNSName(f"{enterprise}.example")]),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = issue(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
            key,
            x509.BasicConstraints(ca=False, path_length=None),
            x509.SubjectAlternativeName(names),
            x509.ExtendedKeyUsage([usage]),
        )
        (folder / f"{role}-cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        _write_key(folder / f"{role}-key.pem", key)
    return folder
