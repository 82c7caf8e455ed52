"""A small Linux guest: a Debian kernel for virtual machines and an initial RAM disk of busybox, made for a test.

Its root is the disk: the RAM disk only loads the drivers, mounts the disk's file system and goes over to it.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

from conftest import ROOT, _unmet

GUEST = ROOT / ".tools" / "guest"
MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")
INIT = f"""#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
for module in {" ".join(MODULES)}; do /bin/busybox insmod /$module.ko; done
/bin/busybox mount -t ext4 /dev/vda /root || exec /bin/busybox poweroff -f
exec /bin/busybox switch_root /root /sbin/init
"""
ROOT_INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev 2>/dev/null
echo started > /boot.log || exec /bin/busybox reboot -f
cd / && /bin/busybox sha256sum -c /etc/sums || { echo "data is damaged"; /bin/busybox sleep 60; }
echo "guest login:"
/bin/busybox sleep 600
"""


def kernel() -> Path:
    """Return the guest's kernel; skip the test where there is none."""
    if not (GUEST / "vmlinuz").is_file():
        _unmet("the guest is missing")
    return GUEST / "vmlinuz"


def make_initrd(folder: Path) -> Path:
    """Return the RAM disk."""
    root = folder / "initrd-root"
    for name in ("bin", "dev", "root"):
        (root / name).mkdir(parents=True)
    shutil.copy(GUEST / "busybox", root / "bin" / "busybox")
    for module in MODULES:
        shutil.copy(GUEST / f"{module}.ko", root)
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    packed = subprocess.run(
        [GUEST / "busybox", "cpio", "-o", "-H", "newc"], cwd=root, input=names.encode(), capture_output=True, check=True
    )
    initrd = folder / "initrd"
    initrd.write_bytes(gzip.compress(packed.stdout, 1))
    return initrd


def make_root(folder: Path) -> Path:
    """Return the tree of the guest's root file system."""
    root = folder / "guest-root"
    for name in ("bin", "dev", "etc", "sbin", "var"):
        (root / name).mkdir(parents=True)
    shutil.copy(GUEST / "busybox", root / "bin" / "busybox")
    (root / "sbin" / "init").write_text(ROOT_INIT)
    (root / "sbin" / "init").chmod(0o755)
    (root / "var" / "data").write_bytes(bytes(range(256)) * 4096)
    sums = subprocess.run(["sha256sum", "var/data"], cwd=root, capture_output=True, text=True, check=True).stdout
    (root / "etc" / "sums").write_text(sums)
    return root
