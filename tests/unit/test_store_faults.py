"""Every fault really fires: a fault that never does would prove everything."""

import pytest

from dr_cloud.store.errors import ObjectMissingError, StoreUnavailableError
from dr_cloud.store.faults import CountingStore, DamagingStore, DelayedStore, FailingStore, Fault
from dr_cloud.store.objects import open_memory

CALLS = {
    "put": [lambda store: store.put_new("new", b"12345")],
    "get": [lambda store: store.get("old"), lambda store: store.get_range("old", 1, 2)],
    "size": [lambda store: store.size("old")],
    "delete": [lambda store: store.delete("old")],
    "list": [lambda store: store.list("")],
}


def filled():
    store = open_memory()
    store.put_new("old", b"0123456789")
    return store


@pytest.mark.parametrize("verb", CALLS)
def test_failing_fails_its_verb_and_no_other(verb):
    for call in CALLS[verb]:
        store = FailingStore(filled(), [Fault(verb)])
        for other in CALLS:
            if other not in (verb, "delete"):
                for harmless in CALLS[other]:
                    harmless(store)
        with pytest.raises(StoreUnavailableError, match="planned fault"):
            call(store)
        assert store.fired == [1]
        call(store)


def test_failing_before_and_after():
    memory = open_memory()
    store = FailingStore(memory, [Fault("put", key="a"), Fault("put", key="b", when="after")])
    for key in ("a", "b"):
        with pytest.raises(StoreUnavailableError):
            store.put_new(key, b"x")
    assert memory.list("") == [("b", 1)]
    assert store.fired == [1, 1]


def test_failing_skips_and_counts_by_key():
    store = FailingStore(filled(), [Fault("get", key="old", skip=2, times=2)])
    outcomes = []
    for key in ("old", "none", "old", "old", "old", "old"):
        try:
            store.get(key)
            outcomes.append("ok")
        except ObjectMissingError:
            outcomes.append("missing")
        except StoreUnavailableError:
            outcomes.append("failed")
    assert outcomes == ["ok", "missing", "ok", "failed", "failed", "ok"]


def test_delayed_waits_before_every_request_or_the_chosen():
    slept = []
    store = DelayedStore(filled(), 0.25, sleep=slept.append)
    for calls in CALLS.values():
        for call in calls:
            call(store)
    assert slept == [0.25] * 6
    slept.clear()
    chosen = DelayedStore(filled(), 0.5, verbs=("put",), sleep=slept.append)
    chosen.get("old")
    chosen.put_new("new", b"")
    assert slept == [0.5]


def test_damaging_changes_exactly_the_byte():
    inner = filled()
    store = DamagingStore(inner)
    store.flip("old", 3, 0x01)
    assert store.get("old") == b"0122456789"
    assert store.get_range("old", 3, 2) == b"24"
    assert store.get_range("old", 4, 2) == b"45"
    assert store.get_range("old", 0, 3) == b"012"
    assert store.fired == 2
    assert inner.get("old") == b"0123456789"
    store.heal()
    assert store.get("old") == b"0123456789"
    with pytest.raises(ValueError, match="flips no bit"):
        store.flip("old", 0, 0)


def test_counting_counts_requests_and_bytes():
    store = CountingStore(filled())
    for calls in CALLS.values():
        for call in calls:
            call(store)
    with pytest.raises(ObjectMissingError):
        store.get("old")
    assert store.requests == {"put": 1, "get": 3, "size": 1, "delete": 1, "list": 1}
    assert store.bytes == {"put": 5, "get": 12}
    store.reset()
    assert not store.requests
    assert not store.bytes


def test_wrappers_compose():
    counting = CountingStore(filled())
    damaging = DamagingStore(counting)
    store = FailingStore(damaging, [Fault("get", skip=1)])
    damaging.flip("old", 0)
    assert store.get("old")[0] == ord("0") ^ 0xFF
    with pytest.raises(StoreUnavailableError):
        store.get("old")
    assert counting.requests == {"get": 1}
