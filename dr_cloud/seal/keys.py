"""Keys of one scope (enterprise, VPG, target), all derived from the enterprise's one key with HKDF-SHA256.

    enterprise key (32 bytes, from a keyring)
      ├─ digest key     per enterprise: keyed BLAKE3 of a block, so that equal blocks are known within one enterprise
      │                 and tell nothing to another
      └─ VPG key        per scope
           ├─ stream key   per stream of a source VDSA: seals frames; nonce = frame number (u64) | group (u32)
           └─ object key   per stored object: from its key in the store and a random salt; nonce = section (96 bits)

A stream's id and an object's salt are random and used once, so no nonce is ever used twice under one key. The scope is
part of every derivation and of the associated data: nothing opens in another place than its own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from dr_cloud.model.ids import Scope

KEY_BYTES: Final = 32
DIGEST_BYTES: Final = 16
TAG_BYTES: Final = 16


def _derive(key: bytes, purpose: str, salt: bytes = b"", *context: bytes) -> bytes:
    info = b"\0".join((b"dr_cloud v1 " + purpose.encode(), *context))
    return HKDF(SHA256(), KEY_BYTES, salt or None, info).derive(key)


class VpgKeys:
    """The keys of one scope. Holds secrets: never log it, never send it outside the process's trust."""

    __slots__ = ("_digest_key", "_vpg_key", "frame_cipher", "scope")

    def __init__(self, enterprise_key: bytes, scope: Scope) -> None:
        """Derive the keys of `scope` from its enterprise's 32-byte key."""
        if len(enterprise_key) != KEY_BYTES:
            raise ValueError(f"an enterprise key has {KEY_BYTES} bytes, not {len(enterprise_key)}")
        self.scope = scope.checked()
        names = [part.encode() for part in scope]
        self._digest_key = _derive(enterprise_key, "digest", b"", names[0])
        self._vpg_key = _derive(enterprise_key, "vpg", b"", *names)
        # A source uses one stream at a time and a reader few: derive each once.
        self.frame_cipher = lru_cache(maxsize=64)(self._frame_cipher)

    @classmethod
    def derive(cls, enterprise_key: bytes, scope: Scope) -> VpgKeys:
        """Return the keys of `scope`."""
        return cls(enterprise_key, scope)

    def digest(self, block: bytes | bytearray | memoryview) -> bytes:
        """Return the keyed 16-byte BLAKE3 digest of a block's content."""
        return blake3(block, key=self._digest_key).digest(DIGEST_BYTES)

    def _frame_cipher(self, stream: bytes) -> AESGCM:
        return AESGCM(_derive(self._vpg_key, "stream", b"", stream))

    def object_cipher(self, key: str, salt: bytes) -> AESGCM:
        """Return the cipher of the sections of the object at `key` in the store."""
        return AESGCM(_derive(self._vpg_key, "object", salt, key.encode()))
