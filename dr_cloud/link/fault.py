"""How an error crosses the link: its kind, what is wrong, what to do."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from dr_cloud.model import errors
from dr_cloud.model.errors import DrCloudError

_TEXT_LENGTH_MAX: Final = 4096
_KINDS: Final = {
    kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DrCloudError)
}


class Fault(BaseModel):
    """A `DrCloudError`, as text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str = Field(default="DrCloudError", max_length=64)
    """The name of its class; one that is not known here counts as the plain one."""
    message: str = Field(max_length=_TEXT_LENGTH_MAX)
    remedy: str = Field(default="", max_length=_TEXT_LENGTH_MAX)

    @classmethod
    def of(cls, error: DrCloudError) -> Fault:
        """Return what crosses for `error`."""
        return cls(
            kind=type(error).__name__ if type(error).__name__ in _KINDS else "DrCloudError",
            message=str(error)[:_TEXT_LENGTH_MAX],
            remedy=error.remedy[:_TEXT_LENGTH_MAX],
        )

    def error(self) -> DrCloudError:
        """Return the error anew."""
        return _KINDS.get(self.kind, DrCloudError)(self.message, self.remedy)
