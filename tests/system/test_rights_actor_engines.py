"""R13 in a running provider, on both engines: who may go where, and what happens when that changes or nobody answers.

One provider per engine, with the seed's world: an enterprise in the USA, one in the UK, one in Asia-Pacific, of one
owner; two data centers in the USA, one in each of the others. All three replicate under load all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from e2e_world import wait_until
from provider_world import CHECKPOINT_SECONDS, CloudWorld, Server, settings_of
from sqlalchemy import delete
from sqlalchemy.orm import Session as DatabaseSession

from dr_cloud.actors.cluster import ask
from dr_cloud.actors.up import RunningProvider
from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.journal.envelope import Opened
from dr_cloud.journal.frame import open_frame
from dr_cloud.journal.objects import MAGIC, VERSION
from dr_cloud.link.messages import Hello, Refused, Welcome, decode_control, encode_control
from dr_cloud.link.purpose import REPLICATION, replication_arguments
from dr_cloud.link.stream import connect
from dr_cloud.link.websocket import dial
from dr_cloud.manager import tables
from dr_cloud.manager.db import open_engine
from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.cloud import VpgTarget
from dr_cloud.model.decision import PolicyChange
from dr_cloud.model.errors import DeniedError, DrCloudError, ForbiddenError
from dr_cloud.model.ids import Scope
from dr_cloud.model.recovery import TestsRequest
from dr_cloud.model.replication import TargetOrders
from dr_cloud.model.rights import CACHE_SECONDS, Mechanism, Regulation
from dr_cloud.nbd.client import NbdClient
from dr_cloud.rights.bundle import Signer
from dr_cloud.rights.grant import Grant, issue
from dr_cloud.seal.identity import Credentials
from dr_cloud.seal.keyring import Keyring
from dr_cloud.site.state import Identity
from dr_cloud.store import layout
from dr_cloud.store.open import open_store

pytestmark = pytest.mark.system

TENANTS = {"acme": ("USA", "chicago"), "brit": ("UK", "leeds"), "coral": ("APAC", "singapore")}
CENTERS = {"us-east": "USA", "us-west": "USA", "uk-south": "UK", "apac-1": "APAC"}
HOT_BLOCKS = 64
"""The guest of acme writes in so many blocks only."""
STOP_SECONDS = 5.0
OPENS = [
    Mechanism.model_validate(
        {
            "kind": "clauses",
            "from": one,
            "to": other,
            "reference": "model clauses 2",
            "assessment": "TIA-7",
            "enterprises": ["acme"],
            "valid_from": "2020-01-01T00:00:00Z",
            "valid_until": "2100-01-01T00:00:00Z",
        }
    )
    for one, other in (("USA", "UK"), ("UK", "USA"))
]
"""With these acme may send to the UK, and its people may see what is there; nobody else may send anywhere else."""


class Rights:
    """The world, and what is asked of it here."""

    def __init__(self, world: CloudWorld, provider: RunningProvider, engine: str) -> None:
        self.world = world
        self.provider = provider
        self.engine = engine
        self.servers: dict[str, Server] = {}

    def apply(self, *mechanisms: Mechanism) -> None:
        regulation = self.in_force().model_copy(update={"mechanisms": list(mechanisms)})
        self.world.client("-").apply_policies(PolicyChange(regulation=regulation))

    def in_force(self) -> Regulation:
        return next(iter(self.world.client("-").policies())).sources.regulation

    def target(self, enterprise: str, name: str) -> VpgTarget:
        vpg = self.world.client(enterprise).vpg("web")
        return next(target for target in vpg.targets if target.name == name)

    def times_ns(self, enterprise: str, name: str) -> list[int]:
        """Of every checkpoint, as its journal tells."""
        return sorted(one.time_ns for one in self.world.client(enterprise).checkpoints("web", name))

    def actor(self, name: str) -> Any:
        return self.provider.settings.placement.find(name)

    def pid(self, name: str) -> int:
        return int(ask(self.actor(name).where.remote(), name, 60).pid)

    def store(self, center: str) -> Path:
        return self.world.folder / "p" / "stores" / center / "ds-1"

    def objects(self, center: str, enterprise: str) -> int:
        """How many objects of an enterprise lie in a data center."""
        return sum(1 for path in self.store(center).glob(f"{enterprise}/**/*") if path.is_file())

    def objects_at(self, changed_ns: int, center: str, enterprise: str) -> int:
        """How many lie there when the time is over in which what is forbidden must have stopped."""
        time.sleep(max(0.0, STOP_SECONDS - (time.time_ns() - changed_ns) / 1e9))
        return self.objects(center, enterprise)

    def decides(self) -> bool:
        state = self.world.client("-").rights_state()
        return bool(state.wanted) and state.revision == state.wanted and not state.problem

    def test_somewhere(self) -> None:
        """A recovery test that is allowed, and new."""
        newest_ns = self.target("brit", "east").newest_ns
        assert newest_ns is not None
        self.world.images(self.servers["brit"], [newest_ns])

    def alert(self) -> bool:
        return any(alert.kind == "rights" for alert in self.world.client("-").health().alerts)

    def goes_on(self, of: Sequence[Server] = ()) -> None:
        """Each replicates on: its state, which needs no decision, tells of a checkpoint of a time after now."""
        begun_ns, servers = time.time_ns(), list(of or self.servers.values())
        written = [len(server.guest.writes) for server in servers]
        wait_until(lambda: all((self.target(s.enterprise, "east").newest_ns or 0) > begun_ns for s in servers), 30)
        for server, before in zip(servers, written, strict=True):
            assert server.guest.failures == [] and len(server.guest.writes) > before


@pytest.fixture(scope="module", params=["embedded", "opa"])
def rights(request: pytest.FixtureRequest) -> Iterator[Rights]:
    engine = request.param
    if engine == "opa":
        request.getfixturevalue("require_tool")("opa")
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    world = CloudWorld(
        folder,
        tenants=TENANTS,
        rights={"engine": engine, "policies": "policies"},
        data_centers=[
            {
                "name": name,
                "jurisdiction": jurisdiction,
                "datastores": [{"name": "ds-1", "store": f"file://{name}/ds-1"}],
                "hosts": [{"name": "h1", "datastores": ["ds-1"]}],
            }
            for name, jurisdiction in CENTERS.items()
        ],
    )
    provider: RunningProvider | None = None
    try:
        provider = world.start_provider_here()
        found = Rights(world, provider, engine)
        for enterprise in TENANTS:
            world.start_site(enterprise)
        for enterprise, centers in (("acme", ["us-east", "us-west"]), ("brit", ["uk-south"]), ("coral", ["apac-1"])):
            server = found.servers[enterprise] = world.add_server(enterprise, "web", copies=3)
            server.guest.areas = {"root": (0, HOT_BLOCKS * BLOCK_SIZE)}
            server.guest.pause_seconds = 0.02
            world.protect(server, centers[0], "h1", "ds-1", *centers[1:])
        for server in found.servers.values():
            world.wait_newest(server)
            server.guest.start()
        yield found
    finally:
        world.close()
        if provider is not None:
            provider.close()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def test_the_seeds_matrix(rights: Rights) -> None:
    """R13.1: each enterprise to the data centers of its own jurisdiction, and no owner opens another."""
    world = rights.world
    expected = {
        (name, center): jurisdiction == CENTERS[center]
        for name, (jurisdiction, _) in TENANTS.items()
        for center in CENTERS
    }
    matrix = world.client("-").rights_matrix()
    assert {(row.enterprise, place.data_center): place.open for row in matrix for place in row.data_centers} == expected
    for (enterprise, center), is_open in expected.items():
        if not is_open:
            settings = settings_of(rights.servers[enterprise], center, name="abroad")
            with pytest.raises(DeniedError) as denial:
                world.client(enterprise).create_vpg(settings)
            way = f"nothing opens {TENANTS[enterprise][0]} to {CENTERS[center]}"
            assert any(way in reason for reason in denial.value.reasons), denial.value.reasons
    for enterprise, (jurisdiction, _) in TENANTS.items():
        assert [vpg.name for vpg in world.client(enterprise).vpgs()] == ["web"]
        for center in CENTERS:
            assert (rights.objects(center, enterprise) > 0) == (CENTERS[center] == jurisdiction), (enterprise, center)
    rights.goes_on()


@contextlib.contextmanager
def forged_row(rights: Rights, name: str) -> Iterator[Scope]:
    """A target in a forbidden data center, written into the database by somebody who asked nobody."""
    engine = open_engine(rights.provider.settings.config.database)
    table = tables.VpgTarget
    try:
        with DatabaseSession(engine) as session, session.begin():
            row = table(
                enterprise="acme", vpg="web", name=name, position=7, copy_number=2, site="uk-south", host="h1",
                datastore="ds-1", in_center=True, placed_host="h1", placed_datastore="ds-1",
            )  # fmt: skip
            session.add(row)
        yield Scope("acme", "web", name)
    finally:
        with DatabaseSession(engine) as session, session.begin():
            session.execute(delete(table).where(table.enterprise == "acme", table.name == name))
        engine.dispose()


async def test_a_forged_client_is_refused_at_the_connector(rights: Rights) -> None:
    """R13.1: a good certificate and a row in the database open no channel; the link's other channels go on."""
    identity = Identity.model_validate_json((rights.world.folder / "s-chicago" / "identity.json").read_bytes())
    credentials = Credentials(identity.key, identity.certificate, identity.ca)
    with forged_row(rights, "forged") as scope:
        async with await dial(identity.link, credentials.client_context()) as session:
            with pytest.raises(ForbiddenError, match="nothing opens USA to UK"):
                await session.open(REPLICATION, replication_arguments(scope))
            session.close("done")
    found = [one for one in rights.world.client("acme").decisions() if one.subject == "vpg/web/forged"]
    assert {(one.point, one.allow) for one in found} >= {("frames", False)}
    assert not any(one.allow for one in found if one.input["place"])
    assert rights.objects("uk-south", "acme") == 0
    rights.goes_on()


