"""The cheapest VDSA there can be, a process of its own: `python -m bench.drain SOCKET`.

It reads a tap's feed, keeps nothing, and calls everything durable. It prints a line when it listens, and one at the end
of a synchronisation.
"""

from __future__ import annotations

import socket
import sys
import time
from typing import Final

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.tap import wire

MARK_SECONDS: Final = 0.05
_MARK: Final = wire.HEAD.pack(wire.MARK, 0, 0, 0, 0, 0, 0, 1)


def follow(connection: socket.socket) -> None:
    """Read one tap's feed to its end."""
    buffer = bytearray(4 << 20)
    view = memoryview(buffer)
    held = skip = 0
    marked_at = 0.0
    connection.settimeout(MARK_SECONDS)
    while True:
        now = time.monotonic()
        if now - marked_at >= MARK_SECONDS:
            connection.sendall(_MARK)
            marked_at = now
        try:
            count = connection.recv_into(view[held:])
        except TimeoutError:
            continue
        if not count:
            return
        end = held + count
        at = skip
        while at + wire.HEAD_BYTES <= end:
            kind, _, _, length, sequence, _, _, _ = wire.HEAD.unpack_from(buffer, at)
            at += wire.HEAD_BYTES
            if kind == wire.WRITE:
                at += length * BLOCK_SIZE
            elif kind == wire.HELLO:
                at += length
            elif kind == wire.MARKED:
                connection.sendall(wire.HEAD.pack(wire.DURABLE, 0, 0, 0, sequence, 0, 0, 0))
            elif kind == wire.SYNC_END:
                print("in sync", flush=True)
        skip = max(at - end, 0)
        held = max(end - at, 0)
        buffer[:held] = buffer[at : at + held]


def main(path: str) -> None:
    """Serve one tap after the other."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    print("drain ready", flush=True)
    while True:
        connection, _ = listening.accept()
        with connection:
            follow(connection)


if __name__ == "__main__":
    main(sys.argv[1])
