"""A recovered disk against a plain array: reads, writes of any part, zeroes, flushes, what is brought over, crashes."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections.abc import Awaitable, Sequence
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.nbd.export import Buffer, Extent
from dr_cloud.recovery.recovered import RecoveredDisk

SIZE = 40 * BLOCK_SIZE + 1536
PAGE = 4096
BOOTS = (b"a" * 16, b"b" * 16)


class PlainImage:
    """An image in memory; now and then it answers later, after others have had their turn."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.size_bytes = SIZE
        content = bytearray(self._random.randbytes(SIZE))
        for block in range(0, 40):
            if self._random.random() < 0.4:
                content[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = bytes(BLOCK_SIZE)
        self.content = bytes(content)
        self.broken = False

    def pread(self, offset: int, length: int) -> Sequence[Buffer] | Awaitable[Sequence[Buffer]]:
        if self.broken:
            raise OSError(5, "the store does not answer")
        data = [self.content[offset : offset + length]]
        return data if self._random.random() < 0.5 else self._later(data)

    async def _later(self, data: list[Buffer]) -> Sequence[Buffer]:
        for _ in range(self._random.randrange(1, 4)):
            await asyncio.sleep(0)
        return data

    def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        end = min(offset + length, (offset // BLOCK_SIZE + 1) * BLOCK_SIZE, SIZE)
        return [Extent(end - offset, not any(self.content[offset:end]))]


place = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * BLOCK_SIZE)).map(
    lambda drawn: (drawn[0], min(drawn[1], SIZE - drawn[0]))
)
step = st.one_of(
    st.tuples(st.just("write"), place),
    st.tuples(st.just("zero"), place),
    st.tuples(st.just("read"), place),
    st.tuples(st.sampled_from(["flush", "killed", "lost", "bring", "stop"]), st.just((0, 0))),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32), steps=st.lists(step, max_size=40))
def test_it_is_the_image_and_what_was_written(seed: int, steps: list[tuple[str, tuple[int, int]]]) -> None:
    """R10: what is read is the image at its time and the writes since; what was flushed outlives process and host."""
    folder = Path(tempfile.mkdtemp(prefix="recovered-"))
    try:
        asyncio.run(_run(folder, seed, steps))
    finally:
        shutil.rmtree(folder)


async def _run(folder: Path, seed: int, steps: list[tuple[str, tuple[int, int]]]) -> None:
    draw = random.Random(seed)
    image, boot = PlainImage(seed), 0
    now, flushed = bytearray(image.content), bytes(image.content)
    since: set[int] = set()
    disk = RecoveredDisk(folder / "d.raw", image, SIZE, BOOTS[boot])
    bringing: asyncio.Task[None] | None = None
    for kind, (offset, length) in [*steps, ("stop", (0, 0)), ("bring all", (0, 0))]:
        blocks = range(offset // BLOCK_SIZE, (offset + length - 1) // BLOCK_SIZE + 1) if length else ()
        if kind == "write":
            data = draw.randbytes(length)
            now[offset : offset + length] = data
            since.update(blocks)
            if (later := disk.pwrite(offset, memoryview(data))) is not None:
                await later
        elif kind == "zero":
            now[offset : offset + length] = bytes(length)
            since.update(blocks)
            await disk.zero(offset, length, draw.random() < 0.5)
        elif kind == "read":
            assert await _read(disk, offset, length) == now[offset : offset + length]
        elif kind == "flush":
            await disk.flush()
            flushed, since = bytes(now), set()
        elif kind in ("bring", "bring all"):
            bringing = bringing or asyncio.create_task(disk.bring_over())
            await asyncio.sleep(0)
            if kind == "bring all":
                await bringing
                assert disk.map.complete and disk.missing_bytes == 0
        else:
            if bringing is not None:
                bringing.cancel()
                await asyncio.gather(bringing, return_exceptions=True)
                bringing = None
            if kind == "stop":
                continue
            await disk.close()
            if kind == "lost":
                boot = 1 - boot
                now = bytearray(_after_loss(folder / "d.raw", bytes(now), flushed, since, image.content, draw))
            disk = RecoveredDisk(folder / "d.raw", image, SIZE, BOOTS[boot])
        assert await _read(disk, 0, SIZE) == now
    await disk.close()
    alone = RecoveredDisk(folder / "d.raw", None, SIZE, BOOTS[boot])
    assert await _read(alone, 0, SIZE) == now
    await alone.close()


def _after_loss(path: Path, now: bytes, flushed: bytes, since: set[int], image: bytes, draw: random.Random) -> bytes:
    """Have the file lose any of what was not flushed, as a host that loses power does; return what must be read."""
    expected = bytearray(image)
    held = path.with_suffix(".map").read_bytes()
    complete, bits = held[12], held[2 * PAGE :]
    with path.open("r+b") as file:
        for block in range(-(-SIZE // BLOCK_SIZE)):
            place = slice(block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, SIZE))
            file.seek(place.start)
            if not complete and not bits[block >> 3] >> (block & 7) & 1:
                assert block in since or flushed[place] == image[place], "what was flushed is not the file's"
                file.write(draw.randbytes(place.stop - place.start))
                continue
            if block in since:
                file.write((now if draw.random() < 0.5 else flushed)[place])
                file.seek(place.start)
            expected[place] = file.read(place.stop - place.start)
    return bytes(expected)


async def _read(disk: RecoveredDisk, offset: int, length: int) -> bytes:
    answer = disk.pread(offset, length)
    return b"".join(answer if isinstance(answer, Sequence) else await answer)
