"""Installs the outside programs that tests and benchmarks use. Standard library only: it runs before the venv is there.

    python3 infra/tools.py           install what is missing, then say what still is
    python3 infra/tools.py --check   only say what is missing

Debian packages are installed with apt-get when this user may (root, or sudo without a password). An S3 server and
the policy server are built by `go install` from pinned versions into .tools/bin and kept there. A small guest for the
tests that boot one (a kernel for virtual machines, a few of its modules, a static busybox) is unpacked from Debian's
packages into .tools/guest; nothing of it is installed. The program itself needs none of this, but for the probes that
a provider uses (docs/probes.md). With CI set, a missing tool is a failure (exit code 1); else it only means skipped
tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent
BIN: Final = ROOT / ".tools" / "bin"
POSTGRESQL: Final = Path("/usr/lib/postgresql")
"""Where Debian keeps the server's programs, in `<version>/bin`: not on the PATH."""
SEARCH_PATH: Final = os.pathsep.join([str(BIN), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
PACKAGES: Final = {
    "nbdkit": "nbdkit",
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "nbdfuse": "libnbd-bin",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "fio": "fio",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "mkfs.vfat": "dosfstools",
    "mkfs.exfat": "exfatprogs",
    "mkfs.ntfs": "ntfs-3g",
    "mkswap": "util-linux",
    "blkid": "util-linux",
    "sfdisk": "fdisk",
    "cryptsetup": "cryptsetup-bin",
    "fusermount3": "fuse3",
    "losetup": "mount",
    "mount": "mount",
    "unshare": "util-linux",
    "git": "git",
    "setpriv": "util-linux",
    "sqlite3": "sqlite3",
    "postgres": "postgresql",
    "ip": "iproute2",
    "nft": "nftables",
    "tinyproxy": "tinyproxy-bin",
}
"""The Debian package of each program."""


class GoProgram(NamedTuple):
    """A program that `go install` builds into .tools/bin."""

    name: str
    package: str
    version: str


GO_PROGRAMS: Final = (
    GoProgram("versitygw", "github.com/versity/versitygw/cmd/versitygw", "v1.8.0"),
    GoProgram("opa", "github.com/open-policy-agent/opa", "v1.22.2"),
)
"""An S3 server for the store's tests; the policy server, and what tests the policies."""


GUEST: Final = ROOT / ".tools" / "guest"
GUEST_FILES: Final = (
    "vmlinuz-*",
    "busybox",
    "virtio_ring.ko",
    "virtio.ko",
    "virtio_pci_legacy_dev.ko",
    "virtio_pci_modern_dev.ko",
    "virtio_pci.ko",
    "virtio_blk.ko",
)
"""The guest: a kernel, what runs in it, and the drivers of its disks in the order in which they are loaded."""


def is_there(program: str) -> bool:
    """Return whether the program can be run."""
    # Looked up each time: what was not there may just have been installed.
    return shutil.which(program, path=os.pathsep.join([SEARCH_PATH, *map(str, POSTGRESQL.glob("*/bin"))])) is not None


def missing_packages() -> list[str]:
    """Return the packages of the programs that are not there."""
    return sorted({package for program, package in PACKAGES.items() if not is_there(program)})


def apt_get() -> list[str] | None:
    """Return the command line by which this user may install packages, or None."""
    if not shutil.which("apt-get"):
        return None
    if os.geteuid() == 0:
        return ["apt-get"]
    if (
        shutil.which("sudo")
        and subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0
    ):
        return ["sudo", "-n", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
    return None


def install_packages(packages: list[str]) -> None:
    """Install the packages, where it may be done; what fails is seen by what is missing afterwards."""
    command = apt_get()
    if command is None:
        return
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for step in (["-q", "update"], ["-q", "install", "-y", "--no-install-recommends", *packages]):
        subprocess.run([*command, *step], env=environment, stdout=sys.stderr, check=False)


def is_built(program: GoProgram) -> bool:
    """Return whether the program is there in the pinned version."""
    stamp = BIN / f"{program.name}.version"
    return os.access(BIN / program.name, os.X_OK) and stamp.is_file() and stamp.read_text() == program.version


def build(program: GoProgram) -> None:
    """Build the program, where Go is there."""
    go = shutil.which("go", path=os.pathsep.join([SEARCH_PATH, "/usr/local/go/bin"]))
    if go is None:
        return
    BIN.mkdir(parents=True, exist_ok=True)
    command = [go, "install", "-trimpath", "-ldflags=-s -w", f"{program.package}@{program.version}"]
    print(f"building {program.name} {program.version} (a minute, once)", file=sys.stderr)
    built = subprocess.run(command, env=os.environ | {"GOBIN": str(BIN)}, stdout=sys.stderr, check=False)
    if built.returncode == 0:
        (BIN / f"{program.name}.version").write_text(program.version)


def fetch_guest() -> None:
    """Unpack the guest, where packages can be had; what fails is seen by what is missing afterwards."""
    if not shutil.which("apt-get"):
        return
    named = subprocess.run(
        ["apt-cache", "show", "linux-image-cloud-amd64"], capture_output=True, text=True, check=False
    )
    kernel = re.search(r"linux-image-[0-9][^ ,]*-cloud-amd64", named.stdout)
    if kernel is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        packages = Path(folder)
        packages.chmod(0o777)  # apt fetches as a user of its own
        command = ["apt-get", "-q", "download", kernel[0], "busybox-static"]
        subprocess.run(command, cwd=packages, stdout=sys.stderr, check=False)
        for package in packages.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, packages / "root"], check=False)
        found = [path for name in GUEST_FILES for path in (packages / "root").rglob(name) if path.is_file()]
        GUEST.mkdir(parents=True, exist_ok=True)
        for path in found:
            shutil.copy(path, GUEST / ("vmlinuz" if path.name.startswith("vmlinuz") else path.name))


def guest_is_there() -> bool:
    """Return whether every file of the guest is there."""
    return all((GUEST / name.removesuffix("-*")).is_file() for name in GUEST_FILES)


def main(arguments: list[str]) -> int:
    """Install and report; return the exit code."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    if not arguments:
        if packages := missing_packages():
            install_packages(packages)
        for program in GO_PROGRAMS:
            if not is_built(program):
                build(program)
        if not guest_is_there():
            fetch_guest()
    packages = missing_packages()
    remedies = [f"sudo apt-get install -y {' '.join(packages)}"] if packages else []
    missing = list(packages)
    if unbuilt := [program.name for program in GO_PROGRAMS if not is_built(program)]:
        missing += unbuilt
        remedies.append("install Go (go.dev), then: python3 infra/tools.py")
    if not guest_is_there():
        missing.append("guest")
        remedies.append("on Debian: python3 infra/tools.py")
    if not missing:
        print("tools: all there")
        return 0
    print(f"tools missing, tests that need them are skipped: {' '.join(missing)}")
    print(f"to install: {'; '.join(remedies)}")
    return 1 if os.environ.get("CI") else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
