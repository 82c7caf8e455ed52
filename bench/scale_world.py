"""A provider with enterprises on this machine, for measurements: sites, taps, VPGs, and guests that write to them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from bench.decisions import CLIENTS, Caller
from dr_cloud.client.client import Client
from dr_cloud.demo.cloud import HOST, LocalCloud, done
from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.model.cloud import VdsaDeployment
from dr_cloud.model.ids import Scope
from dr_cloud.model.probe import ProbeSpec
from dr_cloud.model.provider import Architecture, EnterpriseConfig, SiteConfig
from dr_cloud.model.recovery import TestsRequest
from dr_cloud.model.units import SECOND_NS
from dr_cloud.model.vpg import ProtectedServer, TargetConfig, VpgSettings
from dr_cloud.nbd.async_client import AsyncNbdClient
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.layout import checkpoint_key
from dr_cloud.store.open import open_store

DISK_BYTES: Final = 64 << 20
BLOCK_BYTES: Final = 4096
WRITES_PER_SECOND: Final = 5.0
INTERVAL_SECONDS: Final = 5.0
WAIT_SECONDS_MAX: Final = 180.0
TEST_SECONDS: Final = 90.0
STARTS_AT_ONCE: Final = 4


class Made(NamedTuple):
    """A checkpoint, and when it became durable."""

    time_ns: int
    durable_ns: int


# Processes.


def _name(number: int) -> str:
    return f"e{number:03d}"


class World:
    """A provider, and the enterprises that were added to it."""

    def __init__(self, directory: Path, vpgs: int, architecture: Architecture = Architecture.PAIRED_CONNECTORS) -> None:
        self.vpgs = vpgs
        self._architecture = architecture
        self.uris: list[str] = []
        self.ports: set[int] = set()
        self.enterprises = 0
        self._cloud = LocalCloud(directory)
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """The administrator's, for all enterprises."""
        assert self._client is not None, "start comes first"
        return self._client

    def start(self) -> None:
        """Start the provider."""
        center = {
            "name": "dc-1",
            "jurisdiction": "USA",
            "datastores": [{"name": "ds-1", "store": "file://ds-1"}],
            "hosts": [{"name": f"host-{n}", "datastores": ["ds-1"]} for n in (1, 2)],
            "clusters": [{"name": "compute", "hosts": ["host-1", "host-2"]}],
        }
        config = {"name": "provider", "idle_stacks": 0, "operators": "USA", "data_centers": [center]}
        self._cloud.begin_provider({**config, "architecture": self._architecture.value})
        self._client = self._cloud.wait_provider()

    def close(self) -> None:
        """Stop everything; the sites and taps at once, the provider last."""
        self._cloud.close()

    def _own(self, enterprise: str) -> Client:
        self.client.enterprise_name = enterprise
        return self.client

    def add(self, count: int) -> None:
        """Register enterprises until there are `count`, and protect their servers."""
        names = [_name(number) for number in range(self.enterprises, count)]
        tokens = {}
        for name in names:
            self._own(name)
            config = EnterpriseConfig(
                name=name, jurisdiction="USA", sites=[SiteConfig(name="office", jurisdiction="USA")]
            )
            self.client.register_enterprise(config)
            tokens[name] = self.client.create_pairing("office").token
            self.ports.add(int(self.client.enterprise(name).link.rpartition(":")[2].partition("/")[0]))
        with ThreadPoolExecutor(STARTS_AT_ONCE) as pool:
            self.uris += [
                uri for uris in pool.map(lambda name: self._start_site(name, tokens[name]), names) for uri in uris
            ]
        for name in names:
            self._protect(name)
        self.enterprises = count
        self._wait(lambda: self._recoverable() == count * self.vpgs, "every VPG has a checkpoint")

    def _start_site(self, name: str, token: str) -> list[str]:
        self._cloud.begin_site(name, token).wait_ready()
        uris = []
        for number in range(1, self.vpgs + 1):
            server = f"vm-{number}"
            disk = self._cloud.folder(name) / f"{number}.img"
            with disk.open("wb") as file:
                file.truncate(DISK_BYTES)
            self._cloud.begin_tap(name, server, disk).wait_ready()
            uris.append(self._cloud.uri(name, server))
        return uris

    def _protect(self, name: str) -> None:
        client = self._own(name)
        self._wait(lambda: [host.name for host in client.hosts("office")] == [HOST], f"{name} reports its host")
        if next(iter(client.hosts("office"))).vdsa != "installed":
            done(client, client.deploy_vdsa("office", HOST, VdsaDeployment()), WAIT_SECONDS_MAX)
        for number in range(1, self.vpgs + 1):
            settings = VpgSettings(
                name=f"vpg-{number}",
                source_site="office",
                servers=[ProtectedServer(name=f"vm-{number}")],
                targets=[TargetConfig(name="cloud", site="dc-1", host="compute", datastore="ds-1")],
                checkpoint_seconds=INTERVAL_SECONDS,
            )
            done(client, client.create_vpg(settings), WAIT_SECONDS_MAX)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        self._cloud.wait_until(condition, what, WAIT_SECONDS_MAX)

    def _recoverable(self) -> int:
        return sum(bool(target.newest_ns) for vpg in self._own("-").vpgs() for target in vpg.targets)

    def names(self) -> list[tuple[str, str]]:
        """Return (enterprise, VPG) of every VPG."""
        return [(_name(one), f"vpg-{vpg}") for one in range(self.enterprises) for vpg in range(1, self.vpgs + 1)]

    def caller(self) -> Caller:
        """Return how others reach the API, with the administrator's rights."""
        state = self._cloud.state
        url = f"https://127.0.0.1:{int((state / 'api-port').read_text())}"
        return Caller(url, (state / "admin-token").read_text().strip(), (state / "ca" / "ca-cert.pem").read_text())

    def tested(self) -> list[tuple[str, str]]:
        """Have a recovery test with a probe of some VPGs begin and end; return (enterprise, test) of each."""
        caller, found = self.caller(), []
        with Client(caller.url, caller.token, ca_pem=caller.ca_pem) as client:
            for enterprise, vpg in self.names()[:CLIENTS]:
                client.enterprise_name = enterprise
                newest = next(found for found in client.checkpoints(vpg) if found.testable)
                request = TestsRequest(times_ns=[newest.time_ns], probes=[ProbeSpec(kind="entropy")])
                task = client.wait_task(client.start_tests(vpg, request).id, TEST_SECONDS)
                (test,) = (task.result or {})["tests"]
                deadline = time.monotonic() + TEST_SECONDS
                while client.test(test).stopped_ns is None and time.monotonic() < deadline:
                    time.sleep(0.2)
                found.append((enterprise, test))
        return found

    def checkpoints(self) -> list[list[Made]]:
        """Return, of each VPG, the checkpoints to recover to, ascending."""
        folder = self._cloud.state / "stores" / "ds-1"
        store, keyring = open_store(folder.as_uri()), Keyring.open(self._cloud.state / "keyring.json")
        found = []
        for enterprise, vpg in self.names():
            scope = Scope(enterprise, vpg, "cloud")
            catalogue = Catalogue.load(store, keyring.vpg_keys(scope), scope)
            found.append(
                [
                    Made(one.time_ns, (folder / checkpoint_key(scope, one.number)).stat().st_ctime_ns)
                    for one in catalogue.checkpoints
                    if one.kind != "sync"
                ]
            )
        return found


