"""The errors a user meets. Each says what is wrong and, where something can be done, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class DrCloudError(Exception):
    """An operating error: it is told to the user and handled, never swallowed.

    Attributes:
        remedy: What to do about it, one sentence, or the empty string.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (str(self.args[0]), self.remedy)


class DamagedError(DrCloudError):
    """Stored or received bytes fail a checksum, an authentication tag or a bound. The message names the object."""


class TimeOutOfRangeError(DrCloudError):
    """A time was asked for that the journal does not hold."""


class FencedError(DrCloudError):
    """A newer writer of the same journal has taken over; this one must stop."""


class ProtocolError(DrCloudError):
    """A peer broke the protocol; the connection to it is closed."""


class UnauthenticatedError(DrCloudError):
    """The caller has not proven who it is: no token, a wrong, an expired or a revoked one."""


class ForbiddenError(DrCloudError):
    """The caller's role does not allow this, or policy denies it."""


class DeniedError(ForbiddenError):
    """Policy denies it (R13), or nobody could decide.

    Attributes:
        reasons: Why, in words.
        revision: Of policies and data; empty if no engine answered.
        open: The data centers where it would be allowed, if it is about one.
    """

    def __init__(
        self, message: str, remedy: str = "", reasons: Sequence[str] = (), revision: str = "", open: Sequence[str] = ()
    ) -> None:
        super().__init__(message, remedy)
        self.reasons = list(reasons)
        self.revision = revision
        self.open = list(open)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (str(self.args[0]), self.remedy, self.reasons, self.revision, self.open)


class NotFoundError(DrCloudError):
    """There is no such thing for this caller: it is missing, or it is another's. The two are never told apart."""


class ConflictError(DrCloudError):
    """It is at odds with what is: the name is taken, or the thing's status does not allow it now."""


class LimitError(DrCloudError):
    """Too many or too much at once; later it may be possible."""


class UnavailableError(DrCloudError):
    """A part outside (a site, a VDSA, a node) does not answer now; the same call may be made again."""


class InvalidError(DrCloudError):
    """The request cannot be right in any state: a name that nothing has, settings that contradict each other."""
