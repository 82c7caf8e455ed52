"""The site's process killed -9 under load, again and again, in both of its dialling ways: nothing is lost."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_world import wait_until
from site_world import World

from dr_cloud.model.provider import Architecture

pytestmark = pytest.mark.system


@pytest.fixture
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    world = World(folder)
    yield world
    world.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("architecture", [Architecture.PAIRED_CONNECTORS, Architecture.CLOUD_CONNECTOR])
def test_a_site_killed_under_load_loses_nothing(world: World, architecture: Architecture) -> None:
    """R1, R5: kill -9 in the middle of everything; the guest goes on; image(T) is what was written by T."""
    world.provider.orders["architecture"] = architecture.value
    world.start_site()
    world.start_tap()
    world.guest.start()
    world.wait_newest()
    for pause in (0.0, 0.4):
        world.kill("site")
        count = len(world.guest.writes)
        time.sleep(pause)
        wait_until(lambda count=count: len(world.guest.writes) > count + 50, 10)  # type: ignore[misc]
        world.start_site()
        world.wait_newest()
    world.check()


def test_a_site_killed_while_it_pairs_goes_on(world: World) -> None:
    """Killed when the provider has answered and nothing was kept yet: the next start pairs with the same token."""
    world.provider.api.lose_answers = 1
    path = world.folder / "site.yaml"
    with pytest.raises(AssertionError, match="cannot be reached"):
        world.start_site()
    world.kill("site")
    assert (world.folder / "site" / "request.json").exists()
    assert path.exists()
    world.start_site()
    world.wait_linked()
    assert len(world.provider.api.requests) == 2
