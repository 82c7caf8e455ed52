"""The object store in a local directory.

Purpose: the embedded default; a whole provider on one machine, or on a mounted file system.

Layout: object `a/b/c` is the file `<root>/a/b/c`. Folders have mode 0700, files 0600. `<root>/.partial/` holds objects
that are still being written; no key can name it.

Consistency and durability: obstore's own put neither flushes the file nor its folder, and a power cut could leave an
object that is there but short. So the put is done here, in the only safe order: write the file under a random
name, fsync it, hard-link it to its key (which fails if the key exists: that is the put-if-absent), fsync the folder.
New folders are flushed into their parents before they are used.

Crash recovery: a crash leaves either the whole object or none, and perhaps a file in `.partial/`. Opening the store
deletes such files once they are an hour old; a put that slept so long fails and is done again.
"""

from __future__ import annotations

import builtins
import errno
import os
import secrets
import time
from pathlib import Path
from typing import Final

from obstore.store import LocalStore

from dr_cloud.store.errors import ObjectExistsError, StoreUnavailableError
from dr_cloud.store.objects import ObstoreStore
from dr_cloud.store.store import Data, check_key

PARTIAL: Final = ".partial"
PARTIAL_AGE_SECONDS_MAX: Final = 3600.0
_TEMPORARY: Final = frozenset({errno.EINTR, errno.EAGAIN, errno.ENOENT, errno.EIO, errno.ETIMEDOUT, errno.ESTALE})


class LocalObjectStore(ObstoreStore):
    """A `Store` in the directory `root`, which is made if it is not there."""

    def __init__(self, root: Path) -> None:
        name = root.as_uri()
        try:
            (root / PARTIAL).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sweep(root / PARTIAL)
        except OSError as error:
            raise StoreUnavailableError(
                f"{name}: {error.strerror}", "Name a directory that this user may create and write to.", False
            ) from error
        super().__init__(LocalStore(root), name)
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
        return [entry for entry in super().list(prefix, after) if not entry[0].startswith(f"{PARTIAL}/")]

    def _failed(self, key: str, error: OSError) -> StoreUnavailableError:
        remedy = "Free space there." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return StoreUnavailableError(f"{self.name}: {key}: {error.strerror}", remedy, error.errno in _TEMPORARY)

    def _write(self, path: str, data: Data) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            rest = memoryview(data).cast("B")
            size = len(rest)
            while rest:
                rest = rest[os.write(fd, rest) :]
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


def _flush_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
