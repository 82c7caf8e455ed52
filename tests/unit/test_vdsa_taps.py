from __future__ import annotations

from typing import Any

from dr_cloud.model.journal import Disk
from dr_cloud.tap import wire
from dr_cloud.vdsa.actions import SendTap
from dr_cloud.vdsa.feed import Record
from dr_cloud.vdsa.taps import Announced, TapBook

TAP = "ab" * 16
ROOT, DATA = (Disk(index=index, name=f"db/{index}", size_bytes=1 << 20) for index in (4, 5))


def book(cuts: dict[str, int], *disks: Disk) -> TapBook:
    out: list[Any] = []
    taps = TapBook(out, {"db": {"root": 4, "data": 5}})
    taps.rebase(cuts, disks, 0)
    return taps


def greet(taps: TapBook, connection: int, durable: int, *disks: Disk) -> list[int]:
    """Let the tap connect; return its own indexes of the disks that it is asked to send whole."""
    taps._out.clear()
    taps.greet(connection, Announced(TAP, "db", "h", durable, dict(enumerate(disks))), 0)
    heads = [wire.HEAD.unpack(action.data) for action in taps._out if isinstance(action, SendTap)]
    return [disk for kind, flags, disk, *_ in heads if kind == wire.RESYNC and flags == wire.FLAG_WHOLE]


def answer(taps: TapBook) -> None:
    tap = taps.get(TAP)
    assert tap is not None
    taps.told(tap, Record(wire.MARKED, 0, 0, 90, 900, 0, tap.asked, memoryview(b"")))


def test_bits_count_only_where_the_journal_holds_what_they_rest_on() -> None:
    """Invariant 2: a new tap, and one whose cleared bits this journal holds, need nothing more; others send all."""
    assert greet(book({}), 1, 0, ROOT, DATA) == [], "no bit was ever cleared"
    assert greet(book({TAP: 50}, ROOT, DATA), 1, 50, ROOT, DATA) == []
    assert greet(book({TAP: 50}, ROOT, DATA), 1, 51, ROOT, DATA) == [0, 1], "something else was called durable since"
    assert greet(book({}, ROOT, DATA), 1, 50, ROOT, DATA) == [0, 1], "a journal that has never seen this tap"
    assert greet(book({TAP: 50}, ROOT), 1, 50, ROOT, DATA) == [1], "a disk that was not in the VPG"


def test_a_word_that_was_lost_is_given_again() -> None:
    """Invariant 2: the connection breaks, or the source dies, before it is known that the tap knows: asked again."""
    taps = book({TAP: 50}, ROOT)
    assert greet(taps, 1, 50, ROOT, DATA) == [1]
    listing, gone = taps.listing()
    assert [disk.index for disk in listing[0].disks] == [4, 5]
    assert gone == [TAP], "a source that starts now finds no cut of this tap, and asks for everything"
    assert taps.cuts(1 << 60) == {}, "nothing is called durable to a tap that may not have heard"
    tap = taps.get(TAP)
    assert tap is not None
    taps.leave(tap)
    assert greet(taps, 2, 50, ROOT, DATA) == [1]
    answer(taps)
    assert taps.listing()[1] == []
    assert taps.cuts(1 << 60) == {TAP: 90}
    taps.leave(tap)
    assert greet(taps, 3, 50, ROOT, DATA) == []


def test_a_tap_of_another_host_takes_the_place_and_the_old_ones_cut_is_gone() -> None:
    """R7: the server's earlier tap is forgotten, here and in what the journal keeps."""
    taps = book({TAP: 50}, ROOT)
    greet(taps, 1, 50, ROOT)
    answer(taps)
    taps.greet(2, Announced("cd" * 16, "db", "h2", 0, {0: ROOT}), 0)
    listing, gone = taps.listing()
    assert ([entry.tap for entry in listing], gone) == (["cd" * 16], [TAP])
    assert greet(taps, 3, 50, ROOT) == [0], "it comes back from elsewhere"


def test_disks_of_servers_that_were_not_seen_stay_the_vpgs() -> None:
    """A source that starts again lists what the journal has, until the server's tap says what it is now."""
    taps = book({TAP: 50}, ROOT, DATA)
    assert [disk for entry in taps.listing()[0] for disk in entry.disks] == [ROOT, DATA]
    assert not taps.whole_at(1 << 60)
    greet(taps, 1, 50, ROOT)
    assert [disk for entry in taps.listing()[0] for disk in entry.disks] == [ROOT]
