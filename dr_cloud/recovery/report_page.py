"""A report of recovery tests as a page: one file, nothing fetched, no script; light, dark, narrow and printed.

What probes print comes from disks that nobody trusts. Every text is escaped; characters that would hide or turn around
what stands beside them are shown as what they are; and the page's own policy lets nothing be loaded or run.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable
from typing import Final

from dr_cloud.model.units import format_size
from dr_cloud.recovery.report import PAGE_BEGINS, ProbeReport, Report, TestReport, embedded_json

_STYLE: Final = """
:root { color-scheme: light dark; --line: #d5dae1; --soft: #5b6472; --box: #f4f6f8; --pass: #116b3a; --fail: #b3261e;
  --none: #6b5900; --page: #fff; --text: #14181d; }
@media (prefers-color-scheme: dark) { :root { --line: #353c46; --soft: #a1abb9; --box: #1b2027; --pass: #6cd396;
  --fail: #ff8a80; --none: #e5c865; --page: #11151a; --text: #e6eaf0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 3rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 0; } h3 { font-size: 1rem; margin: 0; }
.soft { color: var(--soft); margin: 0; } .pass { color: var(--pass); } .fail { color: var(--fail); }
.none { color: var(--none); } .word { font-weight: 650; }
section { border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin-top: 1.25rem; }
header.line { display: flex; flex-wrap: wrap; gap: .25rem 1rem; justify-content: space-between; }
dl { display: grid; grid-template-columns: minmax(7rem, 11rem) 1fr; gap: .15rem 1rem; margin: .75rem 0 0; }
dt { color: var(--soft); } dd { margin: 0; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin-top: 1rem; font-size: .93rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; } td { min-width: 4.5rem; }
td a { color: inherit; white-space: nowrap; }
.probe { border-top: 1px solid var(--line); margin-top: 1rem; padding-top: .75rem; }
pre { background: var(--box); border-radius: 6px; padding: .6rem .75rem; margin: .5rem 0 0; max-height: 24rem;
  overflow: auto; white-space: pre-wrap; font: 12.5px/1.45 ui-monospace, monospace; }
footer { margin-top: 1.5rem; font-size: .88rem; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; }
  section { padding: .75rem; } thead { display: none; } td { display: block; border: 0; padding: 0; }
  tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line); } }
