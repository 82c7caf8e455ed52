"""A copy-on-write layer over a stack's disk or a part of it, served over NBD by qemu-nbd; the stack is only read."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from dr_cloud.nbd.client import NbdClient
from dr_cloud.nbd.uri import parse_uri
from dr_cloud.recovery.probes.errors import CannotRunError

EXPORT: Final = "disk"
_START_SECONDS: Final = 20.0
_UNMOUNT_TRIES: Final = 20


def wait_for(process: subprocess.Popen[Any], there: Callable[[], bool], what: str) -> None:
    """Wait until a program that was started is of use.

    Raises:
        FailedError: It has ended, or takes too long.
    """
    deadline = time.monotonic() + _START_SECONDS
    while not there():
        if process.poll() is not None:
            raise CannotRunError(
                f"{what} could not be reached: its server or driver has ended with {process.returncode}"
            )
        if time.monotonic() > deadline:
            raise CannotRunError(f"{what} could not be reached within {_START_SECONDS:g} s")
        time.sleep(0.005)


class Servers:
    """Starts the servers of disks, in the mounts that are left to them (see `inside.py`)."""

    def __init__(self, mounts: int) -> None:
        self._mounts = mounts

    def start(self, *words: str | Path) -> subprocess.Popen[bytes]:
        """Start one."""
        return subprocess.Popen(
            [*self._there(), *map(str, words)],
            stdin=subprocess.DEVNULL,
            pass_fds=[self._mounts],
            # Python ignores SIGXFSZ, and so shall they: a full layer is an I/O error and no sudden death.
            restore_signals=False,
        )

    def unmount(self, folder: Path) -> None:
        """Unmount what a server has mounted."""
        unmount(folder, self._there(), [self._mounts])

    def _there(self) -> list[str]:
        return ["nsenter", f"--mount=/proc/self/fd/{self._mounts}", "--"]


def unmount(folder: Path, there: Sequence[str] = (), files: Sequence[int] = ()) -> None:
    """Unmount, when it is no longer busy."""
    for _ in range(_UNMOUNT_TRIES):
        command = [*there, "umount", str(folder)]
        if subprocess.run(command, stderr=subprocess.DEVNULL, pass_fds=files, check=False).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run([*there, "umount", "--lazy", str(folder)], pass_fds=files, check=False)


def start_layer(
    servers: Servers, uri: str, start_bytes: int, size_bytes: int, folder: Path, name: str
) -> tuple[subprocess.Popen[bytes], Path]:
    """Serve a layer; return the server and its socket. What is written goes to an unnamed file in `folder`."""
    changes, socket = folder / f"{name}.qcow2", folder / f"{name}.sock"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", changes, str(size_bytes)],
        check=True,
        stdin=subprocess.DEVNULL,
        restore_signals=False,
    )
    source, more = _source(uri)
    node = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(changes)},
        "backing": {
            "driver": "raw",
            "read-only": True,
            "offset": start_bytes,
            "size": size_bytes,
            "file": {"driver": "nbd", "read-only": True, **source},
        },
    }
    server = servers.start(
        *("qemu-nbd", "--persistent", "--shared=8", "--cache=unsafe", "--discard=unmap"),
        *("--export-name", EXPORT, "--socket", str(socket), *more, f"json:{json.dumps(node)}"),
    )
    wait_for(server, lambda: _answers(layer_uri(socket)), f"the disk at {uri.split('?')[0]}")
    changes.unlink()
    return server, socket


def _answers(uri: str) -> bool:
    """Return whether the server has opened its disk: its socket is there before."""
    try:
        NbdClient.connect(uri, timeout_seconds=_START_SECONDS).close()
    except OSError:
        return False
    return True


def layer_uri(socket: Path) -> str:
    """Return the NBD address of a layer."""
    return f"nbd+unix:///{EXPORT}?socket={quote(str(socket))}"


def _source(uri: str) -> tuple[dict[str, Any], list[str]]:
    """Return an NBD address in QEMU's words, and the options that come with it."""
    address = parse_uri(uri)
    source: dict[str, Any] = {"export": address.name}
    more: list[str] = []
    if address.unix_path is not None:
        source["server"] = {"type": "unix", "path": address.unix_path}
    else:
        source["server"] = {"type": "inet", "host": address.host, "port": str(address.port)}
    if address.tls:
        if address.certificates is None:
            raise CannotRunError("a TLS address needs certificates: add ?tls-certificates=DIR")
        source["tls-creds"] = "tls"
        more = ["--object", f"tls-creds-x509,id=tls,endpoint=client,dir={address.certificates}"]
    return source, more
