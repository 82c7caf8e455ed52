"""Stores that misbehave on purpose, and one that counts: wrappers over any store, which compose.

They are part of the product: an operator tries with them what a failing store does to a set-up before it happens.

    FailingStore    fails chosen requests, before or after they took effect (the answer that got lost)
    DelayedStore    makes every request slower
    DamagingStore   flips bits of chosen bytes on the way back
    CountingStore   counts requests and bytes by verb (what S3 sends a bill for)

Put them below the retries to try the retries (`RetryingStore(FailingStore(…))`), above them to try what stands on the
store. The verbs are `put`, `get` (whole or range), `size`, `delete`, `list`.
"""

from __future__ import annotations

import builtins
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

from dr_cloud.store.errors import StoreUnavailableError
from dr_cloud.store.store import Data, Store, parts_of

Verb = Literal["put", "get", "size", "delete", "list"]
_T = TypeVar("_T")


class _Wrapper:
    """Passes every request to `inner` through `_do`."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner

    def _do(self, verb: Verb, key: str, action: Callable[[], _T]) -> _T:
        return action()

    def put_new(self, key: str, data: Data) -> None:
        """See `Store.put_new`."""
        self._do("put", key, lambda: self._inner.put_new(key, data))

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        return self._do("get", key, lambda: self._inner.get(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `Store.get_range`."""
        return self._do("get", key, lambda: self._inner.get_range(key, start, length))

    def size(self, key: str) -> int:
        """See `Store.size`."""
        return self._do("size", key, lambda: self._inner.size(key))

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        self._do("delete", key, lambda: self._inner.delete(key))

    def list(self, prefix: str, after: str = "") -> builtins.list[tuple[str, int]]:
        """See `Store.list`."""
        return self._do("list", prefix, lambda: self._inner.list(prefix, after))


class Fault(NamedTuple):
    """Which requests fail: of those of `verb` whose key contains `key`, after `skip` of them the next `times`."""

    verb: Verb
    key: str = ""
    skip: int = 0
    times: int = 1
    when: Literal["before", "after"] = "before"
    """`after`: the request takes effect, and its answer is lost."""
    temporary: bool = True


class FailingStore(_Wrapper):
    """Fails requests as planned. `fired` counts, per fault of the plan, how often it did."""

    def __init__(self, inner: Store, plan: Sequence[Fault]) -> None:
        super().__init__(inner)
        self._plan = list(plan)
        self._seen = [0] * len(self._plan)
        self._lock = threading.Lock()
        self.fired = [0] * len(self._plan)

    def _do(self, verb: Verb, key: str, action: Callable[[], _T]) -> _T:
        fault = self._next(verb, key)
        if fault is None:
            return action()
        if fault.when == "after":
            action()
        raise StoreUnavailableError(f"planned fault: {verb} {key} fails {fault.when} its effect", "", fault.temporary)

    def _next(self, verb: Verb, key: str) -> Fault | None:
        found = None
        with self._lock:
            for number, fault in enumerate(self._plan):
                if fault.verb != verb or fault.key not in key:
                    continue
                self._seen[number] += 1
                if found is None and fault.skip < self._seen[number] <= fault.skip + fault.times:
                    self.fired[number] += 1
                    found = fault
        return found


class DelayedStore(_Wrapper):
    """Waits `seconds` before every request, or before those of `verbs`."""

    def __init__(
        self,
        inner: Store,
        seconds: float,
        verbs: Sequence[Verb] = (),
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        super().__init__(inner)
        self._seconds = seconds
        self._verbs = frozenset(verbs)
        self._sleep = sleep

    def _do(self, verb: Verb, key: str, action: Callable[[], _T]) -> _T:
        if not self._verbs or verb in self._verbs:
            self._sleep(self._seconds)
        return action()


class DamagingStore(_Wrapper):
    """Hands out damaged bytes; what is stored stays whole. `fired` counts the bytes that were changed."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._damage: dict[str, dict[int, int]] = {}
        self.fired = 0

    def flip(self, key: str, offset: int, mask: int = 0xFF) -> None:
        """From now on, byte `offset` of the object `key` comes back with the bits of `mask` flipped."""
        if not 0 < mask <= 0xFF:
            raise ValueError(f"mask {mask} flips no bit of a byte")
        self._damage.setdefault(key, {})[offset] = mask

    def heal(self) -> None:
        """Hand out everything whole again."""
        self._damage.clear()

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        return self._damaged(key, 0, super().get(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `Store.get_range`."""
        return self._damaged(key, start, super().get_range(key, start, length))

    def _damaged(self, key: str, start: int, data: bytes) -> bytes:
        if key not in self._damage:
            return data
        changed = bytearray(data)
        for offset, mask in self._damage[key].items():
            if start <= offset < start + len(data):
                changed[offset - start] ^= mask
                self.fired += 1
        return bytes(changed)


class CountingStore(_Wrapper):
    """Counts what is asked of `inner`: `requests` and `bytes` by verb. A request that fails counts as well."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.requests: Counter[Verb] = Counter()
        self.bytes: Counter[Verb] = Counter()
        self._lock = threading.Lock()

    def put_new(self, key: str, data: Data) -> None:
        """See `Store.put_new`."""
        super().put_new(key, data)
        with self._lock:
            self.bytes["put"] += sum(map(len, parts_of(data)))

    def reset(self) -> None:
        """Count from zero again."""
        with self._lock:
            self.requests.clear()
            self.bytes.clear()

    def _do(self, verb: Verb, key: str, action: Callable[[], _T]) -> _T:
        with self._lock:
            self.requests[verb] += 1
        result = action()
        if isinstance(result, bytes):
            with self._lock:
                self.bytes[verb] += len(result)
        return result
