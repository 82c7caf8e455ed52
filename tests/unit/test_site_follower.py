"""What a site makes of its orders, with its real hub and target; what it then tells."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dr_cloud.link.stream import MessageStream
from dr_cloud.model.errors import NotFoundError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Disk
from dr_cloud.model.replication import SeenServer
from dr_cloud.model.units import SECOND_NS
from dr_cloud.seal.keyring import Keyring
from dr_cloud.site.config import SiteSettings
from dr_cloud.site.follower import Follower, essence
from dr_cloud.site.orders import read_orders
from dr_cloud.vdsa.analysis.analyzers import Analyzers
from dr_cloud.vdsa.hub import SourceHub
from dr_cloud.vdsa.target_io import TargetVdsa

SHOP = Scope("acme", "shop", "dc1")
BACK = Scope("acme", "back", "hq")


async def nobody(scope: Scope) -> MessageStream:
    raise ConnectionRefusedError("nobody is there")


@pytest.fixture
async def follower(tmp_path: Path, tmp_socket_dir: Path) -> AsyncIterator[Follower]:
    keyring = Keyring.open(tmp_path / "keyring.json")
    keyring.create("acme")
    settings = SiteSettings.model_validate(
        {
            "state": tmp_path / "state",
            "hosts": [{"name": name, "listen": f"unix:{tmp_socket_dir}/{name}"} for name in ("h1", "h2")],
            "datastores": [{"name": "ds", "store": f"file://{tmp_path}/store"}],
        }
    )
    follower = Follower(settings, lambda: 42)
    follower.analyzers = Analyzers()
    follower.hub = SourceHub(keyring, nobody, analyzers=follower.analyzers)
    follower.target = TargetVdsa(keyring, tmp_path / "work", follower.admit)
    yield follower
    await follower.hub.close()
    await follower.target.close()


def accepted(revision: int = 1, **orders: Any):
    return read_orders(json.dumps({"revision": revision, "hosts": [], **orders}).encode(), "acme", ["ds"])


def states(follower: Follower) -> dict[str, str]:
    return {host.host: host.vdsa for host in follower.report().hosts}


async def test_hosts_are_listened_for_as_ordered(follower: Follower, tmp_socket_dir: Path) -> None:
    """R17: a VDSA is put on a host, cannot be put on another, and is taken away."""
    assert states(follower) == {"h1": "not installed", "h2": "not installed"}
    (tmp_socket_dir / "h2").mkdir()
    await follower.follow(accepted(hosts=["h1", "h2", "h9"]))
    assert states(follower) == {"h1": "installed", "h2": "failed", "h9": "failed"}
    problems = {host.host: host.problem for host in follower.report().hosts}
    assert str(tmp_socket_dir / "h2") in problems["h2"]
    assert "no such host" in problems["h9"]
    (await asyncio.open_unix_connection(str(tmp_socket_dir / "h1")))[1].close()
    (tmp_socket_dir / "h2").rmdir()
    await follower.tend()
    assert states(follower)["h2"] == "installed", "what failed is tried again"
    await follower.follow(accepted(2, hosts=["h2"]))
    assert states(follower) == {"h1": "not installed", "h2": "installed"}
    with pytest.raises(OSError):
        await asyncio.open_unix_connection(str(tmp_socket_dir / "h1"))


async def test_only_what_is_ordered_is_let_in(follower: Follower) -> None:
    """R11: a scope that nobody ordered here finds no store."""
    with pytest.raises(NotFoundError):
        follower.admit(BACK)
    await follower.follow(accepted(targets=[{"scope": list(BACK), "store": "ds"}]))
    store = follower.admit(BACK)
    assert follower.admit(BACK) is store
    with pytest.raises(NotFoundError):
        follower.admit(SHOP)
    await follower.follow(accepted(2))
    with pytest.raises(NotFoundError):
        follower.admit(BACK)


async def test_the_revision_is_told_when_it_has_been_followed(follower: Follower) -> None:
    source = {"scope": list(SHOP), "copy_number": 0, "members": {"web": {"root": 0}}}
    broken = {"scope": ["acme", "bad", "dc1"]}
    await follower.follow(accepted(3, sources=[source, broken]))
    report = follower.report()
    assert (report.revision, report.time_ns, report.datastores) == (3, 42, ["ds"])
    assert [one.scope.vpg for one in report.sources] == ["shop", "bad"]
    assert "Field required" in report.sources[1].problem

    async def fail(_: Any) -> None:
        raise RuntimeError("a bug")

    configure, follower.hub.configure = follower.hub.configure, fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        await follower.follow(accepted(4))
    assert follower.report().revision == 3
    follower.hub.configure = configure  # type: ignore[method-assign]
    await follower.follow(accepted(4))
    assert (follower.report().revision, follower.report().sources) == (4, [])


async def test_analyses_are_told_in_turn(tmp_path: Path) -> None:
    """R2: the analysis of each server, a few in each report, again after half a minute."""
    now_ns = 0
    settings = SiteSettings.model_validate({"state": tmp_path, "hosts": [{"name": "h1", "listen": "unix:x"}]})
    follower = Follower(settings, lambda: now_ns)
    follower.analyzers = Analyzers()
    names = [f"s{number:02}" for number in range(12)]
    for name in names:
        follower.analyzers.announce(name, [Disk(index=0, name="root", size_bytes=4096)])
    told: list[list[str]] = []
    for second in range(0, 50):
        now_ns = second * SECOND_NS
        told.append([one.server for one in follower.analyses()])
    assert [len(some) for some in told] == [0] * 5 + [8, 4] + [0] * 28 + [8, 4] + [0] * 13
    assert told[5] + told[6] == told[35] + told[36] == names


async def test_servers_that_have_gone_are_still_known(follower: Follower) -> None:
    """R7: a server that shows up on another host is there, and no more where it was."""
    disks = [Disk(index=0, name="root", size_bytes=4096)]

    def server(name: str, host: str, tap: str) -> SeenServer:
        return SeenServer(name=name, host=host, tap=tap * 32, disks=disks, connected=True)

    def found() -> set[tuple[str, str, bool]]:
        return {(one.name, host.host, one.connected) for host in follower.report().hosts for one in host.servers}

    seen = [server("web", "h1", "a"), server("db", "h1", "b")]
    follower.hub.seen = lambda: seen  # type: ignore[method-assign]
    assert found() == {("web", "h1", True), ("db", "h1", True)}
    before = essence(follower.report())
    assert essence(follower.report()) == before
    seen = [server("db", "h1", "b")]
    assert found() == {("web", "h1", False), ("db", "h1", True)}
    assert essence(follower.report()) != before
    seen = [server("web", "h2", "c"), server("db", "h1", "b")]
    assert found() == {("web", "h2", True), ("db", "h1", True)}
