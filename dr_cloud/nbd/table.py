"""Which exports a server has, and who may see them.

A hidden export answers exactly as a missing one does. The table may change while servers run: a new export can be
opened at once; removing one closes its connections and returns when the last call into it has ended.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import structlog

from dr_cloud.nbd.export import Export

log = structlog.get_logger(__name__)


class Peer(NamedTuple):
    """Who is at the other end of a connection, as far as the transport proves it."""

    address: str
    """`host:port`, or `unix`."""
    pid: int | None = None
    uid: int | None = None
    gid: int | None = None
    """Of the process that connected to a unix socket, from the kernel."""
    tls: bool = False
    subject: str = ""
    """Subject of the verified client certificate, as `commonName=…,organizationName=…`; empty if there is none."""
    names: tuple[str, ...] = ()
    """Its subject alternative names, as `DNS:…`, `URI:…`, `IP Address:…`."""


Allow = Callable[[Peer, str], bool]
"""May this peer see and use the export of this name?"""


class ExportTable:
    """The exports of a server by name, with an optional rule on who may see which."""

    def __init__(self, allow: Allow | None = None) -> None:
        self._allow = allow
        self._exports: dict[str, Export] = {}
        self.on_remove: list[Callable[[Export], Awaitable[None]]] = []
        """Servers put here what closes their connections to an export."""

    def add(self, export: Export) -> None:
        """Offer an export from now on.

        Raises:
            ValueError: The name is taken.
        """
        if export.name in self._exports:
            raise ValueError(f"an export named {export.name!r} is already served; remove it first")
        self._exports[export.name] = export

    async def remove(self, name: str) -> None:
        """Stop offering an export, close its connections, and return when no call into it is under way.

        Raises:
            KeyError: There is none of this name.
        """
        export = self._exports.pop(name)
        for close in self.on_remove:
            await close(export)

    def visible(self, peer: Peer) -> list[Export]:
        """Return the exports that `peer` may see, by name."""
        return [export for name, export in sorted(self._exports.items()) if self._allowed(peer, name)]

    def find(self, name: str, peer: Peer) -> Export | None:
        """Return an export, or None if it is missing or hidden from `peer`."""
        export = self._exports.get(name)
        return export if export is not None and self._allowed(peer, name) else None

    def _allowed(self, peer: Peer, name: str) -> bool:
        if self._allow is None:
            return True
        try:
            return self._allow(peer, name) is True
        except Exception:
            # A rule that breaks is a no: nothing is opened because of a fault.
            log.exception("nbd.allow_failed", export=name, peer=peer.address)
            return False
