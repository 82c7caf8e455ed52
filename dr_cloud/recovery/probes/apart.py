"""Programs and functions that touch what the stack's owner wrote: as nobody, without network, within the limits."""

from __future__ import annotations

import contextlib
import json
import os
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
_END_SECONDS: Final = 5.0


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

    def __init__(self, user: int, home: Path, ends: contextlib.ExitStack) -> None:
        self.user = user
        """Id of the user, and of its group."""
        self._home = home
        self._ends = ends

    def start(
        self,
        *words: str | Path,
        env: Mapping[str, str] | None = None,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program in the probe's scratch folder; it is ended with the probe. Prints with the probe, or else."""
        sys.stdout.flush()
        who = (f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups", "--inh-caps=-all")
        process = subprocess.Popen(
            ["unshare", "--net", "--", "setpriv", *who, "--bounding-set=-all", "--", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=self._home,
            env={**os.environ, **(env or {})},
            restore_signals=False,  # a file that grows too large is an error, not a sudden death
        )
        self._ends.callback(end, process)
        return process

    def run(self, *words: str | Path, env: Mapping[str, str] | None = None) -> Done:
        """Run a program to its end; what it prints is the probe's output too."""
        print(f"$ {' '.join(map(str, words))}")
        process = self.start(*words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        output = _echo(process.stdout)
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


def _echo(pipe: IO[bytes]) -> str:
    kept = bytearray()
    while data := os.read(pipe.fileno(), 65536):
        sys.stdout.buffer.write(data)
        kept += data[: _OUTPUT_BYTES_MAX - len(kept)]
    sys.stdout.flush()
    return kept.decode(errors="replace")
