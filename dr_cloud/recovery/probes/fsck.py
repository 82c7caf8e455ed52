"""`fsck`: every file system of the disks is whole. ext2/3/4, XFS and FAT; nothing is repaired.

A disk of a past time is as after a power failure, so the journal is replayed first: ext's by e2fsck, XFS's by the
kernel (a mount), on a layer. What cannot be checked (swap, LUKS, LVM, other file systems) is named in the output.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

from dr_cloud.recovery.probes.bench import Bench
from dr_cloud.recovery.probes.errors import FailedError
from dr_cloud.recovery.probes.volumes import Volume

_LOG_IGNORED: Final = "metadata changes in a log"


def _ext(bench: Bench, volume: Volume, file: Path) -> int:
    bench.replay_ext(volume, file)
    return bench.apart.run("e2fsck", "-f", "-n", file).code


def _xfs(bench: Bench, volume: Volume, file: Path) -> int:
    command = ("xfs_repair", "-n", "-f", file)
    done = bench.apart.run(*command, large_files=True)
    if _LOG_IGNORED not in done.output:
        return done.code
    with bench.mounted(volume, file, write=True):
        print("the log is replayed")
    return bench.apart.run(*command, large_files=True).code


def _fat(bench: Bench, volume: Volume, file: Path) -> int:
    return bench.apart.run("fsck.fat", "-n", file).code


_CHECKS: Final[dict[str, Callable[[Bench, Volume, Path], int]]] = {
    "ext2": _ext,
    "ext3": _ext,
    "ext4": _ext,
    "xfs": _xfs,
    "vfat": _fat,
}


class FsckProbe(BaseModel):
    """Every ext2/3/4, XFS and FAT file system is whole."""

    model_config = ConfigDict(extra="forbid")

    partition: int | None = None
    """Only this one; 0 is a whole disk."""

    def run(self, bench: Bench) -> str:
        """Check each; the first that is damaged is the reason."""
        volumes = [volume for volume in bench.volumes() if self.partition in (None, volume.partition)]
        checked = []
        for volume in volumes:
            if volume.kind not in _CHECKS:
                print(f"not checked: {volume}")
                continue
            code = _CHECKS[volume.kind](bench, volume, bench.file(volume))
            if code:
                raise FailedError(f"{volume} is damaged (the check ends with {code})")
            checked.append(str(volume))
        if not checked:
            raise FailedError(f"no file system that can be checked: {', '.join(map(str, volumes)) or 'nothing there'}")
        return f"whole: {', '.join(checked)}"
