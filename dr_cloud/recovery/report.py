"""Reports of recovery tests: evidence that others can check without this product's word for it. Pure.

Purpose
    A report says of each test who started it, which time was asked for and served, how long it took, what each probe
    found and how it ended. It is made when it is asked for, of what the manager's rows say then, and signed.

Layout, version 1
    JSON in its one canonical form (RFC 8785): keys sorted, no spaces, UTF-8, whole numbers and texts only. Times are
    RFC 3339 with nine digits, durations whole microseconds, for numbers over 2^53 are not the same to every reader::

        {"report":<report>,"signature":"<128 hexadecimal digits>"}

    The signature (Ed25519) is over `dr-cloud report json` NUL and the bytes of <report>, which name the key by its id.
    As a page (`report_page`) the same document lies in a script element, and the page ends with a line of its own::

        <!-- dr-cloud signature <128 hexadecimal digits> -->

    which is over `dr-cloud report html` NUL and every byte before that line: what is read is what was signed.

Consistency
    Every byte of either file is covered: the document or the page by its signature, the rest by having one form only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, ValidationError

from dr_cloud.model.blocks import BLOCK_SIZE
from dr_cloud.model.errors import DamagedError, DrCloudError
from dr_cloud.model.probe import Artefact, ProbeResult, ProbeSpec
from dr_cloud.model.recovery import RecoveryTest, Verdict
from dr_cloud.model.units import format_time
from dr_cloud.recovery.report_key import ReportSigner, key_id, load_public

FORMAT: Final = "dr-cloud recovery tests"
VERSION: Final = 1
PAGE_BEGINS: Final = "<!doctype html>"
Starter = Literal["person", "search", "drill"]
_STARTERS: Final[dict[str, Starter]] = {"clean": "search", "drill": "drill"}
_HEAD: Final = b'{"report":'
_TAIL: Final = re.compile(rb',"signature":"([^"]*)"\}\Z')
_LAST_LINE: Final = re.compile(rb"<!-- dr-cloud signature ([^ ]*) -->\n\Z")
_EMBEDDED: Final = re.compile(rb'<script type="application/json" id="report">(.*?)</script>', re.DOTALL)
_SIGNATURE: Final = re.compile(rb"[0-9a-f]{128}")
_JSON_DOMAIN: Final = b"dr-cloud report json\0"
_PAGE_DOMAIN: Final = b"dr-cloud report html\0"
_ANEW: Final = "Trust nothing of it; get the report anew from the provider."


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ProbeReport(_Part):
    """What one probe was to do, and what it found."""

    name: str
    kind: str
    disk: str
    parameters: str
    """JSON."""
    verdict: Literal["pass", "fail", "not run"]
    conclusive: bool
    """Whether the verdict is about the disks, and not about the probe."""
    reason: str
    started: str | None
    duration_us: int | None
    output: str | None
    """None: left out, see `withheld` of the test; or it was not run."""
    output_cut: bool
    artefacts: list[Artefact] | None
    """None: left out."""


class TestReport(_Part):
    """One recovery test, or one failover before its commit."""

    __test__ = False
    id: str
    kind: Literal["test", "failover"]
    vpg: str
    target: str
    data_center: str
    jurisdiction: str
    started_by: str
    started_as: Starter
    origin: str
    task: str
    status: str
    asked: str | None
    """None: the latest."""
    served: str | None
    """The time whose image was served."""
    started: str
    running: str | None
    stopped: str | None
    duration_us: int | None
    """From its start to its end; None while it runs."""
    ended: str
    verdict: Verdict | None
    verdict_note: str
    note: str
    problem: str
    denied: str
    first_byte_us: int | None
    rto_us: int | None
    read_bytes: int | None
    written_bytes: int | None
    probes: list[ProbeReport]
    withheld: str
    """Why outputs and artefacts are left out for whoever asked for the report; empty if they are not."""
    decisions: list[int]
    """Numbers, in the enterprise's record of decisions, of those by which it was started."""


