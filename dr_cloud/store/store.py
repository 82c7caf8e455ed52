"""What the rest of the project asks of an object store.

Purpose: a flat map from keys to immutable objects, small enough that S3, a directory and memory all do the same.

Consistency: an object is created whole or not at all, once; it never changes. After `put_new` returned, the object is
durable and every reader sees it, in `list` as well. Of several `put_new` of one key exactly one succeeds.

Checks: before a request the key's letters and the range; after it the length of what came against the length the store
tells. What the bytes say is checked by those who sealed them (`dr_cloud.journal`).

Retries: none in an implementation; `dr_cloud.store.retry` does them all in one place.

Threads: every method blocks and may be called from any thread at any time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Protocol

from dr_cloud.model.errors import DrCloudError

Buffer = bytes | bytearray | memoryview
Data = Buffer | Sequence[Buffer]
"""An object's bytes, in one or many parts."""

KEY_LENGTH_MAX: Final = 512
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


class Store(Protocol):
    """An object store. Keys are folders and a name with slashes between, like `acme/vpg1/dc1/writers/0000000001`.

    Every method raises `StoreUnavailableError` if the store fails, and `DrCloudError` for a key that cannot be used.
    """

    def put_new(self, key: str, data: Data) -> None:
        """Create the object `key`; durable on return. `ObjectExistsError` if it is there, whatever its bytes.

        Writers that race for one key must put different bytes, so that each can tell whose object won.
        """
        ...

    def get(self, key: str) -> bytes:
        """Return the whole object; `ObjectMissingError` if there is none."""
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return up to `length` (> 0) bytes from `start`: fewer where the object ends, none from its end on.

        `ObjectMissingError` if there is no such object.
        """
        ...

    def size(self, key: str) -> int:
        """Return the object's size in bytes; `ObjectMissingError` if there is none."""
        ...

    def delete(self, key: str) -> None:
        """Delete the object, if it is there."""
        ...

    def list(self, prefix: str, after: str = "") -> list[tuple[str, int]]:
        """Return `(key, size in bytes)` of every object in the folder `prefix` and below whose key is > `after`.

        Sorted by key. `prefix` is whole folders (`a/b` does not hold `a/bc`), the empty string is the whole store.
        For recovery and housekeeping; never in the data path.
        """
        ...


def check_key(key: str) -> str:
    """Return `key` if it can be used on every store; else raise `DrCloudError`."""
    if len(key) > KEY_LENGTH_MAX or not _KEY.fullmatch(key):
        raise DrCloudError(
            f"object key {key[:80]!r} cannot be used",
            f"Use at most {KEY_LENGTH_MAX} of letters, digits, '.', '_', '-', with '/' between folders, "
            "and begin every part with a letter or digit.",
        )
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` without a slash at its end; `DrCloudError` if it is neither empty nor made of folders."""
    folder = prefix.removesuffix("/")
    return check_key(folder) if folder else ""


def parts_of(data: Data) -> Sequence[Buffer]:
    """Return an object's bytes in parts."""
    return (data,) if isinstance(data, bytes | bytearray | memoryview) else data


def check_range(start: int, length: int) -> None:
    """Raise `ValueError` if the range is none: that is a bug of the caller."""
    if start < 0 or length < 1:
        raise ValueError(f"no range: {length} bytes from {start}")
