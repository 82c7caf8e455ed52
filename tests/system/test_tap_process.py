"""The real tap process under outside clients, with its VDSA dead, hung and killed, and itself killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.nbd.client import NbdClient
from dr_cloud.tap import wire
from dr_cloud.tap.bitmap import IntentBitmap

pytestmark = pytest.mark.system

MIB = 1 << 20
LATE_NS = 1e9
"""What a busy machine may add to one write."""
TOOLS = ("fio", "qemu-io", "qemu-img", "qemu-nbd", "nbdcopy", "nbdinfo")


@pytest.fixture(autouse=True)
def tools() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        if os.environ.get("CI"):
            pytest.fail(f"not installed: {', '.join(missing)}")
        pytest.skip(f"not installed: {', '.join(missing)}")


class Rig:
    """One tap, its disk, its VDSA, in a folder; every process is ended at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "disk"
        self.address = f"nbd+unix:///d?socket={folder}/tap.sock"
        self.processes: list[subprocess.Popen[str]] = []
        self.source = str(self.disk)

    def start(self, *command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        return process

    def start_tap(self, queue: str = "64MiB", *more: str) -> subprocess.Popen[str]:
        arguments = [
            "--server",
            "db",
            "--disk",
            f"d={self.source}",
            "--socket",
            f"{self.folder}/tap.sock",
            "--queue",
            queue,
        ]
        arguments += ["--vdsa", f"{self.folder}/vdsa.sock", "--state", f"{self.folder}/state"]
        tap = self.start(sys.executable, "-m", "dr_cloud.cli.tap", *arguments, *more)
        assert tap.stdout is not None
        line = tap.stdout.readline()
        assert line.startswith(f"tap ready: {self.address}"), line
        return tap

    def start_vdsa(self, hold: str = "") -> subprocess.Popen[str]:
        program = str(Path(__file__).with_name("tap_vdsa.py"))
        return self.start(sys.executable, program, f"{self.folder}/vdsa.sock", str(self.folder), hold)

    def start_fio(self, seconds: float, *more: str) -> subprocess.Popen[str]:
        """Start a guest; one process, so that it writes no more once it is killed."""
        return self.start(
            "fio", "--name=guest", "--ioengine=nbd", f"--uri={self.address}", "--rw=randwrite", "--bs=4k",
            "--iodepth=8", "--time_based", f"--runtime={seconds}", "--output-format=json", "--thread", *more,
        )  # fmt: skip

    def finish_fio(self, fio: subprocess.Popen[str]) -> dict[str, Any]:
        """Return fio's figures for writes; the guest's I/O must not have failed."""
        text, _ = fio.communicate(timeout=60)
        assert fio.returncode == 0, text
        job = json.loads(text[text.index("{") :])["jobs"][0]
        assert job["error"] == 0
        return job["write"]

    def in_sync(self, index: int = 0, disk: Path | None = None) -> bool:
        replica, content = self.folder / f"replica-{index}", (disk or self.disk).read_bytes()
        return replica.exists() and replica.read_bytes()[: len(content)] == content

    def hello(self) -> str:
        """Return what the tap said last of itself."""
        return (self.folder / "hello").read_text().splitlines()[-1]

    def held(self) -> list[str]:
        path = self.folder / "held"
        return path.read_text().splitlines() if path.exists() else []

    def sync_lines(self) -> list[str]:
        path = self.folder / "sync"
        return path.read_text().splitlines() if path.exists() else []

    def synced_blocks(self, lines: list[str], kinds: str = "WZ") -> set[int]:
        blocks: set[int] = set()
        for line in lines:
            kind, *numbers = line.split()
            if kind in kinds and numbers:
                first, count = int(numbers[1]), int(numbers[2])
                blocks.update(range(first, first + count))
        return blocks

    def stop_clean(self, tap: subprocess.Popen[str]) -> None:
        tap.terminate()
        assert tap.wait(20) == 0

    def dirty_blocks(self) -> int:
        """Return how many bits the state file of the stopped tap holds."""
        bitmap = IntentBitmap(self.folder / "state", [("d", self.disk.stat().st_size)])
        try:
            return bitmap.dirty_blocks()
        finally:
            bitmap.close()

    def end(self) -> None:
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    try:
        yield rig
    finally:
        rig.end()


def wait_until(what: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def make_sparse(path: Path, size: int, data_at: list[tuple[int, int]]) -> None:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in data_at:
            file.seek(offset)
            file.write(random.Random(offset).randbytes(length))


def test_initial_sync_while_guest_writes(rig: Rig) -> None:
    """R1, R4.1: a disk that holds data is copied while the guest writes; holes are not sent as data."""
    make_sparse(rig.disk, 256 * MIB + 1536, [(0, MIB), (100 * MIB + 4096, 40 * MIB), (256 * MIB, 1536)])
    rig.start_vdsa()
    tap = rig.start_tap()
    rig.finish_fio(rig.start_fio(2, "--size=8m", "--offset=98m"))
    wait_until(rig.in_sync)
    lines = rig.sync_lines()
    assert [line for line in lines if line in ("BEGIN", "END")] == ["BEGIN", "END"]
    sent = rig.synced_blocks(lines, "W")
    holes = set(range(300, 98 * MIB // BLOCK_SIZE)) | set(range(150 * MIB // BLOCK_SIZE, 256 * MIB // BLOCK_SIZE - 1))
    assert not sent & holes
    zero_ranges = [line for line in lines if line[0] == "Z"]
    assert len(zero_ranges) < 200
    everything = sent | rig.synced_blocks(lines, "Z")
    assert len(everything) > 60_000
    time.sleep(0.3)
    rig.stop_clean(tap)
    assert rig.dirty_blocks() == 0


@pytest.mark.parametrize("trouble", ["killed", "hung"])
def test_vdsa_in_trouble(rig: Rig, trouble: str) -> None:
    """R1: with the VDSA killed -9 or hung no guest write fails or waits; afterwards only dirty blocks come again."""
    make_sparse(rig.disk, 128 * MIB, [(0, 64 * MIB)])
    vdsa = rig.start_vdsa()
    tap = rig.start_tap(queue="2MiB")
    wait_until(rig.in_sync)
    time.sleep(0.3)
    before = len(rig.sync_lines())
    fio = rig.start_fio(4, "--size=16m", "--offset=32m")
    time.sleep(1)
    if trouble == "killed":
        vdsa.kill()
        time.sleep(1)
        rig.start_vdsa()
    else:
        vdsa.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        vdsa.send_signal(signal.SIGCONT)
    figures = rig.finish_fio(fio)
    assert figures["clat_ns"]["max"] < LATE_NS
    assert figures["total_ios"] > 5000
    wait_until(rig.in_sync)
    again = rig.synced_blocks(rig.sync_lines()[before:])
    assert again
    assert again <= set(range(32 * MIB // BLOCK_SIZE, 48 * MIB // BLOCK_SIZE))
    time.sleep(0.3)
    rig.stop_clean(tap)
    assert rig.dirty_blocks() == 0


def test_disks_change_under_load(rig: Rig) -> None:
    """R5: on SIGHUP disks come, grow, shrink and go; the guest of another disk notices nothing; all is replicated."""
    make_sparse(rig.disk, 64 * MIB, [(0, 16 * MIB)])
    more = rig.folder / "more"
    make_sparse(more, 32 * MIB, [(MIB, 2 * MIB)])
    config = rig.folder / "disks.yaml"
    config.write_text("")
    rig.start_vdsa()
    tap = rig.start_tap("64MiB", "--config", str(config))
    wait_until(rig.in_sync)
    fio = rig.start_fio(5, "--size=16m", "--offset=16m")
    uri = rig.address.replace("///d?", "///more?")

    def sizes() -> set[int]:
        done = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True)
        return {int(done.stdout)} if done.returncode == 0 else set()

    def change(text: str, size_bytes: int | None) -> None:
        config.write_text(text)
        tap.send_signal(signal.SIGHUP)
        wait_until(lambda: sizes() == (set() if size_bytes is None else {size_bytes}))

    listed = f"- {{name: more, address: {more}}}\n"
    change(listed, 32 * MIB)
    wait_until(lambda: rig.in_sync(1, more))
    assert rig.hello() == "db 0 [(0, 'd', 67108864), (1, 'more', 33554432)]"
    with NbdClient.connect(uri) as old:
        os.truncate(more, 48 * MIB + 512)
        change(listed, 48 * MIB + 512)
        old.pwrite(5 * MIB, b"o" * 4096)
        with NbdClient.connect(uri) as new:
            new.pwrite(48 * MIB, b"n" * 512)
    wait_until(lambda: rig.in_sync(1, more))
    assert more.read_bytes()[5 * MIB : 5 * MIB + 4096] == b"o" * 4096
    os.truncate(more, 8 * MIB)
    change(listed, 8 * MIB)
    wait_until(lambda: rig.in_sync(1, more) and "(1, 'more', 8388608)" in rig.hello())
    before = rig.hello()
    for wrong in ("- {name: more}", f"{listed}{listed}", "- {name: more, address: /nowhere/at/all}", "[", "8"):
        config.write_text(wrong)
        tap.send_signal(signal.SIGHUP)
        time.sleep(0.1)
    assert rig.hello() == before
    assert sizes() == {8 * MIB}
    change("", None)
    wait_until(lambda: rig.hello() == "db 0 [(0, 'd', 67108864)]")
    change(listed, 8 * MIB)
    wait_until(lambda: rig.in_sync(2, more))
    figures = rig.finish_fio(fio)
    assert figures["clat_ns"]["max"] < LATE_NS
    assert figures["total_ios"] > 5000
    wait_until(rig.in_sync)
    time.sleep(0.3)
    rig.stop_clean(tap)
    assert rig.dirty_blocks() == 0


def test_killed_while_disks_change(rig: Rig) -> None:
    """Invariant 2: a tap killed -9 at any moment of a change sends afterwards what may differ."""
    make_sparse(rig.disk, 64 * MIB, [(0, 8 * MIB)])
    more = rig.folder / "more"
    config = rig.folder / "disks.json"
    listed = json.dumps([{"name": "more", "address": str(more)}])
    rig.start_vdsa()
    for number in range(4):
        config.write_text(listed if number % 2 else "[]")
        make_sparse(more, (8 + number) * MIB, [(0, MIB)])
        tap = rig.start_tap("64MiB", "--config", str(config), "--copies", "3")
        fio = rig.start_fio(20, "--size=16m")
        time.sleep(0.3)
        config.write_text("[]" if number % 2 else listed)
        tap.send_signal(signal.SIGHUP)
        time.sleep(0.002 * 3**number)
        tap.kill()
        tap.wait()
        fio.kill()
        fio.communicate()
    tap = rig.start_tap("64MiB", "--config", str(config))
    wait_until(rig.in_sync)
    assert sorted(path.name for path in rig.folder.glob("state*")) == [
        "state",
        "state.1.lock",
        "state.2.lock",
        "state.lock",
    ]
    rig.stop_clean(tap)


def test_barriers_under_load(rig: Rig) -> None:
    """R5: barriers held and released twenty times a second under load: they hold, and every write succeeds."""
    make_sparse(rig.disk, 64 * MIB, [])
    rig.start_vdsa("release")
    rig.start_tap()
    wait_until(rig.in_sync)
    figures = rig.finish_fio(rig.start_fio(1.5, "--size=16m"))
    held = rig.held()
    assert held.count("released False") > 5
    assert figures["clat_ns"]["max"] < wire.HOLD_NS_MAX + LATE_NS
    wait_until(rig.in_sync)


@pytest.mark.parametrize("trouble", ["keeps", "hung", "killed"])
def test_barrier_that_nobody_ends(rig: Rig, trouble: str) -> None:
    """R1: a VDSA that holds for ever, hangs or dies while it holds: no write fails, none waits over the bound."""
    make_sparse(rig.disk, 64 * MIB, [])
    vdsa = rig.start_vdsa("keep")
    rig.start_tap()
    wait_until(rig.in_sync)
    fio = rig.start_fio(1.5, "--size=16m")
    time.sleep(0.7)
    if trouble == "hung":
        vdsa.send_signal(signal.SIGSTOP)
    elif trouble == "killed":
        vdsa.kill()
    figures = rig.finish_fio(fio)
    assert rig.held().count("held False") > 3
    assert figures["clat_ns"]["percentile"]["50.000000"] < wire.HOLD_NS_MAX
    assert figures["clat_ns"]["max"] < wire.HOLD_NS_MAX + LATE_NS
    assert figures["total_ios"] > 2000


def test_without_vdsa(rig: Rig) -> None:
    """R1: a tap whose VDSA never was there serves its guest; what it wrote is sent when one comes."""
    make_sparse(rig.disk, 64 * MIB, [])
    rig.start_tap()
    rig.finish_fio(rig.start_fio(1, "--size=8m"))
    rig.start_vdsa()
    wait_until(rig.in_sync)


def test_tap_killed_in_mid_write(rig: Rig) -> None:
    """Invariant 2: a tap killed -9 while it writes sends after its restart what may differ, and nothing else."""
    make_sparse(rig.disk, 128 * MIB, [(0, 128 * MIB)])
    rig.start_vdsa()
    tap = rig.start_tap()
    wait_until(rig.in_sync)
    time.sleep(0.3)
    for _ in range(2):
        before = len(rig.sync_lines())
        fio = rig.start_fio(20, "--size=16m", "--offset=64m")
        time.sleep(1.5)
        tap.kill()
        tap.wait()
        fio.kill()
        fio.communicate()
        tap = rig.start_tap()
        wait_until(rig.in_sync)
        again = rig.synced_blocks(rig.sync_lines()[before:])
        assert again <= set(range(64 * MIB // BLOCK_SIZE, 80 * MIB // BLOCK_SIZE))
        time.sleep(0.3)
    rig.stop_clean(tap)
    assert rig.dirty_blocks() == 0


def test_qcow2_upstream_that_restarts(rig: Rig) -> None:
    """R1: qcow2 through qemu-nbd; the upstream server restarts while the guest writes, and no write fails."""
    image = rig.folder / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 3M 5M", image], check=True)
    socket = rig.folder / "up.sock"
    serve = ("qemu-nbd", "-t", "-e", "4", "-f", "qcow2", "--discard=unmap", "-k", str(socket), str(image))
    upstream = rig.start(*serve)
    wait_until(socket.exists)
    rig.source = f"nbd+unix:///?socket={socket}"
    rig.start_vdsa()
    tap = rig.start_tap()
    fio = rig.start_fio(4, "--size=16m", "--bsrange=512-16k", "--bs_unaligned")
    time.sleep(1.5)
    upstream.terminate()
    upstream.wait()
    time.sleep(0.5)
    rig.start(*serve)
    rig.finish_fio(fio)
    qemu_io(rig, "discard 20M 3M", "write -z 1049088 70000", "write -P 9 30M 2M", "flush")

    def in_sync() -> bool:
        subprocess.run(["nbdcopy", rig.address, rig.disk], check=True)
        return rig.in_sync()

    rig.disk.touch()
    wait_until(in_sync)
    assert not rig.synced_blocks(rig.sync_lines(), "W") & set(range(40 * MIB // BLOCK_SIZE, 64 * MIB // BLOCK_SIZE))
    rig.stop_clean(tap)


def qemu_io(rig: Rig, *commands: str) -> None:
    arguments = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-d", "unmap", "-f", "raw", *arguments, rig.address], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout + done.stderr


def test_outside_clients(rig: Rig) -> None:
    """R1: qemu-io, nbdcopy, nbdinfo and fio with verification find a disk; writes of any kind reach the replica."""
    make_sparse(rig.disk, 64 * MIB, [(2 * MIB, MIB)])
    rig.start_vdsa()
    tap = rig.start_tap()
    qemu_io(
        rig, "write -P 1 0 4096", "write -P 2 512 512", "write -P 3 5000 9000", "write -z 16384 8192",
        "discard 2M 10240", "read -P 2 512 512", "read -P 3 5000 9000", "read -P 0 2M 10240", "write -f -P 4 1M 64k",
        "write -P 5 40M 4M", "flush",
    )  # fmt: skip
    info = subprocess.run(["nbdinfo", "--map", rig.address], capture_output=True, text=True, check=True).stdout
    assert "hole,zero" in info
    pattern = rig.folder / "pattern"
    make_sparse(pattern, 64 * MIB, [(MIB, 3 * MIB), (50 * MIB, 777)])
    subprocess.run(["nbdcopy", pattern, rig.address], check=True)
    back = rig.folder / "back"
    subprocess.run(["nbdcopy", rig.address, back], check=True)
    assert back.read_bytes() == pattern.read_bytes() == rig.disk.read_bytes()
    verified = subprocess.run(
        ["fio", "--name=v", "--ioengine=nbd", f"--uri={rig.address}", "--rw=randrw", "--bsrange=512-64k",
         "--bs_unaligned", "--iodepth=16", "--size=16m", "--verify=crc32c", "--verify_fatal=1", "--fsync=64"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert verified.returncode == 0, verified.stdout + verified.stderr
    wait_until(rig.in_sync)
    time.sleep(0.3)
    rig.stop_clean(tap)
    assert rig.dirty_blocks() == 0


def test_wrong_use_is_told(rig: Rig) -> None:
    """A disk that is missing and a size that is none end with a sentence, and with 1 and 2."""
    base = [
        sys.executable,
        "-m",
        "dr_cloud.cli.tap",
        "--server",
        "db",
        "--vdsa",
        "v",
        "--state",
        str(rig.folder / "state"),
    ]
    socket = ["--socket", str(rig.folder / "tap.sock")]
    for arguments, code, words in (
        (["--disk", f"d={rig.disk}", *socket], 1, "cannot be opened"),
        (["--disk", "d", *socket], 2, "NAME=PATH"),
        (["--disk", f"d={rig.disk}"], 2, "--listen"),
        (["--disk", f"d={rig.disk}", *socket, "--queue", "much"], 2, "not a size"),
        (["--disk", f"d=nbd+unix:///?socket={rig.folder}/none", *socket], 1, "Start its NBD server"),
    ):
        done = subprocess.run([*base, *arguments], capture_output=True, text=True, timeout=30)
        assert done.returncode == code, done.stderr
        assert words in " ".join(done.stderr.replace("│", " ").split()), done.stderr
        assert "Traceback" not in done.stderr
