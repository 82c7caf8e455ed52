"""Profiles: which providers this person talks to, and as whom.

Layout. One JSON file, `dr-cloud/profiles.json` in the folder for people's configuration (`XDG_CONFIG_HOME`), readable
by its owner alone, for it holds tokens. It is replaced whole (written beside, flushed, renamed), so a crash leaves the
old one or the new one.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dr_cloud.model.errors import DrCloudError

ADD_REMEDY: Final = "Add one: dr-cloud profile add NAME --url https://HOST:PORT --ca CA.pem --token-file FILE"


class Profile(BaseModel):
    """One provider, and the token that is shown to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    ca: str = ""
    """PEM of the provider's CA; empty: the machine's own CAs are trusted."""
    token: str = Field(repr=False)
    enterprise: str = "-"
    """Whose things are meant where a command does not say; `-`: the token's own."""


class Profiles(BaseModel):
    """All profiles of one person."""

    model_config = ConfigDict(extra="forbid")

    default: str = ""
    profiles: dict[str, Profile] = {}

    @staticmethod
    def path() -> Path:
        """Return where they are kept."""
        return Path(typer.get_app_dir("dr-cloud")) / "profiles.json"

    @classmethod
    def load(cls) -> Profiles:
        """Read them; none if there is no file yet."""
        try:
            return cls.model_validate_json(cls.path().read_bytes())
        except FileNotFoundError:
            return cls()
        except (OSError, ValidationError):
            # The error of a validation would repeat what was read, tokens too.
            raise DrCloudError(
                f"{cls.path()} cannot be read", "Correct it, or remove it and add profiles anew."
            ) from None

    def save(self) -> None:
        """Write them, for the owner's eyes alone."""
        path = self.path()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=".profiles-")  # its mode is 0600
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(self.model_dump_json(indent=2))
                file.flush()
                os.fsync(file.fileno())
            Path(beside).replace(path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise

    def get(self, name: str) -> Profile:
        """Return the profile of that name, or the default one where `name` is empty."""
        if name:
            if found := self.profiles.get(name):
                return found
            known = ", ".join(sorted(self.profiles)) or "none"
            raise DrCloudError(f"there is no profile {name!r} (known: {known})", ADD_REMEDY)
        if found := self.profiles.get(self.default):
            return found
        if self.profiles:
            raise DrCloudError(
                "there are several profiles and none is the default", "Choose: dr-cloud profile use NAME"
            )
        raise DrCloudError("no provider is known here", ADD_REMEDY)
