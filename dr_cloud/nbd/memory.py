"""A RAM disk with holes: the plainest export. Tests and demonstrations use it, and benchmarks as the floor."""

from __future__ import annotations

from collections.abc import Sequence

from dr_cloud.nbd.export import Buffer, Extent

PIECE_BYTES = 1 << 20
"""Memory comes and goes in pieces of this size; a piece that is absent is a hole."""


class MemoryExport:
    """A disk in memory. Nothing is kept when the process ends, so flush and FUA have nothing to do."""

    fast_zeroes = True

    def __init__(self, name: str, size_bytes: int, *, description: str = "", read_only: bool = False) -> None:
        self.name = name
        self.description = description
        self.size_bytes = size_bytes
        self.read_only = read_only
        self.block_size_minimum = 1
        self.block_size_preferred = 4096
        self._pieces: dict[int, memoryview] = {}
        self._zeroes = memoryview(bytes(PIECE_BYTES))

    def pread(self, offset: int, length: int) -> Sequence[Buffer]:
        """Return views of the stored bytes; a later write shows through them until they are sent."""
        index, start = divmod(offset, PIECE_BYTES)
        if start + length <= PIECE_BYTES:
            return (self._pieces.get(index, self._zeroes)[start : start + length],)
        parts = []
        while length:
            size = min(length, PIECE_BYTES - start)
            parts.append(self._pieces.get(index, self._zeroes)[start : start + size])
            length -= size
            index, start = index + 1, 0
        return parts

    def pwrite(self, offset: int, data: memoryview, fua: bool = False) -> None:
        """Write."""
        index, start = divmod(offset, PIECE_BYTES)
        whole = self._pieces.get(index)
        if whole is not None and start + len(data) <= PIECE_BYTES:
            whole[start : start + len(data)] = data
            return
        done = 0
        while done < len(data):
            size = min(len(data) - done, PIECE_BYTES - start)
            piece = self._pieces.get(index)
            if piece is None:
                piece = self._pieces[index] = memoryview(bytearray(PIECE_BYTES))
            piece[start : start + size] = data[done : done + size]
            done += size
            index, start = index + 1, 0

    def flush(self) -> None:
        """Nothing to do."""

    def trim(self, offset: int, length: int, fua: bool = False) -> None:
        """Make it read as zeroes; whole pieces become holes."""
        index, start = divmod(offset, PIECE_BYTES)
        while length:
            size = min(length, PIECE_BYTES - start)
            if size == PIECE_BYTES:
                self._pieces.pop(index, None)
            elif (piece := self._pieces.get(index)) is not None:
                piece[start : start + size] = self._zeroes[:size]
            length -= size
            index, start = index + 1, 0

    def write_zeroes(self, offset: int, length: int, fua: bool = False, may_trim: bool = True) -> None:
        """Write zeroes; without `may_trim` the pieces are given memory."""
        self.trim(offset, length)
        if not may_trim:
            for index in range(offset // PIECE_BYTES, -(-(offset + length) // PIECE_BYTES)):
                if index not in self._pieces:
                    self._pieces[index] = memoryview(bytearray(PIECE_BYTES))

    def block_status(self, offset: int, length: int) -> Sequence[Extent]:
        """Return one extent per piece."""
        extents = []
        index, start = divmod(offset, PIECE_BYTES)
        while length:
            size = min(length, PIECE_BYTES - start)
            extents.append(Extent(size, index not in self._pieces))
            length -= size
            index, start = index + 1, 0
        return extents
