"""Several taps in one VPG: one order of writes over hosts, and a cut that every tap has reached."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from e2e_world import MIB, Chain, Guest, Stacks, make_disk, wait_until

from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.nbd.client import NbdClient

pytestmark = pytest.mark.system

TAPS = {"left": {"a": 0, "b": 1}, "right": {"c": 100}}
"""Disks and their indexes, by tap."""
DISKS = {disk: index for disks in TAPS.values() for disk, index in disks.items()}
SIZE = 2 * MIB + 1536


class World:
    """Two hosts with a tap each, one source; the tests share it and leave it whole."""

    def __init__(self, folder: Path) -> None:
        self.chain = Chain(folder, checkpoint_seconds=0.1)
        for seed, disk in enumerate(DISKS):
            make_disk(folder / disk, SIZE, [(0, MIB)], seed)
        self.stacks = Stacks(self.chain)
        self.guest = self.new_guest()

    def start(self) -> None:
        chain = self.chain
        chain.members = [f"{tap}/{disk}={index}" for tap, disks in TAPS.items() for disk, index in disks.items()]
        chain.start_target()
        chain.start_source()
        for tap, disks in TAPS.items():
            chain.start_tap({disk: chain.folder / disk for disk in disks}, name=tap)
        for name in list(chain.running):
            chain.wait_ready(name)
        wait_until(lambda: self.disks_of(chain.catalogue()) == DISKS)
        chain.wait_newest(time.time_ns())

    def new_guest(self) -> Guest:
        uris = {disk: self.chain.uri(disk, tap) for tap, disks in TAPS.items() for disk in disks}
        self.guest = Guest(uris, {disk: (self.chain.folder / disk).read_bytes() for disk in DISKS}, seed=2)
        return self.guest

    def tap_id(self, tap: str) -> str:
        return (self.chain.folder / f"{tap}.state").read_bytes()[16:32].hex()

    @staticmethod
    def disks_of(catalogue: Catalogue) -> dict[str, int]:
        newest = catalogue.newest
        return {disk.name.partition("/")[2]: disk.index for disk in newest.disks} if newest else {}

    def close(self) -> None:
        self.guest.stop()
        self.stacks.close()
        self.chain.end()


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    world = World(folder)
    try:
        world.start()
        yield world
    finally:
        world.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    shared.new_guest()
    yield shared
    shared.guest.stop()
    for tap in TAPS:
        shared.chain.wake(tap)


def times_of_writes(world: World, catalogue: Catalogue, after_ns: int) -> list[int]:
    """Return the time that its tap gave to each of the guest's writes."""
    times = np.unique(world.chain.rows(catalogue)["time_ns"])
    found: list[int] = times[times > after_ns].tolist()
    return found


def test_one_order_over_two_hosts(world: World) -> None:
    """R5: image(T) of three disks behind two taps holds every write up to T in the order of time, and none after."""
    chain, guest = world.chain, world.guest
    start_ns = time.time_ns()
    guest.start()
    wait_until(lambda: len(guest.writes) > 600)
    guest.stop()
    assert not guest.failures
    catalogue = chain.wait_newest(time.time_ns())
    times = times_of_writes(world, catalogue, start_ns)
    assert len(times) == len(guest.writes)
    assert all(write.begun_ns <= at <= write.acked_ns for write, at in zip(guest.writes, times, strict=True))
    for at_ns in guest.random_times(8):
        plan = catalogue.plan(at_ns)
        assert plan.at_ns == at_ns
        assert world.stacks.image(plan) == guest.state(bisect_right(times, at_ns))
    for number in random.sample(range(len(times)), 6):
        for at_ns, done in ((times[number] - 1, number), (times[number], number + 1)):
            assert world.stacks.image(catalogue.plan(at_ns)) == guest.state(done)


