"""Artefacts of probes in the store: what was sealed for one test and path opens there and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from dr_cloud.model.errors import DamagedError, DrCloudError, NotFoundError
from dr_cloud.model.ids import Scope
from dr_cloud.recovery.artefacts import forget_artefacts, read_artefact, store_artefact
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store import layout
from dr_cloud.store.errors import ObjectExistsError
from dr_cloud.store.open import open_store
from dr_cloud.store.store import Store

SCOPE = Scope("acme", "shop", "dc1")
KEYS = VpgKeys(bytes(range(32)), SCOPE)
CONTENT = b"login: " * 20
TEST = "0af3"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}")


def key_of(test: str, path: str) -> str:
    return layout.artefact_key(SCOPE, test, KEYS.digest(path.encode()))


def test_it_is_read_as_it_was_stored(store: Store) -> None:
    """R14.8: of any name and size, under a key that does not tell its name; and it never changes."""
    for path, content in (("boot/console ä.txt", CONTENT), ("boot/empty", b""), ("boot/large", CONTENT * 10_000)):
        store_artefact(store, KEYS, TEST, path, content)
        assert read_artefact(store, KEYS, TEST, path) == content
        sealed = store.get(key_of(TEST, path))
        assert CONTENT not in sealed and path.encode() not in sealed
        with pytest.raises(ObjectExistsError):
            store_artefact(store, KEYS, TEST, path, b"other")
    for test, path in ((TEST, "boot/none"), ("0af4", "boot/empty")):
        with pytest.raises(NotFoundError, match=path):
            read_artefact(store, KEYS, test, path)
    with pytest.raises(DrCloudError, match="cannot be used"):
        read_artefact(store, KEYS, "../0af3", "boot/empty")


def test_every_flipped_bit_is_found(store: Store) -> None:
    """R3, invariant 3: head, section or tag."""
    store_artefact(store, KEYS, TEST, "a/b", CONTENT)
    sealed = store.get(key_of(TEST, "a/b"))
    for position in range(len(sealed)):
        damaged = bytearray(sealed)
        damaged[position] ^= 1 << position % 8
        store.delete(key_of(TEST, "a/b"))
        store.put_new(key_of(TEST, "a/b"), damaged)
        with pytest.raises(DamagedError, match=key_of(TEST, "a/b")):
            read_artefact(store, KEYS, TEST, "a/b")
    store.delete(key_of(TEST, "a/b"))
    store.put_new(key_of(TEST, "a/b"), sealed[:-1])
    with pytest.raises(DamagedError):
        read_artefact(store, KEYS, TEST, "a/b")


def test_what_is_put_in_anothers_place_does_not_open(store: Store) -> None:
    """R11: another path, another test, another VPG of the same enterprise, another enterprise."""
    store_artefact(store, KEYS, TEST, "a/b", CONTENT)
    sealed = store.get(key_of(TEST, "a/b"))
    for test, path in ((TEST, "a/c"), ("0af4", "a/b")):
        store.put_new(key_of(test, path), sealed)
        with pytest.raises(DamagedError):
            read_artefact(store, KEYS, test, path)
    for enterprise, key in (("acme", bytes(range(32))), ("brit", bytes(32))):
        keys = VpgKeys(key, Scope(enterprise, "other", "dc1"))
        store.put_new(layout.artefact_key(keys.scope, TEST, keys.digest(b"a/b")), sealed)
        with pytest.raises(DamagedError):
            read_artefact(store, keys, TEST, "a/b")


def test_those_of_forgotten_tests_are_gone_and_no_others(store: Store) -> None:
    for test in ("1", "2", "22"):
        for path in ("a/b", "a/c"):
            store_artefact(store, KEYS, test, path, CONTENT)
    for _ in range(2):
        forget_artefacts(store, SCOPE, ["2", "nothing"])
        assert [key for key, _ in store.list(layout.artefact_prefix(SCOPE, "2"))] == []
    for test in ("1", "22"):
        assert read_artefact(store, KEYS, test, "a/c") == CONTENT
