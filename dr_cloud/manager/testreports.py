"""Signed reports of recovery tests, made when they are asked for, of what the rows say then.

What probes print and leave is content of an image. It is left out for whoever may not read that image where they sit,
and the report says so; each question whether they may is decided and recorded before anything is told. A test that was
discarded has no report.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from importlib.metadata import version
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.operations import missing
from dr_cloud.manager.questions import by_person, place_of_target, subject_of
from dr_cloud.manager.recovery_tests import RecoveryTests, test_view
from dr_cloud.model.errors import DeniedError, InvalidError
from dr_cloud.model.principal import Principal
from dr_cloud.model.recovery import TEST_TIMES_MAX, RecoveryTest, ReportFormat, ReportKey, ReportQuery
from dr_cloud.model.rights import Action
from dr_cloud.model.units import SECOND_NS
from dr_cloud.recovery.report import Tested, build_report, signed_json, signed_page
from dr_cloud.recovery.report_page import report_page

OUTPUT_CHARACTERS_MAX: Final = 64 << 20
"""Of all probes together, in one report."""
_MOMENT_NS: Final = 60 * SECOND_NS


class TestReports(RecoveryTests):
    """Operations on reports."""

    __test__ = False

    def report_key(self) -> ReportKey:
        """Return the public key of reports. It is everyone's to know."""
        return self._context.report_signer.public

    def test_report(self, who: Principal, enterprise: str, test: str, form: ReportFormat = "json") -> str:
        """Return the signed report of one test."""
        return self.tests_report(who, enterprise, ReportQuery(test=[test]), form)

    def tests_report(self, who: Principal, enterprise: str, which: ReportQuery, form: ReportFormat = "json") -> str:
        """Return one signed report of several tests."""
        with self._read(who, "test.read", enterprise) as session:
            rows = self._reported(session, enterprise, which)
            now_ns = self._context.clock_ns()
            found = [test_view(row, now_ns) for row in rows]
            targets = [session.get(tables.VpgTarget, (enterprise, test.vpg, test.target)) for test in found]
            # Tests that were started together rest on the same decisions.
            begun = {(test.vpg, test.target, test.started_ns): test for test in found}
            decisions = {key: _decisions(session, test) for key, test in begun.items()}
        read = {(test.vpg, test.target): target for test, target in zip(found, targets, strict=True) if test.results}
        withheld = {key: self._withheld(who, enterprise, *key, target) for key, target in read.items()}
        tests = []
        for test, target in zip(found, targets, strict=True):
            center = self._context.config.data_center(target.site) if target is not None else None
            tests.append(
                Tested(
                    test,
                    center.name if center is not None else "",
                    center.jurisdiction if center is not None else "",
                    decisions[test.vpg, test.target, test.started_ns],
                    withheld.get((test.vpg, test.target), ""),
                )
            )
        if sum(len(result.output) for tested in tests for result in tested.test.results) > OUTPUT_CHARACTERS_MAX:
            raise InvalidError("the probes have printed too much for one report", "Ask for fewer tests at once.")
        return self._signed(enterprise, tests, form)

    def _reported(self, session: Session, enterprise: str, which: ReportQuery) -> Sequence[tables.RecoveryTest]:
        table = tables.RecoveryTest
        wanted = select(table).order_by(table.started_ns, table.asked_ns, table.id)
        if which.vpg is not None:
            self._row(session, enterprise, which.vpg)
            wanted = wanted.where(table.vpg == which.vpg)
        if which.task is not None:
            wanted = wanted.where(table.task == which.task)
        ids = list(which.test)
        if which.drill is not None:
            drill = session.get(tables.Drill, (enterprise, which.vpg, which.drill))
            if drill is None:
                raise missing("drill", which.drill)
            wanted = wanted.where(table.id.in_(drill.last_tests))
        if ids:
            wanted = wanted.where(table.id.in_(ids))
        rows = session.scalars(wanted.limit(TEST_TIMES_MAX + 1)).all()
        if lost := sorted(set(ids) - {row.id for row in rows}):
            raise missing("test", lost[0])
        if not rows:
            raise missing("test", which.task or which.drill or which.vpg or "")
        if len(rows) > TEST_TIMES_MAX:
            raise InvalidError(
                f"these are more than {TEST_TIMES_MAX} tests", "Name tests, a task, or a drill: a report for each."
            )
        return rows

    def _withheld(self, who: Principal, enterprise: str, vpg: str, name: str, target: tables.VpgTarget | None) -> str:
        """Return why the caller may not read the images at a target; empty if it may."""
        if who.place is None:
            return ""
        place = place_of_target(target) if target is not None else None
        question = by_person(who, Action.READ, enterprise, place, vpg)
        try:
            self._permit(enterprise, "read", subject_of((enterprise, vpg, name)), [question])
        except DeniedError as error:
            return f"outputs and artefacts are left out of this report: {error}"
        return ""

    def _signed(self, enterprise: str, tests: Sequence[Tested], form: ReportFormat) -> str:
        signer = self._context.report_signer
        report = build_report(
            self._context.config.name,
            enterprise,
            tests,
            key=signer.public.id,
            made_ns=self._context.clock_ns(),
            software=f"dr-cloud {version('dr-cloud')}",
        )
        document = signed_json(report, signer)
        return (document if form == "json" else signed_page(report_page(report, document), signer)).decode()


def _decisions(session: Session, test: RecoveryTest) -> list[int]:
    """Return the numbers of the decisions that were written when the test was started."""
    table = tables.Decision
    first, last = session.execute(select(func.min(table.number), func.max(table.number))).one()
    if first is None:
        return []

    def at_ns(number: int) -> int:
        return session.scalars(select(table.at_ns).where(table.number == number)).one()

    # Times are no key of the record, but they ascend with its numbers, but for what was written at the same moment.
    numbers = range(first, last + 1)
    since = bisect.bisect_left(numbers, test.started_ns - _MOMENT_NS, key=at_ns)
    until = bisect.bisect_right(numbers, test.started_ns + _MOMENT_NS, key=at_ns)
    found = select(table.number).where(
        table.number.between(first + since, first + until - 1),
        table.at_ns == test.started_ns,
        table.subject == subject_of((test.enterprise, test.vpg, test.target)),
        table.allow,
    )
    return list(session.scalars(found.order_by(table.number)))
