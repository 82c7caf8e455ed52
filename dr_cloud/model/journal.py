"""The records of the journal's catalogue: what a checkpoint says, and the plan by which a stack makes its image.

All times are nanoseconds since the epoch. Records are immutable; they are written as JSON inside sealed objects
(`dr_cloud.journal.checkpoint`) and passed between actors.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dr_cloud.model.blocks import DISK_INDEX_MAX, DISK_SIZE_BYTES_MAX
from dr_cloud.model.ids import Scope

CheckpointKind = Literal["open", "auto", "tag", "sync"]
"""`open`: a writer took over (no new data); `auto`: by the timer or a full object; `tag`: by hand, with a
description; `sync`: durable progress while a disk is (re)synchronising, which is no point to recover to."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Disk(_Record):
    """One virtual disk of a VPG. `index` never changes and is never used again for another disk."""

    index: int = Field(ge=0, le=DISK_INDEX_MAX)
    name: str
    size_bytes: int = Field(gt=0, le=DISK_SIZE_BYTES_MAX)


class ObjectRef(_Record):
    """One journal object: its number (with the generation, its key) and what it holds."""

    number: int = Field(gt=0, le=0x7FFF_FFFF)
    """Below 2³¹: the highest bit of a loc is taken."""
    generation: int = Field(gt=0)
    size_bytes: int = Field(ge=0)
    blocks: int = Field(ge=0)
    rows: int = Field(ge=0)


class KeyframeRef(_Record):
    """One keyframe: the replica map just after checkpoint `number`, whose time is `time_ns`."""

    number: int = Field(ge=0)
    generation: int = Field(gt=0)
    time_ns: int
    rows_before: int = Field(ge=0)
    """How many change rows the journal held up to here: the distance between keyframes and times is in rows."""


class Checkpoint(_Record):
    """A durable cut of the journal: every write with time ≤ `time_ns` is in it, none after.

    Any T with `exact_from_ns` ≤ T ≤ `time_ns` has an image. `exact_from_ns` equals `time_ns` after a gap (a
    synchronisation, whose order of writes is not known) and is the checkpoint's before otherwise.
    """

    number: int = Field(ge=0)
    generation: int = Field(gt=0)
    journal: str = ""
    """The journal's identity, drawn at random when it was begun: tells it from another at the same place."""
    kind: CheckpointKind
    time_ns: int
    exact_from_ns: int
    created_ns: int
    tag: str = ""
    description: str = ""
    request: str = ""
    """Id of the request that it fulfils, if it was made by hand."""
    stream: str = ""
    """The source's stream (its id in hexadecimal) that it was cut from; empty for one that opens a writer."""
    cuts: dict[str, int] = Field(default_factory=dict)
    """The last sequence of each tap (its id in hexadecimal) that this checkpoint holds."""
    disks: list[Disk] = Field(default_factory=list)
    objects: list[ObjectRef] = Field(default_factory=list)
    rows_before: int = Field(ge=0)
    keyframes: list[KeyframeRef] = Field(default_factory=list)
    """Keyframes that became durable since the checkpoint before (usually none, at most one)."""
    generations: list[tuple[int, int]] = Field(default_factory=list)
    """(first object number, generation) of every writer so far, ascending: gives each object number its key."""

    @property
    def rows(self) -> int:
        """The change rows of this checkpoint's interval."""
        return sum(ref.rows for ref in self.objects)

    @property
    def testable(self) -> bool:
        """Whether this is a time to recover to."""
        return self.kind in ("auto", "tag")


class Write(_Record):
    """All that was written at one time: a candidate for the last clean one."""

    time_ns: int
    blocks: int
    """How many blocks it changed."""
    exact: bool
    """Whether this time has an image of its own; else a test of it is moved down to the checkpoint before."""


class PlacedImage(_Record):
    """The image that is served for a time, and where it stands in the order of the journal's change rows."""

    time_ns: int
    """The time that is served."""
    rows: int
    """How many rows it holds: those at positions 0 to `rows` - 1."""


class PlacedWrite(_Record):
    """A write, and which positions it takes: how many change rows of the journal come before each of its own."""

    time_ns: int
    """The first time whose image holds it whole."""
    first: int
    last: int
    exact: bool
    """False: it is all that was written while the order was not known, which can be had as a whole only."""


class ImagePlan(_Record):
    """Everything a stack needs to serve image(`at_ns`), without a LIST and without the journal's writer.

    The image is keyframe `base` (all holes if None) and the rows of `objects`: applied forward where
    `direction` is redo (rows with base time < time ≤ `at_ns`), backward where it is undo (rows with `at_ns` <
    time ≤ base time).
    """

    scope: Scope
    journal: str = ""
    """The journal's identity: what is cached of one journal is never taken for another's."""
    asked_ns: int
    at_ns: int
    note: str = ""
    """Why `at_ns` is not `asked_ns`, where it is not."""
    disks: list[Disk]
    base: KeyframeRef | None
    direction: Literal["redo", "undo"]
    objects: list[ObjectRef]
    generations: list[tuple[int, int]]
