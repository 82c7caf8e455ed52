from __future__ import annotations

import asyncio
import os
import ssl
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from vdsa_site import ZERO, Site, orders, until

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.model.replication import Throttle
from dr_cloud.seal.authority import Authority
from dr_cloud.tap.address import TlsFiles, VdsaAddress


def block(value: int) -> bytes:
    return bytes([value]) * BLOCK_SIZE


@pytest.fixture
async def site(tmp_socket_dir: Path) -> AsyncIterator[Site]:
    site = Site(tmp_socket_dir)
    await site.start()
    yield site
    await site.close()


async def test_taps_wait_for_orders_and_their_disks_get_the_vpgs_indexes(site: Site) -> None:
    """R8: the VPG says which disks of which servers it has; what no order names is kept waiting, and loses nothing."""
    a, b = site.disk("a", data=block(1)), site.disk("b", data=block(2))
    tap = await site.tap("db", "h0", root=a, data=b)
    await until(lambda: [server.name for server in site.hub.seen()] == ["db"])
    await tap.write("root", 3, block(3))
    await site.hub.configure([orders("shop", {"db": {"data": 8}})])
    await tap.write("data", 4, block(4))
    catalogue = await site.newer("shop")
    assert [(disk.index, disk.name) for disk in catalogue.newest.disks] == [(8, "db/data")]
    assert site.image(catalogue) == {"db/data": b.read_bytes()}
    assert site.report("shop").taps == {"db": "whole"}
    await site.hub.configure([orders("shop", {"db": {"data": 8, "root": 9}})])
    await until(lambda: len(site.catalogue("shop").newest.disks) == 2)
    assert site.image(await site.newer("shop")) == {"db/data": b.read_bytes(), "db/root": a.read_bytes()}


async def test_there_is_no_checkpoint_before_the_disks_have_their_indexes(site: Site) -> None:
    """R8: a server of which no disk is known yet is absent: no time is offered of which a test would serve nothing."""
    disk = site.disk("a", data=block(1))
    await site.tap("db", "h0", root=disk)
    await site.hub.configure([orders("shop", {"db": {}})])
    await until(lambda: site.report("shop").linked)
    await asyncio.sleep(0.5)
    assert site.report("shop").taps == {"db": "absent"}
    assert [server.name for server in site.hub.seen()] == ["db"]
    assert not any(checkpoint.testable for checkpoint in site.catalogue("shop").checkpoints)
    await site.hub.configure([orders("shop", {"db": {"root": 0}})])
    assert site.image(await site.newer("shop")) == {"db/root": disk.read_bytes()}


async def test_configure_again_changes_nothing_and_pause_keeps_what_is_missing(site: Site) -> None:
    """R8: orders are a state; while a VPG is paused its taps go on by bitmap, and only what is missing comes after."""
    disk = site.disk("a", data=block(1))
    tap = await site.tap("db", "h0", root=disk)
    one = orders("shop", {"db": {"root": 0}})
    await site.hub.configure([one])
    before = (await site.newer("shop")).newest.number
    await site.hub.configure([one])
    await site.newer("shop")
    assert site.dialled == [one.scope], "the link stands"
    await site.hub.configure([one.model_copy(update={"paused": "asked for"})])
    await tap.write("root", 5, block(5))
    assert (site.report("shop").paused, site.report("shop").linked) == ("asked for", False)
    assert site.report("shop").durable_ns > 0
    await site.hub.configure([one])
    catalogue = await site.newer("shop")
    assert site.image(catalogue) == {"db/root": disk.read_bytes()}
    rows = sum(checkpoint.rows for checkpoint in catalogue.checkpoints[before + 1 :])
    assert rows == 1, "only the block that was written meanwhile"


