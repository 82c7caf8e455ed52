"""For the tests of a provider's node: a journal of one small ext4 disk in a folder store, and stack processes on it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from probe_world import ext4, loops, processes_of, wait_until
from stack_journal import SCOPE, History

from dr_cloud.actors.node import NodeSettings
from dr_cloud.actors.stack import StackProcess
from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.journal import Disk, ImagePlan
from dr_cloud.model.probe import ProbeResult, ProbeSpec
from dr_cloud.recovery.probes.spec import parse_spec
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.open import open_store
from dr_cloud.store.store import Store

LETTER = b"the letter that lies on the disk\n"
DISK_NAME = "web/root"


class Node:
    """Its folders, a store beside them, and the stack processes that a test has begun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store_url = f"file://{folder / 'store'}"
        tree = folder / "tree"
        tree.mkdir()
        (tree / "letter.txt").write_bytes(LETTER)
        image = ext4(folder / "image", tree, 8 << 20)
        self.history = History(self.store, [Disk(index=0, name=DISK_NAME, size_bytes=8 << 20)])
        with image.open("rb") as file:
            for block in range((8 << 20) // BLOCK_SIZE):
                if (data := file.read(BLOCK_SIZE)).count(0) < BLOCK_SIZE:
                    self.history.write(0, block, data)
        self.history.checkpoint()
        Keyring.open(folder / "keyring.json").put(SCOPE.enterprise, bytes(range(32)))
        self.settings = NodeSettings(
            keyring=folder / "keyring.json",
            work_dir=folder / "work",
            cache_dir=folder / "cache",
            run_dir=folder / "run",
            probes_at_once=2,
        )
        self.begun: list[StackProcess] = []

    @property
    def store(self) -> Store:
        return open_store(self.store_url)

    @property
    def plan(self) -> ImagePlan:
        return self.history.plan(self.history.time_ns)

    def open(self, test: str, host: str = "") -> StackProcess:
        """Open a stack as its actor would: in one that is idle, if there is one."""
        idle = [stack for stack in self.begun if stack.opened() is None]
        stack = idle[0] if idle else StackProcess(self.settings)
        stack.open(test, self.plan, self.store_url, host=host)
        if not idle:
            self.begun.append(stack)
        return stack

    def left(self) -> list[Path]:
        """Return what tests have left in the node's folder for probes."""
        return list(self.settings.probes_dir.glob("test-*"))

    def close(self) -> None:
        for stack in self.begun:
            if stack.opened() is not None:
                stack.close()


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    folder.chmod(0o755)
    node = Node(folder)
    yield node
    node.close()
    node.history.writer.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def nothing_left(node: Node) -> Iterator[None]:
    """After each test no process, mount, loop device or file of a probe is there."""
    before = loops()
    yield
    node.close()
    assert processes_below(node) == []
    assert wait_until(lambda: loops() == before)
    assert str(node.folder) not in Path("/proc/mounts").read_text()
    assert wait_until(lambda: node.left() == [])


def processes_below(node: Node) -> list[int]:
    """Return the processes of probes that run for tests of the node."""
    found = []
    for folder in node.left():
        found += processes_of(folder / "work")
    return found


def specs(*texts: str) -> list[ProbeSpec]:
    return [parse_spec(text) for text in texts]


def results(stack: StackProcess, test: str, seconds: float = 60) -> list[ProbeResult]:
    """Wait until all probes of a test have ended."""
    deadline = time.monotonic() + seconds
    while not (progress := stack.probe_progress(test)).done:
        assert time.monotonic() < deadline, progress
        time.sleep(0.05)
    return progress.results
