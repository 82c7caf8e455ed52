"""Where writes are in the order of a journal: by position, by time, without listing them."""

from __future__ import annotations

from collections import Counter

import pytest
from clean_journal import WrittenJournal
from hypothesis import given
from hypothesis import strategies as st

from dr_cloud.journal.objects import Rows
from dr_cloud.journal.reader import JournalReader
from dr_cloud.journal.writes import images_at, writes_at
from dr_cloud.model.errors import InvalidError, TimeOutOfRangeError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import ObjectRef, PlacedImage, PlacedWrite
from dr_cloud.store.objects import open_memory

SCOPE = Scope("acme", "shop", "dc1")


def one_of_each() -> WrittenJournal:
    """Return a journal with writes of one block and of many, a synchronisation, and intervals without writes."""
    journal = WrittenJournal(open_memory(), SCOPE, 1000)
    journal.write([1100, 1200, 1200, 1200])
    journal.write([1950])  # sent early: it is after the next cut
    journal.cut(1900)
    journal.cut(2000)
    journal.cut(3000)
    journal.write([3500])
    journal.cut(4000, "sync", exact=False)
    journal.write([4500, 4600])
    journal.cut(5000, exact=False)
    journal.write([5001, 6000])
    journal.cut(6000, "tag", tag="before the move")
    return journal


def test_positions_are_by_time_and_gaps_are_one_write() -> None:
    """R14.2: each changed block has a position; what has no order of its own is had as a whole."""
    journal = one_of_each()
    found = writes_at(journal.writer.catalogue, journal.reader(), range(10))
    gap = PlacedWrite(time_ns=5000, first=5, last=7, exact=False)
    many = PlacedWrite(time_ns=1200, first=1, last=3, exact=True)
    assert found == [
        PlacedWrite(time_ns=1100, first=0, last=0, exact=True),
        *[many] * 3,
        PlacedWrite(time_ns=1950, first=4, last=4, exact=True),
        *[gap] * 3,
        PlacedWrite(time_ns=5001, first=8, last=8, exact=True),
        PlacedWrite(time_ns=6000, first=9, last=9, exact=True),
    ]
    for write in found:
        assert journal.writer.catalogue.plan(write.time_ns).at_ns == write.time_ns
        (image,) = images_at(journal.writer.catalogue, journal.reader(), [write.time_ns])
        assert image == PlacedImage(time_ns=write.time_ns, rows=write.last + 1)


def test_images_say_how_much_of_the_journal_they_hold() -> None:
    journal = one_of_each()
    asked = {1000: (1000, 0), 1100: (1100, 1), 1199: (1199, 1), 1200: (1200, 4), 2500: (2500, 5), 3000: (3000, 5)}
    asked |= {3600: (3000, 5), 4999: (3000, 5), 5000: (5000, 8), 5999: (5999, 9), 6000: (6000, 10)}
    found = images_at(journal.writer.catalogue, journal.reader(), list(asked))
    assert [(image.time_ns, image.rows) for image in found] == list(asked.values())


def test_times_and_positions_that_are_not_there() -> None:
    journal = one_of_each()
    catalogue, reader = journal.writer.catalogue, journal.reader()
    for at_ns in (999, 6001):
        with pytest.raises(TimeOutOfRangeError):
            images_at(catalogue, reader, [2000, at_ns])
    for position in (-1, 10):
        with pytest.raises(InvalidError, match="no position"):
            writes_at(catalogue, reader, [3, position])
    assert images_at(catalogue, reader, []) == writes_at(catalogue, reader, []) == []
    journal.write([7000])
    journal.cut(7500, "sync", exact=False)
    with pytest.raises(InvalidError, match="no image holds position 10 yet"):
        writes_at(catalogue, reader, [10])


def test_only_the_checkpoints_that_are_asked_for_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """R14.2: a round reads as many checkpoints as it asks for positions, each once, however many there are."""
    journal = WrittenJournal(open_memory(), SCOPE, 0)
    for interval in range(400):
        journal.write([interval * 100 + at for at in (10, 20, 30)])
        journal.cut(interval * 100 + 100)
    read: list[int] = []
    rows = JournalReader.rows
    monkeypatch.setattr(JournalReader, "rows", lambda self, ref: (read.append(ref.number), rows(self, ref))[1])
    found = writes_at(journal.writer.catalogue, journal.reader(), [0, 1, 2, 600, 1199])
    assert [write.time_ns for write in found] == [10, 20, 30, 20_010, 39_930]
    assert sorted(read) == [1, 201, 400]


def test_a_checkpoint_of_several_objects_has_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two objects of one checkpoint are in order by time, not by object."""
    journal = WrittenJournal(open_memory(), SCOPE, 0)
    journal.write([10, 30, 50])
    journal.cut(100)
    journal.write([120, 140, 160])
    journal.cut(200)
    catalogue, reader = journal.writer.catalogue, journal.reader()
    first, second = (checkpoint.objects[0] for checkpoint in catalogue.checkpoints[2:])
    # As if both objects were the second checkpoint's, and the times of one came between those of the other.
    rows = JournalReader.rows

    def mixed(self: JournalReader, ref: ObjectRef) -> Rows:
        found = rows(self, ref).copy()
        found["time_ns"] += 100 if ref.number == first.number else 0
        return found

    monkeypatch.setattr(JournalReader, "rows", mixed)
    catalogue.checkpoints[2] = catalogue.checkpoints[2].model_copy(update={"objects": []})
    catalogue.checkpoints[3] = catalogue.checkpoints[3].model_copy(
        update={"objects": [second, first], "rows_before": 0}
    )
    found = writes_at(catalogue, reader, range(6))
    assert [write.time_ns for write in found] == [110, 120, 130, 140, 150, 160]


@given(
    intervals=st.lists(
        st.tuples(
            st.lists(st.integers(1, 99), max_size=8),
            st.sampled_from(["exact", "exact", "unordered", "sync"]),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_positions_agree_with_images_whatever_was_written(intervals: list[tuple[list[int], str]]) -> None:
    """R14.2: every position has the first image that holds it, and every image holds what its time says."""
    journal = WrittenJournal(open_memory(), SCOPE, 1000)
    for number, (times, how) in enumerate(intervals, start=10):
        if times:
            journal.write([number * 100 + at for at in sorted(times)])
        journal.cut(number * 100 + 100, "sync" if how == "sync" else "auto", exact=how == "exact")
    journal.cut(9000, exact=True)
    catalogue, reader = journal.writer.catalogue, journal.reader()
    times = sorted(journal.times)
    asked = sorted({*times, *range(1000, 9001, 50)})
    images = images_at(catalogue, reader, asked)
    for at_ns, image in zip(asked, images, strict=True):
        assert image.time_ns == catalogue.plan(at_ns).at_ns <= at_ns
        assert image.rows == sum(when <= image.time_ns for when in times)
    ends = sorted({image.rows for image in images})
    places = writes_at(catalogue, reader, range(len(times)))
    for position, place in enumerate(places):
        assert place.first <= position <= place.last
        assert place.first == max(end for end in ends if end <= position)
        assert place.last + 1 == min(end for end in ends if end > position)
        assert catalogue.plan(place.time_ns).at_ns == place.time_ns
    assert all(Counter(places)[place] == place.last - place.first + 1 for place in places)
