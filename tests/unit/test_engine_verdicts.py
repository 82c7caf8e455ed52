"""What probes say of a test, and what is kept of it for its time."""

from __future__ import annotations

import pytest
from quiet_fabric import probed

from dr_cloud.model.probe import ProbeResult, ProbeSpec
from dr_cloud.recovery.verdicts import data_verdict, probes_digest, verdict_of_test

PASSED, FAILED = probed("fsck"), probed("sqlite", "it is damaged")
UNSAID = probed("boot", "no verdict within 3 s", conclusive=False)


@pytest.mark.parametrize(
    ("results", "test", "data"),
    [
        ([PASSED, PASSED], (True, ""), (True, "")),
        ([PASSED, FAILED], (False, "sqlite: it is damaged"), (False, "sqlite: it is damaged")),
        ([PASSED], (False, ""), None),
        ([], (False, ""), None),
        ([FAILED], (False, "sqlite: it is damaged"), (False, "sqlite: it is damaged")),
        ([UNSAID, PASSED], (False, "boot: no verdict within 3 s"), None),
        ([UNSAID, FAILED], (False, "boot: no verdict within 3 s"), (False, "sqlite: it is damaged")),
    ],
)
def test_verdicts(results: list[ProbeResult], test: tuple[bool, str], data: tuple[bool, str] | None) -> None:
    """R14.7: a test passes only if all of its probes have; the data is clean or dirty only if they could tell."""
    assert verdict_of_test(2, results) == test
    assert data_verdict(2, results) == data


def test_a_digest_is_of_what_is_looked_for() -> None:
    fsck, query = ProbeSpec(kind="fsck"), ProbeSpec(kind="sqlite", parameters={"path": "/a", "query": "q"})
    digest = probes_digest([fsck, query])
    named = query.model_copy(
        update={"name": "x", "timeout_seconds": 1.0, "parameters": dict(reversed(query.parameters.items()))}
    )
    assert probes_digest([named, fsck, fsck]) == digest
    others = [
        [fsck],
        [query],
        [fsck, query.model_copy(update={"disk": "db/*"})],
        [fsck, query.model_copy(update={"parameters": {"path": "/b", "query": "q"}})],
        [ProbeSpec(kind="mount"), query],
    ]
    assert len({digest, *map(probes_digest, others)}) == 6
