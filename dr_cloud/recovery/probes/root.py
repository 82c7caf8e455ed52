"""The files of a mounted file system, by paths as its own machine would read them: links never lead out of it."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dr_cloud.recovery.probes.errors import FailedError
from dr_cloud.recovery.probes.kernel import open_in_root

_COPY_BYTES: Final = 1 << 20


class Root:
    """An open mount point."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[io.BufferedReader]:
        """Open a regular file. Raises `FailedError` if it is missing, something else, or cannot be read."""
        with self._descriptor(path, os.O_RDONLY) as file:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise FailedError(f"{path} is not a file")
            with open(file, "rb", closefd=False) as opened:
                yield opened

    def stat(self, path: str) -> os.stat_result:
        """Return what the path leads to. Raises `FailedError`."""
        with self._descriptor(path, os.O_PATH) as file:
            return os.fstat(file)

    def real(self, path: str) -> str:
        """Return the path in the file system, without links. Raises `FailedError`."""
        with self._descriptor(path, os.O_PATH) as file:
            return "/" + os.path.relpath(os.readlink(f"/proc/self/fd/{file}"), self._folder).removeprefix("./")

    def exists(self, path: str) -> bool:
        """Return whether the path leads to something."""
        try:
            self.stat(path)
        except FailedError:
            return False
        return True

    def matching(self, pattern: str) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the files and folders whose whole path matches; `*` stands for slashes too. Links are not followed.

        Raises:
            FailedError: The folder before the first `*`, `?` or `[` is missing.
        """
        literal = pattern[: min(pattern.find(mark) if mark in pattern else len(pattern) for mark in "*?[")]
        top = "/" + literal.rpartition("/")[0].strip("/")
        with self._descriptor(top, os.O_RDONLY | os.O_DIRECTORY) as folder:
            for place, folders, names, at in os.fwalk(".", dir_fd=folder):
                for name in sorted(folders + names):
                    path = os.path.normpath(os.path.join(top, place, name))
                    if fnmatch.fnmatchcase(path, "/" + pattern.lstrip("/")):
                        yield path, os.stat(name, dir_fd=at, follow_symlinks=False)

    def copy(self, path: str, target: Path, owner: int) -> int:
        """Copy a file out; return its size. Raises `FailedError`; also if it is too large for the scratch space."""
        with self.open(path) as file, open(target, "xb") as copy:
            try:
                while data := file.read(_COPY_BYTES):
                    copy.write(data)
            except OSError as error:
                raise FailedError(f"{path} cannot be copied: {error.strerror}") from error
            os.fchown(copy.fileno(), owner, owner)
            return file.tell()

    @contextlib.contextmanager
    def _descriptor(self, path: str, flags: int) -> Iterator[int]:
        root = os.open(self._folder, os.O_PATH | os.O_DIRECTORY)
        try:
            file = open_in_root(root, path, flags)
        except OSError as error:
            raise FailedError(f"{path}: {error.strerror}") from error
        finally:
            os.close(root)
        try:
            yield file
        finally:
            os.close(file)
