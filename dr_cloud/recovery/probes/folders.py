"""Folders that go with whoever made them, and slots that few may have at once: both are locks that a death releases.

A folder is locked as long as it is in use. One that nobody holds was left by a process that was killed; the next sweep
of its place removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_LOOK_SECONDS: Final = 0.1


def make_folder(place: Path, prefix: str) -> tuple[Path, int]:
    """Return a new folder in `place` and the open lock that says that it is in use. Raises `OSError`."""
    with _held(place):
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place.absolute()))
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def sweep(place: Path, prefix: str) -> None:
    """Remove the folders with this prefix that nobody holds. Raises `OSError` if `place` cannot be read."""
    with _held(place):
        for folder in place.glob(f"{prefix}*"):
            with contextlib.suppress(OSError):
                lock = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(lock)


@contextlib.contextmanager
def slot(place: Path, count: int, stop: threading.Event) -> Iterator[None]:
    """Wait for one of `count` slots of all processes that name this `place`, and hold it; once `stop` is set, go on.

    Args:
        place: An existing folder.
        count: At least 1.
        stop: Ends the waiting.
    """
    with contextlib.ExitStack() as ends:
        while not stop.is_set() and not any(_take(place / f"slot-{number}", ends) for number in range(count)):
            stop.wait(_LOOK_SECONDS)
        yield


def _take(path: Path, ends: contextlib.ExitStack) -> bool:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    ends.callback(os.close, lock)
    return True


@contextlib.contextmanager
def _held(place: Path) -> Iterator[None]:
    """Hold the folder of folders, so that none is taken for a dead one's between its making and its lock."""
    lock = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
