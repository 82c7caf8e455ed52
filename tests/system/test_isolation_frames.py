"""Sealed frames in the wrong place: replayed, spliced, cut or stretched, across enterprises, VPGs, targets and streams.

A target that holds the keys of all that are aimed at (as a provider's does) is sent what it must not take. It refuses
the stream, or drops what has come before; it never journals it. After each attack every journal's newest image, read
from the store alone, is what its own source wrote.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import pytest
from isolation_frames import DISK_BLOCKS, FRAME_BLOCKS, HandSource, durable, greet, heard, newest_image

from dr_cloud.journal.frame import HEAD, HEAD_BYTES, check_groups, open_frame
from dr_cloud.journal.verify import verify_object
from dr_cloud.link import messages as link
from dr_cloud.link.stream import PlainStream, connect, listen
from dr_cloud.model.errors import DamagedError, DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.open import open_store
from dr_cloud.store.store import Store
from dr_cloud.vdsa.target_io import TargetVdsa

pytestmark = pytest.mark.system
OURS = Scope("acme", "shop", "dc1")
OTHERS = {
    "another VPG": Scope("acme", "erp", "dc1"),
    "another target": Scope("acme", "shop", "dc2"),
    "another enterprise": Scope("brit", "shop", "dc1"),
}


class Rig:
    """A target of all these scopes, a source for each, and one store for all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"unix:{folder}/t"
        self.keyring = Keyring.open(folder / "keyring")
        for enterprise in ("acme", "brit"):
            self.keyring.create(enterprise)
        self.store = open_store("memory:")
        self.sources: dict[Scope, HandSource] = {}
        self.streams: dict[Scope, PlainStream] = {}
        self.sent: dict[Scope, list[bytes]] = {}
        """Every frame that was sent and is durable, as a message."""
        self.said: dict[Scope, list[str | bytes]] = {}
        """All that was sent after the last hello."""
        self.server: asyncio.Server

    async def start(self) -> None:
        self.vdsa = TargetVdsa(self.keyring, self.folder / "digests", self.admit)
        self.server = await listen(self.address, self.vdsa.serve)

    async def stop(self) -> None:
        for stream in self.streams.values():
            stream.close()
        self.server.close()
        await self.vdsa.close()

    async def restart(self) -> None:
        """Another target takes the place of this one, on the same store."""
        await self.stop()
        await self.start()

    async def say(self, scope: Scope, message: str | bytes) -> None:
        self.said[scope].append(message)
        await self.streams[scope].send(message)

    def admit(self, scope: Scope) -> Store:
        if scope != OURS and scope not in OTHERS.values():
            raise DrCloudError("not served")
        return self.store

    async def begin(self, scope: Scope) -> None:
        """Have a source of `scope` connect, write, and see it durable."""
        self.streams[scope] = await connect(self.address)
        before = self.sources.get(scope)
        source = self.sources[scope] = HandSource(self.keyring.vpg_keys(scope), before.time_ns if before else 1_000)
        if before is not None:
            source.blocks = before.blocks
        await greet(self.streams[scope], source)
        self.said[scope] = []
        await self.say(scope, source.taps())
        await self.go_on(scope)

    async def go_on(self, scope: Scope) -> None:
        """Write, and see it durable and right."""
        source = self.sources[scope]
        for _ in range(2):
            self.sent.setdefault(scope, []).append(source.frame())
            await self.say(scope, self.sent[scope][-1])
        await self.say(scope, source.checkpoint())
        assert isinstance(await heard(self.streams[scope]), link.Durable)
        self.check(scope)

    def check(self, scope: Scope) -> None:
        assert newest_image(self.store, self.keyring.vpg_keys(scope)) == self.sources[scope].blocks, scope.prefix

    def objects(self) -> dict[str, bytes]:
        return {key: self.store.get(key) for key, _ in self.store.list("")}


@pytest.fixture
async def rig(tmp_socket_dir: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_socket_dir)
    await rig.start()
    for scope in (OURS, *OTHERS.values()):
        await rig.begin(scope)
    yield rig
    await rig.stop()


class Parts(NamedTuple):
    """A frame taken apart."""

    head: tuple[int | bytes, ...]
    columns: bytes
    groups: list[bytes]

    @classmethod
    def of(cls, rig: Rig, scope: Scope, message: bytes) -> Parts:
        data = message[link.HEAD_BYTES :]
        frame = open_frame(rig.keyring.vpg_keys(scope), data)
        ends = frame.groups_offset + frame.group_lengths.cumsum()
        starts = [frame.groups_offset, *ends[:-1].tolist()]
        groups = [data[start:end] for start, end in zip(starts, ends.tolist(), strict=True)]
        return cls(HEAD.unpack_from(data), data[HEAD_BYTES : frame.groups_offset], groups)

    def join(self, **fields: int | bytes) -> bytes:
        """Put it together with other fields in the head, whose checksum is made right."""
        names = ("magic", "version", "flags", "stream", "number", "columns", "data", "writes", "blocks", "groups")
        values = list(self.head)
        for name, value in fields.items():
            values[names.index(name)] = value
        head = HEAD.pack(*values)
        crc: bytes = google_crc32c.value(head).to_bytes(4, "little")
        return head + crc + self.columns + b"".join(self.groups)


