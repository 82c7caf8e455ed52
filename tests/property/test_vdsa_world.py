from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from vdsa_world import DISK_BLOCKS, ZERO, World

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.vdsa.actions import SourceLimits

CONTENTS = [ZERO, *(bytes([value]) * BLOCK_SIZE for value in (1, 2, 3))]
TINY = SourceLimits(batches_max=4, kept_bytes_max=6000, cut_bytes=1500, cut_bytes_max=3000)

choice = st.integers(0, 99)
WRITE = st.tuples(
    st.just("write"), choice, st.integers(0, DISK_BLOCKS - 3), st.lists(st.integers(0, 9), min_size=1, max_size=3)
)
STEPS = st.one_of(
    WRITE,
    WRITE,
    WRITE,
    st.tuples(st.sampled_from(["read", "read", "sync"]), choice, st.integers(1, 30_000)),
    st.tuples(st.sampled_from(["job", "deliver", "answer", "job", "deliver", "answer", "twice"]), choice),
    st.tuples(st.sampled_from(["flush", "commit", "tick", "run", "run", "run", "run"])),
    st.tuples(st.sampled_from(["run", "cut link", "drop tap", "kill source", "kill target"]), choice),
    st.tuples(st.sampled_from(["run", "leave", "come back"]), choice),
)


def step(world: World, action: tuple[Any, ...]) -> None:
    verb, *arguments = action
    tap = world.taps[arguments[0] % len(world.taps)] if arguments else world.taps[0]
    match verb:
        case "write":
            # Values above the shared contents are new data; the others meet deduplication and holes.
            blocks = [
                CONTENTS[value] if value < len(CONTENTS) else world.clock().to_bytes(8, "big") * (BLOCK_SIZE // 8)
                for value in arguments[2]
            ]
            tap.write(arguments[1], blocks)
        case "read":
            world.connect_tap(tap)
            world.read_tap(tap, arguments[1])
        case "sync":
            tap.synchronise()
        case "job":
            world.run_job(arguments[0])
        case "deliver" | "twice":
            world.deliver(arguments[0], verb == "twice")
        case "answer":
            world.answer(arguments[0])
        case "flush":
            world.do(world.source.flush())
        case "commit":
            world.commit()
        case "tick":
            world.tick()
        case "run":
            run(world)
        case "cut link":
            world.cut_link()
        case "drop tap":
            world.drop_tap(tap)
        case "leave" | "come back":
            world.set_member(tap, verb == "come back")
        case "kill source":
            world.start_source()
        case "kill target":
            world.start_target()


def run(world: World) -> None:
    """Everything goes well for a while, though not to its end."""
    for tap in world.taps:
        world.connect_tap(tap)
    world.connect_link()
    for _ in range(4):
        for tap in world.taps:
            world.read_tap(tap, 1 << 16)
            tap.synchronise()
        world.do(world.source.flush())
        for turn in range(6):
            world.run_job(turn)
            world.deliver(turn)
            world.answer(turn)
    world.commit()
    world.tick()


@settings(max_examples=60)
@given(
    taps=st.integers(1, 3),
    connections=st.sampled_from([1, 3]),
    limits=st.sampled_from([SourceLimits(), TINY]),
    actions=st.lists(STEPS, min_size=20, max_size=90),
    times=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=2),
)
def test_images_are_right_and_nothing_is_lost(
    taps: int, connections: int, limits: SourceLimits, actions: list[Any], times: list[int]
) -> None:
    """R3, R5: whatever order, repeats, breaks and crashes, image(T) is right and no acknowledged write is lost."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), taps, connections, limits)
        try:
            for action in actions:
                step(world, action)
            world.settle()
            world.check(times)
        finally:
            world.close()
