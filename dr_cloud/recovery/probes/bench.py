"""What a probe works with: the stack's disks as addresses, files or mounted file systems, and programs apart.

All that a probe gets of a disk is a copy-on-write layer (`layer.py`), so it may write, and nothing of it stays.

Whom is trusted: the probe's own code. Not the data. What parses it (a checker, a database, a machine, a program named
by the tester) runs by `bench.apart`: as a user that nobody else is, without network, without capabilities,
within the limits. The one exception is a mount, which this machine's kernel does; see docs/probes.md.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from dr_cloud.model.probe import ProbeLimits, ProbeSpec
from dr_cloud.nbd.client import NbdClient
from dr_cloud.recovery.probes.apart import Apart, end
from dr_cloud.recovery.probes.errors import CannotRunError, FailedError
from dr_cloud.recovery.probes.layer import Servers, layer_uri, start_layer, unmount, wait_for
from dr_cloud.recovery.probes.volumes import Volume, read_volumes

INSIDE: Final = Path("/mnt/probe")
"""The probe's folder, as it sees it."""
MOUNT_OPTIONS: Final = {
    # A superblock may ask for a panic on errors: that must never be this machine's.
    "ext2": ("ext4", "errors=remount-ro"),
    "ext3": ("ext4", "errors=remount-ro"),
    "ext4": ("ext4", "errors=remount-ro"),
    # The same file system may be mounted at several times at once.
    "xfs": ("xfs", "nouuid"),
    "vfat": ("vfat", "errors=remount-ro"),
}
"""By kind of file system, the driver and its options."""
_UNMOUNT_SECONDS: Final = 2.0


class Bench:
    """The disks and tools of one probe. Made and closed by `inside.py`."""

    def __init__(self, spec: ProbeSpec, disks: Mapping[str, str], limits: ProbeLimits, user: int, servers: int) -> None:
        self.disks = dict(disks)
        """Name → NBD address of the stack itself: to read from."""
        self.home = INSIDE / "home"
        """Scratch space that belongs to the probe's user."""
        self.artefacts = INSIDE / "artefacts"
        """What is left here is kept."""
        self.limits = limits
        self._deadline = time.monotonic() + spec.timeout_seconds
        self._ends = contextlib.ExitStack()
        self.apart = Apart(user, self.home, limits.scratch_bytes, self._ends)
        """Runs programs and functions that touch the data."""
        self._servers = Servers(servers)
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.close()

    @property
    def seconds_left(self) -> float:
        """Until the time-out."""
        return self._deadline - time.monotonic()

    def connect(self, disk: str) -> NbdClient:
        """Open a disk of the stack, to read from. Raises `FailedError`."""
        try:
            return NbdClient.connect(self.disks[disk])
        except OSError as error:
            raise CannotRunError(f"disk {disk} could not be reached: {error.strerror or error}") from error

    def volumes(self) -> list[Volume]:
        """Return the volumes of all the probe's disks."""
        found = []
        for disk in self.disks:
            with self.connect(disk) as client:
                found += read_volumes(disk, client)
        return found

    def the_volume(self, partition: int | None) -> Volume:
        """Return the one volume that can be mounted; `partition` tells which if there are several (0: a whole disk).

        Raises:
            FailedError: There is none, or more than one.
        """
        found = [volume for volume in self.volumes() if partition in (None, volume.partition)]
        fit = [volume for volume in found if volume.kind in MOUNT_OPTIONS]
        if len(fit) == 1:
            return fit[0]
        if fit:
            raise FailedError(f"several file systems: {_listed(fit)}; say which by disk= and partition=")
        raise FailedError(f"no file system that can be mounted: {_listed(found) or 'no such partition'}")

    def layer(self, disk: str, start_bytes: int = 0, size_bytes: int | None = None) -> str:
        """Return the NBD address of a layer over a disk, or over a part of it, that programs may use."""
        if size_bytes is None:
            with self.connect(disk) as client:
                size_bytes = client.size_bytes
        # QEMU counts in sectors; no partition ends within one.
        self._count += 1
        server, socket = start_layer(
            self._servers, self.disks[disk], start_bytes, size_bytes // 512 * 512, INSIDE, f"layer-{self._count}"
        )
        self._ends.callback(end, server)
        os.chown(socket, self.apart.user, self.apart.user)
        return layer_uri(socket)

    def file(self, volume: Volume) -> Path:
        """Return a volume as a file, by nbdfuse over a layer."""
        uri = self.layer(volume.disk, volume.start_bytes, volume.size_bytes)
        path = INSIDE.parent / f"file-{self._count}" / "volume"
        path.parent.mkdir()
        # Its reading is bounded by the layer's own limits; its address space is not the data's.
        fuse = self._servers.start("nbdfuse", "-o", "allow_other", path, uri)
        self._ends.callback(_wait_and_end, fuse)
        wait_for(fuse, path.exists, str(volume))
        self._ends.callback(self._servers.unmount, path.parent)
        return path

    @contextlib.contextmanager
    def mounted(self, volume: Volume, file: Path, write: bool = False) -> Iterator[Path]:
        """Mount a volume's file for a while; gives the folder.

        ext's journal is replayed before, by e2fsck and not by the kernel. XFS's log can only be replayed by the kernel.

        Raises:
            FailedError: It cannot be mounted, or mounts are not allowed here.
        """
        if not self.limits.kernel_mounts:
            raise CannotRunError(f"{volume} cannot be looked into: mounting is switched off on this node")
        driver, options = MOUNT_OPTIONS[volume.kind]
        if driver == "ext4":
            self.replay_ext(volume, file)
        elif driver == "xfs" and not write:
            with self.mounted(volume, file, write=True):
                pass
        if not write:
            options += ",ro,noload" if driver == "ext4" else ",ro"
        folder = Path(f"{file.parent}-mounted")
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", driver, "-o", f"loop,nosuid,nodev,noexec,{options}", file, folder],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            print(done.stdout + done.stderr)
            raise FailedError(
                f"{volume} cannot be mounted: {(done.stderr.strip().splitlines() or ['mount says nothing'])[0]}"
            )
        try:
            yield folder
        finally:
            unmount(folder)
            folder.rmdir()

    def mount(self, volume: Volume, write: bool = False) -> Path:
        """Mount a volume until the probe ends; return the folder. Errors as for `mounted`."""
        return self._ends.enter_context(self.mounted(volume, self.file(volume), write))

    def replay_ext(self, volume: Volume, file: Path) -> None:
        """Replay the journal of an ext file system, in user space. Raises `FailedError`."""
        done = self.apart.run("e2fsck", "-E", "journal_only", "-p", file)
        if done.code & ~1:
            raise FailedError(f"{volume}: its journal cannot be replayed (e2fsck ends with {done.code})")


def _listed(volumes: list[Volume]) -> str:
    return ", ".join(map(str, volumes))


def _wait_and_end(fuse: subprocess.Popen[bytes]) -> None:
    """End nbdfuse, which ends by itself when it is unmounted."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        fuse.wait(_UNMOUNT_SECONDS)
    end(fuse)