class Report(_Part):
    """What is signed."""

    format: Literal["dr-cloud recovery tests"] = FORMAT
    version: Literal[1] = VERSION
    provider: str
    enterprise: str
    made: str
    software: str
    key: str
    """Id of the key that signed it."""
    tests: list[TestReport]


class Tested(NamedTuple):
    """A test, with what its row does not say."""

    test: RecoveryTest
    data_center: str
    jurisdiction: str
    decisions: list[int]
    withheld: str


def build_report(
    provider: str, enterprise: str, tests: Sequence[Tested], *, key: str, made_ns: int, software: str
) -> Report:
    """Return the report of these tests, in their order. `key` is the id of the key that will sign it."""
    return Report(
        provider=provider,
        enterprise=enterprise,
        made=format_time(made_ns),
        software=software,
        key=key,
        tests=[_of_test(tested) for tested in tests],
    )


def _of_test(tested: Tested) -> TestReport:
    test, counted = tested.test, tested.test.statistics
    results = {result.probe: result for result in test.results}
    return TestReport(
        id=test.id,
        kind=test.kind,
        vpg=test.vpg,
        target=test.target,
        data_center=tested.data_center,
        jurisdiction=tested.jurisdiction,
        started_by=test.started_by,
        started_as=_STARTERS.get(test.origin.partition("/")[0], "person"),
        origin=test.origin,
        task=test.task,
        status=test.status,
        asked=_time(test.asked_ns or None),
        served=_time(test.at_ns),
        started=format_time(test.started_ns),
        running=_time(test.running_ns),
        stopped=_time(test.stopped_ns),
        duration_us=None if test.stopped_ns is None else (test.stopped_ns - test.started_ns) // 1000,
        ended=test.ended,
        verdict=test.verdict,
        verdict_note=test.verdict_note,
        note=test.note,
        problem=test.problem,
        denied=test.denied,
        first_byte_us=_microseconds(counted.get("first_byte_seconds")),
        rto_us=_microseconds(test.rto_seconds),
        read_bytes=_bytes(counted.get("blocks_read")),
        written_bytes=_bytes(counted.get("blocks_written")),
        probes=[_of_probe(spec, results.get(spec.name), shown=not tested.withheld) for spec in test.probes],
        withheld=tested.withheld,
        decisions=tested.decisions,
    )


def _of_probe(spec: ProbeSpec, result: ProbeResult | None, *, shown: bool) -> ProbeReport:
    return ProbeReport(
        name=spec.name,
        kind=spec.kind,
        disk=spec.disk,
        parameters=json.dumps(spec.parameters, sort_keys=True, ensure_ascii=False),
        verdict=result.verdict if result is not None else "not run",
        conclusive=result is not None and result.conclusive,
        reason=result.reason if result is not None else "",
        started=_time(result.started_ns) if result is not None else None,
        duration_us=_microseconds(result.seconds) if result is not None else None,
        output=result.output if result is not None and shown else None,
        output_cut=result is not None and result.output_cut,
        artefacts=result.artefacts if result is not None and shown else None,
    )


def _time(time_ns: int | None) -> str | None:
    return None if time_ns is None else format_time(time_ns)


def _microseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1_000_000)


def _bytes(blocks: float | None) -> int | None:
    return None if blocks is None else int(blocks) * BLOCK_SIZE


