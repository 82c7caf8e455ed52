"""Operations on rights: where data may go, policies and what a change of them would do, the record of decisions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Response

from dr_cloud.api.deps import AnyTenant, GzipResponse, Linked, Manager, OnlyOnce, Pages, Tenant, Who
from dr_cloud.model import decision as d
from dr_cloud.model.cloud import Page
from dr_cloud.model.rights import RightsState, WhatIf

router = APIRouter()


@router.get("/rights", tags=["rights"])
def rights_state(cloud: Manager, who: Who) -> RightsState:
    """Tell how the rights manager stands: its engine, its revision, and what is wrong with it."""
    return cloud.rights_state(who)


@router.get("/rights/matrix", tags=["rights"])
def rights_matrix(cloud: Manager, who: Who) -> list[d.EnterpriseRights]:
    """Tell for each enterprise that the caller may see, which data centers its data may come to."""
    return cloud.rights_matrix(who)


@router.get("/rights/policies", tags=["rights"])
def policies(cloud: Manager, who: Who, query: Pages, links: Linked) -> Page[d.PolicyRevision]:
    """List the policies that were put in force. Newest first."""
    return links.of(cloud.policies(who, query))


@router.post("/rights/policies", status_code=201, tags=["rights"])
def apply_policies(cloud: Manager, who: Who, once: OnlyOnce, body: d.PolicyChange) -> d.PolicyRevision:
    """Put other policies, another regulation, or both in force. What is no longer allowed stops within seconds."""
    return once(d.PolicyRevision, lambda: cloud.apply_policies(who, body))


@router.post("/rights/what-if", tags=["rights"])
def what_if(cloud: Manager, who: Who, body: d.PolicyChange) -> list[WhatIf]:
    """Tell which protection groups, links and tests a change would stop or free. Nothing is changed."""
    return cloud.what_if(who, body)


@router.get(
    "/rights/bundle", response_class=GzipResponse, tags=["rights"], responses={304: {"description": "Not Modified"}}
)
def rights_bundle(
    cloud: Manager,
    who: Who,
    if_none_match: Annotated[str | None, Header(description="The ETag of the bundle that is there.")] = None,
) -> Response:
    """Download the newest signed bundle of policies and data (tar.gz). Its ETag is its revision."""
    revision, data = cloud.rights_bundle(who)
    headers = {"ETag": f'"{revision}"'}
    if if_none_match is not None and headers["ETag"] in [known.strip() for known in if_none_match.split(",")]:
        return Response(status_code=304, headers=headers)
    return GzipResponse(data, headers=headers)


@router.get("/enterprises/{enterprise}/rights", tags=["rights"])
def explain(cloud: Manager, who: Who, enterprise: Tenant) -> d.EnterpriseRights:
    """Tell which data centers an enterprise's data may come to, and why not to each of the others."""
    return cloud.explain(who, enterprise)


@router.get("/enterprises/{enterprise}/decisions", tags=["rights"])
def decisions(cloud: Manager, who: Who, enterprise: AnyTenant, query: Pages, links: Linked) -> Page[d.Decision]:
    """List the record of decisions. Oldest first. `-` by the provider's own people: the provider's own."""
    return links.of(cloud.decisions(who, enterprise, query))


@router.get("/enterprises/{enterprise}/decisions/verify", tags=["rights"])
def verify_decisions(cloud: Manager, who: Who, enterprise: AnyTenant) -> d.DecisionCheck:
    """Tell whether the record of decisions is whole: nothing changed, removed or cut off."""
    return cloud.verify_decisions(who, enterprise)
