"""Artefacts: the files that probes leave for people to look at, sealed beside the journal of their VPG.

A screenshot or a console shows what is on the disks, so it is kept as their blocks are: under the keys of the scope, in
the datastore of the journal, and nowhere in the clear once its probe has ended.

Layout, version 1: an envelope (`dr_cloud/journal/envelope.py`) with magic "DRCA", two sections and no body::

    section 0   JSON: {"test": id, "path": "<probe>/<file>"}
    section 1   the file's bytes

It lies at `artefacts/<test>/<digest>` of its scope (`dr_cloud/store/layout.py`). Its key is derived from the scope and
from that place, so it opens in no other scope, for no other test, and for no other path; section 0 says it once more.

Consistency: an object is there whole or not at all, and never changes. A test whose process dies may leave artefacts
that no result names; they go with those that are named (`forget_artefacts`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from dr_cloud.journal.envelope import Opened, Sealer, pack_json, unpack_json
from dr_cloud.model.errors import NotFoundError
from dr_cloud.model.ids import Scope
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store import layout
from dr_cloud.store.errors import ObjectMissingError
from dr_cloud.store.store import Store

MAGIC: Final = b"DRCA"
VERSION: Final = 1
ARTEFACT_BYTES_MAX: Final = 4 << 20
TEST_BYTES_MAX: Final = 16 << 20
"""Of all artefacts of one test."""


def store_artefact(store: Store, keys: VpgKeys, test: str, path: str, content: bytes) -> None:
    """Seal a file and put it into the store; durable on return. Raises `DrCloudError`."""
    key = _key(keys, test, path)
    sealer = Sealer(keys, key, MAGIC, VERSION)
    store.put_new(key, sealer.finish([pack_json({"test": test, "path": path}), content], []))


def read_artefact(store: Store, keys: VpgKeys, test: str, path: str) -> bytes:
    """Return a file as it was sealed.

    Raises:
        NotFoundError: There is none.
        DamagedError: It is not what was stored for this test and path.
    """
    try:
        opened = Opened(store, keys, _key(keys, test, path), MAGIC, VERSION)
    except ObjectMissingError:
        raise NotFoundError(f"test {test} has no artefact {path!r}", "Its results list those that it has.") from None
    if unpack_json(opened.section(0)) != {"test": test, "path": path}:
        raise opened.damaged("it is another artefact")
    return opened.section(1)


def forget_artefacts(store: Store, scope: Scope, tests: Iterable[str]) -> None:
    """Delete every artefact of these tests; those that have none are passed by. May be repeated."""
    for test in tests:
        for key, _ in store.list(layout.artefact_prefix(scope, test)):
            store.delete(key)


def _key(keys: VpgKeys, test: str, path: str) -> str:
    return layout.artefact_key(keys.scope, test, keys.digest(path.encode()))
