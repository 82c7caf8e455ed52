"""`boot`: a machine boots from the stack's disks, and its serial console says what is expected in time.

QEMU runs apart, without network (nor a network card), with a seccomp filter; with KVM on a node that is no virtual
machine itself, else by emulation. The disks are attached in the order of their names; the first is booted from, unless
a kernel of this node is given. A screenshot is kept, `screen.png`, unless the machine has ended by itself; and the
console, `console.txt`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dr_cloud.nbd.uri import parse_uri
from dr_cloud.recovery.probes import kernel
from dr_cloud.recovery.probes.apart import end
from dr_cloud.recovery.probes.bench import Bench
from dr_cloud.recovery.probes.errors import CannotRunError, FailedError
from dr_cloud.recovery.probes.qmp import Qmp

_QEMU: Final = "qemu-system-x86_64"
_KVM: Final = Path("/dev/kvm")
_DEVICES: Final = {"virtio": "virtio-blk-pci", "sata": "ide-hd", "nvme": "nvme"}
_HYPERVISOR: Final = "hypervisor"
"""The processor's flag that says that it is one of a virtual machine."""
_LAST_SECONDS: Final = 3.0
"""Before the time-out: for the screenshot and the verdict."""
_WINDOW_BYTES: Final = 64 << 10
"""How much of the console is searched at once; a match is shorter."""
_MACHINE_BYTES: Final = 1 << 30
"""Address space that QEMU itself needs."""