def message(number: int, frame: bytes) -> bytes:
    return link.encode_data(link.FRAME, number, frame)


Attack = Callable[[Rig, HandSource, int], bytes]
"""Makes the bad message: the rig, the source of OURS, the number that is next in its stream."""


def replayed(scope: Scope, **head: bool) -> Attack:
    """A durable frame of `scope`; its head is left, or says this stream, or this number too."""

    def make(rig: Rig, source: HandSource, number: int) -> bytes:
        fields: dict[str, int | bytes] = {"stream": source.stream} if head.get("stream") else {}
        if head.get("number"):
            fields["number"] = number
        return message(number, Parts.of(rig, scope, rig.sent[scope][-1]).join(**fields))

    return make


def another_number(rig: Rig, source: HandSource, number: int) -> bytes:
    return message(number, source.sealed(number + 1, 0))


def another_stream(rig: Rig, source: HandSource, number: int) -> bytes:
    other = HandSource(source.keys)
    return message(number, other.sealed(number, 0))


def anothers_groups(group: int) -> Attack:
    """The columns of the right frame, with a group of an earlier one in the place of its own."""

    def make(rig: Rig, source: HandSource, number: int) -> bytes:
        mine = Parts.of(rig, OURS, message(number, source.sealed(number, 0)))
        mine.groups[group] = Parts.of(rig, OURS, rig.sent[OURS][-1]).groups[group]
        return message(number, mine.join())

    return make


def groups_of_another_enterprise(rig: Rig, source: HandSource, number: int) -> bytes:
    mine = Parts.of(rig, OURS, message(number, source.sealed(number, 0)))
    theirs = Parts.of(rig, OTHERS["another enterprise"], rig.sent[OTHERS["another enterprise"]][-1])
    return message(number, mine._replace(groups=theirs.groups).join())


def groups_swapped(rig: Rig, source: HandSource, number: int) -> bytes:
    mine = Parts.of(rig, OURS, message(number, source.sealed(number, 0)))
    return message(number, mine._replace(groups=mine.groups[::-1]).join())


def anothers_columns(rig: Rig, source: HandSource, number: int) -> bytes:
    mine = Parts.of(rig, OURS, message(number, source.sealed(number, 0)))
    return message(number, mine._replace(columns=Parts.of(rig, OURS, rig.sent[OURS][-1]).columns).join())


def changed(change: Callable[[bytearray], object]) -> Attack:
    """The right frame with other bytes."""

    def make(rig: Rig, source: HandSource, number: int) -> bytes:
        frame = bytearray(source.sealed(number, 0))
        change(frame)
        return message(number, bytes(frame))

    return make


def flip(at: int) -> Callable[[bytearray], None]:
    def change(frame: bytearray) -> None:
        frame[at] ^= 1

    return change


def of_other_lengths(rig: Rig, source: HandSource, number: int) -> bytes:
    """The last group is left out, and the head says so."""
    mine = Parts.of(rig, OURS, message(number, source.sealed(number, 0)))
    last = mine.groups.pop()
    size = mine.head[6]
    assert isinstance(size, int)
    return message(number, mine.join(data=size - len(last)))


ATTACKS: dict[str, Attack] = {
    **{f"a frame of {name}, as it is": replayed(scope) for name, scope in OTHERS.items()},
    **{f"a frame of {name}, relabelled": replayed(scope, stream=True, number=True) for name, scope in OTHERS.items()},
    "an earlier frame under the next number": replayed(OURS),
    "an earlier frame, relabelled with the next number": replayed(OURS, number=True),
    "a frame sealed for another number": another_number,
    "a frame of another stream": another_stream,
    "the first group of an earlier frame": anothers_groups(0),
    "the last group of an earlier frame": anothers_groups(1),
    "the groups of another enterprise": groups_of_another_enterprise,
    "its groups in another order": groups_swapped,
    "the columns of an earlier frame": anothers_columns,
    "a byte of the head": changed(flip(50)),
    "a byte of the columns": changed(flip(HEAD_BYTES + 3)),
    "a byte of the last group": changed(flip(-1)),
    "one byte less": changed(lambda frame: frame.pop()),
    "one byte more": changed(lambda frame: frame.append(0)),
    "its head alone": changed(lambda frame: frame.__delitem__(slice(HEAD_BYTES, None))),
    "half a head": changed(lambda frame: frame.__delitem__(slice(30, None))),
    "a group less, and lengths that say so": of_other_lengths,
}


