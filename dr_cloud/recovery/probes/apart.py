"""Programs and functions that touch what the stack's owner wrote: as nobody, without network, within the limits."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, NoReturn

from dr_cloud.recovery.probes import kernel
from dr_cloud.recovery.probes.errors import FailedError

_OUTPUT_BYTES_MAX: Final = 256 << 10
_ANSWER_BYTES_MAX: Final = 1 << 20
_END_SECONDS: Final = 2.0


class Done(NamedTuple):
    """A program that has ended."""

    code: int
    """Exit code; negative: the signal that ended it."""
    output: str
    """Its beginning, at most."""


def end(process: subprocess.Popen[Any]) -> None:
    """End a program, gently first."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
        process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


class Apart:
    """Starts them; closed with the probe."""

    def __init__(self, user: int, home: Path, file_bytes_max: int, ends: contextlib.ExitStack) -> None:
        self.user = user
        """Id of the user, and of its group."""
        self._home = home
        self._file_bytes_max = file_bytes_max
        self._ends = ends

    def start(
        self,
        *words: str | Path,
        env: Mapping[str, str] | None = None,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
        large_files: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Start a program in the probe's scratch folder; it is ended with the probe. Its output is the probe's.

        `large_files` takes away the limit on the size of files, for programs that insist on it.
        """
        sys.stdout.flush()
        who = (f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups", "--inh-caps=-all")
        limit = ["prlimit", f"--fsize={'unlimited' if large_files else self._file_bytes_max}", "--"]
        process = subprocess.Popen(
            [*limit, "unshare", "--net", "--", "setpriv", *who, "--bounding-set=-all", "--", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=self._home,
            env={**os.environ, **(env or {})},
            restore_signals=False,  # a file that grows too large is an error, not a sudden death
        )
        self._ends.callback(end, process)
        return process

    def run(self, *words: str | Path, env: Mapping[str, str] | None = None, large_files: bool = False) -> Done:
        """Run a program to its end; what it prints is the probe's output too."""
        print(f"$ {' '.join(map(str, words))}")
        process = self.start(*words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, large_files=large_files)
        output = _echo(process)
        return Done(process.wait(), output)

    def call(self, function: Callable[[], Any]) -> Any:
        """Call a function in a process apart and return its answer, which must be fit for JSON.

        Raises:
            FailedError: The function raised it, or something else, or its process was killed.
        """
        sys.stdout.flush()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            self._called(function, write)
        os.close(write)
        with open(read, "rb") as pipe:
            answer = pipe.read(_ANSWER_BYTES_MAX)
        _, status = os.waitpid(child, 0)
        try:
            told = json.loads(answer)
        except ValueError:
            code = os.waitstatus_to_exitcode(status)
            raise FailedError(f"reading the data ended without an answer (exit code {code})") from None
        if "failed" in told:
            raise FailedError(str(told["failed"]))
        return told.get("answer")

    def _called(self, function: Callable[[], Any], write: int) -> NoReturn:
        code = 1
        try:
            os.dup2(write, 3)
            os.closerange(4, os.sysconf("SC_OPEN_MAX"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._file_bytes_max, self._file_bytes_max))
            kernel.unshare(kernel.NEW_NETWORK)
            os.setgroups([])
            os.setresgid(self.user, self.user, self.user)
            os.setresuid(self.user, self.user, self.user)
            try:
                told = {"answer": function()}
            except FailedError as failed:
                told = {"failed": str(failed)}
            except Exception as error:
                traceback.print_exc()
                told = {"failed": f"{type(error).__name__}: {error}"}
            sys.stdout.flush()
            with open(3, "w") as pipe:
                json.dump(told, pipe)
            code = 0
        finally:
            os._exit(code)


def _echo(process: subprocess.Popen[bytes]) -> str:
    """Print what a program prints until it ends; what it started and left behind is not waited for."""
    assert process.stdout is not None
    kept = bytearray()
    ended = os.pidfd_open(process.pid)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        while ready := [key.fd for key, _ in selector.select()]:
            # Once it has ended, what is still in the pipe is read, and no more is waited for.
            if ready == [ended]:
                break
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                break
            sys.stdout.buffer.write(data)
            kept += data[: _OUTPUT_BYTES_MAX - len(kept)]
    os.close(ended)
    sys.stdout.flush()
    return kept.decode(errors="replace")
