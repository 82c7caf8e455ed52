"""The local keyring: a JSON file, mode 0600, with one random 32-byte key per enterprise.

Layout: `{"version": 1, "enterprises": {"acme": "<64 hexadecimal digits>"}}`. The file is replaced whole (temporary
file, fsync, rename), so a crash leaves the old or the new one. A lost keyring is lost data: back it up apart from the
store. Two processes may create keys at the same time: an exclusive lock on a file beside it orders them.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from pathlib import Path

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope, check_name
from dr_cloud.seal.keys import KEY_BYTES, VpgKeys


class Keyring:
    """Enterprise keys in a local file."""

    def __init__(self, path: Path) -> None:
        """Use the keyring at `path`; it need not exist yet."""
        self.path = path

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Keyring:
        """Return the keyring at `path`, refusing a file that others may read."""
        ring = cls(Path(path))
        if ring.path.exists() and ring.path.stat().st_mode & 0o077:
            raise DrCloudError(f"keyring {ring.path} can be read by others", f"Run: chmod 600 {ring.path}")
        return ring

    def _load(self) -> dict[str, str]:
        try:
            document = json.loads(self.path.read_text())
            if document["version"] != 1:
                raise DrCloudError(f"keyring {self.path} has version {document['version']}", "Use a newer dr_cloud.")
            return dict(document["enterprises"])
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError) as error:
            raise DrCloudError(f"keyring {self.path} is damaged: {error}", "Restore it from its backup.") from error

    def create(self, enterprise: str) -> None:
        """Make a key for `enterprise` unless it has one."""
        self._put(enterprise, secrets.token_hex(KEY_BYTES))

    def put(self, enterprise: str, key: bytes) -> None:
        """Keep a key that another keyring made. Raises `DrCloudError` if there is a different one."""
        if len(key) != KEY_BYTES:
            raise DrCloudError(f"a key of {len(key)} bytes is none", f"An enterprise's key has {KEY_BYTES} bytes.")
        if not secrets.compare_digest(self._put(enterprise, key.hex()), key.hex()):
            raise DrCloudError(
                f"keyring {self.path} has another key of enterprise {enterprise!r}",
                "Use a new keyring: what the other key sealed cannot be read with this one.",
            )

    def key(self, enterprise: str) -> bytes:
        """Return the key of `enterprise`, to be given to its own site. Raises `DrCloudError` if there is none."""
        key = self._load().get(enterprise)
        if key is None:
            raise DrCloudError(
                f"keyring {self.path} has no key of enterprise {enterprise!r}",
                "Copy the enterprise's key here, or create one if the enterprise is new.",
            )
        return bytes.fromhex(key)

    def _put(self, enterprise: str, key: str) -> str:
        """Keep `key` unless there is one; return the one that is kept."""
        check_name(enterprise, "enterprise")
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = self._load()
            if enterprise in keys:
                return keys[enterprise]
            keys[enterprise] = key
            fresh = self.path.with_suffix(".new")
            fresh.unlink(missing_ok=True)
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "w") as file:
                json.dump({"version": 1, "enterprises": keys}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self.path)
            directory = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
            return key

    def vpg_keys(self, scope: Scope) -> VpgKeys:
        """Return the keys of `scope`; `DrCloudError` if its enterprise has no key here."""
        return VpgKeys(self.key(scope.enterprise), scope)