async def test_a_vdsa_keeps_nothing_without_a_good_grant(rights: Rights, tmp_path: Path) -> None:
    """R13.3: orders without a grant, with a forged one and with another's open no store."""
    name = "vdsa/uk-south/h1/"
    scope, store = Scope("acme", "web", "slipped"), f"file://{rights.store('uk-south')}"
    until_s = int(time.time()) + 600
    forged = issue(Grant(scope, "uk-south", store, "r", until_s), Signer.open(tmp_path))
    kept = rights.provider.settings.node.socket("vdsa/us-east/h1/").with_suffix(".targets").read_text()
    others = kept.partition('"grant":"')[2].partition('"')[0]
    assert others
    for grant, why in (("", "no grant"), (forged, "not of the rights manager"), (others, "for another")):
        admitted = rights.actor(name).admit.remote([TargetOrders(scope=scope, store=store, grant=grant)])
        stream = await connect(ask(admitted, name))
        await stream.send(encode_control(Hello(scope=scope, stream="0" * 32, connection=0, connections=1)))
        answer = await stream.receive()
        assert isinstance(answer, str)
        refused = decode_control(answer)
        assert isinstance(refused, Refused) and refused.code == "denied"
        assert why in refused.reason
        stream.close()
    assert rights.objects("uk-south", "acme") == 0