@media print { :root { --line: #bbb; --soft: #444; --box: #f4f4f4; --pass: #0b4d29; --fail: #8c1d18; --none: #4d4000;
  --page: #fff; --text: #000; } body { max-width: none; padding: 0; font-size: 10.5pt; }
  section { break-inside: auto; } header.line, .probe h3 { break-after: avoid; } pre { max-height: none; } }
"""
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_KEPT: Final = "\n\t"


def report_page(report: Report, document: bytes) -> str:
    """Return the page of a report. `document` is the same report, signed: it is embedded."""
    title = f"Recovery tests of {report.enterprise}"
    return "\n".join(
        [
            PAGE_BEGINS,
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{_text(title)}</h1>",
            f'<p class="soft">{_text(report.provider)} · made {_text(report.made)} · {_text(report.software)}</p>',
            f'<p class="word">{_counted(report.tests)}</p>',
            _overview(report.tests) if len(report.tests) > 1 else "",
            *(_test(test) for test in report.tests),
            f'<footer class="soft">Signed with Ed25519 by the key {_text(report.key)}. The signature is over this whole'
            " file, and over the data embedded in it: <code>dr-cloud report verify FILE</code> checks both.</footer>",
            f'<script type="application/json" id="report">{embedded_json(document)}</script>',
            "</body></html>",
            "",
        ]
    )


def _text(text: object) -> str:
    """Return a text that stands in the page as itself, whatever it is."""
    return html.escape("".join(map(_seen, str(text))))


def _seen(character: str) -> str:
    """Return a character, or its name in brackets if it is not seen but acts: controls, turners, joiners."""
    if character in _KEPT or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return character
    return f"[U+{ord(character):04X}]"


def _counted(tests: list[TestReport]) -> str:
    counts = {"pass": 0, "fail": 0, "none": 0}
    for test in tests:
        counts[test.verdict or "none"] += 1
    words = (("pass", "passed"), ("fail", "failed"), ("none", "without a verdict"))
    return " · ".join(f'<span class="{kind}">{counts[kind]} {word}</span>' for kind, word in words if counts[kind])


def _verdict(verdict: str | None) -> str:
    word = {"pass": "pass", "fail": "fail"}.get(verdict or "", "none")
    return f'<span class="word {word}">{_text(verdict or "no verdict")}</span>'


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of cells that are escaped already."""
    head = "".join(f"<th>{name}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _overview(tests: list[TestReport]) -> str:
    rows = [
        [
            f'<a href="#{_text(test.id)}">{_text(test.served or test.asked or "the latest")}</a>',
            _text(f"{test.vpg} at {test.target}"),
            _verdict(test.verdict),
            _text(_seconds(test.rto_us)),
            _text(test.verdict_note or test.problem),
        ]
        for test in tests
    ]
    return _table(["time", "group", "verdict", "RTO", "note"], rows)


def _pairs(pairs: Iterable[tuple[str, str | None]]) -> str:
    """Return a list of names and values, without those that are empty."""
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{_text(value)}</dd>' for name, value in pairs if value)}</dl>"


def _seconds(duration_us: int | None) -> str:
    if duration_us is None:
        return ""
    seconds = duration_us / 1_000_000
    hours, minutes = divmod(int(seconds) // 60, 60)
    exact = f"{seconds:.3f} s"
    return f"{exact} ({hours} h {minutes} min)" if hours or minutes else exact


def _size(size_bytes: int | None) -> str:
    return "" if size_bytes is None else format_size(size_bytes)


def _test(test: TestReport) -> str:
    started = {"person": "", "search": "by a search for the last clean point", "drill": "by a drill"}[test.started_as]
    place = f"{test.data_center} ({test.jurisdiction})" if test.jurisdiction else test.data_center
    facts = _pairs(
        [
            ("group", test.vpg),
            ("target", f"{test.target} in {place}" if place else test.target),
            ("started by", f"{test.started_by} {f'· {started} · {test.origin}' if started else ''}".strip()),
            ("time asked for", test.asked or "the latest"),
            ("time served", test.served),
            ("started", test.started),
            ("disks served", test.running),
            ("ended", test.stopped or f"not yet: it is {test.status}"),
            ("duration", _seconds(test.duration_us)),
            ("how it ended", test.ended or (test.status if test.stopped else "")),
            ("verdict’s note", test.verdict_note),
            ("note", test.note),
            ("problem", test.problem),
            ("denied by policy", test.denied),
            ("time to first byte", _seconds(test.first_byte_us)),
            ("achieved RTO", _seconds(test.rto_us)),
            ("read", _size(test.read_bytes)),
            ("written", _size(test.written_bytes)),
            ("decisions", ", ".join(map(str, test.decisions))),
            ("task", test.task),
            ("left out", test.withheld),
        ]
    )
    kind = "Failover" if test.kind == "failover" else "Test"
    return (
        f'<section id="{_text(test.id)}"><header class="line"><h2>{kind} {_text(test.id)}</h2>'
        f"{_verdict(test.verdict)}</header>{facts}{''.join(map(_probe, test.probes))}</section>"
    )


def _probe(probe: ProbeReport) -> str:
    verdict = probe.verdict if probe.verdict != "not run" else None
    facts = _pairs(
        [
            ("probe", f"{probe.kind} on {probe.disk}"),
            ("parameters", probe.parameters if probe.parameters != "{}" else ""),
            ("found", probe.reason or ("it was not run" if verdict is None else "")),
            ("of the disks", "" if probe.conclusive or verdict is None else "it says nothing: the probe could not end"),
            ("started", probe.started),
            ("duration", _seconds(probe.duration_us)),
        ]
    )
    parts = [facts]
    if probe.output:
        cut = " (its middle was cut out)" if probe.output_cut else ""
        parts.append(f'<p class="soft">output{cut}</p><pre>{_text(probe.output)}</pre>')
    if probe.artefacts:
        rows = [[_text(a.path), _text(format_size(a.size_bytes)), _text(a.sha256)] for a in probe.artefacts]
        parts.append(_table(["artefact", "size", "SHA-256"], rows))
    shown = _verdict(verdict) if verdict is not None else '<span class="word none">not run</span>'
    head = f'<header class="line"><h3>{_text(probe.name)}</h3>{shown}</header>'
    return f'<div class="probe">{head}{"".join(parts)}</div>'
