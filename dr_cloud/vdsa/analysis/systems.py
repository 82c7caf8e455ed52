"""The operating system, from files that are known by how they begin: a file's first block is a block of the disk.

Seen are the text of os-release, a Linux kernel's image, "Linux version …" in a log, a hive of the Windows registry, and
Windows' boot sectors. A small file that its file system stores inside of its own tree (btrfs) is only found where it
falls into a sample. Servers with containers hold several os-release files: that of the kernel's maker is taken, else
the one seen first.
"""

from __future__ import annotations

import re
from typing import Any, Final

from dr_cloud.model.analysis import OperatingSystem
from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.vdsa.analysis.fields import text, u16

RELEASES_MAX: Final = 8
FILE_BYTES: Final = 32 << 10
"""A kernel image tells its release within its first 32 KiB."""
_TEXT_BYTES_MAX: Final = 1024
_RELEASE_LINE: Final = re.compile(
    rb"^([A-Z][A-Z0-9_]*)=(?:\"([^\"\n]*)\"|'([^'\n]*)'|([^\s\"']*))[ \t]*$", re.MULTILINE
)
_NO_TEXT: Final = re.compile(rb"[^\t\n\r -~\x80-\xff]")
_LINUX: Final = re.compile(rb"Linux version (\d{1,2}\.\d{1,3}[\w.+~-]{0,60}) \(")
_KERNEL: Final = re.compile(rb"\d{1,2}\.\d{1,3}[\w.+~-]{0,60} ")
_WINDOWS: Final = re.compile(
    rb"Windows (?:Server 20[0-9]{2}(?: R2)?|1[01]|8\.1|8|7) (?:Standard|Datacenter|Essentials|Pro|Enterprise|Home|"
    rb"Education|Foundation)"
)
_KERNELS_OF: Final = {
    "debian": ("debian",),
    "ubuntu": ("ubuntu", "-generic"),
    "fedora": (".fc",),
    "rhel": (".el",),
    "rocky": (".el",),
    "almalinux": (".el",),
    "centos": (".el",),
    "ol": (".el", "uek"),
    "amzn": (".amzn",),
    "arch": ("arch",),
    "sles": ("suse", "-default"),
    "opensuse-leap": ("suse", "-default"),
    "alpine": ("alpine", "-lts", "-virt"),
}


class SystemSeen:
    """What was seen of one server's operating system."""

    def __init__(self) -> None:
        self.releases: dict[str, dict[str, str]] = {}
        """os-release by its ID, in the order seen."""
        self.kernel = ""
        self.kernel_image = ""
        self.windows = ""
        self.hives: list[str] = []

    def file(self, data: bytes) -> None:
        """Look at what may be the beginning of a file: up to `FILE_BYTES` of it, as far as the write goes."""
        head = data[:4]
        if head in (b"PRET", b"NAME"):
            self._os_release(data[:_TEXT_BYTES_MAX])
        elif head[:2] == b"MZ":
            self._kernel_image(data)
        elif head == b"regf":
            hive = text(data[48:112], "utf-16-le").rpartition("\\")[2]
            if hive and hive not in self.hives:
                self.hives = [*self.hives, hive][-RELEASES_MAX:]
        elif head == b"hbin" and (found := _WINDOWS.search(data[:BLOCK_SIZE:2])):
            # UTF-16 of plain letters: every other byte.
            self.windows = found[0].decode()

    def sample(self, block: bytes) -> None:
        """Look anywhere in a sampled block."""
        at = block.find(b"Linux version ")
        if at >= 0 and (found := _LINUX.match(block, at)):
            self.kernel = text(found[1])
        at = block.find(b"PRETTY_NAME=")
        if at >= 0:
            # The line may not be the first one: take the text around it.
            start = max(block.rfind(b"\0", 0, at) + 1, at - _TEXT_BYTES_MAX)
            self._os_release(block[start : at + _TEXT_BYTES_MAX])

    def _os_release(self, raw: bytes) -> None:
        end = _NO_TEXT.search(raw)
        lines = _RELEASE_LINE.findall(raw[: end.start()] if end else raw)
        fields = {key.decode(): text(a or b or c) for key, a, b, c in lines}
        identity = fields.get("ID", "")
        if not identity or not ("PRETTY_NAME" in fields or "NAME" in fields):
            return
        if identity in self.releases or len(self.releases) < RELEASES_MAX:
            kept = ("NAME", "PRETTY_NAME", "VERSION", "VERSION_ID")
            self.releases[identity] = {key: fields[key][:200] for key in kept if key in fields}

    def _kernel_image(self, data: bytes) -> None:
        if data[0x202:0x206] == b"HdrS":
            at = u16(data, 0x20E) + 0x200
            if _KERNEL.match(data, at):
                self.kernel_image = text(data[at : at + 120])

    def report(self, boot_sectors: list[str]) -> OperatingSystem:
        """Return what is known; `boot_sectors` names what was found in the disks' boot sectors."""
        evidence = list(boot_sectors)
        kernel = self.kernel or self.kernel_image.split(" ", 1)[0]
        if self.releases:
            evidence.append("os-release")
        if self.kernel:
            evidence.append("kernel's first message")
        if self.kernel_image:
            evidence.append("kernel image")
        evidence += [f"registry hive {hive}" for hive in self.hives]
        if self.releases:
            identity = self._chosen()
            fields = self.releases[identity]
            return OperatingSystem(
                family="linux",
                name=fields.get("PRETTY_NAME") or fields.get("NAME", ""),
                id=identity,
                version=fields.get("VERSION_ID") or fields.get("VERSION", ""),
                kernel=kernel,
                evidence=evidence,
            )
        if kernel:
            return OperatingSystem(family="linux", name="Linux", kernel=kernel, evidence=evidence)
        if self.windows or self.hives or any("Windows" in sector for sector in boot_sectors):
            return OperatingSystem(family="windows", name=self.windows or "Windows", evidence=evidence)
        return OperatingSystem(evidence=evidence)

    def _chosen(self) -> str:
        signs = f"{self.kernel} {self.kernel_image}".lower()
        matching = (i for i in self.releases if any(mark in signs for mark in _KERNELS_OF.get(i, ())))
        return next(matching, next(iter(self.releases)))

    def state(self) -> dict[str, Any]:
        """Return what was seen, fit for JSON."""
        return dict(vars(self))

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        self.releases = {str(key): dict(fields) for key, fields in state["releases"].items()}
        self.kernel, self.kernel_image, self.windows = state["kernel"], state["kernel_image"], state["windows"]
        self.hives = list(state["hives"])
