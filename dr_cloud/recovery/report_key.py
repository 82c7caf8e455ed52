"""The key by which a provider signs its reports of recovery tests: Ed25519.

Layout: one file, `report-key.pem` (PKCS 8, mode 0600). The public half is in no file: it is told to whoever asks.

Consistency: the file appears whole or not at all, and is never changed. Of two processes that make it at the same time
one wins, and both use it. Reports name their key by the SHA-256 of its public half.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dr_cloud.model.errors import DrCloudError, InvalidError
from dr_cloud.model.recovery import ReportKey
from dr_cloud.seal.identity import replace_file


class ReportSigner:
    """The private half. It is in no representation."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        """Use `open`."""
        self._key = key
        public = key.public_key()
        pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.public = ReportKey(id=key_id(public), public=pem.decode())

    def __repr__(self) -> str:
        return f"ReportSigner({self.public.id[:16]})"

    @classmethod
    def open(cls, folder: Path) -> ReportSigner:
        """Return the key kept in `folder`, made now if there is none.

        Raises:
            DrCloudError: The key is damaged or readable by others.
            OSError: The folder cannot be used.
        """
        path = folder / "report-key.pem"
        if not path.exists():
            _create(path)
        if path.stat().st_mode & 0o077:
            raise DrCloudError(f"{path} can be read by others", f"Run: chmod 600 {path}")
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise DrCloudError(f"{path} is damaged", "Restore it from its backup.")
        return cls(key)

    def sign(self, data: bytes) -> bytes:
        """Return the signature, 64 bytes."""
        return self._key.sign(data)


def key_id(key: Ed25519PublicKey) -> str:
    """Return how a key is named."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()


def load_public(pem: str) -> Ed25519PublicKey:
    """Return a public key from its PEM. Raises `InvalidError`."""
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidError("that is no public key of reports", "Take it from the provider: dr-cloud report key")
    return key


def _create(path: Path) -> None:
    encryption = serialization.NoEncryption()
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")
    try:
        replace_file(fresh, pem.decode(), 0o600)
        with contextlib.suppress(FileExistsError):  # another process was faster: its key is the one
            os.link(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
