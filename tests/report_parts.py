"""Recovery tests for reports, of arbitrary texts and of one's own choice."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import strategies as st

from dr_cloud.model.probe import Artefact, ProbeResult, ProbeSpec
from dr_cloud.model.recovery import RecoveryTest
from dr_cloud.recovery.report import Report, Tested, build_report, signed_json, signed_page
from dr_cloud.recovery.report_key import ReportSigner
from dr_cloud.recovery.report_page import report_page

NOW_NS = 1_800_000_000_123_456_789
SIGNER, OTHER = ReportSigner(Ed25519PrivateKey.generate()), ReportSigner(Ed25519PrivateKey.generate())
PUBLIC = SIGNER.public.public


def of_test(text: str = "ok", withheld: str = "", **changes: Any) -> Tested:
    """Return a test with two probes, of which one has ended; `text` stands wherever others may write."""
    artefact = Artefact(path=f"fsck/{text}", size_bytes=12, sha256="ab" * 32)
    result = ProbeResult(
        probe="fsck",
        verdict="fail",
        reason=text,
        output=text,
        started_ns=NOW_NS,
        seconds=0.1 + 0.2,
        artefacts=[artefact],
    )
    test = RecoveryTest(
        id="0123456789abcdef0123456789abcdef",
        enterprise="acme",
        vpg="erp",
        target="dc1",
        kind="test",
        task="t1",
        status="stopped",
        asked_ns=NOW_NS,
        at_ns=NOW_NS - 1,
        note=text,
        probes=[
            ProbeSpec(kind="fsck", name="fsck"),
            ProbeSpec(kind="sqlite", name="db", parameters={"query": text, "ratio": 0.1}),
        ],
        results=[result],
        started_ns=NOW_NS,
        running_ns=NOW_NS + 5,
        stopped_ns=NOW_NS + 1_500_000_000,
        ended=text,
        rto_seconds=1.25,
        verdict="fail",
        verdict_note=text,
        statistics={"first_byte_seconds": 0.0125, "blocks_read": 3, "blocks_written": 2},
        started_by=text,
    )
    return Tested(test.model_copy(update=changes), "us-east", "USA", [4, 7], withheld)


def report(*tests: Tested) -> Report:
    """Return the report of these tests."""
    return build_report("provider", "acme", tests, key=SIGNER.public.id, made_ns=NOW_NS, software="dr-cloud 1")


def as_json(made: Report, signer: ReportSigner = SIGNER) -> bytes:
    return signed_json(made, signer)


def as_page(made: Report, signer: ReportSigner = SIGNER) -> bytes:
    return signed_page(report_page(made, signed_json(made, signer)), signer)


texts = st.text(st.characters(codec="utf-8"), max_size=60) | st.sampled_from(
    [
        "</script><script>alert(1)</script>",
        "<!--",
        "-->",
        "]]>",
        "\\u003c",
        "\\",
        '"}',
        "\u202egnp.exe",
        "\r\n\0\x1b[31m",
    ]
)
"""What may stand on a disk: all that Unicode has, and what is made to break out."""
