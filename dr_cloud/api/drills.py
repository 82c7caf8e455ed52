"""Operations on drills, and on signed reports of recovery tests."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict

from dr_cloud.api.deps import IdPart, Linked, Manager, NamePart, OnlyOnce, Pages, Tenant, Who, part
from dr_cloud.model import cloud as c
from dr_cloud.model import recovery as r
from dr_cloud.model.task import Task

router = APIRouter()
_DRILLS: Final = "/enterprises/{enterprise}/vpgs/{vpg}/drills"
_TESTS: Final = "/enterprises/{enterprise}/tests"
_FORMS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The report, signed. Keep it byte by byte.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/html": {"schema": {"type": "string"}}},
    }
}


class ReportsQuery(r.ReportQuery):
    """Of which tests a report is wanted, and in which form."""

    format: r.ReportFormat = "json"


class FormQuery(BaseModel):
    """In which form a report is wanted."""

    model_config = ConfigDict(extra="forbid")

    format: r.ReportFormat = "json"


def _report(report: str, form: r.ReportFormat) -> Response:
    # Attached: what is in a page came from disks that nobody trusts, and is not to be of the API's origin.
    headers = {"Content-Disposition": f'attachment; filename="report.{form}"'}
    return Response(report, media_type="application/json" if form == "json" else "text/html", headers=headers)


@router.get("/report-key", tags=["reports"])
async def report_key(cloud: Manager) -> r.ReportKey:
    """Show the public key by which reports are signed. Needs no token."""
    return cloud.report_key()


@router.get(_TESTS + "/report", tags=["reports"], response_class=Response, responses=_FORMS)
def tests_report(cloud: Manager, who: Who, enterprise: Tenant, query: Annotated[ReportsQuery, Query()]) -> Response:
    """Make one signed report of several tests: named, of a task, of a VPG, or of a drill's last run."""
    return _report(cloud.tests_report(who, enterprise, part(query, r.ReportQuery), query.format), query.format)


@router.get(_TESTS + "/{test}/report", tags=["reports"], response_class=Response, responses=_FORMS)
def test_report(
    cloud: Manager, who: Who, enterprise: Tenant, test: IdPart, query: Annotated[FormQuery, Query()]
) -> Response:
    """Make the signed report of one test."""
    return _report(cloud.test_report(who, enterprise, test, query.format), query.format)


@router.get(_DRILLS, tags=["drills"])
def drills(cloud: Manager, who: Who, enterprise: Tenant, vpg: NamePart, query: Pages, links: Linked) -> c.Page[r.Drill]:
    """List the drills of a VPG."""
    return links.of(cloud.drills(who, enterprise, vpg, query))


@router.get(_DRILLS + "/{drill}", tags=["drills"])
def drill(cloud: Manager, who: Who, enterprise: Tenant, vpg: NamePart, drill: NamePart) -> r.Drill:
    """Show a drill, when it is due next, and how its last run went."""
    return cloud.drill(who, enterprise, vpg, drill)


@router.post(_DRILLS, tags=["drills"])
def put_drill(
    cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, vpg: NamePart, body: r.DrillSettings
) -> r.Drill:
    """Make a drill, or give the one of that name other settings. It acts as the caller from now on."""
    return once(r.Drill, lambda: cloud.put_drill(who, enterprise, vpg, body))


@router.delete(_DRILLS + "/{drill}", tags=["drills"])
def remove_drill(
    cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, vpg: NamePart, drill: NamePart
) -> r.Drill:
    """Remove a drill; its tests stay."""
    return once(r.Drill, lambda: cloud.remove_drill(who, enterprise, vpg, drill))


@router.post(_DRILLS + "/{drill}/run", status_code=202, tags=["drills"])
def run_drill(cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, vpg: NamePart, drill: NamePart) -> Task:
    """Run a drill now, as the caller's."""
    return once.task(lambda: cloud.run_drill(who, enterprise, vpg, drill))
