"""The process of one probe, and the walls around it: `python -m dr_cloud.recovery.probes.inside`.

    runner ──▶ keeper ──▶ process 1 of a new namespace ──▶ the probe ─┬─▶ its programs, as a user of their own
                                                                      └─▶ the disks' servers, in other mounts

The keeper leaves the namespaces of processes, mounts, IPC and host name, starts process 1 and waits. When process 1 is
gone, by its own end or killed, the kernel has ended every process below it, however deep it hid; with the last of them
go the mounts, and with the mounts the loop devices. So there is nothing to clean up one by one, and nothing to forget.

Process 1 only waits for the probe: it touches no disk, so it can always be killed. A probe in the midst of a disk's I/O
cannot, until that I/O fails; and it fails when the disk's servers are killed, which process 1's end does.

Who ends it: the probe, by returning; the runner, by SIGTERM to the keeper (time-out, stop); the kernel, when the runner
or the keeper dies (each dies with its parent).

The job comes as JSON on standard input. The verdict goes as JSON to the file descriptor that the job names; standard
output and standard error are the probe's output.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Final

from pydantic import BaseModel

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.probe import ProbeLimits, ProbeSpec
from dr_cloud.recovery.probes import kernel
from dr_cloud.recovery.probes.bench import INSIDE, Bench
from dr_cloud.recovery.probes.errors import CannotRunError, FailedError
from dr_cloud.recovery.probes.probe import make_probe

USER_BASE: Final = 0x1000_0000
"""A keeper's process id is added to it: a user that is nobody else's as long as the probe runs."""


class Job(BaseModel):
    """What the runner tells."""

    spec: ProbeSpec
    disks: dict[str, str]
    """By name, the NBD addresses of those that the spec names."""
    limits: ProbeLimits
    folder: Path
    """The probe's own; it is removed afterwards."""
    runner: int
    """Process id."""
    verdict: int
    """File descriptor."""


class Verdict(BaseModel):
    """What the probe tells."""

    passed: bool
    reason: str
    conclusive: bool = True
    """Whether it is about the disks."""


def main() -> int:
    """Be the keeper; return the exit code, 128 + the signal if process 1 was killed."""
    kernel.die_with_parent()
    job = Job.model_validate_json(sys.stdin.buffer.read())
    if os.getppid() != job.runner:
        return 1  # it died before it could take us with it
    watched = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    user = USER_BASE + os.getpid()
    kernel.unshare(kernel.NEW_PIDS | kernel.NEW_MOUNTS | kernel.NEW_IPC | kernel.NEW_UTS)
    alive, keeper = os.pipe()
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        os.close(keeper)
        os._exit(_first(job, user, alive))
    os.close(job.verdict)
    if signal.sigwait(watched) == signal.SIGTERM:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _first(job: Job, user: int, alive: int) -> int:
    """Be process 1: start the probe and wait for its end; return the exit code as `main` does."""
    kernel.die_with_parent()
    os.set_blocking(alive, False)
    with contextlib.suppress(BlockingIOError):
        os.read(alive, 1)
        return 1  # the keeper is gone already
    probe = os.fork()
    if probe == 0:
        os._exit(_probe(job, user))
    os.close(job.verdict)
    while True:
        process, status = os.wait()
        if process == probe:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _probe(job: Job, user: int) -> int:
    """Be the probe: build the walls, look, tell; return the exit code."""
    code = 1
    try:
        verdict = _verdict(job, user)
        with open(job.verdict, "w") as file:
            file.write(verdict.model_dump_json())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def _verdict(job: Job, user: int) -> Verdict:
    try:
        servers = _build_walls(job, user)
        with Bench(job.spec, job.disks, job.limits, user, servers) as bench:
            return Verdict(passed=True, reason=make_probe(job.spec).run(bench))
    except FailedError as failed:
        return Verdict(passed=False, reason=str(failed), conclusive=not isinstance(failed, CannotRunError))
    except DrCloudError as error:
        return Verdict(passed=False, reason=f"{error}. {error.remedy}".rstrip(". ") + ".", conclusive=False)
    except Exception as error:
        traceback.print_exc()
        reason = f"the probe crashed: {type(error).__name__}: {error}".rstrip(": ")
        return Verdict(passed=False, reason=reason, conclusive=False)


def _build_walls(job: Job, user: int) -> int:
    """Make what only this probe sees: mounts, /proc, shared memory, its folder; set the limits.

    Returns the open namespace for servers, as `_leave_servers_behind`.
    """
    socket.sethostname("probe")
    kernel.mount("none", "/", "", kernel.PRIVATE_BELOW)
    flags = kernel.NO_SUID | kernel.NO_DEVICES | kernel.NO_EXEC
    kernel.mount("proc", "/proc", "proc", flags)
    kernel.mount("tmpfs", "/dev/shm", "tmpfs", flags, f"mode=1777,size={job.limits.memory_bytes}")
    # The way to the folder may be closed to the probe's user; /mnt never is.
    folder = os.open(job.folder, os.O_PATH | os.O_DIRECTORY)
    kernel.mount("tmpfs", "/mnt", "tmpfs", kernel.NO_SUID | kernel.NO_DEVICES, "mode=0755,size=16m")
    INSIDE.mkdir()
    kernel.mount(f"/proc/self/fd/{folder}", str(INSIDE), "", kernel.BIND)
    os.close(folder)
    os.chmod(INSIDE, 0o711)
    for name in ("home", "artefacts"):
        (INSIDE / name).mkdir(mode=0o700)
        os.chown(INSIDE / name, user, user)
    servers = _leave_servers_behind()
    kernel.gain_nothing()
    del os.environ["PYTHONPATH"]
    os.environ.update(HOME=str(INSIDE / "home"), TMPDIR=str(INSIDE / "home"))
    os.chdir(INSIDE / "home")
    for kind, most in ((resource.RLIMIT_AS, job.limits.memory_bytes), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (most, most))
    # What root may not exceed by mistake; programs apart get it as a limit that they cannot lift.
    resource.setrlimit(resource.RLIMIT_FSIZE, (job.limits.scratch_bytes, resource.RLIM_INFINITY))
    # Root is not bound by it; each user of its own is.
    resource.setrlimit(resource.RLIMIT_NPROC, (job.limits.processes, job.limits.processes))
    return servers


def _leave_servers_behind() -> int:
    """Go on in mounts of our own; return the open namespace of the mounts that are left, for the disks' servers.

    They see the disks as files, and not the file systems on them; we see both. A server that saw them could be the last
    of the namespace when all are killed. Then it is for it to unmount them while it ends, and the kernel waits for what
    only that server could have answered: for ever.
    """
    kernel.mount("none", "/mnt", "", kernel.SHARED)
    servers = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    kernel.unshare(kernel.NEW_MOUNTS)
    kernel.mount("none", "/", "", kernel.SLAVE_BELOW)
    return servers


if __name__ == "__main__":
    sys.exit(main())
