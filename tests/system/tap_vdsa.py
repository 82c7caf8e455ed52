"""A receiving VDSA in a process of its own, so that it can be stopped and killed: `tap_vdsa.py SOCKET FOLDER [HOLD]`.

It writes the feed of one copy into `FOLDER/replica-<disk>`, answers DURABLE for what it has written, and notes every
record of a synchronisation in `FOLDER/sync`, one line each: `W|Z disk block count`; also `BEGIN` and `END`. Each HELLO
goes to `FOLDER/hello`, one line each. With HOLD it holds a barrier each 50 ms: `release` lets go as soon as it is held,
`keep` never does; the answers go to `FOLDER/held`, one line each: their type and whether they said EXPIRED.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.journal import Disk
from dr_cloud.tap import wire
from dr_cloud.tap.disk import FileDisk

MARK_SECONDS = 0.05
AHEAD_NS = 5_000_000


def ask(connection: socket.socket, lock: threading.Lock, hold: str) -> None:
    """Send a MARK now and then: its answer says up to where the writes are whole. And a HOLD, if there are to be."""
    with contextlib.suppress(OSError):
        while True:
            time.sleep(MARK_SECONDS)
            with lock:
                connection.sendall(wire.HEAD.pack(wire.MARK, 0, 0, 0, 0, 0, 0, 1))
                if hold:
                    connection.sendall(wire.HEAD.pack(wire.HOLD, 0, 0, 0, 0, time.time_ns() + AHEAD_NS, 0, 2))


def follow(
    stream: BinaryIO, connection: socket.socket, lock: threading.Lock, folder: Path, log: int, hold: str
) -> None:
    held = os.open(folder / "held", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    replicas: dict[int, tuple[int, FileDisk]] = {}
    while len(head := stream.read(wire.HEAD_BYTES)) == wire.HEAD_BYTES:
        kind, flags, disk, count, sequence, _, block, _ = wire.HEAD.unpack(head)
        if kind == wire.HELLO:
            hello = wire.Hello.model_validate_json(stream.read(count))
            with (folder / "hello").open("a") as file:
                file.write(f"{hello.server} {hello.copy_number} {[tuple(disk) for disk in map(sizes, hello.disks)]}\n")
            for known in hello.disks:
                path = folder / f"replica-{known.index}"
                fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                os.truncate(fd, -(-known.size_bytes // BLOCK_SIZE) * BLOCK_SIZE)
                replicas[known.index] = (fd, FileDisk(path))
        elif kind == wire.WRITE:
            body = stream.read(count * BLOCK_SIZE)
            if len(body) < count * BLOCK_SIZE:
                return
            os.pwrite(replicas[disk][0], body, block * BLOCK_SIZE)
        elif kind == wire.ZERO:
            replicas[disk][1].zero_blocking(block * BLOCK_SIZE, count * BLOCK_SIZE, True)
        elif kind == wire.MARKED:
            with lock:
                connection.sendall(wire.HEAD.pack(wire.DURABLE, 0, 0, 0, sequence, 0, 0, 0))
        elif kind in (wire.HELD, wire.RELEASED):
            os.write(
                held, f"{'held' if kind == wire.HELD else 'released'} {bool(flags & wire.FLAG_EXPIRED)}\n".encode()
            )
            if kind == wire.HELD and hold == "release":
                with lock:
                    connection.sendall(wire.HEAD.pack(wire.RELEASE, 0, 0, 0, 0, 0, 0, 2))
        else:
            os.write(log, b"BEGIN\n" if kind == wire.SYNC_BEGIN else b"END\n")
        if flags & wire.FLAG_SYNC:
            os.write(log, f"{'W' if kind == wire.WRITE else 'Z'} {disk} {block} {count}\n".encode())


def sizes(disk: Disk) -> tuple[int, str, int]:
    return disk.index, disk.name, disk.size_bytes


def serve(connection: socket.socket, folder: Path, log: int, hold: str) -> None:
    lock = threading.Lock()
    threading.Thread(target=ask, args=(connection, lock, hold), daemon=True).start()
    with contextlib.suppress(OSError), connection.makefile("rb", buffering=1 << 20) as stream:
        follow(stream, connection, lock, folder, log, hold)
    connection.close()


def main(address: str, folder: Path, hold: str = "") -> None:
    log = os.open(folder / "sync", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    Path(address).unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    while True:
        serve(listening.accept()[0], folder, log, hold)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