class BootProbe(BaseModel):
    """A machine boots from the disks, and its serial console matches a pattern in time."""

    model_config = ConfigDict(extra="forbid")

    match: str = "login:"
    """A regular expression over the serial console; finding it is a pass."""
    reject: str = "Kernel panic|[Ee]mergency mode|Boot failed"
    """A regular expression; finding it first is a fail. Empty: none."""
    memory_mib: Annotated[int, Field(ge=64, le=65536)] = 512
    cpus: Annotated[int, Field(ge=1, le=64)] = 1
    bus: Literal["virtio", "sata", "nvme"] = "virtio"
    """How the disks are attached."""
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    """`auto` takes KVM only on real hardware: in a virtual machine it may be there and not run a guest."""
    kernel: Path | None = None
    """A kernel on this node, instead of the disk's boot loader."""
    initrd: Path | None = None
    append: str = "console=ttyS0 panic=-1"
    """The kernel's command line."""

    @field_validator("match", "reject")
    @classmethod
    def _is_pattern(cls, text: str) -> str:
        try:
            re.compile(text.encode())
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        return text

    def run(self, bench: Bench) -> str:
        """Start the machine, read its console, keep a screenshot."""
        if shutil.which(_QEMU) is None:
            raise CannotRunError(f"there is no {_QEMU} on this node")
        if bench.limits.memory_bytes < (self.memory_mib << 20) + _MACHINE_BYTES:
            raise CannotRunError(
                f"{self.memory_mib} MiB for the machine and 1 GiB for QEMU are more than the probe may use"
            )
        kvm = self._kvm(bench.apart.user)
        control = bench.home / "qmp.sock"
        command = self._machine(kvm, control) + self._disks(bench) + self._kernel(bench)
        print(f"$ {' '.join(command)}")
        machine = bench.apart.start(*command, stdout=subprocess.PIPE, stderr=sys.stdout)
        try:
            found = self._watch(bench, machine)
            return f"the console says {found!r} ({'KVM' if kvm else 'emulation'})"
        finally:
            with contextlib.suppress(FailedError):
                if machine.poll() is None:
                    qmp = Qmp(control)
                    qmp.do("screendump", filename=str(bench.artefacts / "screen.png"), format="png")
                    qmp.close()
            machine.kill()  # it is a machine whose power is cut; nothing of it is kept
            end(machine)

    def _machine(self, kvm: bool, control: Path) -> list[str]:
        # QEMU 7.2 cannot set one register of newer processors within a virtual machine; the guest misses nothing.
        accel = ["kvm", "-cpu", "host,-arch-capabilities"] if kvm else ["tcg,tb-size=64", "-cpu", "max"]
        return [
            *(_QEMU, "-nodefaults", "-no-user-config", "-machine", "q35", "-accel", *accel, "-no-reboot"),
            *("-m", str(self.memory_mib), "-smp", str(self.cpus), "-nic", "none", "-display", "none", "-vga", "std"),
            *("-serial", "stdio", "-monitor", "none", "-qmp", f"unix:{control},server=on,wait=off"),
            *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        ]

    def _disks(self, bench: Bench) -> list[str]:
        options = []
        for number, disk in enumerate(bench.disks):
            layer = parse_uri(bench.layer(disk))
            server = {"type": "unix", "path": layer.unix_path}
            node = {"driver": "nbd", "node-name": f"disk{number}", "server": server, "export": layer.name}
            device = f"{_DEVICES[self.bus]},drive=disk{number},bootindex={number + 1}"
            device += f",bus=ide.{number}" if self.bus == "sata" else ""
            device += f",serial=disk{number}" if self.bus == "nvme" else ""
            options += ["-blockdev", json.dumps(node), "-device", device]
        return options

    def _kernel(self, bench: Bench) -> list[str]:
        options = []
        for name, path in (("kernel", self.kernel), ("initrd", self.initrd)):
            if path is not None:
                try:
                    copy = shutil.copyfile(path, bench.home / name)
                except OSError as error:
                    raise FailedError(f"{path} cannot be read: {error.strerror}") from error
                copy.chmod(0o644)
                options += [f"-{name}", str(copy)]
        return [*options, "-append", self.append] if self.kernel is not None else options

    def _kvm(self, user: int) -> bool:
        """Return whether KVM is used; gives its device, in the probe's own view, to the probe's user."""
        if self.accel == "tcg" or (self.accel == "auto" and _HYPERVISOR in Path("/proc/cpuinfo").read_text().split()):
            return False
        try:
            device = _KVM.stat().st_rdev
            own = Path("/dev/shm")  # the probe's own, like what is mounted here
            kernel.mount("tmpfs", str(own), "tmpfs", kernel.NO_SUID | kernel.NO_EXEC, "mode=0755,size=64k")
            os.mknod(own / "kvm", stat.S_IFCHR | 0o600, device)
            os.chown(own / "kvm", user, user)
            kernel.mount(str(own / "kvm"), str(_KVM), "", kernel.BIND)
            with open(_KVM, "rb"):
                return True
        except OSError as error:
            if self.accel == "kvm":
                raise CannotRunError(f"there is no KVM on this node: {error.strerror}") from error
            return False

    def _watch(self, bench: Bench, machine: subprocess.Popen[bytes]) -> str:
        """Read the console until it is clear what becomes of the machine."""
        match, reject = re.compile(self.match.encode()), re.compile(self.reject.encode())
        seen = b""
        assert machine.stdout is not None
        with open(bench.artefacts / "console.txt", "wb") as console, selectors.DefaultSelector() as selector:
            selector.register(machine.stdout, selectors.EVENT_READ)
            while (left := bench.seconds_left - _LAST_SECONDS) > 0:
                if not selector.select(left):
                    break
                data = os.read(machine.stdout.fileno(), 65536)
                if not data:
                    raise FailedError(f"the machine ended with {machine.wait()} before its console matched")
                console.write(data)
                sys.stdout.buffer.write(data)
                sys.stdout.flush()
                seen = (seen + data)[-_WINDOW_BYTES - len(data) :]
                if found := match.search(seen):
                    return found[0].decode(errors="replace")[:200]
                if self.reject and (bad := reject.search(seen)):
                    raise FailedError(f"the console says {bad[0].decode(errors='replace')[:200]!r}")
        raise FailedError(f"the console did not match {self.match!r} in time")
