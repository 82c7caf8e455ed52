"""Keys and the keyring."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.seal.keyring import Keyring
from dr_cloud.seal.keys import VpgKeys

SCOPE = Scope("acme", "shop", "dc1")


def test_keys_are_of_their_place_only() -> None:
    """Invariant 7, R11: what one scope, stream or object sealed opens under no other's key."""
    nonce = bytes(12)
    sealed = VpgKeys(bytes(32), SCOPE).frame_cipher(b"s" * 16).encrypt(nonce, b"data", None)
    assert VpgKeys(bytes(32), SCOPE).frame_cipher(b"s" * 16).decrypt(nonce, sealed, None) == b"data"
    others = [
        VpgKeys(bytes(32), SCOPE).frame_cipher(b"t" * 16),
        VpgKeys(b"\1" * 32, SCOPE).frame_cipher(b"s" * 16),
        *(VpgKeys(bytes(32), SCOPE._replace(**{part: "x"})).frame_cipher(b"s" * 16) for part in Scope._fields),
        VpgKeys(bytes(32), SCOPE).object_cipher("k", b"s" * 16),
    ]
    for other in others:
        with pytest.raises(InvalidTag):
            other.decrypt(nonce, sealed, None)


def test_digests_are_of_one_enterprise() -> None:
    """Invariant 7: equal data of two enterprises has different digests; of one enterprise's VPGs the same."""
    block = bytes(4096)
    mine = VpgKeys(bytes(32), SCOPE).digest(block)
    assert len(mine) == 16
    assert VpgKeys(bytes(32), SCOPE._replace(vpg="other")).digest(block) == mine
    assert VpgKeys(bytes(32), SCOPE._replace(enterprise="other")).digest(block) != mine
    assert VpgKeys(b"\1" * 32, SCOPE).digest(block) != mine


def test_a_keyring_keeps_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.json"
    Keyring.open(path).create("acme")
    before = path.read_bytes()
    Keyring.open(path).create("acme")
    assert path.read_bytes() == before
    assert path.stat().st_mode & 0o777 == 0o600
    digest = Keyring.open(path).vpg_keys(SCOPE).digest(b"x")
    Keyring.open(path).create("other")
    assert Keyring.open(path).vpg_keys(SCOPE).digest(b"x") == digest


def _create(path: Path, name: str) -> None:
    Keyring.open(path).create(name)


def test_processes_that_create_at_once_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    names = [f"e{n}" for n in range(6)]
    workers = [get_context("fork").Process(target=_create, args=(path, name)) for name in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for name in names:
        Keyring.open(path).vpg_keys(Scope(name, "v", "t"))


def test_a_keyring_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    Keyring.open(path).create("acme")
    with pytest.raises(DrCloudError, match="no key of enterprise 'other'"):
        Keyring.open(path).vpg_keys(SCOPE._replace(enterprise="other"))
    path.chmod(0o644)
    with pytest.raises(DrCloudError, match="read by others"):
        Keyring.open(path)
    path.chmod(0o600)
    path.write_text("{")
    with pytest.raises(DrCloudError, match="damaged"):
        Keyring.open(path).vpg_keys(SCOPE)
    path.write_text('{"version": 2, "enterprises": {}}')
    with pytest.raises(DrCloudError, match="version 2"):
        Keyring.open(path).vpg_keys(SCOPE)
