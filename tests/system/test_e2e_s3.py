"""The whole chain over a real S3 server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_world import MIB, Chain, Guest, Stacks, make_disk, wait_until
from s3_servers import BUCKET, CREDENTIALS, REGION, versitygw

pytestmark = pytest.mark.system

SIZE = 6 * MIB


@pytest.fixture
def url(
    require_tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with versitygw(require_tool("versitygw"), tmp_path_factory.mktemp("versitygw")) as endpoint:
        yield f"s3://{BUCKET}/chain?endpoint={endpoint}&region={REGION}"


def test_the_chain_over_s3(url: str, tmp_socket_dir: Path) -> None:
    """R3, R14.3: tap, source, target and stacks with the journal in S3: image = disk, and right at random times."""
    disk = tmp_socket_dir / "disk"
    base = make_disk(disk, SIZE, [(0, 3 * MIB)])
    chain = Chain(tmp_socket_dir, url)
    stacks = Stacks(chain)
    guest = Guest({"d": chain.uri("d")}, {"d": base}, seed=4)
    try:
        chain.start_all({"d": disk})
        guest.start()
        wait_until(lambda: len(guest.writes) > 300)
        # The target comes back from what is in the bucket.
        chain.kill("target")
        chain.start_target()
        chain.wait_ready("target")
        wait_until(lambda: len(guest.writes) > 600)
        guest.stop()
        assert not guest.failures
        catalogue = chain.wait_newest(time.time_ns())
        assert stacks.image(catalogue.plan(catalogue.newest_ns)) == {"d": disk.read_bytes()}
        for at_ns in guest.random_times(6):
            plan = catalogue.plan(at_ns)
            guest.check(stacks.image(plan), plan.at_ns)
        assert not (tmp_socket_dir / "store").exists()
    finally:
        guest.stop()
        stacks.close()
        chain.end()
