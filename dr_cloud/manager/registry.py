"""The registry in the store: so that a provider that lost its database loses nothing but its log of the past.

Purpose: everything that people decided (enterprises, sites, certificates, tokens' hashes, VPGs, targets, disk indexes,
tests and their verdicts, policies), and the head of each record of decisions, is written to the object store after
each change. `rebuild` fills an empty database from there. Checkpoints are not in it: the journals are their catalogue.

Layout::

    registry/<enterprise>/<number>.reg      registry/acme/0000000042.reg
    registry/provider/<number>.reg          the provider's own

An envelope (`dr_cloud.journal.envelope`), magic "DRCR", version 1. Section 0 is JSON: `{"schema": "0003", "enterprise":
…, "tables": {table: [row …]}}`. `<number>` counts the changes, with gaps: changes that come while one is being written
go together into the next. It is sealed with the enterprise's key from the keyring; `provider` has a key of its own.
`registry` and `provider` can therefore be no enterprise's names.

Consistency: the object holds one snapshot of the database. It is created with put-if-absent; a number that is taken (by
a former life of the database) is skipped. The newest object is the truth, the ones before are spares.

Retries: the row says which state has changed and which is written; a thread writes what is behind until it is done,
off the path of requests. Crash recovery: it goes on there at the next start.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from dr_cloud.journal.envelope import Opened, Sealer, pack_json, unpack_json
from dr_cloud.manager import tables
from dr_cloud.manager.record import Entry, Head, append
from dr_cloud.manager.tenancy import EVERYONE, PROVIDER, Database
from dr_cloud.model.errors import ConflictError, DamagedError, DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.model.rights import Answer
from dr_cloud.seal.keyring import Keyring
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store.errors import ObjectExistsError
from dr_cloud.store.store import Store

MAGIC: Final = b"DRCR"
VERSION: Final = 1
SCHEMA: Final = "0003"
RESERVED_NAMES: Final = frozenset({"registry", "provider"})
KEPT: Final = 8
"""Objects of one enterprise that are kept at least."""
_PRUNE_EVERY: Final = 16
_RETRY_SECONDS: Final = 5.0
_KEY: Final = re.compile(r"registry/([^/]+)/(\d{10})\.reg")

TENANT_TABLES: Final[tuple[type[tables.Base], ...]] = (
    tables.Enterprise,
    tables.Site,
    tables.Certificate,
    tables.Token,
    tables.Host,
    tables.Server,
    tables.Vpg,
    tables.VpgTarget,
    tables.VpgMember,
    tables.VpgDisk,
    tables.RecoveryTest,
    tables.ProbeVerdict,
    tables.Drill,
    tables.DecisionHead,
)
"""In the order in which rows can be added."""
PROVIDER_TABLES: Final[tuple[type[tables.Base], ...]] = (
    tables.Token,
    tables.CenterHost,
    tables.DecisionHead,
    tables.PolicyRevision,
)
log = structlog.get_logger(__name__)


class Registry:
    """Writes the registry's objects."""

    def __init__(
        self,
        database: Database,
        store: Store,
        keyring: Keyring,
        answers_for: Callable[[str], bool] = lambda enterprise: True,
    ) -> None:
        self._database = database
        self._store = store
        self._keyring = keyring
        self._answers_for = answers_for
        self._known: set[str] = set()
        """Enterprises whose objects in the store this process has looked at."""
        self._woken = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="registry", daemon=True)

    def touch(self, session: Session, enterprise: str) -> None:
        """Note, in the change's own transaction, that what the registry holds of `enterprise` changes."""
        row = session.get(tables.RegistryState, enterprise, with_for_update=True)
        if row is None:
            session.add(tables.RegistryState(enterprise=enterprise, changed=1, written=0))
        else:
            row.changed += 1

    def wake(self) -> None:
        """Look now for what is behind."""
        self._woken.set()

    def start(self) -> None:
        """Begin to write in the background."""
        self._thread.start()

    def close(self) -> None:
        """Write what is behind, as far as the store lets it, and end."""
        self._stopping = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()
        self.write_behind()

    def _run(self) -> None:
        while not self._stopping:
            self._woken.wait(_RETRY_SECONDS)
            self._woken.clear()
            self.write_behind()

    def write_behind(self) -> int:
        """Write every enterprise's object that is behind; return how many could not be written."""
        state = tables.RegistryState
        failed = 0
        try:
            with self._database.read(EVERYONE) as session:
                behind = session.scalars(select(state.enterprise).where(state.changed > state.written)).all()
        except Exception:
            log.exception("registry.database")
            return 1
        for enterprise in filter(self._answers_for, behind):
            try:
                self._write(enterprise)
            except Exception as error:
                failed += 1
                log.warning("registry.behind", enterprise=enterprise, error=str(error))
        return failed

    def _write(self, enterprise: str) -> None:
        folder = enterprise or "provider"
        if enterprise not in self._known:
            self._pass_by(enterprise, folder)
            self._known.add(enterprise)
        number, content = self._snapshot(enterprise)
        if enterprise == PROVIDER:
            self._keyring.create("provider")
        key = _key(folder, number)
        data = Sealer(_keys(self._keyring, folder), key, MAGIC, VERSION).finish([pack_json(content)], [])
        try:
            self._store.put_new(key, data)
        except ObjectExistsError:
            self._pass_by(enterprise, folder)
            self._woken.set()
            return
        with self._database.write(EVERYONE) as session:
            row = session.get_one(tables.RegistryState, enterprise)
            before, row.written = row.written, number
        if before // _PRUNE_EVERY != number // _PRUNE_EVERY:
            for _, old in _objects(self._store, folder)[:-KEPT]:
                self._store.delete(old)

    def heads(self, enterprise: str) -> list[Head]:
        """Return the heads of the record of decisions in all objects of an enterprise that are kept.

        Raises:
            DrCloudError: The store does not answer, or none of the objects can be read.
        """
        folder = enterprise or "provider"
        objects = _objects(self._store, folder)
        found = []
        problem: DamagedError | None = None
        for _, key in objects:
            try:
                content = unpack_json(Opened(self._store, _keys(self._keyring, folder), key, MAGIC, VERSION).section(0))
            except DamagedError as error:
                problem = error
                continue
            rows = content["tables"].get(tables.DecisionHead.__tablename__, [])
            found.append(next((Head(row["number"], row["hash"]) for row in rows), Head(0, "")))
        if problem is not None and not found:
            raise problem
        return found

    def _pass_by(self, enterprise: str, folder: str) -> None:
        """Go on after the newest object in the store: a former life of the database may have written further."""
        newest = max((number for number, _ in _objects(self._store, folder)), default=0)
        with self._database.write(EVERYONE) as session:
            row = session.get_one(tables.RegistryState, enterprise)
            if newest >= row.changed or newest > row.written:
                log.info("registry.passed", enterprise=enterprise, changed=row.changed, newest=newest)
                row.changed = max(row.changed, newest) + 1

    def _snapshot(self, enterprise: str) -> tuple[int, dict[str, Any]]:
        with self._database.read(EVERYONE) as session:
            if session.get_bind().dialect.name == "postgresql":
                session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            number = session.get_one(tables.RegistryState, enterprise).changed
            kinds = TENANT_TABLES if enterprise else PROVIDER_TABLES
            content = {kind.__tablename__: _rows(session, kind, enterprise) for kind in kinds}
        return number, {"schema": SCHEMA, "enterprise": enterprise, "tables": content}


