"""The whole chain in trouble: each of its processes killed -9 or hung while a guest writes, and back."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_world import MIB, SECOND_NS, Chain, Guest, GuestWrite, Stacks, make_disk, wait_until

from dr_cloud.journal.writer import KEYFRAME_ROWS
from dr_cloud.model.blocks import BLOCK_SIZE

pytestmark = pytest.mark.system

SIZE = 24 * MIB
AREA = (8 * MIB, 16 * MIB)
AWAY_SECONDS = 1.5


class World:
    """One chain for all tests; each leaves it running and whole."""

    def __init__(self, folder: Path) -> None:
        self.chain = Chain(folder)
        self.disk = folder / "disk"
        make_disk(self.disk, SIZE, [(0, 14 * MIB)])
        self.stacks = Stacks(self.chain)
        self.guest = self.new_guest()

    def new_guest(self) -> Guest:
        self.guest = Guest({"d": self.chain.uri("d")}, {"d": self.disk.read_bytes()}, seed=1)
        self.guest.areas = {"d": AREA}
        return self.guest

    def break_part(self, part: str, trouble: str) -> None:
        if trouble == "killed":
            self.chain.kill(part)
        else:
            self.chain.hang(part)

    def bring_back(self, part: str, trouble: str) -> None:
        if trouble == "hung":
            self.chain.wake(part)
            return
        if part == "tap":
            self.chain.start_tap({"d": self.disk}, "--queue", "1MiB")
        elif part == "source":
            self.chain.start_source()
        else:
            self.chain.start_target()
        self.chain.wait_ready(part)

    def write_over_a_checkpoint(self) -> int:
        """Let the guest write in its thread; return the time of a checkpoint that was made meanwhile."""
        self.guest.start()
        wait_until(lambda: len(self.guest.writes) > 200)
        newest_ns = self.chain.wait_newest(time.time_ns()).newest_ns
        assert newest_ns is not None
        return newest_ns

    def check_everything(self, exact_until_ns: int = 0) -> None:
        """The newest image is the disk; images at any time are what the guest had written by then."""
        catalogue = self.chain.wait_newest(time.time_ns())
        image = self.stacks.image(catalogue.plan(catalogue.newest_ns))
        assert image == {"d": self.disk.read_bytes()}
        assert image == self.guest.state(len(self.guest.writes))
        times = self.guest.random_times(6)
        if exact_until_ns:
            times += [random.randint(self.guest.writes[0].begun_ns, exact_until_ns) for _ in range(4)]
        for at_ns in times:
            plan = catalogue.plan(at_ns)
            assert plan.at_ns == at_ns or at_ns > exact_until_ns, plan.note
            self.guest.check(self.stacks.image(plan), plan.at_ns)

    def sent_after(self, number: int) -> list[int]:
        return [block for _, block in self.chain.blocks_sent(number, self.chain.wait_quiet())]

    def close(self) -> None:
        self.guest.stop()
        self.stacks.close()
        self.chain.end()


def blocks_of(writes: list[GuestWrite]) -> set[int]:
    return {
        block for write in writes for block in range(write.offset >> 12, (write.offset + write.length + 4095) >> 12)
    }


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    world = World(folder)
    try:
        world.chain.start_all({"d": world.disk}, "--queue", "1MiB")
        yield world
    finally:
        world.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    """The chain, with a guest that has not written yet; after a test that failed, its parts are brought back."""
    shared.new_guest()
    yield shared
    shared.guest.stop()
    for part in ("target", "source", "tap"):
        shared.bring_back(part, "hung" if part in shared.chain.running else "killed")


@pytest.mark.parametrize("trouble", ["killed", "hung"])
@pytest.mark.parametrize("part", ["source", "target"])
def test_a_vdsa_in_trouble(world: World, part: str, trouble: str) -> None:
    """R1, invariant 2: no guest write fails or waits; afterwards image = disk, and only dirty blocks came again."""
    chain, guest = world.chain, world.guest
    before = chain.wait_quiet().checkpoints[-1].number
    exact_until_ns = world.write_over_a_checkpoint()
    world.break_part(part, trouble)
    began = len(guest.writes)
    time.sleep(AWAY_SECONDS)
    assert len(guest.writes) > began + 50, "the guest waited for the VDSA"
    world.bring_back(part, trouble)
    time.sleep(0.5)
    guest.stop()
    assert not guest.failures
    assert max(write.acked_ns - write.begun_ns for write in guest.writes) < AWAY_SECONDS * SECOND_NS
    world.check_everything(exact_until_ns)
    assert set(world.sent_after(before)) == blocks_of(guest.writes)
    # Once more, with nothing under way: exactly what is written meanwhile is sent, and each block once.
    before = chain.catalogue().checkpoints[-1].number
    done = len(guest.writes)
    world.break_part(part, trouble)
    for block in range(2048, 2148, 5):
        guest.write("d", block * BLOCK_SIZE, guest.random.randbytes(2 * BLOCK_SIZE))
    world.bring_back(part, trouble)
    world.check_everything()
    assert sorted(world.sent_after(before)) == sorted(blocks_of(guest.writes[done:]))


def test_the_tap_killed_in_mid_write(world: World) -> None:
    """Invariant 2: a tap killed -9 while its guest writes sends what may differ after its start, and nothing else."""
    chain, guest = world.chain, world.guest
    guest.may_break = True
    before = chain.wait_quiet().checkpoints[-1].number
    exact_until_ns = world.write_over_a_checkpoint()
    for _ in range(2):
        chain.kill("tap")
        world.bring_back("tap", "killed")
        done = len(guest.writes)
        wait_until(lambda done=done: len(guest.writes) > done + 100)
    guest.stop()
    assert not guest.failures
    world.check_everything(exact_until_ns)
    assert set(world.sent_after(before)) <= blocks_of(guest.writes)
    # With nothing under way there is nothing to send.
    before = chain.catalogue().checkpoints[-1].number
    chain.kill("tap")
    world.bring_back("tap", "killed")
    assert world.sent_after(before) == []


def test_source_and_target_killed_at_once(world: World) -> None:
    """Invariants 2 and 4: both sides killed -9 under load; the next writer has a new generation; nothing is lost."""
    chain, guest = world.chain, world.guest
    generation = chain.wait_quiet().checkpoints[-1].generation
    exact_until_ns = world.write_over_a_checkpoint()
    for part in ("target", "source"):
        chain.kill(part)
    time.sleep(0.5)
    for part in ("target", "source"):
        world.bring_back(part, "killed")
    time.sleep(0.5)
    guest.stop()
    assert not guest.failures
    world.check_everything(exact_until_ns)
    assert chain.catalogue().checkpoints[-1].generation == generation + 1


def test_the_target_killed_between_keyframes(world: World) -> None:
    """R14.3, invariant 4: a map recovered from a keyframe and the rows after it makes right images, undo and redo."""
    chain, guest = world.chain, world.guest
    for _ in range(2):
        chain.wait_newest(time.time_ns())
        keyframes = len(chain.catalogue().keyframes)
        for _ in range(100):
            guest.write_something()
        for _ in range(KEYFRAME_ROWS // 1024 + 1):
            guest.write("d", AREA[1], None, 1024 * BLOCK_SIZE)
        wait_until(lambda keyframes=keyframes: len(chain.catalogue().keyframes) > keyframes)
        for _ in range(100):
            guest.write_something()
        chain.wait_newest(time.time_ns())
        chain.kill("target")
        world.bring_back("target", "killed")
    world.check_everything()
    catalogue = chain.catalogue()
    plans = [catalogue.plan(write.acked_ns) for write in guest.writes]
    for direction in ("undo", "redo"):
        for plan in random.sample([plan for plan in plans if plan.direction == direction], 6):
            guest.check(world.stacks.image(plan), plan.at_ns)
