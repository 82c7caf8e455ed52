"""What passes when a site is paired with its provider: the token's text, the request, the answer.

Layout. A pairing token is `drp1.` and, in base64url without padding, the JSON of `PairingToken`. It is shown once, may
be used once, and expires. The site proves the API by the fingerprint of its CA before it sends the secret.
"""

from __future__ import annotations

import base64
import binascii
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.provider import Name

_PREFIX: Final = "drp1."
_TOKEN_LENGTH_MAX: Final = 4096


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PairingToken(_Record):
    """A one-time leave to pair one site."""

    api: str = Field(pattern=r"^https://[^/]+$", max_length=512)
    """Where the provider's API is: https://host:port."""
    ca: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the provider's CA certificate (DER), in hexadecimal."""
    enterprise: Name
    site: Name
    secret: str = Field(min_length=16, max_length=256, repr=False)

    def encode(self) -> str:
        """Return the text that is handed to the enterprise."""
        return _PREFIX + base64.urlsafe_b64encode(self.model_dump_json().encode()).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> PairingToken:
        """Return the token in `text`. Raises `DrCloudError`, which does not repeat it."""
        text = "".join(text.split())
        body = text.removeprefix(_PREFIX)
        if body == text or len(text) > _TOKEN_LENGTH_MAX:
            raise DrCloudError("that is no pairing token", f"Copy it whole: it begins with {_PREFIX}")
        try:
            return cls.model_validate_json(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        except (binascii.Error, ValueError, ValidationError):
            raise DrCloudError("the pairing token is damaged", "Copy it whole, or ask for a new one.") from None


class PairRequest(_Record):
    """Body of `POST /v1/pair`. The same request may be sent again: a site that crashed gets the same answer."""

    enterprise: Name
    site: Name
    secret: str = Field(min_length=16, max_length=256, repr=False)
    csr: str = Field(max_length=16384)
    """PEM. Only its public key counts."""


class PairAnswer(_Record):
    """What a paired site keeps."""

    certificate: str
    """PEM: the site's own."""
    ca: str
    """PEM: the provider's CA."""
    link: str
    """Where the enterprise's connector listens: wss://host:port/link."""
    enterprise_key: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    serial: str
    """The certificate's, in hexadecimal."""


class Renewal(_Record):
    """A new certificate for a site that is paired."""

    certificate: str
    """PEM."""
    serial: str
    """Hexadecimal."""