@contextlib.contextmanager
def hanging(pid: int, end: signal.Signals = signal.SIGKILL) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, end)


async def test_a_scope_is_let_go_when_its_grant_ends(rights: Rights) -> None:
    """R13.3: while the manager hangs nobody renews it, so the VDSA closes the scope and its streams by itself."""
    name, scope, store = "vdsa/uk-south/h1/", Scope("brit", "web", "short"), f"file://{rights.store('uk-south')}"
    config = rights.provider.settings.config
    with hanging(rights.pid("manager"), signal.SIGCONT):
        await asyncio.sleep(0.5)  # what was on its way to the VDSA has arrived
        grant = issue(Grant(scope, "uk-south", store, "r", int(time.time()) + 4), Signer.open(config.state))
        admitted = rights.actor(name).admit.remote([TargetOrders(scope=scope, store=store, grant=grant)])
        stream = await connect(ask(admitted, name))
        await stream.send(encode_control(Hello(scope=scope, stream="0" * 32, connection=0, connections=1)))
        answer = await stream.receive()
        assert isinstance(answer, str) and isinstance(decode_control(answer), Welcome)
        async with asyncio.timeout(8):
            with contextlib.suppress(OSError):
                while await stream.receive() is not None:
                    pass
    log = config.state / "logs" / "vdsa+uk-south+h1" / "log.jsonl"

    def told() -> bool:
        lines = log.read_text().splitlines()
        return any("brit/web/short" in line and "its grant has ended" in line for line in lines)

    wait_until(told, 10)  # a thread of its own writes the log