@pytest.mark.parametrize("what", ATTACKS)
async def test_a_frame_in_the_wrong_place_is_refused(rig: Rig, what: str) -> None:
    """R11: nothing but the frame that belongs there is journaled; the reason says what is wrong, and no secret."""
    source, stream = rig.sources[OURS], rig.streams[OURS]
    held = dict(source.blocks)
    bad = ATTACKS[what](rig, source, source.number + 1)
    source.blocks = held  # What it seals is not to arrive.
    before = rig.objects()
    await stream.send(bad)
    source.number += 1
    await stream.send(source.checkpoint())
    refusal = await heard(stream)
    assert isinstance(refusal, link.Refused), refusal
    assert refusal.code == "stream"
    assert str(source.number - 1) in refusal.reason or "head" in refusal.reason, refusal.reason
    for secret in (rig.keyring.key("acme").hex(), rig.keyring.key("brit").hex(), "brit"):
        assert secret not in refusal.reason + refusal.remedy
    assert rig.objects() == before, "nothing of it is journaled"
    for scope in (OURS, *OTHERS.values()):
        rig.check(scope)
    for scope in OTHERS.values():
        await rig.go_on(scope)
    await rig.begin(OURS)


async def test_the_same_frame_twice_is_journaled_once(rig: Rig) -> None:
    """R5, R11: a number that has come is dropped, with whatever bytes it comes again."""
    source, stream = rig.sources[OURS], rig.streams[OURS]
    duplicates = rig.vdsa.status(OURS).duplicates
    again = rig.sent[OURS][-1]
    number = struct.unpack_from("<B7xQ", again)[1]
    held = dict(source.blocks)
    others = message(number, source.sealed(number, 0))
    source.blocks = held
    for copy in (again, others, message(number, b"garbage")):
        await stream.send(copy)
    await rig.go_on(OURS)
    assert rig.vdsa.status(OURS).duplicates == duplicates + 3


async def test_a_whole_stream_cannot_be_said_again(rig: Rig) -> None:
    """R5, R11: recorded, and said anew to a target that has been started again: old writes take no new one's place."""
    said = rig.sources[OURS]
    recorded = [said.hello(), *rig.said[OURS]]
    await rig.begin(OURS)
    source = rig.sources[OURS]
    for frame in range(DISK_BLOCKS // FRAME_BLOCKS):
        source.number += 1
        await rig.streams[OURS].send(message(source.number, source.sealed(source.number, frame * FRAME_BLOCKS)))
    await durable(rig.streams[OURS], source)
    rig.check(OURS)
    await rig.restart()
    replay = await connect(rig.address)
    for each in recorded:
        await replay.send(each)
    refusal = await heard(replay)
    assert isinstance(refusal, link.Refused), refusal
    assert refusal.code == "stream"
    replay.close()
    rig.check(OURS)
    await rig.begin(OURS)


async def test_an_object_at_anothers_key_is_not_read(rig: Rig) -> None:
    """R11: every kind of object, copied by hand to its place in another scope or to another number, is refused."""
    kinds: set[str] = set()
    for key, data in rig.objects().items():
        if not key.startswith(f"{OURS.prefix}/"):
            continue
        kind = key.removeprefix(f"{OURS.prefix}/").partition("/")[0]
        digits = secrets.randbelow(10**8) + 10**8
        places = [f"{scope.prefix}/{key.removeprefix(f'{OURS.prefix}/')}" for scope in OTHERS.values()]
        stem, dot, ending = key.partition(".")
        places.append(f"{stem[:-9]}{digits}{dot}{ending}")
        for place in places:
            copied = open_store("memory:")
            copied.put_new(place, data)
            scope = Scope(*place.split("/")[:3])
            with pytest.raises(DamagedError) as caught:
                verify_object(copied, rig.keyring.vpg_keys(scope), place)
            assert place in str(caught.value)
        verify_object(rig.store, rig.keyring.vpg_keys(OURS), key)
        kinds.add(kind)
    assert kinds == {"writers", "checkpoints", "journal"}


def test_groups_are_checked_one_by_one(tmp_path: Path) -> None:
    """What the attacks above rest on: a whole frame passes, and each group alone can fail."""
    keyring = Keyring.open(tmp_path / "keyring")
    keyring.create("acme")
    source = HandSource(keyring.vpg_keys(OURS))
    frame = open_frame(source.keys, source.sealed(1))
    check_groups(source.keys, frame)
    at = frame.groups_offset
    for group, length in enumerate(frame.group_lengths.tolist()):
        data = bytearray(frame.data)
        data[at + length // 2] ^= 1
        with pytest.raises(DamagedError, match=f"group {group} of frame 1"):
            check_groups(source.keys, open_frame(source.keys, bytes(data)))
        at += length
