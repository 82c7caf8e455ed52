"""Folders that go with their process, and slots of a node."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path

from dr_cloud.recovery.probes.folders import make_folder, slot, sweep

FORKS = multiprocessing.get_context("fork")


def test_a_sweep_takes_what_nobody_holds(tmp_path: Path) -> None:
    mine, lock = make_folder(tmp_path, "test-")
    (mine / "file").write_text("x")
    dead, other = make_folder(tmp_path, "test-")
    (dead / "file").write_text("x")
    os.close(other)
    (tmp_path / "kept").mkdir()
    sweep(tmp_path, "test-")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["kept", mine.name])
    os.close(lock)
    sweep(tmp_path, "test-")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def _hold(place: Path, held: Event) -> None:
    with slot(place, 1, threading.Event()):
        held.set()
        time.sleep(60)


def test_a_killed_process_gives_its_slot_back(tmp_path: Path) -> None:
    """R8: others of the node wait for it meanwhile, and a stop ends their waiting."""
    held, stop = FORKS.Event(), threading.Event()
    process = FORKS.Process(target=_hold, args=(tmp_path, held))
    process.start()
    assert held.wait(10)
    taken: list[str] = []

    def wait(name: str, stop: threading.Event) -> None:
        with slot(tmp_path, 1, stop):
            taken.append(name)

    waiting = [threading.Thread(target=wait, args=item) for item in (("stopped", stop), ("slot", threading.Event()))]
    for thread in waiting:
        thread.start()
    time.sleep(0.3)
    assert taken == []
    stop.set()
    waiting[0].join(5)
    assert taken == ["stopped"]
    process.kill()
    process.join()
    waiting[1].join(5)
    assert taken == ["stopped", "slot"]


def test_there_are_as_many_slots_as_told(tmp_path: Path) -> None:
    stop = threading.Event()
    with slot(tmp_path, 2, stop), slot(tmp_path, 2, stop):
        threading.Timer(0.3, stop.set).start()
        begun = time.monotonic()
        with slot(tmp_path, 2, stop):
            assert time.monotonic() - begun >= 0.25
    with slot(tmp_path, 2, threading.Event()):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["slot-0", "slot-1"]