# Guests.


class Guests:
    """Writes to every disk, from a thread of its own."""

    def __init__(self, uris: Sequence[str]) -> None:
        self.writes = 0
        self._uris = uris
        self._stop = False

    async def _write(self, uri: str) -> None:
        guest = await AsyncNbdClient.connect(uri)
        rng = random.Random(uri)
        try:
            await asyncio.sleep(rng.random() / WRITES_PER_SECOND)
            while not self._stop:
                block = rng.randrange(DISK_BYTES // BLOCK_BYTES)
                await guest.pwrite(block * BLOCK_BYTES, rng.randbytes(BLOCK_BYTES // 2) + bytes(BLOCK_BYTES // 2))
                self.writes += 1
                await asyncio.sleep(1 / WRITES_PER_SECOND)
        finally:
            await guest.close()

    async def _all(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for uri in self._uris:
                tasks.create_task(self._write(uri))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Write while the block runs."""
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(asyncio.run, self._all())
            try:
                yield
            finally:
                self._stop = True
                running.result()


# Measuring.


def ages(made: Sequence[Made], times_ns: Sequence[int]) -> list[float]:
    """Return how old the newest durable one of a VPG's checkpoints was at these times, in intervals."""
    newest = [max((one.time_ns for one in made if one.durable_ns <= at_ns), default=0) for at_ns in times_ns]
    return [_intervals(at_ns - time_ns) for at_ns, time_ns in zip(times_ns, newest, strict=True)]


def oldest(made: Sequence[Made], since_ns: int, until_ns: int) -> float:
    """Return how old it ever was between two times: it is oldest just before the next one is durable."""
    moments = [one.durable_ns - 1 for one in made if since_ns < one.durable_ns <= until_ns]
    return max(ages(made, [since_ns, *moments, until_ns]))


def _intervals(duration_ns: int) -> float:
    return duration_ns / SECOND_NS / INTERVAL_SECONDS
