"""The write log: space reserved before use, errors instead of signals, nothing left behind."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dr_cloud.stack.writelog import STEP_BYTES_MIN, WriteLog


def test_slots_hold_what_was_written(tmp_path: Path) -> None:
    log = WriteLog(tmp_path)
    for number in range(3000):
        slot = log.take(1)
        assert slot == number
        log.view[slot * 4096 : slot * 4096 + 4096] = number.to_bytes(4, "little") * 1024
    for slot in range(3000):
        assert log.view[slot * 4096 : slot * 4096 + 4096] == slot.to_bytes(4, "little") * 1024
    log.close()


def test_views_survive_growth_and_close(tmp_path: Path) -> None:
    log = WriteLog(tmp_path)
    slot = log.take(1)
    log.view[slot * 4096 : slot * 4096 + 4] = b"once"
    early = log.view[slot * 4096 : slot * 4096 + 4]
    log.take(10_000)
    assert log.view[slot * 4096 : slot * 4096 + 4] == b"once"
    log.close()
    assert early == b"once"


def test_stored_at_most_a_tenth_more_than_written(tmp_path: Path) -> None:
    """R14.4: a test stores what it wrote, at most 1.1 times (past the first step)."""
    log = WriteLog(tmp_path)
    for written in range(4096, 30 << 20, 4096):
        log.take(1)
        assert written <= log.stored_bytes <= max(1.1 * written, written + STEP_BYTES_MIN)
    assert os.fstat(log._fd).st_blocks * 512 <= 1.1 * (30 << 20)
    log.close()


def test_a_spent_quota_is_enospc_and_leaves_the_log_usable(tmp_path: Path) -> None:
    """R14.5: a test that writes too much is told so; what it wrote before stays."""
    log = WriteLog(tmp_path, quota_bytes=10 * 4096 + 100)
    slot = log.take(8)
    with pytest.raises(OSError) as caught:
        log.take(3)
    assert caught.value.errno == errno.ENOSPC
    assert slot == 0 and log.take(2) == 8
    assert log.stored_bytes <= 10 * 4096 + 100
    with pytest.raises(OSError):
        log.take(1)
    log.close()


def test_nothing_is_left_in_the_directory(tmp_path: Path) -> None:
    """R14.5: the log vanishes; it has no name even while it is in use."""
    log = WriteLog(tmp_path)
    log.take(100)
    assert os.listdir(tmp_path) == []
    log.close()
    assert os.listdir(tmp_path) == []
    with pytest.raises(OSError) as caught:
        log.take(100_000)
    assert caught.value.errno == errno.ESHUTDOWN


def test_without_tmpfile_the_log_is_unlinked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse(path: object, flags: int, *rest: object, **more: object) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE here")
        return real_open(path, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    log = WriteLog(tmp_path)
    log.take(5)
    assert os.listdir(tmp_path) == []
    log.close()


def test_a_file_size_limit_is_enospc(tmp_path: Path) -> None:
    """A limit set from outside (here RLIMIT_FSIZE, in a process of its own) gives an error, not a signal."""
    program = f"""
import errno, resource, sys
from pathlib import Path
from dr_cloud.stack.writelog import WriteLog
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
log = WriteLog(Path({str(tmp_path)!r}))
taken = 0
try:
    while True:
        slot = log.take(1)
        log.view[slot * 4096 : slot * 4096 + 4096] = b"x" * 4096
        taken += 1
except OSError as error:
    assert error.errno == errno.ENOSPC, error
assert taken == 256, taken
assert bytes(log.view[: 4096]) == b"x" * 4096
print("told")
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert answer.stdout == "told\n", answer.stderr
