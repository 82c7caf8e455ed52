"""The runner's side of one probe: starts its keeper, reads its output and its verdict, ends it in time."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import IO, Any, Final

from pydantic import ValidationError

from dr_cloud.recovery.probes.inside import Job, Verdict
from dr_cloud.recovery.probes.output import Output

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LOOK_SECONDS: Final = 0.2
_END_SECONDS: Final = 10.0
_READ_BYTES: Final = 256 << 10
_VERDICT_BYTES_MAX: Final = 64 << 10


def watch(job: Mapping[str, Any], output: Output, stop: threading.Event) -> Verdict:
    """Run one probe to its verdict, its time-out or `stop`; when this returns, nothing of it is left.

    Args:
        job: The fields of `Job` that the caller knows.
        output: Takes what is printed.
        stop: Ends the probe once it is set.
    """
    with contextlib.ExitStack() as ends:
        told, tell = os.pipe()
        ends.callback(os.close, told)
        try:
            whole = Job(**job, runner=os.getpid(), verdict=tell)
            keeper = _start(tell)
        finally:
            os.close(tell)
        assert keeper.stdin is not None and keeper.stdout is not None
        ends.enter_context(keeper.stdout)
        ends.callback(_end, keeper)
        with contextlib.suppress(BrokenPipeError), keeper.stdin as stdin:
            stdin.write(whole.model_dump_json().encode())
        answer = bytearray()
        ended = _listen(keeper.stdout, told, output, answer, time.monotonic() + whole.spec.timeout_seconds, stop)
        if ended:
            gone = _end(keeper)
            # What was printed last is read too; the pipe has no writer any more.
            _listen(keeper.stdout, told, output, bytearray(), time.monotonic() + 1, threading.Event())
            reason = ended if ended == "stopped" else f"{ended} within {whole.spec.timeout_seconds:g} s"
            reason = reason if gone else f"{reason}; it could not be ended, it hangs in I/O"
            return Verdict(passed=False, reason=reason, conclusive=False)
        return _judge(bytes(answer), keeper.wait(_END_SECONDS))


def _start(tell: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "dr_cloud.recovery.probes.inside"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        # What this process knows of secrets stays here; where its modules are is none.
        env={
            "PATH": PATH,
            "LANG": "C.UTF-8",
            "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path if place),
        },
        cwd="/",
        pass_fds=[tell],
        start_new_session=True,
    )


def _listen(
    printed: IO[bytes], told: int, output: Output, answer: bytearray, deadline: float, stop: threading.Event
) -> str:
    """Read both pipes to their ends; return why that was given up, or the empty string."""
    with selectors.DefaultSelector() as selector:
        selector.register(printed, selectors.EVENT_READ)
        selector.register(told, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if stop.is_set():
                return "stopped"
            if left <= 0:
                return "no verdict"
            for key, _ in selector.select(min(left, _LOOK_SECONDS)):
                data = os.read(key.fd, _READ_BYTES)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fd == told:
                    answer += data[: _VERDICT_BYTES_MAX - len(answer)]
                else:
                    output.take(data)
    return ""


def _end(keeper: subprocess.Popen[bytes]) -> bool:
    """End the keeper and all that it keeps; return whether it is gone."""
    for send in (keeper.terminate, keeper.kill):
        if keeper.poll() is None:
            send()
        with contextlib.suppress(subprocess.TimeoutExpired):
            keeper.wait(_END_SECONDS)
            return True
    return False


def _judge(answer: bytes, code: int) -> Verdict:
    if answer:
        try:
            return Verdict.model_validate_json(answer)
        except ValidationError:
            return _crashed("while it gave its verdict")
    number = code - 128 if code > 128 else -code
    if number > 0:
        with contextlib.suppress(ValueError):
            return _crashed(f"killed by {signal.Signals(number).name}")
    return _crashed(f"it ended without a verdict (exit code {code})")


def _crashed(how: str) -> Verdict:
    return Verdict(passed=False, reason=f"the probe crashed: {how}", conclusive=False)
