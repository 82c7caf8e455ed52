"""NBD addresses: `nbd://host:port/name`, `nbds://…`, `nbd+unix:///name?socket=/path`, `nbds+unix:///…`.

`tls-certificates=DIR` in the query of the two TLS forms names the folder with the certificates, as for libnbd.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from dr_cloud.nbd.protocol import DEFAULT_PORT


class NbdUri(NamedTuple):
    """Where an export is."""

    name: str
    """Of the export; empty for the server's default."""
    unix_path: str | None
    """Path of the unix socket; None for TCP."""
    host: str
    port: int
    tls: bool
    certificates: str | None
    """Folder of the TLS certificates."""


def parse_uri(uri: str) -> NbdUri:
    """Take an NBD URI apart.

    Raises:
        ValueError: It is none; the message says why.
    """
    parts = urlsplit(uri)
    scheme, _, kind = parts.scheme.partition("+")
    if scheme not in ("nbd", "nbds") or kind not in ("", "unix"):
        raise ValueError(f"{uri!r} is not an NBD address: use nbd://host:port/name or nbd+unix:///name?socket=/path")
    query = parse_qs(parts.query)
    name = unquote(parts.path.removeprefix("/"))
    certificates = query.get("tls-certificates", [None])[0]
    if kind == "unix":
        if "socket" not in query:
            raise ValueError(f"{uri!r} names no socket: add ?socket=/path")
        return NbdUri(name, query["socket"][0], "", 0, scheme == "nbds", certificates)
    return NbdUri(name, None, parts.hostname or "localhost", parts.port or DEFAULT_PORT, scheme == "nbds", certificates)
