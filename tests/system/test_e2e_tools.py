"""Outside clients on both ends of the chain: what they write through the tap, they find in a stack, at its time."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_world import MIB, Chain, Stacks, make_disk

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.journal import ImagePlan

pytestmark = pytest.mark.system

SIZE = 32 * MIB


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chain = Chain(folder)
        self.disk = folder / "disk"
        make_disk(self.disk, SIZE, [(MIB, 2 * MIB)])
        self.stacks = Stacks(self.chain)

    @property
    def tap(self) -> str:
        return self.chain.uri("d")

    def now(self) -> ImagePlan:
        """Return the plan of the disk as it is now."""
        at_ns = time.time_ns()
        return self.chain.wait_newest(at_ns).plan(at_ns)


@pytest.fixture(scope="module")
def world(require_tool: Callable[[str], str]) -> Iterator[World]:
    for tool in ("nbdinfo", "nbdcopy", "qemu-io", "qemu-img", "fio"):
        require_tool(tool)
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    world = World(folder)
    try:
        world.chain.start_all({"d": world.disk})
        yield world
    finally:
        world.stacks.close()
        world.chain.end()
        shutil.rmtree(folder, ignore_errors=True)


def run(*command: str | Path, code: int = 0) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, f"{command}: {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout + done.stderr


def qemu_io(uri: str, *commands: str) -> None:
    told = run("qemu-io", "-d", "unmap", "-f", "raw", *(word for command in commands for word in ("-c", command)), uri)
    assert "failed" not in told, told


def fio(uri: str, seed: int, *more: str, code: int = 0) -> str:
    return run(
        "fio", "--name=v", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--iodepth=16",
        "--offset=8m", "--size=4m", "--verify=crc32c", "--verify_fatal=1", f"--randseed={seed}", *more, code=code,
    )  # fmt: skip


def test_fio_verifies_in_a_stack_what_it_wrote_through_the_tap(world: World) -> None:
    """R14.3: blocks written by fio at the tap pass its verification in a stack of that time, and in no later one."""
    fio(world.tap, 1, "--do_verify=0")
    first = world.now()
    fio(world.tap, 2, "--do_verify=0", "--verify_pattern=0x5a", "--verify=pattern")
    with world.stacks.at(first) as then, world.stacks.at(world.now()) as later:
        fio(then.uris["tap/d"][0], 1, "--verify_only")
        assert "verify" in fio(later.uris["tap/d"][0], 1, "--verify_only", code=1)
        assert then.stack.statistics().blocks_written == 0


def test_qemu_io_writes_at_the_tap_and_reads_in_stacks(world: World) -> None:
    """R14.1, R14.5: writes, zeroes and trims of odd sizes are each there from their time on; a test's own are not."""
    qemu_io(world.tap, "write -P 0x11 16M 64k", "write -P 0x22 16385k 512", "flush")
    first = world.now()
    qemu_io(world.tap, "write -z 16386k 5k", "discard 16400k 8k", "write -f -P 0x33 16420k 1536", "flush")
    second = world.now()
    with world.stacks.at(first) as one, world.stacks.at(second) as two:
        before, after = one.uris["tap/d"][0], two.uris["tap/d"][0]
        qemu_io(before, "read -P 0x11 16M 1k", "read -P 0x22 16385k 512", "read -P 0x11 16386k 62k")
        qemu_io(after, "read -P 0x22 16385k 512", "read -P 0 16386k 5k", "read -P 0x11 16391k 9k")
        qemu_io(after, "read -P 0 16400k 8k", "read -P 0x11 16408k 12k", "read -P 0x33 16420k 1536")
        qemu_io(before, "write -P 0x44 0 1M", "read -P 0x44 0 1M")
        qemu_io(after, "read -P 0 0 1M")
    qemu_io(world.tap, "read -P 0 0 1M")


def test_nbdcopy_and_qemu_img_compare(world: World) -> None:
    """R14.3: a disk copied in through the tap is copied out of a stack, and qemu calls them identical."""
    source, back = world.folder / "in.raw", world.folder / "out.raw"
    make_disk(source, SIZE, [(3 * MIB + 4096, MIB), (20 * MIB, 777)], seed=7)
    run("nbdcopy", "--flush", source, world.tap)
    with world.stacks.at(world.now()) as server:
        uri = server.uris["tap/d"][0]
        run("nbdcopy", uri, back)
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
    assert back.read_bytes() == source.read_bytes() == world.disk.read_bytes()


def blocks(entries: list[dict[str, Any]], zero: bool) -> set[int]:
    return {
        block
        for entry in entries
        if entry["zero"] is zero
        for block in range(entry["start"] // BLOCK_SIZE, (entry["start"] + entry["length"]) // BLOCK_SIZE)
    }


def test_nbdinfo_and_qemu_img_map(world: World) -> None:
    """Both ends tell size, features and holes; a stack calls a hole just what is zero."""
    qemu_io(world.tap, "discard 0 32M", "write -P 1 4M 1M", "write -P 0 6M 64k", "write -P 2 31M 4k", "flush")
    content = world.disk.read_bytes()
    zero = {at for at in range(SIZE // BLOCK_SIZE) if not any(content[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE])}
    with world.stacks.at(world.now()) as server:
        for uri, name in ((world.tap, "d"), (server.uris["tap/d"][0], "tap/d")):
            (told,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
            assert told["export-size"] == SIZE
            assert not told["is_read_only"]
            assert all(told[can] for can in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"))
            listed = json.loads(run("nbdinfo", "--json", "--list", uri))["exports"]
            assert [export["export-name"] for export in listed] == [name]
            mapped = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri))
            holes, data = blocks(mapped, True), blocks(mapped, False)
            assert holes | data == set(range(SIZE // BLOCK_SIZE))
            assert holes <= zero
            assert len(holes) > 7000
            assert name == "d" or holes == zero
