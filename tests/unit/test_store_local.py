"""The directory store's own part: the order of durability, and what a crash leaves behind."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from dr_cloud.store.errors import ObjectExistsError, StoreUnavailableError
from dr_cloud.store.local import PARTIAL, PARTIAL_AGE_SECONDS_MAX, LocalObjectStore


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_the_file_is_flushed_before_it_is_linked_and_the_folders_after(tmp_path, monkeypatch):
    store = LocalObjectStore(tmp_path)
    steps = []
    names = {}
    real_open, real_fsync, real_link, real_mkdir = os.open, os.fsync, os.link, os.mkdir

    def spy_open(path, flags, *rest):
        fd = real_open(path, flags, *rest)
        names[fd] = "partial" if f"/{PARTIAL}/" in path else os.path.relpath(path, tmp_path)
        return fd

    def spy_fsync(fd):
        steps.append(f"fsync {names[fd]}")
        real_fsync(fd)

    def spy_link(source, target):
        steps.append("link")
        real_link(source, target)

    def spy_mkdir(path, mode):
        steps.append(f"mkdir {os.path.relpath(path, tmp_path)}")
        real_mkdir(path, mode)

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "link", spy_link)
    monkeypatch.setattr(os, "mkdir", spy_mkdir)
    store.put_new("a/b/c", b"one")
    assert steps == ["fsync partial", "mkdir a", "fsync .", "mkdir a/b", "fsync a", "link", "fsync a/b"]
    steps.clear()
    store.put_new("a/b/d", b"two")
    assert steps == ["fsync partial", "link", "fsync a/b"]
    # Another process may have made the folder and died before flushing it: a new store flushes it again.
    another = LocalObjectStore(tmp_path)
    steps.clear()
    another.put_new("a/b/e", b"three")
    assert steps == ["fsync partial", "fsync .", "fsync a", "link", "fsync a/b"]


def test_objects_and_folders_are_closed_to_others(tmp_path):
    store = LocalObjectStore(tmp_path / "root")
    store.put_new("a/b", b"x")
    assert (tmp_path / "root" / "a" / "b").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "root" / "a").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("call", ["writev", "fsync", "link"])
def test_a_failed_put_leaves_nothing(tmp_path, monkeypatch, call):
    store = LocalObjectStore(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StoreUnavailableError, match="No space left") as caught:
            store.put_new("a/b", b"x")
    assert caught.value.remedy == "Free space there."
    assert not caught.value.temporary
    assert files(tmp_path) == []
    store.put_new("a/b", b"x")
    assert store.get("a/b") == b"x"


def test_a_lost_race_leaves_the_winner_and_no_rest(tmp_path, monkeypatch):
    store = LocalObjectStore(tmp_path)
    real_link = os.link

    def link_after_another(source, target):
        monkeypatch.setattr(os, "link", real_link)
        store.put_new("a/b", b"winner")
        real_link(source, target)

    monkeypatch.setattr(os, "link", link_after_another)
    with pytest.raises(ObjectExistsError):
        store.put_new("a/b", b"loser")
    assert store.get("a/b") == b"winner"
    assert files(tmp_path) == ["a/b"]


def test_a_writer_killed_at_any_moment_leaves_whole_objects_only(tmp_path):
    script = (
        "import sys; from pathlib import Path; from dr_cloud.store.local import LocalObjectStore\n"
        "store = LocalObjectStore(Path(sys.argv[1])); print('ready', flush=True)\n"
        "for n in range(10**6): store.put_new(f'a/{n:09d}', bytes([n % 251]) * (1 << 20))\n"
    )
    for delay_seconds in (0.02, 0.05, 0.09):
        root = tmp_path / str(delay_seconds)
        writer = subprocess.Popen([sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE)
        try:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(delay_seconds)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        store = LocalObjectStore(root)
        for number, (key, size) in enumerate(store.list("")):
            assert key == f"a/{number:09d}"
            assert size == 1 << 20
            assert store.get(key) == bytes([number % 251]) * (1 << 20)


def test_unfinished_objects_are_not_seen_and_are_swept_when_old(tmp_path):
    store = LocalObjectStore(tmp_path)
    store.put_new("a/b", b"x")
    old, young = tmp_path / PARTIAL / "old", tmp_path / PARTIAL / "young"
    for file in (old, young):
        file.write_bytes(b"half")
    past = time.time() - PARTIAL_AGE_SECONDS_MAX - 60
    os.utime(old, (past, past))
    assert store.list("") == [("a/b", 1)]
    LocalObjectStore(tmp_path)
    assert files(tmp_path) == [f"{PARTIAL}/young", "a/b"]


def test_a_put_whose_unfinished_file_was_swept_can_be_done_again(tmp_path, monkeypatch):
    store = LocalObjectStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda source, target: os.unlink(source) or (_ for _ in ()).throw(missing()))
        with pytest.raises(StoreUnavailableError) as caught:
            store.put_new("a/b", b"x")
    assert caught.value.temporary
    store.put_new("a/b", b"x")


def missing():
    return FileNotFoundError(errno.ENOENT, "No such file or directory")


def test_a_store_that_was_unmounted_is_not_an_empty_store(tmp_path):
    store = LocalObjectStore(tmp_path / "root")
    store.put_new("a/b", b"x")
    (tmp_path / "root").rename(tmp_path / "elsewhere")
    (tmp_path / "root").mkdir()
    for call in (
        lambda: store.get("a/b"),
        lambda: store.get_range("a/b", 0, 1),
        lambda: store.size("a/b"),
        lambda: store.list(""),
        lambda: store.put_new("a/c", b"x"),
    ):
        with pytest.raises(StoreUnavailableError):
            call()


def test_a_key_below_an_object_is_told(tmp_path):
    store = LocalObjectStore(tmp_path)
    store.put_new("a", b"x")
    with pytest.raises(StoreUnavailableError, match="an object has the name of this folder"):
        store.put_new("a/b", b"x")


def test_an_object_of_many_parts_is_written_whole_also_by_short_writes(tmp_path, monkeypatch):
    store = LocalObjectStore(tmp_path)
    parts = [bytes([n % 251]) * (n % 7 * 100) for n in range(3000)]
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, views: real(fd, [views[0][:37]] if len(views[0]) > 37 else views[:5]))
    store.put_new("a/parts", parts)
    assert store.get("a/parts") == b"".join(parts)
