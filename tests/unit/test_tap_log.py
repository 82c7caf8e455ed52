"""R1: the tap's log may stand still without the tap doing so."""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor

import structlog

from dr_cloud.tap.log import LINES_MAX, LogThread


def test_unread_log_blocks_nobody_and_says_so_later() -> None:
    """R1: a full pipe behind the log costs lines, not time."""
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w")
    log = LogThread(stream)
    logger = structlog.wrap_logger(log(), processors=[structlog.processors.KeyValueRenderer()])
    since = time.monotonic()
    for number in range(4 * LINES_MAX):
        logger.warning("x" * 100, number=number)
    assert time.monotonic() - since < 5
    with os.fdopen(reading, "rb") as reader, ThreadPoolExecutor(1) as pool:
        text = pool.submit(reader.read)
        log.close()
        stream.close()
        assert b"number=0" in text.result()
        assert b"lines were left out" in text.result()


def test_closed_log_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    log = LogThread(stream)
    log.msg("one")
    log.msg("two")
    log.close()
    assert not log._thread.is_alive()
    with contextlib.suppress(BrokenPipeError):
        stream.close()
