"""What is written: blocks that compress about 2:1, as databases do, or not at all; every block differs."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from dr_cloud.model.blocks import BLOCK_SIZE, GROUP_BLOCKS

RECORD: Final = np.dtype(
    [("id", "<u8"), ("time", "<u8"), ("amount", "<u4"), ("kind", "S12"), ("name", "S16"), ("key", "V16")]
)
"""64 bytes: a counter, a time, a small number, two words, sixteen random bytes."""
GROUP_BYTES: Final = GROUP_BLOCKS * BLOCK_SIZE

Bytes = NDArray[np.uint8]


def realistic(size_bytes: int, seed: int = 1) -> Bytes:
    """Return records as a table of a database holds them."""
    draw = np.random.default_rng(seed)
    count = size_bytes // RECORD.itemsize
    letters = draw.integers(97, 123, (4096, 16), np.uint8)
    letters[:, 9:] = 0
    names: NDArray[Any] = letters.view("S16").ravel()
    kinds = np.array([b"order", b"payment", b"shipment", b"return", b"invoice"], "S12")
    records = np.zeros(count, RECORD)
    records["id"] = np.arange(count)
    records["time"] = 1_700_000_000_000_000 + np.cumsum(draw.integers(0, 5000, count, np.uint32), dtype=np.uint64)
    records["amount"] = draw.integers(0, 100_000, count, np.uint32)
    records["kind"] = kinds[draw.integers(0, len(kinds), count, np.uint8)]
    records["name"] = names[draw.integers(0, len(names), count, np.uint16)]
    records["key"] = np.frombuffer(draw.bytes(16 * count), "V16")
    return records.view(np.uint8)


def random(size_bytes: int, seed: int = 1) -> Bytes:
    """Return bytes that do not compress."""
    return np.frombuffer(bytearray(np.random.default_rng(seed).bytes(size_bytes)), np.uint8)


def renew(data: Bytes, round_number: int) -> None:
    """Change the first 8 bytes of every block, in place, so that none was ever stored before."""
    words = data.view(np.uint64).reshape(-1, BLOCK_SIZE // 8)
    words[:, 0] = np.arange(len(words), dtype=np.uint64) + np.uint64((round_number + 1) << 32)


def seal_in_one_thread(data: Bytes) -> int:
    """Do what cannot be left out, by groups of 16 blocks: zstd level 1, then AES-256-GCM. Return the sealed length."""
    cipher, compressor, view = AESGCM(bytes(32)), zstandard.ZstdCompressor(level=1), data.data
    sealed = 0
    for number, at in enumerate(range(0, len(view), GROUP_BYTES)):
        nonce = number.to_bytes(12, "little")
        sealed += len(cipher.encrypt(nonce, compressor.compress(view[at : at + GROUP_BYTES]), b"group"))
    return sealed