def test_two_guests_at_once(world: World) -> None:
    """R5: two hosts write at once, as fast as they can; the journal has each write at the time it was made."""
    chain = world.chain
    everything = world.new_guest()
    everything.stop()
    guests = []
    for tap, disks in TAPS.items():
        guest = Guest(everything.disks, everything.base, seed=len(guests))
        guest.areas = {disk: guest.areas[disk] for disk in disks}
        guest.pause_seconds = 0
        guests.append((tap, guest))
    start_ns = time.time_ns()
    before = chain.catalogue().checkpoints[-1].number
    for _, guest in guests:
        guest.start()
    wait_until(lambda: chain.catalogue().checkpoints[-1].number > before + 12)
    for _, guest in guests:
        guest.stop()
        assert not guest.failures
    catalogue = chain.wait_newest(time.time_ns())
    rows = chain.rows(catalogue)
    rows = rows[rows["time_ns"] > start_ns]
    times = {}
    for tap, guest in guests:
        mine = rows[np.isin(rows["disk"], list(TAPS[tap].values()))]
        times[tap] = np.unique(mine["time_ns"]).tolist()
        assert len(times[tap]) == len(guest.writes)
        assert all(w.begun_ns <= at <= w.acked_ns for w, at in zip(guest.writes, times[tap], strict=True))
    for at_ns in random.sample([at for tap in TAPS for at in times[tap]], 8):
        image = world.stacks.image(catalogue.plan(at_ns))
        for tap, guest in guests:
            state = guest.state(bisect_right(times[tap], at_ns))
            assert {disk: image[disk] for disk in TAPS[tap]} == {disk: state[disk] for disk in TAPS[tap]}


def test_a_cut_holds_what_every_tap_had_written(world: World) -> None:
    """R5, invariant 2: a checkpoint calls no write of any tap durable that it lacks; the last one has them all."""
    chain, guest = world.chain, world.guest
    before = chain.wait_quiet().checkpoints[-1].number
    guest.start()
    wait_until(lambda: chain.catalogue().checkpoints[-1].number > before + 4)
    guest.stop()
    catalogue = chain.wait_quiet()
    entries = chain.entries(before, catalogue)
    assert len(entries) >= len(guest.writes) > 0
    for checkpoint in catalogue.checkpoints[before + 1 :]:
        assert checkpoint.testable
        for tap, disks in TAPS.items():
            cut = checkpoint.cuts[world.tap_id(tap)]
            mine = entries[np.isin(entries["disk"], list(disks.values()))]
            assert cut < mine["sequence"][mine["time_ns"] > checkpoint.time_ns].min(initial=1 << 62)
            assert checkpoint is not catalogue.checkpoints[-1] or cut >= mine["sequence"].max()


def test_no_cut_is_ahead_of_a_tap(world: World) -> None:
    """R5: while one host is hung the VPG's checkpoints wait for it, and the order holds."""
    chain, guest = world.chain, world.guest
    guest.areas.pop("c")
    guest.write("c", 0, b"before".ljust(4096, b"."))
    guest.start()
    chain.wait_newest(time.time_ns())
    chain.hang("right")
    stat = Path(f"/proc/{chain.running['right'].pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
    hung_ns = time.time_ns()
    written = len(guest.writes)
    time.sleep(1.5)
    assert len(guest.writes) > written + 50, "the guest of the other tap waited"
    assert chain.catalogue().checkpoints[-1].time_ns <= hung_ns
    chain.wake("right")
    guest.stop()
    assert not guest.failures
    guest.write("c", 0, b"after".ljust(4096, b"."))
    catalogue = chain.wait_newest(time.time_ns())
    for at_ns in [*guest.random_times(6), hung_ns]:
        plan = catalogue.plan(at_ns)
        assert plan.at_ns == at_ns
        guest.check(world.stacks.image(plan), at_ns)


def test_a_tap_of_no_member_waits(world: World) -> None:
    """R1, R8: a server that is no member of the VPG is not replicated, and its guest goes on."""
    chain = world.chain
    path = chain.folder / "other"
    make_disk(path, MIB)
    chain.start_tap({"other": path}, name="third")
    chain.wait_ready("third")
    wait_until(lambda: "server=third" in chain.log("source"))
    with NbdClient.connect(chain.uri("other", "third")) as client:
        client.pwrite(0, b"x" * 4096)
    assert path.read_bytes()[:4096] == b"x" * 4096
    catalogue = chain.wait_newest(time.time_ns())
    assert world.disks_of(catalogue) == DISKS
    chain.kill("third")
