"""TLS contexts from a folder of PEM files, named as libnbd, nbdkit and qemu name them.

    ca-cert.pem                       who is trusted to vouch for the other end
    server-cert.pem, server-key.pem   the server's own
    client-cert.pem, client-key.pem   the client's own (optional)

Only TLS 1.3 is spoken.
"""

from __future__ import annotations

import ssl
from pathlib import Path


def server_context(folder: str | Path, *, require_client_certificate: bool = False) -> ssl.SSLContext:
    """Make a server's context. With a `ca-cert.pem`, a client certificate is asked for, and verified where given.

    Args:
        folder: Where the files are.
        require_client_certificate: Refuse clients without one.

    Raises:
        OSError: A file is missing or no PEM.
    """
    folder = Path(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    authority = folder / "ca-cert.pem"
    if require_client_certificate or authority.exists():
        context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_REQUIRED if require_client_certificate else ssl.CERT_OPTIONAL
    return context


def client_context(folder: str | Path, *, check_hostname: bool = True) -> ssl.SSLContext:
    """Make a client's context. The server must be vouched for by `ca-cert.pem`.

    Args:
        folder: Where the files are.
        check_hostname: Also compare the host name; off for unix sockets, which have none.

    Raises:
        OSError: A file is missing or no PEM.
    """
    folder = Path(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = check_hostname
    context.load_verify_locations(folder / "ca-cert.pem")
    if (folder / "client-cert.pem").exists():
        context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    return context
