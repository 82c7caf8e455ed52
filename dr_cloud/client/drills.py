"""The client's operations on drills and on reports of recovery tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from dr_cloud.client.calls import Calls, dump, path_of
from dr_cloud.model.recovery import Drill, DrillSettings, ReportFormat, ReportKey, ReportQuery
from dr_cloud.model.task import Task

_REPORT_SECONDS: Final = 300.0


class DrillCalls(Calls):
    """See the module's docstring."""

    def drills(self, vpg: str) -> Iterator[Drill]:
        """List the drills of a VPG."""
        return self._pages(Drill, self._own("vpgs", vpg, "drills"))

    def drill(self, vpg: str, drill: str) -> Drill:
        """Show a drill, and how its last run went."""
        return self._get(Drill, self._own("vpgs", vpg, "drills", drill))

    def put_drill(self, vpg: str, settings: DrillSettings) -> Drill:
        """Make a drill, or give the one of that name other settings."""
        return self._send(Drill, "POST", self._own("vpgs", vpg, "drills"), settings)

    def remove_drill(self, vpg: str, drill: str) -> Drill:
        """Remove a drill; its tests stay."""
        return self._send(Drill, "DELETE", self._own("vpgs", vpg, "drills", drill))

    def run_drill(self, vpg: str, drill: str) -> Task:
        """Run a drill now."""
        return self._send(Task, "POST", self._own("vpgs", vpg, "drills", drill, "run"))

    def test_report(self, test: str, form: ReportFormat = "json") -> bytes:
        """Return the signed report of a test, as it is to be kept."""
        path = self._own("tests", test, "report")
        return self._session.call("GET", path, parameters={"format": form}, timeout_seconds=_REPORT_SECONDS).content

    def tests_report(self, which: ReportQuery, form: ReportFormat = "json") -> bytes:
        """Return one signed report of several tests, as it is to be kept."""
        path, parameters = self._own("tests", "report"), dump(which) | {"format": form}
        return self._session.call("GET", path, parameters=parameters, timeout_seconds=_REPORT_SECONDS).content

    def report_key(self) -> ReportKey:
        """Return the public key of the provider's reports; no token is needed for it."""
        return self._get(ReportKey, path_of("report-key"))
