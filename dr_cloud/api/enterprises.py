"""Operations on enterprises, tokens and pairing."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from dr_cloud.api.deps import IdPart, Linked, Manager, NamePart, Narrowed, OnlyOnce, Pages, Tenant, Who, part
from dr_cloud.model import cloud as c
from dr_cloud.model.pairing import PairAnswer, PairRequest
from dr_cloud.model.provider import EnterpriseConfig

router = APIRouter()


@router.get("/enterprises", tags=["enterprises"])
def enterprises(cloud: Manager, who: Who, query: Pages, links: Linked) -> c.Page[c.Enterprise]:
    """List the enterprises that the caller may see."""
    return links.of(cloud.enterprises(who, query))


@router.post("/enterprises", status_code=201, tags=["enterprises"])
def register_enterprise(
    cloud: Manager, who: Who, once: OnlyOnce, body: EnterpriseConfig, response: Response
) -> c.Enterprise:
    """Register an enterprise: its key is made, its connector is started."""
    made = once(c.Enterprise, lambda: cloud.register_enterprise(who, body))
    response.headers["Location"] = f"/v1/enterprises/{made.name}"
    return made


@router.get("/enterprises/{enterprise}", tags=["enterprises"])
def enterprise(cloud: Manager, who: Who, enterprise: Tenant) -> c.Enterprise:
    """Show one enterprise."""
    return cloud.enterprise(who, enterprise)


@router.patch("/enterprises/{enterprise}", tags=["enterprises"])
def update_enterprise(cloud: Manager, who: Who, enterprise: Tenant, body: c.EnterpriseUpdate) -> c.Enterprise:
    """Change what is told of an enterprise."""
    return cloud.update_enterprise(who, enterprise, body)


@router.delete("/enterprises/{enterprise}", status_code=204, tags=["enterprises"])
def remove_enterprise(cloud: Manager, who: Who, enterprise: Tenant) -> None:
    """Remove an enterprise that has no VPGs: its tokens and certificates are revoked, its connector ends."""
    cloud.remove_enterprise(who, enterprise)


@router.get("/tokens", tags=["tokens"])
def tokens(cloud: Manager, who: Who, query: Annotated[Narrowed, Query()], links: Linked) -> c.Page[c.Token]:
    """List tokens, without their secrets."""
    return links.of(cloud.tokens(who, query.enterprise, part(query, c.PageRequest)))


@router.post("/tokens", status_code=201, tags=["tokens"])
def create_token(cloud: Manager, who: Who, once: OnlyOnce, body: c.TokenRequest) -> c.NewToken:
    """Make a token. Its secret is in this answer and nowhere else."""
    return once(c.NewToken, lambda: cloud.create_token(who, body))


@router.delete("/tokens/{token}", tags=["tokens"])
def revoke_token(cloud: Manager, who: Who, token: IdPart) -> c.Token:
    """Revoke a token; from then on it is worth nothing."""
    return cloud.revoke_token(who, token)


@router.post("/enterprises/{enterprise}/sites/{site}/pairing", status_code=201, tags=["pairing"])
def create_pairing(
    cloud: Manager,
    who: Who,
    once: OnlyOnce,
    enterprise: Tenant,
    site: NamePart,
    lifetime_seconds: Annotated[int, Query(ge=60, le=7 * 86400)] = 3600,
) -> c.NewPairing:
    """Make a one-time token with which the site is paired. It is in this answer and nowhere else."""
    return once(c.NewPairing, lambda: cloud.create_pairing(who, enterprise, site, lifetime_seconds))


@router.delete("/enterprises/{enterprise}/sites/{site}/pairing", tags=["pairing"])
def unpair(cloud: Manager, who: Who, enterprise: Tenant, site: NamePart) -> c.Site:
    """Unpair a site: its certificate is revoked and its link closed at once."""
    return cloud.unpair(who, enterprise, site)


@router.post("/pair", tags=["pairing"])
def pair(cloud: Manager, body: PairRequest) -> PairAnswer:
    """Exchange a pairing token's secret for a certificate. Needs no bearer token; the same request may be repeated."""
    return cloud.pair(body)
