"""The peers: other NBD servers on the same data, started and stopped."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dr_cloud.model.errors import DrCloudError

START_SECONDS_MAX: Final = 10.0
PACKAGES: Final = {
    "fio": "fio",
    "nbdkit": "nbdkit",
    "qemu-nbd": "qemu-utils",
    "qemu-img": "qemu-utils",
    "nbdcopy": "libnbd-bin",
}


def check_programs() -> None:
    """Raise `DrCloudError` that tells how to install what is missing."""
    missing = [program for program in PACKAGES if not shutil.which(program)]
    if missing:
        packages = sorted({PACKAGES[program] for program in missing})
        raise DrCloudError(
            f"cannot measure without {', '.join(missing)}",
            f"Run `make tools`, or: sudo apt-get install -y {' '.join(packages)}",
        )


@contextlib.contextmanager
def nbdkit_memory(size_bytes: int, socket: Path) -> Iterator[str]:
    """Serve a disk in memory; gives its URI."""
    with _serving(["nbdkit", "-f", "-U", str(socket), "memory", str(size_bytes)], socket) as uri:
        yield uri


@contextlib.contextmanager
def nbdkit_null(size_bytes: int, socket: Path) -> Iterator[str]:
    """Serve a disk that answers every request and does nothing, in one thread; gives its URI.

    What fio reaches with it is as far as any server gets on this machine.
    """
    with _serving(["nbdkit", "-f", "-t", "1", "-U", str(socket), "null", str(size_bytes)], socket) as uri:
        yield uri


@contextlib.contextmanager
def nbdkit_file(path: Path, socket: Path) -> Iterator[str]:
    """Serve a raw file; gives its URI."""
    with _serving(["nbdkit", "-f", "-U", str(socket), "file", str(path)], socket) as uri:
        yield uri


@contextlib.contextmanager
def qemu_nbd(path: Path, image_format: str, socket: Path) -> Iterator[str]:
    """Serve an image; gives its URI."""
    command = ["qemu-nbd", "--persistent", "--shared=0", "-k", str(socket), "-f", image_format, str(path)]
    with _serving(command, socket) as uri:
        yield uri


def make_overlay(backing: Path, overlay: Path) -> None:
    """Make an empty qcow2 overlay over a raw image."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(backing), str(overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DrCloudError(f"qemu-img failed: {done.stderr.strip()}")


def copy(source: str, destination: str) -> None:
    """Copy a whole disk between files and NBD URIs."""
    done = subprocess.run(["nbdcopy", source, destination], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DrCloudError(f"nbdcopy failed: {done.stderr.strip()}")


@contextlib.contextmanager
def _serving(command: list[str], socket: Path) -> Iterator[str]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS_MAX
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise DrCloudError(f"{command[0]} did not start: {process.communicate()[1].decode().strip()[-500:]}")
            time.sleep(0.02)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.terminate()
        try:
            process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        socket.unlink(missing_ok=True)
