"""Retries of object requests: all of them, in this one place.

What is retried: `StoreUnavailableError` that says it is temporary; never "missing" or "exists", which are answers.
Bounded by attempts and by time, with exponential waits and jitter; each retry is logged.

The put whose answer was lost: the object may be there although the put failed, and then the next try says "exists".
So after a put failed, "exists" is compared: the same bytes mean that it was ours. This holds also when the retries of
one call were used up and the caller asks again later with the same bytes. Writers that race for a key must therefore
put different bytes (`Store.put_new`).
"""

from __future__ import annotations

import builtins
import hashlib
from typing import Final

import stamina

from dr_cloud.store.errors import ObjectExistsError, ObjectMissingError, StoreUnavailableError
from dr_cloud.store.store import Data, Store, parts_of

ATTEMPTS_MAX: Final = 6
SECONDS_MAX: Final = 60.0


def _digest(data: Data) -> bytes:
    digest = hashlib.sha256()
    for part in parts_of(data):
        digest.update(part)
    return digest.digest()


def _is_temporary(error: Exception) -> bool:
    return isinstance(error, StoreUnavailableError) and error.temporary


class RetryingStore:
    """A `Store` that tries again where `inner` fails for a while. `wait_seconds` is the first wait; it doubles."""

    def __init__(
        self,
        inner: Store,
        *,
        attempts_max: int = ATTEMPTS_MAX,
        seconds_max: float = SECONDS_MAX,
        wait_seconds: float = 0.1,
    ) -> None:
        self._inner = inner
        self._unsure: set[tuple[str, bytes]] = set()
        self._retried = stamina.RetryingCaller(
            attempts=attempts_max,
            timeout=seconds_max,
            wait_initial=wait_seconds,
            wait_max=50 * wait_seconds,
            wait_jitter=wait_seconds,
        ).on(_is_temporary)

    def put_new(self, key: str, data: Data) -> None:
        """See `Store.put_new`."""
        self._retried(self._put_once, key, data)

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        return self._retried(self._inner.get, key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `Store.get_range`."""
        return self._retried(self._inner.get_range, key, start, length)

    def size(self, key: str) -> int:
        """See `Store.size`."""
        return self._retried(self._inner.size, key)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        self._retried(self._inner.delete, key)

    def list(self, prefix: str, after: str = "") -> builtins.list[tuple[str, int]]:
        """See `Store.list`."""
        return self._retried(self._inner.list, prefix, after)

    def _put_once(self, key: str, data: Data) -> None:
        try:
            self._inner.put_new(key, data)
        except StoreUnavailableError:
            self._unsure.add((key, _digest(data)))
            raise
        except ObjectExistsError:
            ours = (key, _digest(data))
            if ours not in self._unsure:
                raise
            held = self._holds(key, data)
            self._unsure.discard(ours)
            if not held:
                raise
        else:
            if self._unsure:
                self._unsure.discard((key, _digest(data)))

    def _holds(self, key: str, data: Data) -> bool:
        try:
            parts = parts_of(data)
            return self._inner.size(key) == sum(map(len, parts)) and self._inner.get(key) == b"".join(parts)
        except ObjectMissingError:
            return False
