"""Reports of recovery tests: what is in them, what a check says, the page, the key."""

from __future__ import annotations

import json
import stat
from html.parser import HTMLParser
from pathlib import Path
from threading import Thread

import pytest
from report_parts import NOW_NS, OTHER, PUBLIC, SIGNER, as_json, as_page, of_test, report

from dr_cloud.model.errors import DamagedError, DrCloudError, InvalidError
from dr_cloud.recovery.report import check_report
from dr_cloud.recovery.report_key import ReportSigner

EVIL = '<img src=x onerror="alert(1)">\'&amp;</pre></script><script>alert(2)</script>\x1b[2J\u202e'


class Page(HTMLParser):
    """What a browser would find: elements, what they fetch, and the text that is seen."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.seen = ""
        self.feed(data.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.seen += data


def test_a_report_says_what_was_done_and_found() -> None:
    """R14.7, FIELD: who, what time, which checks, how long (achieved RTO)."""
    (test,) = json.loads(as_json(report(of_test())))["report"]["tests"]
    assert (test["asked"], test["served"]) == ("2027-01-15T08:00:00.123456789Z", "2027-01-15T08:00:00.123456788Z")
    assert (test["duration_us"], test["rto_us"], test["first_byte_us"]) == (1_500_000, 1_250_000, 12_500)
    assert (test["read_bytes"], test["written_bytes"]) == (3 * 4096, 2 * 4096)
    assert (test["data_center"], test["jurisdiction"], test["decisions"]) == ("us-east", "USA", [4, 7])
    assert (test["started_as"], test["verdict"]) == ("person", "fail")
    fsck, db = test["probes"]
    assert (fsck["verdict"], fsck["duration_us"], fsck["output"]) == ("fail", 300_000, "ok")
    assert fsck["artefacts"] == [{"path": "fsck/ok", "size_bytes": 12, "sha256": "ab" * 32}]
    assert (db["verdict"], db["output"], db["artefacts"]) == ("not run", None, None)
    assert json.loads(db["parameters"]) == {"query": "ok", "ratio": 0.1}


def test_who_started_it() -> None:
    made = report(of_test(origin="drill/nightly"), of_test(origin="clean/1234"), of_test())
    assert [test.started_as for test in made.tests] == ["drill", "search", "person"]


def test_numbers_are_whole_and_the_same_to_every_reader() -> None:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no whole number")

    json.loads(as_json(report(of_test())), parse_float=refuse, parse_constant=refuse)
    numbers: list[int] = []
    json.loads(as_json(report(of_test())), parse_int=lambda text: numbers.append(int(text)))
    assert max(numbers) < 1 << 53


def test_what_may_not_be_read_is_left_out_and_said() -> None:
    """R13: outputs and artefacts are content of an image."""
    made = report(of_test("S3CRET", withheld="policy denies it"))
    (test,) = made.tests
    assert (test.probes[0].output, test.probes[0].artefacts) == (None, None)
    assert "policy denies it" in Page(as_page(made)).seen


@pytest.mark.parametrize("form", [as_json, as_page])
def test_a_whole_report_is_found_whole(form) -> None:
    made = report(of_test())
    assert check_report(form(made), PUBLIC) == made


@pytest.mark.parametrize(
    ("form", "change", "said"),
    [
        (as_json, lambda data: data.replace(b"fail", b"pass", 1), "changed since it was signed"),
        (as_json, lambda data: data.replace(b'"version":1', b'"version": 1'), "changed since it was signed"),
        (as_json, lambda data: data[:-40], "truncated"),
        (as_json, lambda data: data[:5], "truncated"),
        (as_json, lambda data: b"", "truncated"),
        (as_json, lambda data: data + b"\n", "added after"),
        (as_json, lambda data: b'{"other":1}', "no report"),
        (as_json, lambda data: b"PK\x03\x04", "no report"),
        (as_page, lambda data: data.replace(b">fail<", b">pass<", 1), "the data embedded in it was not"),
        (as_page, lambda data: data.replace(b"fail", b"pass"), "and the data in it too"),
        (as_page, lambda data: data[:-100], "truncated"),
        (as_page, lambda data: data[:12], "truncated"),
        (as_page, lambda data: data + b"<p>added</p>", "added after"),
    ],
)
def test_a_check_says_what_is_wrong(form, change, said) -> None:
    with pytest.raises(DamagedError, match=said):
        check_report(change(form(report(of_test()))), PUBLIC)


@pytest.mark.parametrize("form", [as_json, as_page])
def test_another_key_is_told_apart_from_a_change(form) -> None:
    with pytest.raises(DamagedError, match=f"another key: {SIGNER.public.id}; the given one is {OTHER.public.id}"):
        check_report(form(report(of_test())), OTHER.public.public)
    # A forger signs with a key of their own, and names the provider's.
    with pytest.raises(DamagedError, match="changed"):
        check_report(form(report(of_test()), OTHER), PUBLIC)


def test_a_signature_is_for_one_form_only() -> None:
    """The signature of a document is none of a page, though a page's bytes could be given out for a document's."""
    document = as_json(report(of_test()))
    body, _, signature = document.removeprefix(b'{"report":').partition(b',"signature":"')
    page = b"<!doctype html>" + body + b"<!-- dr-cloud signature " + signature[:128] + b" -->\n"
    with pytest.raises(DamagedError):
        check_report(page, PUBLIC)


def test_what_is_no_key_is_refused() -> None:
    for pem in ("", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        with pytest.raises(InvalidError, match="no public key"):
            check_report(as_json(report(of_test())), pem)


def test_a_page_is_one_file_without_scripts() -> None:
    """Nothing is fetched, nothing runs, whatever the disks hold."""
    data = as_page(
        report(of_test(EVIL), of_test(EVIL, withheld=EVIL, problem=EVIL, denied=EVIL, origin=f"drill/{EVIL}"))
    )
    page = Page(data)
    assert page.open == []
    assert page.tags.count("script") == 1
    assert not {"img", "link", "iframe", "object", "form", "base"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on")} | names & {"src", "style"}
    assert {value for name, value in page.attributes if name == "href"} == {"#0123456789abcdef0123456789abcdef"}
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert b"http" not in data.replace(b"http-equiv", b"")
    assert EVIL.replace("\x1b", "[U+001B]").replace("\u202e", "[U+202E]") in page.seen
    assert b"\x1b" not in data


def test_a_page_shows_what_matters() -> None:
    seen = Page(as_page(report(of_test("found it"), of_test(verdict="pass"), of_test(verdict=None)))).seen
    for part in ("1 passed", "1 failed", "1 without a verdict", "1.250 s", "us-east (USA)", "12.0 KiB", "found it"):
        assert part in seen, part


def test_the_key_is_made_once_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    made: list[ReportSigner] = []
    threads = [Thread(target=lambda: made.append(ReportSigner.open(folder))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({signer.public.id for signer in made}) == 1
    assert [path.name for path in folder.iterdir()] == ["report-key.pem"]
    assert stat.S_IMODE((folder / "report-key.pem").stat().st_mode) == 0o600
    assert "PRIVATE" not in repr(made[0])
    (folder / "report-key.pem").chmod(0o640)
    with pytest.raises(DrCloudError, match="read by others"):
        ReportSigner.open(folder)
    (folder / "report-key.pem").chmod(0o600)
    (folder / "report-key.pem").write_text("not a key")
    with pytest.raises(DrCloudError, match="damaged"):
        ReportSigner.open(folder)


def test_the_clock_of_the_report_is_in_it() -> None:
    assert report(of_test()).made == "2027-01-15T08:00:00.123456789Z"
    assert NOW_NS == 1_800_000_000_123_456_789
