"""The object store in a local directory.

Purpose: the embedded default; a whole provider on one machine, or on a mounted file system.

Layout: object `a/b/c` is the file `<root>/a/b/c`. Folders have mode 0700, files 0600. `<root>/.partial/` holds objects
that are still being written; no key can name it.

Consistency and durability: a put goes in the only safe order: write the file under a random name, fsync it, hard-link
it to its key (which fails if the key exists: that is the put-if-absent), fsync the folder. New folders are flushed into
their parents before they are used. (This is why it does not stand on obstore: its directory store flushes nothing, so
a power cut could leave an object that is there but short. Nor are its reads as fast: 140 against 20 µs for 4 KiB.)

Crash recovery: a crash leaves either the whole object or none, and perhaps a file in `.partial/`. Opening the store
deletes such files once they are an hour old; a put that slept so long fails and is done again.
"""

from __future__ import annotations

import builtins
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dr_cloud.model.errors import DrCloudError
from dr_cloud.store.errors import ObjectExistsError, ObjectMissingError, StoreUnavailableError
from dr_cloud.store.store import Data, check_key, check_prefix, check_range, parts_of

PARTIAL: Final = ".partial"
PARTIAL_AGE_SECONDS_MAX: Final = 3600.0
_PARTS_MAX: Final = 1024
"""As many as one `writev` takes."""
_TEMPORARY: Final = frozenset({errno.EINTR, errno.EAGAIN, errno.ENOENT, errno.EIO, errno.ETIMEDOUT, errno.ESTALE})


class LocalObjectStore:
    """A `Store` in the directory `root`, which is made if it is not there."""

    def __init__(self, root: Path) -> None:
        self.name = root.as_uri()
        try:
            (root / PARTIAL).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sweep(root / PARTIAL)
        except OSError as error:
            raise StoreUnavailableError(
                f"{self.name}: {error.strerror}", "Name a directory that this user may create and write to.", False
            ) from error
        self._root = str(root)
        self._durable_folders: set[str] = {self._root}

    def put_new(self, key: str, data: Data) -> None:
        """See `Store.put_new`."""
        path = f"{self._root}/{check_key(key)}"
        partial = f"{self._root}/{PARTIAL}/{secrets.token_hex(16)}"
        try:
            if os.path.exists(path):  # Spares the writing; the link below decides.
                raise FileExistsError(errno.EEXIST, "exists", path)
            self._write(partial, data)
            try:
                self._make_folder(os.path.dirname(path))
                os.link(partial, path)
            finally:
                os.unlink(partial)
            _flush_folder(os.path.dirname(path))
        except FileExistsError:
            raise ObjectExistsError(f"{self.name}: object {key} exists already") from None
        except OSError as error:
            raise self._failed(key, error) from error

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        try:
            with open(f"{self._root}/{check_key(key)}", "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                data = file.readall()
        except OSError as error:
            raise self._unread(key, error) from error
        return self._checked(key, data, size)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `Store.get_range`."""
        check_range(start, length)
        try:
            with open(f"{self._root}/{check_key(key)}", "rb", buffering=0) as file:
                length = max(0, min(length, os.fstat(file.fileno()).st_size - start))
                data = os.pread(file.fileno(), length, start)
        except OSError as error:
            raise self._unread(key, error) from error
        return self._checked(key, data, length)

    def size(self, key: str) -> int:
        """See `Store.size`."""
        try:
            found = os.stat(f"{self._root}/{check_key(key)}")
        except OSError as error:
            raise self._unread(key, error) from error
        if not stat.S_ISREG(found.st_mode):
            raise self._missing(key)
        return found.st_size

    def delete(self, key: str) -> None:
        """See `Store.delete`. The folder stays."""
        try:
            os.unlink(f"{self._root}/{check_key(key)}")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return
        except OSError as error:
            raise self._failed(key, error) from error

    def list(self, prefix: str, after: str = "") -> builtins.list[tuple[str, int]]:
        """See `Store.list`."""
        folder = check_prefix(prefix)
        try:
            found = sorted(entry for entry in self._walk(folder) if entry[0] > after)
        except OSError as error:
            raise self._failed(prefix, error) from error
        if not found and not isinstance(gone := self._missing(prefix), ObjectMissingError):
            raise gone
        return found

    def _walk(self, folder: str) -> Iterator[tuple[str, int]]:
        """Yield `(key, size)` of every object below `folder`, in no order."""
        try:
            with os.scandir(f"{self._root}/{folder}") as entries:
                found = list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in found:
            key = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                if key != PARTIAL:
                    yield from self._walk(key)
            else:
                try:
                    yield key, entry.stat().st_size
                except FileNotFoundError:
                    continue  # Deleted meanwhile.

    def _checked(self, key: str, data: bytes, length: int) -> bytes:
        if len(data) != length:
            raise StoreUnavailableError(f"{self.name}: {length} bytes of {key} asked for, {len(data)} came")
        return data

    def _missing(self, key: str) -> DrCloudError:
        """Return the error for a key without an object: callers act on "missing", so the store must be there."""
        if os.path.isdir(f"{self._root}/{PARTIAL}"):
            return ObjectMissingError(f"{self.name}: no object {key}")
        return StoreUnavailableError(f"{self.name}: the directory is gone", "Mount it again, or restore it.")

    def _unread(self, key: str, error: OSError) -> DrCloudError:
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            return self._missing(key)
        return self._failed(key, error)

    def _failed(self, key: str, error: OSError) -> StoreUnavailableError:
        remedy = "Free space there." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return StoreUnavailableError(f"{self.name}: {key}: {error.strerror}", remedy, error.errno in _TEMPORARY)

    def _write(self, path: str, data: Data) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            rest = [memoryview(part).cast("B") for part in parts_of(data)]
            size = sum(map(len, rest))
            _write_all(fd, rest)
            os.fsync(fd)
            if os.fstat(fd).st_size != size:
                raise OSError(errno.EIO, "the file has another size than was written")
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)

    def _make_folder(self, folder: str) -> None:
        """Make `folder` and those above it, each flushed into its parent once by this process."""
        if folder in self._durable_folders:
            return
        parent = os.path.dirname(folder)
        self._make_folder(parent)
        if not os.path.isdir(folder):
            try:
                os.mkdir(folder, 0o700)
            except FileExistsError:
                if not os.path.isdir(folder):
                    raise NotADirectoryError(errno.ENOTDIR, "an object has the name of this folder", folder) from None
        _flush_folder(parent)
        self._durable_folders.add(folder)

    @staticmethod
    def _sweep(folder: Path) -> None:
        oldest = time.time() - PARTIAL_AGE_SECONDS_MAX
        for file in folder.iterdir():
            try:
                if file.stat().st_mtime < oldest:
                    file.unlink()
            except FileNotFoundError:
                continue


def _write_all(fd: int, parts: builtins.list[memoryview]) -> None:
    first = 0
    while first < len(parts):
        written = os.writev(fd, parts[first : first + _PARTS_MAX])
        while first < len(parts) and written >= len(parts[first]):
            written -= len(parts[first])
            first += 1
        if written:
            parts[first] = parts[first][written:]


def _flush_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
