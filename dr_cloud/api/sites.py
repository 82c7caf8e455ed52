"""Operations on sites and data centers, their hosts and VDSAs, and the virtual servers that are seen there."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from dr_cloud.api.deps import Linked, Manager, NamePart, OnlyOnce, Pages, Tenant, Who, part
from dr_cloud.model import cloud as c
from dr_cloud.model.task import Task

router = APIRouter()
_SITE = "/enterprises/{enterprise}/sites/{site}"
_CENTER = "/data-centers/{data_center}"


class HostQuery(c.PageRequest):
    """Which hosts are wanted: those where the VDSA is being installed, removed, is installed, is not."""

    vdsa: c.VdsaState | None = None


@router.get("/enterprises/{enterprise}/sites", tags=["sites"])
def sites(cloud: Manager, who: Who, enterprise: Tenant, query: Pages, links: Linked) -> c.Page[c.Site]:
    """List an enterprise's sites."""
    return links.of(cloud.sites(who, enterprise, query))


@router.get(_SITE, tags=["sites"])
def site(cloud: Manager, who: Who, enterprise: Tenant, site: NamePart) -> c.Site:
    """Show one site: name, location, contact; address and port; the VDSAs' port; pairing and link."""
    return cloud.site(who, enterprise, site)


@router.patch(_SITE, tags=["sites"])
def update_site(cloud: Manager, who: Who, enterprise: Tenant, site: NamePart, body: c.SiteUpdate) -> c.Site:
    """Change a site's information, address, VDSA port or throttle."""
    return cloud.update_site(who, enterprise, site, body)


@router.get(_SITE + "/hosts", tags=["hosts"])
def hosts(
    cloud: Manager,
    who: Who,
    enterprise: Tenant,
    site: NamePart,
    query: Annotated[HostQuery, Query()],
    links: Linked,
) -> c.Page[c.Host]:
    """List a site's hosts; `vdsa` chooses by the state of their VDSA."""
    return links.of(cloud.hosts(who, enterprise, site, query.vdsa, part(query, c.PageRequest)))


@router.post(_SITE + "/hosts/{host}/vdsa", status_code=202, tags=["hosts"])
def deploy_vdsa(
    cloud: Manager,
    who: Who,
    once: OnlyOnce,
    enterprise: Tenant,
    site: NamePart,
    host: NamePart,
    body: c.VdsaDeployment,
) -> Task:
    """Deploy a VDSA on a host."""
    return once.task(lambda: cloud.deploy_vdsa(who, enterprise, site, host, body))


@router.delete(_SITE + "/hosts/{host}/vdsa", status_code=202, tags=["hosts"])
def undeploy_vdsa(cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, site: NamePart, host: NamePart) -> Task:
    """Undeploy the VDSA of a host."""
    return once.task(lambda: cloud.undeploy_vdsa(who, enterprise, site, host))


@router.get(_SITE + "/servers", tags=["servers"])
def servers(
    cloud: Manager, who: Who, enterprise: Tenant, site: NamePart, query: Pages, links: Linked
) -> c.Page[c.Server]:
    """List the virtual servers that taps of the site have announced."""
    return links.of(cloud.servers(who, enterprise, site, query))


@router.get(_SITE + "/servers/{server}/report", tags=["servers"])
def server_report(cloud: Manager, who: Who, enterprise: Tenant, site: NamePart, server: NamePart) -> c.ServerReport:
    """Show what is known of a server: disks, file systems, operating system, activity, what looks suspicious."""
    return cloud.server_report(who, enterprise, site, server)


@router.get("/data-centers", tags=["data centers"])
def data_centers(cloud: Manager, who: Who, query: Pages, links: Linked) -> c.Page[c.DataCenter]:
    """List the provider's data centers with what of them a target may name."""
    return links.of(cloud.data_centers(who, query))


@router.get(_CENTER, tags=["data centers"])
def data_center(cloud: Manager, who: Who, data_center: NamePart) -> c.DataCenter:
    """Show one data center."""
    return cloud.data_center(who, data_center)


@router.get(_CENTER + "/hosts", tags=["hosts"])
def center_hosts(
    cloud: Manager, who: Who, data_center: NamePart, vdsa: Annotated[c.VdsaState | None, Query()] = None
) -> list[c.Host]:
    """List a data center's hosts; for the provider's own people."""
    return cloud.center_hosts(who, data_center, vdsa)


@router.post(_CENTER + "/hosts/{host}/vdsa", status_code=202, tags=["hosts"])
def deploy_center_vdsa(
    cloud: Manager, who: Who, once: OnlyOnce, data_center: NamePart, host: NamePart, body: c.VdsaDeployment
) -> Task:
    """Deploy a VDSA on a data center's host."""
    return once.task(lambda: cloud.deploy_center_vdsa(who, data_center, host, body))


@router.delete(_CENTER + "/hosts/{host}/vdsa", status_code=202, tags=["hosts"])
def undeploy_center_vdsa(cloud: Manager, who: Who, once: OnlyOnce, data_center: NamePart, host: NamePart) -> Task:
    """Undeploy the VDSA of a data center's host."""
    return once.task(lambda: cloud.undeploy_center_vdsa(who, data_center, host))
