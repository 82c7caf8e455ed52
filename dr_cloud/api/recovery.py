"""Operations that recover: failover, and recovery tests at many times."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel

from dr_cloud.api.deps import IdPart, Linked, Manager, NamePart, OnlyOnce, Tenant, Who, part
from dr_cloud.model import cloud as c
from dr_cloud.model import recovery as r
from dr_cloud.model.probe import PROBE_NAME
from dr_cloud.model.provider import Name
from dr_cloud.model.task import Task

router = APIRouter()
_VPG = "/enterprises/{enterprise}/vpgs/{vpg}"
_TESTS = "/enterprises/{enterprise}/tests"


class TestQuery(c.PageRequest):
    """Which recovery tests are wanted. Newest first."""

    __test__ = False
    vpg: Name | None = None


ProbePart = Annotated[str, Path(pattern=f"^{PROBE_NAME}$")]
FilePart = Annotated[str, Path(min_length=1, max_length=255)]


class FileResponse(Response):
    """A file of whatever kind, to be kept and not to be shown."""

    media_type = "application/octet-stream"


class Discarded(BaseModel):
    """How much was forgotten."""

    discarded: int


@router.post(_VPG + "/failover", status_code=202, tags=["failover"])
def failover(
    cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, vpg: NamePart, body: r.FailoverRequest
) -> Task:
    """Fail over to a checkpoint, a time or the latest; with or without reverse replication."""
    return once.task(lambda: cloud.failover(who, enterprise, vpg, body))


@router.post(_VPG + "/failover/commit", status_code=202, tags=["failover"])
def commit_failover(cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, vpg: NamePart) -> Task:
    """Have the recovered servers stay; the task ends when their disks need the journal no more."""
    return once.task(lambda: cloud.commit_failover(who, enterprise, vpg))


@router.post(_VPG + "/failover/release", status_code=202, tags=["failover"])
def release_failover(cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, vpg: NamePart) -> Task:
    """End the servers of a committed failover, with their disks."""
    return once.task(lambda: cloud.release_failover(who, enterprise, vpg))


@router.delete(_VPG + "/failover", status_code=202, tags=["failover"])
def rollback_failover(cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, vpg: NamePart) -> Task:
    """Roll a failover back: the recovered disks and what was written to them are gone, protection goes on."""
    return once.task(lambda: cloud.rollback_failover(who, enterprise, vpg))


@router.post(_VPG + "/tests", status_code=202, tags=["recovery tests"])
def start_tests(
    cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, vpg: NamePart, body: r.TestsRequest
) -> Task:
    """Start recovery tests, one at each of the times, all at once."""
    return once.task(lambda: cloud.start_tests(who, enterprise, vpg, body))


@router.post(_VPG + "/find-clean", status_code=202, tags=["recovery tests"])
def find_clean(
    cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, vpg: NamePart, body: r.CleanRequest
) -> Task:
    """Search the last time between two at which all probes pass; the task's result is a `CleanPoint`, as it grows."""
    return once.task(lambda: cloud.find_clean(who, enterprise, vpg, body))


@router.delete(_VPG + "/tests", tags=["recovery tests"])
def discard_tests(
    cloud: Manager, who: Who, enterprise: Tenant, vpg: NamePart, count: Annotated[int, Query(ge=1, le=1_000_000)]
) -> Discarded:
    """Forget the oldest `count` tests that have ended."""
    return Discarded(discarded=cloud.discard_tests(who, enterprise, vpg, count))


@router.get(_TESTS, tags=["recovery tests"])
def tests(
    cloud: Manager, who: Who, enterprise: Tenant, query: Annotated[TestQuery, Query()], links: Linked
) -> c.Page[r.RecoveryTest]:
    """List recovery tests and what came of them."""
    return links.of(cloud.tests(who, enterprise, query.vpg, part(query, c.PageRequest)))


@router.get(_TESTS + "/{test}", tags=["recovery tests"])
def test(cloud: Manager, who: Who, enterprise: Tenant, test: IdPart) -> r.RecoveryTest:
    """Show one recovery test (FailoverTestInfo): its time, where its disks are served, its verdict."""
    return cloud.test(who, enterprise, test)


@router.get(_TESTS + "/{test}/credential", tags=["recovery tests"])
def test_credential(cloud: Manager, who: Who, enterprise: Tenant, test: IdPart) -> r.TestCredential:
    """Get what a client needs to attach the disks of a remote test; it ends with the test."""
    return cloud.test_credential(who, enterprise, test)


@router.get(_TESTS + "/{test}/artefacts/{probe}/{file}", response_class=FileResponse, tags=["recovery tests"])
def test_artefact(
    cloud: Manager, who: Who, enterprise: Tenant, test: IdPart, probe: ProbePart, file: FilePart
) -> Response:
    """Download a file that a probe of a test left: a screenshot, a console."""
    content = cloud.test_artefact(who, enterprise, test, f"{probe}/{file}")
    return FileResponse(content, headers={"Content-Disposition": "attachment"})


@router.post(_TESTS + "/{test}/stop", status_code=202, tags=["recovery tests"])
def stop_test(cloud: Manager, who: Who, once: OnlyOnce, enterprise: Tenant, test: IdPart, body: r.StopTest) -> Task:
    """Stop one test, leave the others as they are, and mark it passed or failed."""
    return once.task(lambda: cloud.stop_test(who, enterprise, test, body))
