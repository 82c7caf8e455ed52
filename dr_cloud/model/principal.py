"""Who calls: roles and principals. A token is a principal's; what a role may do is one table in `manager/access.py`."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class Role(StrEnum):
    """What a caller is."""

    PROVIDER_ADMIN = "provider-admin"
    PROVIDER_OPERATOR = "provider-operator"
    ENTERPRISE_ADMIN = "enterprise-admin"
    ENTERPRISE_OPERATOR = "enterprise-operator"
    AUDITOR = "auditor"
    """Reads everything of its enterprise, or of the provider where it has none; changes nothing."""


class Principal(BaseModel):
    """A caller that has proven who it is."""

    model_config = ConfigDict(frozen=True)

    id: str
    """Of its token, or of its certificate."""
    name: str
    role: Role
    enterprise: str | None = None
    """The only enterprise whose things it sees; None: all (the provider's own people)."""
    place: str | None = ""
    """The jurisdiction it sits in; empty if that is not known. None: no person, but the provider or a site itself."""
