"""The site as a real process: a provider over real TLS, real taps, both directions, orders, logs, certificates."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from e2e_world import Guest, make_disk, wait_until
from site_provider import KEY, ConnectProxy
from site_world import BACK, SHOP, World, order

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.ids import Scope
from dr_cloud.model.provider import Architecture
from dr_cloud.nbd.client import NbdClient

pytestmark = pytest.mark.system


@pytest.fixture
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    world = World(folder)
    yield world
    world.close()
    shutil.rmtree(folder, ignore_errors=True)


def sources(world: World) -> dict[str, tuple[bool, str]]:
    return {one.scope.vpg: (one.linked, one.problem) for one in world.provider.report().sources}


@pytest.mark.parametrize("architecture", [Architecture.PAIRED_CONNECTORS, Architecture.VDSA_PER_ENTERPRISE])
def test_a_site_pairs_and_replicates(world: World, architecture: Architecture) -> None:
    """R6, R9, R11, R12: from a token to images of any time, in both ways of dialling; then a clean end."""
    world.provider.orders["architecture"] = architecture.value
    line = world.start_site()
    assert f"h1=unix:{world.folder}/h1.sock" in line
    assert world.provider.api.link in line
    world.start_tap()
    world.guest.start()
    world.wait_newest()
    assert len(world.provider.sessions) == (1 if architecture is Architecture.PAIRED_CONNECTORS else 2)
    wait_until(lambda: world.provider.report().sources[0].taps == {"web": "whole"})
    world.check()
    report = world.provider.report()
    assert (report.revision, report.datastores, report.problems) == (1, ["ds"], [])
    [host] = report.hosts
    assert (host.host, host.vdsa, host.problem) == ("h1", "installed", "")
    [server] = host.servers
    assert (server.name, server.connected, server.disks[0].size_bytes) == ("web", True, 512 * BLOCK_SIZE)
    [source] = report.sources
    assert (source.scope, source.linked, source.problem) == (SHOP, True, "")
    assert source.checkpoints > 0
    assert source.lag_seconds < 5
    assert world.stop("site") == 0


def test_what_a_user_may_do_wrong(world: World) -> None:
    """One process for a state folder; a wrong token; each is one line that says what to do."""
    world.start_site()

    def fail(**settings: object) -> str:
        path = world.folder / "other.yaml"
        path.write_text(yaml.safe_dump({**world.settings, **settings}))
        done = subprocess.run(
            [sys.executable, "-m", "dr_cloud.cli.site_up", "-c", str(path)], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 1
        assert done.stdout == ""
        return done.stderr

    assert "another process runs the site" in fail()
    assert "has been used" in fail(state="second")
    assert "not paired" in fail(state="third", token="")


def test_orders_change_and_a_broken_one_stops_no_other(world: World) -> None:
    """R7, R17: VPGs come, pause and go, VDSAs are put on hosts and taken away; each order stands alone.

    R2: what the analyzers find of each server comes with the reports.
    """
    world.settings["hosts"].append({"name": "h2", "listen": "unix:h2.sock"})
    provider = world.provider
    world.start_site()
    world.start_tap()
    world.wait_newest()

    other = Scope(SHOP.enterprise, "erp", "dc1")
    foreign = {**order(), "scope": ["rival", "secret", "dc1"]}
    broken = {**order(Scope(SHOP.enterprise, "bad", "dc1")), "order": "by chance"}
    make_disk(world.folder / "disk2", 64 * BLOCK_SIZE, [(0, 8 * BLOCK_SIZE)])
    provider.tell(hosts=["h1", "h2", "h3"], sources=[order(), broken, foreign, order(other, server="db")])
    world.start_tap("tap2", server="db", host="h2", disk=world.folder / "disk2")
    newest = world.wait_newest(other)
    image = world.image(newest.newest_ns or 0, other, size_bytes=64 * BLOCK_SIZE)
    assert image == (world.folder / "disk2").read_bytes()
    wait_until(lambda: provider.report().revision == 2)
    found = sources(world)
    assert found["shop"] == found["erp"] == (True, "")
    assert "order" in found["bad"][1]
    report = provider.report()
    assert report.problems == ["an order names no scope of this enterprise"]
    assert "secret" not in report.model_dump_json() + world.log("site")
    states = {host.host: host.vdsa for host in report.hosts}
    assert states == {"h1": "installed", "h2": "installed", "h3": "failed"}

    wait_until(lambda: any(one.server == "web" for report in provider.reports for one in report.analyses), 20)
    analysis = next(one for report in provider.reports for one in report.analyses if one.server == "web")
    assert analysis.problem == ""
    assert [disk.name for disk in analysis.disks] == ["root"]
    assert analysis.since_ns is not None

    provider.tell(hosts=["h2"], sources=[{**order(), "paused": "by an administrator"}, order(other, server="db")])
    wait_until(lambda: {h.host: h.vdsa for h in provider.report().hosts} == {"h1": "not installed", "h2": "installed"})
    assert [one.paused for one in provider.report().sources] == ["by an administrator", ""]
    with NbdClient.connect(world.uri("tap")) as client:
        client.pwrite(0, b"written while nobody listens".ljust(BLOCK_SIZE))
    world.wait_newest(other)

    provider.tell(hosts=["h1", "h2"], sources=[order()])
    newest = world.wait_newest()
    assert world.image(newest.newest_ns or 0) == world.disk.read_bytes()
    wait_until(lambda: list(sources(world)) == ["shop"])


def test_a_site_without_its_provider_goes_on(world: World) -> None:
    """R1, R6: started again while the provider is away, the site serves its taps by the orders it has kept."""
    world.start_site()
    world.start_tap()
    world.guest.start()
    world.wait_newest()
    world.provider.stop()
    world.kill("site")
    assert (world.folder / "site" / "orders.json").stat().st_mode & 0o777 == 0o600
    world.settings["token"] = ""
    world.start_site()
    wait_until(lambda: "site.link_down" in world.log("site"))
    wait_until(lambda: world.log("site").count(" vdsa.tap ") == 2, 20)
    count = len(world.guest.writes)
    wait_until(lambda: len(world.guest.writes) > count + 50, 10)
    world.provider.start()
    world.wait_newest()
    world.check()
    assert len(world.provider.api.requests) == 1


def test_a_revoked_site_is_out_until_it_is_paired_anew(world: World) -> None:
    """R11, R16: unpaired, the site gets no link any more; its guests do not notice; a new token brings it back."""
    world.start_site()
    world.start_tap()
    world.guest.start()
    world.wait_newest()
    provider = world.provider
    provider.revoked.add(provider.serials[-1])
    assert provider.server is not None
    provider.loop.loop.call_soon_threadsafe(provider.server.revoke, provider.serials[-1])
    wait_until(lambda: "the provider refuses this site" in world.log("site"))
    assert not provider.sessions
    count = len(world.guest.writes)
    wait_until(lambda: len(world.guest.writes) > count + 50, 10)
    world.stop("site")
    provider.api.secrets["n" * 32] = ""
    world.settings["token"] = provider.api.token(secret="n" * 32)
    world.start_site()
    world.check()


def test_a_certificate_is_renewed_in_time(world: World) -> None:
    """A third of its life left: a new key and certificate, kept, and used from the next dial on."""
    world.provider.api.issue = {"life": timedelta(seconds=6)}
    world.start_site()
    wait_until(lambda: world.provider.renewals == 1, 10)
    identity = world.folder / "site" / "identity.json"
    wait_until(lambda: len(set(world.provider.serials)) == 2, 30)
    assert json.loads(identity.read_text())["key"].startswith("-----BEGIN PRIVATE KEY")
    assert identity.stat().st_mode & 0o777 == 0o600
    world.kill("site")
    world.start_site()
    world.wait_linked()
    assert world.provider.serials[-1] == world.provider.serials[-2]


def test_logs_are_collected(world: World) -> None:
    """R20: level, time, with VDSA and core information, one archive, no secret in it."""
    world.start_site()
    world.start_tap()
    world.wait_newest()
    between = time.time_ns()
    world.provider.tell(hosts=["h1"])
    files = world.provider.logs(level="info", vdsa=True, core=True)
    assert set(files) == {"log.jsonl", "about.json", "vdsa.json", "core.json"}
    events = [json.loads(line) for line in files["log.jsonl"].splitlines()]
    assert {"site.paired", "site.linked", "site.orders"} <= {line["event"] for line in events}
    assert json.loads(files["vdsa.json"])["sources"][0]["scope"] == list(SHOP)
    assert "uplink" in [task["name"] for task in json.loads(files["core.json"])["tasks"]]
    later = world.provider.logs(level="info", since_ns=between, vdsa=False)
    assert set(later) == {"log.jsonl", "about.json"}
    assert "site.paired" not in later["log.jsonl"].decode()
    assert "site.orders" in later["log.jsonl"].decode()
    assert world.provider.logs(level="error", vdsa=False)["log.jsonl"] == b""
    everything = b"".join(files.values()) + world.log("site").encode()
    for secret in (KEY, "s" * 32, "PRIVATE KEY", world.provider.api.token()):
        assert secret.encode() not in everything


def test_a_site_behind_a_proxy(world: World) -> None:
    """R12: paired and linked through an HTTP proxy with a password, which is told to nobody."""
    proxy = ConnectProxy("proxy-pass")
    try:
        world.settings["proxy"] = proxy.url
        world.start_site()
        world.wait_linked()
        api, link = world.provider.api.url.removeprefix("https://"), f"127.0.0.1:{world.provider.port}"
        assert set(proxy.asked) == {api, link}
        assert proxy.asked[-1] == link
        logs = b"".join(world.provider.logs(level="debug", core=True).values())
        assert b"proxy-pass" not in logs + world.log("site").encode()
        world.stop("site")
        world.settings["proxy"] = proxy.url.replace("proxy-pass", "wrong-pass")
        world.start_site()
        wait_until(lambda: "site.link_down" in world.log("site"))
        assert "407" in world.log("site")
        assert "wrong-pass" not in world.log("site")
    finally:
        world.end()
        proxy.close()


def test_both_directions_at_once(world: World) -> None:
    """R9: enterprise → cloud and cloud → enterprise over one link, each journal whole, in its own store."""
    store_url = f"file://{world.folder}/site-store"
    world.provider.orders["targets"] = [{"scope": list(BACK), "store": "ds"}]
    world.start_site()
    world.start_tap()
    world.provider.replicate_back(world.folder / "cloud.sock")
    cloud = world.folder / "cloud-disk"
    make_disk(cloud, 256 * BLOCK_SIZE, [(0, 32 * BLOCK_SIZE)])
    world.start_tap("tap2", server="cloudy", host="cloud", disk=cloud)
    guest = Guest({"root": world.uri("tap2")}, {"root": cloud.read_bytes()}, seed=5)
    world.guest.start()
    guest.start()
    try:
        world.wait_newest()
        newest = world.wait_newest(BACK, store_url).newest_ns or 0
        guest.check({"root": world.image(newest, BACK, store_url, len(guest.base["root"]))}, newest)
    finally:
        guest.stop()
    assert guest.failures == []
    newest = world.wait_newest(BACK, store_url).newest_ns or 0
    assert world.image(newest, BACK, store_url, len(guest.base["root"])) == cloud.read_bytes()
    world.check()
    assert [one.scope for one in world.provider.report().targets] == [BACK]
    world.provider.tell(targets=[])
    wait_until(lambda: world.provider.report().targets == [])