async def test_the_analyzer_hears_of_every_checkpoint_what_became_of_the_bytes(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R2: how well the writes compress is told from what was sealed, checkpoint by checkpoint."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(
        site.analyzers, "interval", lambda servers, at_ns, raw, sealed, whole: told.append((raw, sealed))
    )
    tap = await site.tap("db", "h0", root=site.disk("a", data=block(1)))
    await site.hub.configure([orders("shop", {"db": {"root": 0}})])
    await site.newer("shop")
    for number in range(1, 9):
        await tap.write("root", number, bytes([number, 0]) * (BLOCK_SIZE // 2))
    await site.newer("shop")
    await until(lambda: sum(raw for raw, _ in told) == (1 + 8) * BLOCK_SIZE)
    assert 0 < sum(sealed for _, sealed in told) < 9 * BLOCK_SIZE // 2


async def test_one_broken_order_stops_no_other(site: Site) -> None:
    """R11: an enterprise without a key, a target that refuses: told in that report; the others go on."""
    disk = site.disk("a", data=block(1))
    await site.tap("db", "h0", root=disk)
    stranger = orders("x", {}).model_copy(update={"scope": Scope("stranger", "shop", "dc1")})
    await site.hub.configure(
        [stranger, orders("y", {"web": {"root": 0}}, "nowhere"), orders("shop", {"db": {"root": 0}})]
    )
    await site.newer("shop")
    problems = {report.scope: report.problem for report in site.hub.reports()}
    assert "stranger" in problems[stranger.scope]
    assert "not served" in problems["acme", "y", "nowhere"]
    assert problems["acme", "shop", "dc1"] == ""
    with pytest.raises(DrCloudError):
        await site.hub.checkpoint(stranger.scope, "tag")
    durable = await site.hub.checkpoint(Scope("acme", "shop", "dc1"), "before the update")
    assert site.catalogue("shop").checkpoints[durable.checkpoint].tag == "before the update"


async def test_each_target_is_a_replication_of_its_own(site: Site) -> None:
    """R8: two targets of one VPG, each from its own copy; one that is away does not touch the other."""
    disk = site.disk("a", data=block(1))
    tap = await site.tap("db", "h0", copies=2, root=disk)
    members = {"db": {"root": 0}}
    away = orders("shop", members, "nowhere", copy_number=1)
    await site.hub.configure([orders("shop", members), away])
    await tap.write("root", 2, block(2))
    assert site.image(await site.newer("shop")) == {"db/root": disk.read_bytes()}
    assert not site.report("shop", "nowhere").linked
    await site.hub.configure([orders("shop", members), orders("shop", members, "dc2", copy_number=1)])
    assert site.image(await site.newer("shop", "dc2")) == {"db/root": disk.read_bytes()}


async def test_a_server_that_left_and_came_back_is_sent_whole(site: Site) -> None:
    """Invariant 2: bits that were cleared for one VPG mean nothing to another, nor to the same one afterwards."""
    disk = site.disk("a", data=block(1))
    tap = await site.tap("db", "h0", root=disk)
    members = {"db": {"root": 0}}
    await site.hub.configure([orders("shop", members)])
    await site.newer("shop")
    await site.hub.configure([orders("other", members)])
    await tap.write("root", 7, block(7))
    assert site.image(await site.newer("other")) == {"db/root": disk.read_bytes()}
    await tap.write("root", 8, block(8))
    await site.newer("other")
    await site.hub.configure([orders("shop", members)])
    assert site.image(await site.newer("shop")) == {"db/root": disk.read_bytes()}


async def test_everything_is_sent_again_when_asked(site: Site) -> None:
    """A disk that was changed behind the tap: a raised sync number has all of it sent again."""
    disk = site.disk("a", data=block(1))
    await site.tap("db", "h0", root=disk)
    one = orders("shop", {"db": {"root": 0}})
    await site.hub.configure([one])
    await site.newer("shop")
    with disk.open("r+b") as file:
        file.seek(6 * BLOCK_SIZE)
        file.write(block(6))
    await site.hub.configure([one.model_copy(update={"sync_number": 1})])
    await until(lambda: site.report("shop").taps == {"db": "synchronising"})
    assert site.image(await site.newer("shop")) == {"db/root": disk.read_bytes()}


async def test_a_server_that_moves_to_another_host_is_followed(site: Site) -> None:
    """R7: its tap on the new host takes the old one's place at once; the old one waits, and may come back whole."""
    disk, other = site.disk("a", data=block(1)), site.disk("b", data=block(9))
    await site.tap("web", "h0", root=other)
    old = await site.tap("db", "h0", root=disk)
    await site.hub.configure([orders("shop", {"db": {"root": 0}, "web": {"root": 1}})])
    await old.write("root", 2, block(2))
    await site.newer("shop")
    new = await site.tap("db", "h1", root=disk)
    await until(lambda: "h1" in {server.host for server in site.hub.seen()})
    await new.write("root", 3, block(3))
    expected = {"db/root": disk.read_bytes(), "web/root": other.read_bytes()}
    assert site.image(await site.newer("shop")) == expected
    resyncs = site.report("shop").resyncs
    await asyncio.sleep(0.5)
    assert site.report("shop").taps == {"db": "whole", "web": "whole"}, "the old tap does not fight for its place"
    assert site.report("shop").resyncs == resyncs
    assert {(one.name, one.host) for one in site.hub.seen()} == {("web", "h0"), ("db", "h0"), ("db", "h1")}
    assert site.report("shop").skipped <= 2


async def test_disks_come_go_grow_and_shrink(site: Site) -> None:
    """R7: the VPG follows, and every earlier time has the disks of then, whole."""
    root, data = site.disk("a", 32, block(1) * 32), site.disk("b", 8, block(2) * 8)
    tap = await site.tap("db", "h0", root=root)
    await site.hub.configure([orders("shop", {"db": {"root": 0, "data": 1}})])
    truth = []

    async def note() -> None:
        catalogue = await site.newer("shop")
        truth.append((catalogue.newest_ns, {f"db/{name}": path.read_bytes() for name, path in tap.paths.items()}))

    async def changed(disks: int) -> None:
        await tap.change()
        sizes = sorted(os.path.getsize(path) for path in tap.paths.values())
        await until(lambda: sorted(disk.size_bytes for disk in site.catalogue("shop").newest.disks) == sizes)
        assert len(sizes) == disks

    await note()
    tap.paths["data"] = data
    await changed(2)
    await note()
    os.truncate(root, 20 * BLOCK_SIZE)
    await changed(2)
    await note()
    os.truncate(root, 40 * BLOCK_SIZE)
    await changed(2)
    await note()
    await tap.write("root", 39, block(3))
    await note()
    assert root.read_bytes()[20 * BLOCK_SIZE : 39 * BLOCK_SIZE] == ZERO * 19
    del tap.paths["data"]
    await changed(1)
    await note()
    tap.paths["data"] = data
    data.write_bytes(block(4) + ZERO * 7)
    await changed(2)
    await note()
    catalogue = site.catalogue("shop")
    for at_ns, disks in truth:
        assert site.image(catalogue, at_ns) == disks


async def test_a_throttle_holds_the_stream_and_may_change(site: Site) -> None:
    disk = site.disk("a", 512, os.urandom(512 * BLOCK_SIZE))
    await site.tap("db", "h0", root=disk)
    slow = Throttle(bytes_per_second=200_000)
    one = orders("shop", {"db": {"root": 0}}, throttle=slow)
    await site.hub.configure([one])
    await asyncio.sleep(1.0)
    assert site.report("shop").durable_ns == 0, "2 MiB take ten seconds"
    await site.hub.configure([one.model_copy(update={"throttle": Throttle()})])
    assert site.image(await site.newer("shop")) == {"db/root": disk.read_bytes()}


async def test_many_scopes_need_no_more_threads_and_tasks_than_their_links(site: Site) -> None:
    """A hundred VPGs in one process: threads do not grow with them, and idle ones have fresh checkpoints."""
    disks = [site.disk(f"d{number}", 4, block(1)) for number in range(100)]
    for number, disk in enumerate(disks):
        await site.tap(f"s{number}", "h0", root=disk)
    await site.hub.configure(
        [orders(f"v{number}", {f"s{number}": {"root": 0}}, checkpoint_seconds=2.0) for number in range(100)]
    )
    await until(lambda: all(report.durable_ns for report in site.hub.reports()), 30)
    assert threading.active_count() < 40
    assert max(report.lag_seconds for report in site.hub.reports()) < 10


async def test_a_tap_on_another_host_comes_over_tls(site: Site) -> None:
    """R6, R11: a host without a VDSA of its own is heard over TLS, by its certificate; a barrier spans the hosts."""
    authority = Authority.open(site.folder / "ca", "provider")
    files = []
    for name in ("vdsa", "tap"):
        credentials = authority.service_credentials(name, ["127.0.0.1"])
        paths = [site.folder / f"{name}.{part}" for part in ("pem", "key", "ca")]
        for path, text in zip(paths, (credentials.certificate, credentials.key, credentials.ca), strict=True):
            path.write_text(text)
        files.append(TlsFiles(*paths))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[0].certificate, files[0].key)
    context.load_verify_locations(files[0].authority)
    context.verify_mode = ssl.CERT_REQUIRED
    address = await site.hub.listen("far", "tls:127.0.0.1:0", context)
    with pytest.raises(DrCloudError):
        await site.hub.listen("far", "tls:127.0.0.1:0", context)
    with pytest.raises(DrCloudError):
        await site.hub.listen("farther", "tls:127.0.0.1:0")
    near, far = site.disk("a", data=block(1)), site.disk("b", 2048, os.urandom(2048 * BLOCK_SIZE))
    tap = await site.tap("db", "h0", root=near)
    await site.tap("web", "far", vdsa=VdsaAddress.parse(address, files[1]), root=far)
    await site.hub.configure([orders("shop", {"db": {"root": 0}, "web": {"root": 1}})])
    await site.newer("shop")
    await tap.write("root", 1, block(2))
    catalogue = await site.newer("shop")
    assert site.image(catalogue) == {"db/root": near.read_bytes(), "web/root": far.read_bytes()}
    assert not any(c.exact_from_ns < c.time_ns for c in catalogue.checkpoints), "exact at checkpoints only"
    await site.hub.unlisten("far")
    await until(lambda: site.report("shop").taps["web"] == "absent")
