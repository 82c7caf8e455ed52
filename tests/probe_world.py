"""What tests of probes share: disks served read-only by a real NBD server, and a look at what is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dr_cloud.model.probe import ProbeResult
from dr_cloud.recovery.probes.runner import run_probes
from dr_cloud.recovery.probes.spec import parse_spec

MIB = 1 << 20


def run(*command: object, **options: object) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=60, check=False, **options
    )
    assert done.returncode == 0, f"{command}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def sparse(path: Path, size: int) -> Path:
    with path.open("xb") as file:
        file.truncate(size)
    return path


def ext4(path: Path, source: Path, size: int = 24 * MIB, *more: object) -> Path:
    """Make an ext4 image of a folder."""
    run("mkfs.ext4", "-q", "-F", "-d", source, *more, sparse(path, size))
    return path


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def wait_until(true: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def processes_of(folder: Path) -> list[int]:
    """Return the processes that see a folder mounted somewhere: all of a probe that runs in it do."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"{folder}/.probe-" in (entry / "mountinfo").read_text():
                    found.append(int(entry.name))
            except OSError:
                continue  # it has just ended
    return found


def command_of(process: int) -> bytes:
    """Return a process's words, each ended by NUL; nothing if it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def loops() -> list[str]:
    """Return the loop devices over a probe's volumes."""
    listed = run("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE").splitlines()
    return [line for line in listed if "/file-" in line and "/volume" in line]


class World:
    """A folder with images, all of them served."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.work = folder / "work"
        for path in (self.images, self.work):
            path.mkdir()
        self.socket = folder / "nbd.sock"
        self.server = subprocess.Popen(
            ["nbdkit", "--exit-with-parent", "-f", "-r", "-U", self.socket, "file", f"dir={self.images}"]
        )
        assert wait_until(self.socket.exists)

    def uri(self, image: str) -> str:
        return f"nbd+unix:///{image}?socket={self.socket}"

    def probe(self, spec: str, *images: str) -> ProbeResult:
        """Run one probe on images, each a disk of its name."""
        (result,) = run_probes([parse_spec(spec)], {image: self.uri(image) for image in images}, self.work)
        print(result.model_dump_json(indent=1))
        return result

    def close(self) -> None:
        self.server.kill()
        self.server.wait()


@pytest.fixture(scope="module")
def world(require_tool: Callable[[str], str]) -> Iterator[World]:
    """Whatever a module's tests do: no process, mount, loop device or file of a probe is left at its end."""
    for tool in ("nbdkit", "qemu-nbd", "nbdfuse", "setpriv", "unshare", "mkfs.ext4"):
        require_tool(tool)
    if os.geteuid() != 0:
        pytest.skip("probes need root")
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    folder.chmod(0o755)
    before = loops()
    world = World(folder)
    try:
        yield world
        assert processes_of(world.work) == []
        assert wait_until(lambda: loops() == before)
        assert str(folder) not in Path("/proc/mounts").read_text()
        assert list(world.work.glob(".*")) == []
    finally:
        world.close()
        shutil.rmtree(folder, ignore_errors=True)
