"""The envelope: how every object that the target writes is laid out and sealed.

Layout, version 1, little-endian::

    offset  size  field
         0     4  magic      "DRCJ" journal object, "DRCK" keyframe, "DRCC" checkpoint, "DRCW" writer's claim
         4     2  version
         6     2  sections   1 or 2
         8    16  salt       random, of the object's key
        24     8  section 0  sealed bytes
        32     8  section 1  sealed bytes (0 if there is none)
        40     8  body       bytes after the sections
        48    12  reserved (0)
        60     4  CRC-32C of the 60 bytes before
        64        section 0, section 1, body

Each section is AES-256-GCM under the object's own key (from its key in the store and the salt) with the section's
number as nonce and the whole head as associated data: no section opens in another object, place or length. What the
body holds says the format that uses it; its parts are sealed one by one, with nonces from 16 on.
"""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Sequence
from typing import Any, Final

import google_crc32c
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dr_cloud.journal.frame import Buffer, compress, decompress
from dr_cloud.model.errors import DamagedError
from dr_cloud.seal.keys import TAG_BYTES, VpgKeys
from dr_cloud.store.store import Store

HEAD: Final = struct.Struct("<4sHH16sQQQ12x")
HEAD_BYTES: Final = HEAD.size + 4
FIRST_READ_BYTES: Final = 64 << 10
"""The first request for an object asks for this much: the head with, most often, the sections one wants."""
SECTION_BYTES_MAX: Final = 1 << 30
_U32: Final = struct.Struct("<I")


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")


class Sealer:
    """Seals one new object: its sections, and the parts of its body."""

    def __init__(self, keys: VpgKeys, key: str, magic: bytes, version: int) -> None:
        """Begin the object that will be stored at `key`."""
        self.key = key
        self._magic = magic
        self._version = version
        self._salt = secrets.token_bytes(16)
        self._cipher = keys.object_cipher(key, self._salt)

    def part(self, number: int, data: Buffer, place: bytes) -> bytes:
        """Seal part `number` of the body; `place` is authenticated with it."""
        return self._cipher.encrypt(_nonce(16 + number), data, place)

    def finish(self, sections: Sequence[bytes], body: Sequence[Buffer]) -> list[Buffer]:
        """Return the whole object, in parts."""
        lengths = [len(section) + TAG_BYTES for section in sections]
        body_bytes = sum(map(len, body))
        head = HEAD.pack(
            self._magic, self._version, len(sections), self._salt, lengths[0], sum(lengths[1:]), body_bytes
        )
        sealed = [self._cipher.encrypt(_nonce(i), section, head) for i, section in enumerate(sections)]
        return [head + google_crc32c.value(head).to_bytes(4, "little"), *sealed, *body]


class Opened:
    """An object under reading: its checked head, and its sections on demand. Errors name the object."""

    def __init__(self, store: Store, keys: VpgKeys, key: str, magic: bytes, version: int) -> None:
        """Fetch and check the head of the object at `key`."""
        self.key = key
        self._store = store
        self._first = memoryview(store.get_range(key, 0, FIRST_READ_BYTES))
        if len(self._first) < HEAD_BYTES:
            raise self.damaged("it is shorter than its head")
        self._head = bytes(self._first[: HEAD.size])
        if google_crc32c.value(self._head) != int.from_bytes(self._first[HEAD.size : HEAD_BYTES], "little"):
            raise self.damaged("the head fails its checksum")
        found, version_found, sections, salt, length_0, length_1, self.body_bytes = HEAD.unpack(self._head)
        if found != magic or not 1 <= sections <= 2 or max(length_0, length_1) > SECTION_BYTES_MAX:
            raise self.damaged(f"the head is not that of {magic.decode()}")
        if version_found != version:
            raise DamagedError(f"{key}: version {version_found}, known is {version}", "Use a newer dr_cloud.")
        self._lengths = (length_0, length_1)
        self.body_offset = HEAD_BYTES + length_0 + length_1
        self._cipher: AESGCM = keys.object_cipher(key, salt)

    def damaged(self, what: str) -> DamagedError:
        """Return the error that names this object."""
        return DamagedError(f"object {self.key} is damaged: {what}")

    def read(self, start: int, length: int) -> memoryview:
        """Return exactly `length` bytes from `start`."""
        data = self._first[start : start + length]
        if len(data) < length:
            data = memoryview(self._store.get_range(self.key, start, length))
        if len(data) != length:
            raise self.damaged(f"{length} bytes wanted at {start}, {len(data)} are there")
        return data

    def section(self, number: int) -> bytes:
        """Return section `number` in the clear."""
        start = HEAD_BYTES + sum(self._lengths[:number])
        try:
            return self._cipher.decrypt(_nonce(number), self.read(start, self._lengths[number]), self._head)
        except InvalidTag:
            raise self.damaged(f"section {number} fails its authentication") from None

    def part(self, number: int, offset: int, length: int, place: bytes) -> bytes:
        """Return part `number` of the body, which lies `offset` bytes into it, in the clear."""
        try:
            return self._cipher.decrypt(_nonce(16 + number), self.read(self.body_offset + offset, length), place)
        except InvalidTag:
            raise self.damaged(f"part {number} fails its authentication") from None


def pack_json(document: Any) -> bytes:
    """Return a document as a section: u32 length, then zstd of its JSON."""
    text = json.dumps(document, separators=(",", ":")).encode()
    return _U32.pack(len(text)) + compress(text)


def unpack_json(section: bytes) -> Any:
    """Turn `pack_json` back; `DamagedError` if it cannot be."""
    try:
        return json.loads(decompress(section[4:], *_U32.unpack_from(section)))
    except (ValueError, struct.error) as error:
        raise DamagedError(f"a section is no JSON: {error}") from error
