"""Grants: the right of one data center to hold one scope in one store, signed by the rights key, for a while.

A VDSA serves a scope only with a grant, so the way to the store is closed even to whoever can write the manager's
database. A grant is a JWT (ES256); nothing in it is secret, and it is of no use elsewhere than where it says.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jwt
from pydantic import BaseModel, ConfigDict, ValidationError

from dr_cloud.model.errors import ForbiddenError
from dr_cloud.model.ids import Scope
from dr_cloud.rights.bundle import ALGORITHM, Signer

_LENGTH_MAX = 4096


class _Claims(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    use: Literal["grant"]
    enterprise: str
    vpg: str
    target: str
    data_center: str
    store: str
    revision: str
    exp: int


class Grant(NamedTuple):
    """What a valid grant says."""

    scope: Scope
    data_center: str
    store: str
    """URL."""
    revision: str
    until_s: int
    """It ends with this second since the epoch."""


def issue(grant: Grant, signer: Signer) -> str:
    """Return the grant, signed."""
    claims = _Claims(
        use="grant",
        **grant.scope._asdict(),
        data_center=grant.data_center,
        store=grant.store,
        revision=grant.revision,
        exp=grant.until_s,
    )
    return signer.sign(claims.model_dump())


def verify(token: str, public: str, scope: Scope, data_center: str, store: str, now_s: int) -> Grant:
    """Return what a grant says, if it is good here and now.

    Args:
        token: The grant.
        public: The rights key's public half, PEM.
        scope: Whose data is to be held.
        data_center: Where.
        store: In which store, the URL as the order has it.
        now_s: Seconds since the epoch.

    Raises:
        ForbiddenError: It is none, forged, for something else, or over; the message says which.
    """
    if not token:
        raise ForbiddenError("there is no grant", "Wait for the rights manager's.")
    try:
        if len(token) > _LENGTH_MAX:
            raise ValueError
        # The time is looked at below, by the clock that was given.
        read = jwt.decode(token, public, [ALGORITHM], options={"verify_exp": False})
        claims = _Claims.model_validate(read)
    except (jwt.InvalidTokenError, ValidationError, ValueError):
        raise ForbiddenError("the grant is not of the rights manager", "Wait for a good one.") from None
    grant = Grant(
        Scope(claims.enterprise, claims.vpg, claims.target),
        claims.data_center,
        claims.store,
        claims.revision,
        claims.exp,
    )
    if (grant.scope, grant.data_center, grant.store) != (scope, data_center, store):
        raise ForbiddenError("the grant is for another scope, data center or store", "Wait for the right one.")
    if now_s >= grant.until_s:
        raise ForbiddenError("the grant is over", "Wait for a fresh one.")
    return grant
