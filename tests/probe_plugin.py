"""A plug-in with probes that behave badly; installed for a test as a package with entry points."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from pathlib import Path

from dr_cloud.recovery.probes.bench import Bench
from dr_cloud.recovery.probes.errors import FailedError

ENTRY_POINTS = "[dr_cloud.probes]\n" + "".join(
    f"{name.lower()} = probe_plugin:{name}\n"
    for name in ("Hangs", "Raises", "Killed", "Leaves", "Writes", "Eats", "Look")
)


def install(folder: Path) -> None:
    """Make the folder one that, on the path, brings these probes."""
    info = folder / "bad_probes-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-probes\nVersion: 1\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)


class Hangs:
    """Mounts the disk, starts programs that hide from their parent, and never answers."""

    def run(self, bench: Bench) -> str:
        volume = bench.the_volume(None)
        folder = bench.mount(volume, write=True)
        script = "trap '' TERM HUP INT; (setsid sh -c 'trap \"\" TERM; sleep 600; sleep 600' &) ; sleep 600"
        bench.apart.start("sh", "-c", script)
        subprocess.Popen(["setsid", "sleep", "600"])
        (folder / "file").write_bytes(os.urandom(1 << 20))
        print("hanging", flush=True)
        time.sleep(600)
        return "never"


class Raises:
    """Crashes as a program with a mistake does."""

    def run(self, bench: Bench) -> str:
        return str(1 // len(bench.disks[next(iter(bench.disks))][:0]))


class Killed:
    """Is killed in the middle, with a disk mounted."""

    def run(self, bench: Bench) -> str:
        bench.mount(bench.the_volume(None), write=True)
        ctypes.string_at(0)
        return "never"


class Leaves:
    """Gives its verdict while its programs run on."""

    def run(self, bench: Bench) -> str:
        bench.mount(bench.the_volume(None), write=True)
        bench.apart.start("sh", "-c", "trap '' TERM; (setsid sleep 600 &); sleep 600 & wait")
        subprocess.Popen(["setsid", "sleep", "600"])
        return "done"


class Writes:
    """Writes to a mounted file system for ever; tells when it has begun."""

    def run(self, bench: Bench) -> str:
        folder = bench.mount(bench.the_volume(None), write=True)
        for number in range(1_000_000):
            with open(folder / f"{number % 100}-{number}", "wb") as file:
                file.write(os.urandom(10_000))
                file.flush()
                os.fsync(file.fileno())
            if number == 3:
                (bench.artefacts / "writing").touch()
        return "never"


class Eats:
    """Takes more of a resource than it may."""

    def __init__(self, what: str) -> None:
        self.what = what

    def run(self, bench: Bench) -> str:
        program = {
            "memory": "bytearray(1 << 30)",
            "file": "file = open('big', 'wb', 0)\nfor _ in range(4): file.write(bytes(1 << 20))",
            "processes": "import os, time\nfor _ in range(100):\n  os.fork() or (time.sleep(600), os._exit(0))",
        }[self.what]
        done = bench.apart.run("python3", "-c", program)
        if done.code:
            raise FailedError(done.output.strip().splitlines()[-1])
        return "ate it"


class Look:
    """Tells what a function apart can see and do."""

    def run(self, bench: Bench) -> str:
        def look() -> list[object]:
            open_files = sorted(map(int, os.listdir("/proc/self/fd")))
            status = Path("/proc/self/status").read_text().splitlines()
            rights = [line.split()[1] for line in status if line.startswith(("CapI", "CapP", "CapE", "CapA"))]
            network = Path("/proc/self/net/dev").read_text().count(":")
            return [os.getuid() >= 1 << 28, os.getgroups(), open_files[:4], set(rights) == {"0" * 16}, network]

        return str(bench.apart.call(look))