def _rows(session: Session, kind: type[tables.Base], enterprise: str) -> list[dict[str, Any]]:
    wanted = select(kind.__table__)
    if issubclass(kind, tables.Owned):
        wanted = wanted.where(kind.__table__.c.enterprise == enterprise)
    return [dict(row) for row in session.execute(wanted).mappings()]


def _keys(keyring: Keyring, folder: str) -> VpgKeys:
    return keyring.vpg_keys(Scope(folder, "registry", "registry"))


def _key(folder: str, number: int) -> str:
    return f"registry/{folder}/{number:010d}.reg"


def _objects(store: Store, folder: str) -> list[tuple[int, str]]:
    """Return (number, key) of the objects of one enterprise, ascending."""
    found = [(_KEY.fullmatch(key), key) for key, _ in store.list(f"registry/{folder}")]
    return sorted((int(match[2]), key) for match, key in found if match)


def rebuild(
    database: Database, store: Store, keyring: Keyring, clock_ns: Callable[[], int] = time.time_ns
) -> dict[str, int]:
    """Fill an empty database from the store; return the number of the object that each enterprise came from.

    An object that is damaged is passed over for the one before it, with a warning in the log. Records of decisions
    begin anew, chained to the last head that the store knows.

    Raises:
        ConflictError: The database is not empty.
        DamagedError: None of an enterprise's objects can be read.
    """
    with database.read(EVERYONE) as session:
        if session.scalars(select(tables.Enterprise.enterprise).limit(1)).first() is not None:
            raise ConflictError("the database is not empty", "Rebuild into a new one; keep the old one aside.")
    folders = sorted({match[1] for key, _ in store.list("registry") if (match := _KEY.fullmatch(key))})
    found = {folder: _newest(store, keyring, folder) for folder in folders}
    with database.write(EVERYONE) as session:
        for folder, (number, content) in found.items():
            enterprise = PROVIDER if folder == "provider" else folder
            for kind in TENANT_TABLES if enterprise else PROVIDER_TABLES:
                for row in content["tables"].get(kind.__tablename__, []):
                    session.add(kind(**row))
                session.flush()
            _begin_record(session, enterprise, clock_ns())
            session.add(tables.RegistryState(enterprise=enterprise, changed=number, written=number))
    return {folder: number for folder, (number, _) in found.items()}


def _begin_record(session: Session, enterprise: str, at_ns: int) -> None:
    head = session.get(tables.DecisionHead, enterprise)
    if head is not None and head.number:
        lost = f"decisions up to {head.number} ({head.hash}) were in a former database"
        append(session, enterprise, [Entry("rebuild", "record", None, Answer(allow=True, reasons=[lost]))], at_ns)


def _newest(store: Store, keyring: Keyring, folder: str) -> tuple[int, dict[str, Any]]:
    keys = _keys(keyring, folder)
    problem: DrCloudError | None = None
    for number, key in reversed(_objects(store, folder)):
        try:
            content: dict[str, Any] = unpack_json(Opened(store, keys, key, MAGIC, VERSION).section(0))
            return number, content
        except DamagedError as error:
            log.warning("registry.damaged", key=key, error=str(error))
            problem = problem or error
    raise problem or DamagedError(f"registry/{folder} holds no object")
