"""The link cut under load, again and again, at any moment: the source resumes from the last item that was received."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_world import wait_until
from site_world import World

pytestmark = pytest.mark.system
SEED = 20_261_123


@pytest.fixture
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    world = World(folder)
    yield world
    world.close()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_link_that_is_cut_resumes_and_sends_nothing_anew(world: World) -> None:
    """R1, R5: guests notice nothing, image(T) is what was written by T, and no cut costs a synchronisation."""
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    provider = world.provider
    world.start_site()
    world.start_tap()
    world.guest.start()
    world.wait_newest()
    world.wait_newest()
    before = provider.report().sources[0]
    for _ in range(8):
        for session in list(provider.sessions):
            provider.loop.loop.call_soon_threadsafe(session._carrier.close)
        gone = list(provider.controls)
        wait_until(lambda gone=gone: provider.controls and provider.controls[-1] not in gone, 20)  # type: ignore[misc]
        time.sleep(chance.uniform(0.0, 0.6))
    world.wait_newest()
    after = provider.report().sources[0]
    assert (after.resyncs, after.checkpoints > before.checkpoints) == (before.resyncs, True)
    assert len(provider.serials) >= 9, "each cut was followed by a new link"
    world.check()
