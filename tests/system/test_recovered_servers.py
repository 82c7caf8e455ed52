"""Recovered servers as outside clients see them: they last, they become disks of their own, or they vanish."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stack_journal import SCOPE, History

from dr_cloud.actors.node import NodeSettings
from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.journal import Disk
from dr_cloud.recovery.servers import RecoveredRecord
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.open import open_store

pytestmark = pytest.mark.system

SIZE = 12 << 20
DISKS = [Disk(index=0, name="db/root", size_bytes=SIZE + 1536), Disk(index=3, name="web/root", size_bytes=SIZE)]
PROGRAM = Path(__file__).parents[1] / "recovered_process.py"


class Rig:
    """A journal, a node, and the process of one failover."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store_url = f"file://{folder / 'store'}"
        self.history = History(open_store(self.store_url), DISKS)
        rng = random.Random(4)
        for disk in (0, 3):
            for block in range(0, SIZE // BLOCK_SIZE, 2):
                self.history.write(disk, block, rng.randbytes(64) * 64)
        self.at_ns = self.history.checkpoint()
        for block in range(0, 400):
            self.history.write(0, block, b"later---" * 512)
        self.history.checkpoint()
        Keyring.open(folder / "keyring.json").put(SCOPE.enterprise, bytes(range(32)))
        self.settings = NodeSettings(
            keyring=folder / "keyring.json",
            work_dir=folder / "work",
            cache_dir=folder / "cache",
            run_dir=folder / "run",
        )
        self.record = RecoveredRecord(failover="f1", store=self.store_url, plan=self.history.plan(self.at_ns))
        self.expected = {
            name: bytearray(self.history.disk_at(index, self.at_ns)) for index, name, _ in map(_parts, DISKS)
        }
        self.process: subprocess.Popen[str] | None = None
        self.uris: dict[str, list[str]] = {}

    def start(self, *, again: bool = False) -> None:
        arguments = [self.settings.model_dump_json(), self.record.model_dump_json(), f"{self.folder}/no-vdsa.sock"]
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments, "again" if again else "first"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.uris = self._said()

    def _said(self) -> Any:
        assert self.process is not None and self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith(("{", "null")):
                return json.loads(line)
        raise AssertionError(f"it ended with {self.process.wait()}")

    def say(self, word: str) -> Any:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self._said()

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.communicate()
            self.process = None

    def write(self, disk: str, offset: int, length: int, pattern: int) -> None:
        """Write with qemu-io, and flush."""
        subprocess.run(
            ["qemu-io", "-f", "raw", self.uris[disk][0], "-c", f"write -P {pattern} {offset} {length}", "-c", "flush"],
            check=True,
            capture_output=True,
        )
        self.expected[disk][offset : offset + length] = bytes([pattern]) * length

    def check(self) -> None:
        """Read every disk with nbdcopy."""
        for disk, content in self.expected.items():
            copy = subprocess.run(["nbdcopy", self.uris[disk][0], "-"], check=True, capture_output=True).stdout
            assert hashlib.sha256(copy).digest() == hashlib.sha256(content).digest(), disk

    def store_hash(self) -> str:
        digest = hashlib.sha256()
        for path in sorted((self.folder / "store").rglob("*")):
            if path.is_file():
                digest.update(str(path).encode() + path.read_bytes())
        return digest.hexdigest()


def _parts(disk: Disk) -> tuple[int, str, int]:
    return disk.index, disk.name, disk.size_bytes


@pytest.fixture
def rig(require_tool: Callable[[str], str]) -> Iterator[Rig]:
    for tool in ("qemu-io", "nbdcopy", "fio"):
        require_tool(tool)
    folder = Path(tempfile.mkdtemp(prefix="recovered-"))
    rig = Rig(folder)
    try:
        yield rig
    finally:
        rig.kill()
        rig.history.writer.close()
        shutil.rmtree(folder)


def test_it_lasts_and_is_promoted(rig: Rig) -> None:
    """R10: what a recovered server wrote outlives kill -9; promoted while it writes, it needs the journal no more."""
    before = rig.store_hash()
    rig.start()
    rig.check()
    rig.write("db/root", 512, 5 * BLOCK_SIZE, 7)
    rig.write("web/root", 3 << 20, 1 << 20, 8)
    rig.write("db/root", SIZE + 512, 1024, 9)
    rig.kill()
    rig.start(again=True)
    rig.check()
    assert rig.say("progress")["missing_bytes"] > 0
    fio = subprocess.Popen(
        ["fio", "--name=v", "--ioengine=nbd", f"--uri={rig.uris['web/root'][0]}", "--rw=randwrite", "--bs=4k",
         "--size=4m", "--offset=6m", "--verify=crc32c", "--thread", "--iodepth=8"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    rig.say("promote")
    deadline = time.monotonic() + 60
    while not (progress := rig.say("progress"))["promoted"]:
        assert time.monotonic() < deadline, progress
        time.sleep(0.1)
    said, _ = fio.communicate(timeout=60)
    assert fio.returncode == 0 and "bad magic" not in said, said
    assert progress["missing_bytes"] == 0 and progress["problem"] == ""
    assert rig.store_hash() == before
    raw = rig.settings.work_dir / "recovered" / "f1" / "3.raw"
    rig.expected["web/root"] = bytearray(raw.read_bytes())
    assert rig.expected["web/root"][3 << 20 : 4 << 20] == bytes([8]) * (1 << 20)
    rig.say("stop")
    rig.kill()
    shutil.rmtree(rig.folder / "store")
    rig.start(again=True)
    rig.check()


def test_promotion_goes_on_after_a_kill(rig: Rig) -> None:
    """R10: killed in the middle, it goes on where it stood."""
    rig.start()
    rig.say("promote")
    time.sleep(0.05)
    rig.kill()
    rig.start(again=True)
    rig.check()
    rig.say("promote")
    deadline = time.monotonic() + 60
    while not rig.say("progress")["promoted"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    rig.check()


def test_rolled_back_nothing_is_left(rig: Rig) -> None:
    """R10: a rollback leaves replica and journal as if nothing had happened, and nothing on the target's node."""
    before = rig.store_hash()
    rig.start()
    rig.write("db/root", 0, 1 << 20, 7)
    rig.say("discard")
    rig.kill()
    assert list((rig.settings.work_dir / "recovered").iterdir()) == []
    assert rig.store_hash() == before


def test_denied_they_serve_nobody(rig: Rig) -> None:
    """R13.3: what policy has stopped is not served until it is allowed again; nothing of it is lost."""
    rig.start()
    rig.write("db/root", 512, 5 * BLOCK_SIZE, 7)
    rig.say("pause denied")
    rig.say("pause denied")
    assert rig.say("progress")["paused"] == "denied"
    for uris in rig.uris.values():
        assert subprocess.run(["nbdcopy", uris[0], "-"], capture_output=True).returncode != 0
    rig.say("resume")
    rig.say("resume")
    rig.check()


def test_on_another_node_nothing_is_begun(rig: Rig) -> None:
    """R10: an actor that comes back where its disks are not says so, instead of beginning with the image again."""
    with pytest.raises(AssertionError, match="it ended with 1"):
        rig.start(again=True)
    assert not (rig.settings.work_dir / "recovered").exists()
