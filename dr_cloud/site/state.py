"""The site's state folder: what it must not lose, and the lock that lets one process use it.

Layout (the folder has mode 0700, every file 0600)::

    lock             held by the process that runs
    identity.json    `Identity`: certificate, key, the provider's CA, where the link is
    request.json     `PairingAttempt`: a pairing that was begun and is not known to have ended
    keyring.json     the enterprise's key (`dr_cloud.seal.keyring`)
    orders.json      the last orders that were received, as they came
    work/            digest indexes of scopes that are replicated to here; may be lost
    analysis/        what the analyzers have learnt of each server; may be lost
    logs/            log lines, bounded

Crash recovery
    A file is replaced whole: written beside, flushed, renamed, and the folder flushed. identity.json alone says that
    the site is paired; it is written when everything else is there. What a crash left half written (`*.new`) goes at
    the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dr_cloud.model.errors import DrCloudError
from dr_cloud.seal.identity import replace_file

IDENTITY: Final = "identity.json"
ATTEMPT: Final = "request.json"
ORDERS: Final = "orders.json"

_R = TypeVar("_R", bound=BaseModel)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Identity(_Record):
    """What a paired site is and how it proves it."""

    enterprise: str
    site: str
    api: str
    link: str
    ca: str
    """PEM."""
    certificate: str
    """PEM."""
    key: str = Field(repr=False)
    """PEM."""
    token: str
    """SHA-256 of the token that it was paired with: another token in the configuration pairs again."""


class PairingAttempt(_Record):
    """Kept before the token is sent, so that a site that crashed sends the same request again."""

    token: str
    key: str = Field(repr=False)
    csr: str


class StateFolder:
    """A state folder that this process has locked."""

    def __init__(self, path: Path) -> None:
        """Make the folder if need be, and lock it. Raises `DrCloudError` if another process has it."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.chmod(0o700)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DrCloudError(f"state folder {path} cannot be used: {error.strerror}", "Correct `state`.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise DrCloudError(
                f"another process runs the site of {path}",
                "Stop it first, or give this site a state folder of its own.",
            ) from None
        for unfinished in path.glob("*.new"):
            unfinished.unlink(missing_ok=True)

    def close(self) -> None:
        """Let the folder go."""
        os.close(self._lock)

    def write(self, name: str, text: str) -> None:
        """Replace a file whole, readable by its owner alone; when it returns, a crash cannot undo it."""
        replace_file(self.path / name, text, 0o600)

    def save(self, name: str, record: BaseModel) -> None:
        """Replace a file by `record`."""
        self.write(name, record.model_dump_json(indent=1))

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            return (self.path / name).read_bytes()
        return None

    def load(self, name: str, kind: type[_R]) -> _R | None:
        """Return the record in a file, None if there is none. Raises `DrCloudError` if it is damaged."""
        data = self.read(name)
        if data is None:
            return None
        try:
            return kind.model_validate_json(data)
        except ValidationError:
            # Its content is not repeated: it may be a key.
            raise DrCloudError(
                f"{self.path / name} is damaged",
                "Restore it from a backup, or begin with an empty state folder and a new pairing token.",
            ) from None

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        (self.path / name).unlink(missing_ok=True)