def canonical_json(value: Any) -> bytes:
    """Return a value of texts and whole numbers in its one form (RFC 8785)."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def signed_json(report: Report, signer: ReportSigner) -> bytes:
    """Return the report as a signed JSON document."""
    body = canonical_json(report.model_dump(mode="json"))
    return _HEAD + body + b',"signature":"' + signer.sign(_JSON_DOMAIN + body).hex().encode() + b'"}'


def signed_page(page: str, signer: ReportSigner) -> bytes:
    """Return a page that holds a signed document, signed itself."""
    data = page.encode()
    return data + f"<!-- dr-cloud signature {signer.sign(_PAGE_DOMAIN + data).hex()} -->\n".encode()


def embedded_json(document: bytes) -> str:
    """Return a signed document as it stands in a script element, which no `</script>` in it can end."""
    return document.decode().replace("<", r"\u003c")


def named_key(data: bytes) -> str:
    """Return the id of the key by which a file says it was signed; empty if it says none. It may be lying."""
    try:
        document = _embedded_in(data) if _is_page(data) else data
        return str(json.loads(document)["report"]["key"])
    except (ValueError, KeyError, TypeError, RecursionError, DrCloudError):
        return ""


def check_report(data: bytes, public: str) -> Report:
    """Return what a file says, as JSON or as a page.

    Args:
        data: The whole file.
        public: The key that must have signed it, PEM.

    Raises:
        DamagedError: It is no report, it was signed by another key, cut off, or changed: the message says which.
        InvalidError: `public` is no key.
    """
    key = load_public(public)
    if _is_page(data):
        _check_page(data, key)
        data = _embedded_in(data)
    return _checked(data, key)


def _is_page(data: bytes) -> bool:
    return data.startswith(PAGE_BEGINS.encode())


def _check_page(data: bytes, key: Ed25519PublicKey) -> None:
    last = _LAST_LINE.search(data)
    if last is None:
        raise _unfinished(re.search(rb"<!-- dr-cloud signature [0-9a-f]{128} -->\n", data) is not None)
    if _signed(last[1], _PAGE_DOMAIN + data[: last.start()], key):
        return
    _check_key(data, key)
    try:
        _checked(_embedded_in(data), key)
    except DamagedError:
        raise DamagedError("the page was changed since it was signed, and the data in it too", _ANEW) from None
    raise DamagedError("the page was changed since it was signed; the data embedded in it was not", _ANEW)


def _checked(data: bytes, key: Ed25519PublicKey) -> Report:
    if not data.startswith(_HEAD):
        if _HEAD.startswith(data) or PAGE_BEGINS.encode().startswith(data):
            raise _unfinished(longer=False)
        raise DamagedError("this is no report of recovery tests, or its beginning was changed", "Name another file.")
    tail = _TAIL.search(data)
    if tail is None:
        raise _unfinished(re.search(rb',"signature":"[0-9a-f]{128}"\}', data) is not None)
    body = data[len(_HEAD) : tail.start()]
    if not _signed(tail[1], _JSON_DOMAIN + body, key):
        _check_key(data, key)
        raise DamagedError("the report was changed since it was signed", _ANEW)
    try:
        return Report.model_validate_json(body)
    except ValidationError:
        raise DamagedError(
            "the signature is right, but this version does not know the report's form", "Use the version that made it."
        ) from None


def _signed(signature: bytes, data: bytes, key: Ed25519PublicKey) -> bool:
    if not _SIGNATURE.fullmatch(signature):
        return False
    try:
        key.verify(bytes.fromhex(signature.decode()), data)
    except InvalidSignature:
        return False
    return True


def _check_key(data: bytes, key: Ed25519PublicKey) -> None:
    """Raise the error for a file that names another key, if it does."""
    named = named_key(data)
    if named and named != key_id(key):
        raise DamagedError(
            f"the report says that it was signed by another key: {named}; the given one is {key_id(key)}",
            "Give the key of the provider that made it; without one, trust nothing of it.",
        )


def _embedded_in(page: bytes) -> bytes:
    found = _EMBEDDED.search(page)
    try:
        return canonical_json(json.loads(found[1])) if found is not None else b""
    except (ValueError, RecursionError):
        raise DamagedError("the page was changed: the data embedded in it cannot be read", _ANEW) from None


def _unfinished(longer: bool) -> DamagedError:
    if longer:
        return DamagedError("something was added after the report's signature", "Cut it off, and verify again.")
    return DamagedError("the report is truncated: it ends before its signature", "Get it anew from the provider.")