def blocks_sent(rights: Rights, scope: Scope, center: str, after_ns: int) -> set[int]:
    """The blocks in every frame that a target has stored since a time."""
    keys = Keyring.open(rights.world.folder / "p" / "keyring.json").vpg_keys(scope)
    store = open_store(f"file://{rights.store(center)}")
    blocks: set[int] = set()
    for checkpoint in Catalogue.load(store, keys, scope).checkpoints:
        for ref in checkpoint.objects if checkpoint.time_ns > after_ns else ():
            opened = Opened(store, keys, layout.journal_key(scope, ref.generation, ref.number), MAGIC, VERSION)
            body = opened.read(opened.body_offset, opened.body_bytes) if opened.body_bytes else memoryview(b"")
            while len(body):
                frame = open_frame(keys, body, partial=True)
                for entry in np.asarray(frame.columns):
                    blocks |= set(range(int(entry["block"]), int(entry["block"]) + int(entry["count"])))
                body = body[len(frame.data) :]
    return blocks


def wait_while(what: Callable[[], bool], seconds: float) -> float:
    """Return how long it took until this was no more; fail if it was longer than it may be."""
    begun = time.monotonic()
    wait_until(lambda: not what(), seconds)
    return time.monotonic() - begun


def reads(uri: str) -> bool:
    try:
        with NbdClient.connect(uri) as client:
            client.pread(0, BLOCK_SIZE)
    except PermissionError:
        return False
    return True


def test_a_policy_change_under_load(rights: Rights) -> None:
    """R13: what is no longer allowed stops within 5 s, and it alone; allowed again, it goes on by what is missing."""
    world, acme, scope = rights.world, rights.servers["acme"], Scope("acme", "web", "uk-south")
    client = world.client("acme")
    rights.apply(*OPENS)
    wait_until(lambda: place_open(rights, "acme", "uk-south"), STOP_SECONDS)
    assert not place_open(rights, "brit", "us-east")
    world.done("acme", client.update_vpg("web", settings_of(acme, "us-east", "h1", "ds-1", "us-west", "uk-south")))
    wait_until(lambda: (rights.target("acme", "uk-south").newest_ns or 0) > time.time_ns() - 3 * 10**9, 60)
    newest_ns = rights.target("acme", "uk-south").newest_ns
    assert newest_ns is not None
    task = world.done("acme", client.start_tests("web", TestsRequest(target="uk-south", times_ns=[newest_ns])))
    (test,) = [test for test in client.tests("web") if test.task == task.id]
    ((uri,),) = test.uris.values()
    assert reads(uri)
    others = {("acme", "east"), ("acme", "us-west"), ("brit", "east"), ("coral", "east")}
    before = {key: rights.target(*key) for key in others}
    written = len(acme.guest.writes)

    changed_ns = time.time_ns()
    rights.apply()
    stopped = wait_while(lambda: reads(uri), STOP_SECONDS)
    wait_until(lambda: rights.target("acme", "uk-south").denied, STOP_SECONDS - stopped)
    stopped_ns = time.time_ns()
    assert stopped_ns - changed_ns < STOP_SECONDS * 1e9
    assert "nothing opens USA to UK" in rights.target("acme", "uk-south").denied
    kept = rights.objects_at(changed_ns, "uk-south", "acme")
    time.sleep(2)
    assert rights.objects("uk-south", "acme") == kept, "it went on being stored"
    with pytest.raises(DeniedError):
        client.start_tests("web", TestsRequest(target="uk-south", times_ns=[newest_ns]))
    for key in others:
        now = rights.target(*key)
        assert not now.denied and now.linked and now.problem == ""
        assert now.skipped == before[key].skipped, f"{key} missed a checkpoint"
        assert now.resyncs == before[key].resyncs
        times = [changed_ns, *(one for one in rights.times_ns(*key) if one > changed_ns), time.time_ns()]
        apart = [(after - earlier) / 1e9 for earlier, after in itertools.pairwise(times)]
        assert max(apart) < 4 * CHECKPOINT_SECONDS, f"{key}: {apart}"
    assert acme.guest.failures == [] and len(acme.guest.writes) > written

    rights.apply(*OPENS)
    wait_until(lambda: (rights.target("acme", "uk-south").newest_ns or 0) > stopped_ns, 60)
    assert rights.target("acme", "uk-south").denied == ""
    wait_until(lambda: reads(uri), 10)
    sent = blocks_sent(rights, scope, "uk-south", stopped_ns)
    assert sent and sent <= set(range(HOT_BLOCKS)), "what had not changed was sent again"
    world.done("acme", client.update_vpg("web", settings_of(acme, "us-east", "h1", "ds-1", "us-west")))
    rights.apply()


