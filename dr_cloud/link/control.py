"""The control messages of a link: what its two ends tell each other about channels and themselves.

Layout. One JSON object with a `type`, at most 65,536 bytes::

    open     channel, purpose, arguments, credit    opens a channel; the opener's credit comes with it
    credit   channel, bytes                         that many bytes more may be sent; the first one accepts
    close    channel, fault or null                 refuses a channel, or breaks it off
    ping     pong                                   are you there; yes
    bye      reason                                 the last message: the whole link is closed
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from dr_cloud.link.fault import Fault
from dr_cloud.model.errors import ProtocolError

CONTROL_BYTES_MAX: Final = 64 << 10
CREDIT_BYTES_MAX: Final = 1 << 31

_Number = Annotated[int, Field(ge=0, lt=1 << 32)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Open(_Record):
    """Opens a channel."""

    type: Literal["open"] = "open"
    channel: _Number
    purpose: str = Field(pattern=r"^[a-z][a-z-]{0,62}$")
    arguments: dict[str, JsonValue] = Field(max_length=32)
    credit: int = Field(gt=0, le=CREDIT_BYTES_MAX)


class Credit(_Record):
    """Lets the other end send more on a channel; the first one of the end that did not open it accepts it."""

    type: Literal["credit"] = "credit"
    channel: _Number
    bytes: int = Field(gt=0, le=CREDIT_BYTES_MAX)


class Close(_Record):
    """Refuses a channel, or breaks it off."""

    type: Literal["close"] = "close"
    channel: _Number
    fault: Fault | None


class Ping(_Record):
    """Asks for a sign of life."""

    type: Literal["ping"] = "ping"


class Pong(_Record):
    """Answers `Ping`."""

    type: Literal["pong"] = "pong"


class Bye(_Record):
    """The last message of a link: why it is closed."""

    type: Literal["bye"] = "bye"
    reason: str = Field(max_length=4096)


Control = Open | Credit | Close | Ping | Pong | Bye
_ANY: Final[TypeAdapter[Control]] = TypeAdapter(Annotated[Control, Field(discriminator="type")])


def decode(text: str) -> Control:
    """Return the control message in `text`. Raises `ProtocolError` that says what is wrong with it."""
    if len(text) > CONTROL_BYTES_MAX:
        raise ProtocolError(f"a control message of {len(text)} characters is too long")
    try:
        return _ANY.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProtocolError(f"bad control message: {where}: {first['msg']}") from None