def test_a_link_that_policy_cuts(rights: Rights) -> None:
    """R13.1: a site that lies where nothing is open any more is out within 5 s, is told why, and comes back."""
    world, coral = rights.world, rights.servers["coral"]
    client, before = world.client("coral"), rights.in_force()
    others = [rights.servers[name] for name in ("acme", "brit")]
    jurisdictions = {name: record for name, record in before.jurisdictions.items() if name != "APAC"}
    written = len(coral.guest.writes)
    changed_ns = time.time_ns()
    world.client("-").apply_policies(PolicyChange(regulation=Regulation(jurisdictions=jurisdictions)))
    wait_until(lambda: not client.site("singapore").connected, STOP_SECONDS)
    wait_until(lambda: rights.target("coral", "east").denied, STOP_SECONDS)
    kept = rights.objects_at(changed_ns, "apac-1", "coral")
    wait_until(lambda: "the provider refuses this site" in world.log("singapore"), 20)
    assert "coral" in client.site("singapore").denied, "why, by its own name"
    rights.goes_on(others)
    assert rights.objects("apac-1", "coral") == kept
    assert coral.guest.failures == [] and len(coral.guest.writes) > written
    world.client("-").apply_policies(PolicyChange(regulation=before))
    wait_until(lambda: client.site("singapore").connected, 40)
    rights.goes_on()


def place_open(rights: Rights, enterprise: str, center: str) -> bool:
    places = rights.world.client(enterprise).explain().data_centers
    return next(place.open for place in places if place.data_center == center)


def opa_of(pid: int) -> int:
    """The OPA server that a rights manager has started."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for path in children for child in path.read_text().split()]
    return next(child for child in found if b"opa" in Path(f"/proc/{child}/comm").read_bytes())


def test_without_an_answer_nothing_new_begins_and_what_stands_goes_on(rights: Rights) -> None:
    """R13: hung, then killed with -9; an alert says so, and it comes back by itself with what it knew."""
    wait_until(rights.decides, 20)
    revision = rights.world.client("-").rights_state().wanted
    victims = [lambda: rights.pid("rights")]
    if rights.engine == "opa":
        victims.append(lambda: opa_of(rights.pid("rights")))
    for victim in victims:
        with hanging(victim()):
            wait_until(lambda: not rights.decides(), 20)
            time.sleep(CACHE_SECONDS)  # what it said before still counts for that long
            with pytest.raises(DrCloudError):
                rights.test_somewhere()
            rights.goes_on()
            wait_until(rights.alert, 20)
        wait_until(rights.decides, 30)
        assert rights.world.client("-").rights_state().wanted == revision
        rights.test_somewhere()
        wait_until(lambda: not rights.alert(), 20)
    rights.goes_on()


def test_the_record_is_whole(rights: Rights) -> None:
    """R13: after all of that."""
    for enterprise in ("-", *TENANTS):
        check = rights.world.client(enterprise).verify_decisions()
        assert check.whole, check
    for server in rights.servers.values():
        rights.world.check(server, times=1)
