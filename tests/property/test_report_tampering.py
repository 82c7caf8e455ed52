"""Reports under every change of a byte, and with every text that a disk may hold."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_parts import PUBLIC, as_json, as_page, of_test, report, texts

from dr_cloud.model.errors import DamagedError
from dr_cloud.recovery.report import canonical_json, check_report

JSON = as_json(report(of_test("it says </script>: é \u202e \\u003c"), of_test()))
PAGE = as_page(report(of_test("it says </script>: é \u202e \\u003c"), of_test()))


@given(st.sampled_from([JSON, PAGE]), st.data())
def test_any_change_of_any_byte_is_found(whole: bytes, data: st.DataObject) -> None:
    """R14.7: what a report says cannot be changed without being found: one byte changed, taken out or put in."""
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255))
    how = data.draw(st.sampled_from(["change", "remove", "insert"]))
    kept = {"change": 1, "remove": 1, "insert": 0}[how]
    changed = whole[:place] + (b"" if how == "remove" else bytes([byte])) + whole[place + kept :]
    if changed == whole:
        return
    with pytest.raises(DamagedError):
        check_report(changed, PUBLIC)


@given(st.sampled_from([JSON, PAGE]), st.data())
def test_any_end_that_is_cut_off_is_found(whole: bytes, data: st.DataObject) -> None:
    with pytest.raises(DamagedError, match=r"truncated|no report"):
        check_report(whole[: data.draw(st.integers(0, len(whole) - 1))], PUBLIC)


def test_every_single_bit_of_a_document_counts() -> None:
    """Not a sample: each byte of a whole document, changed in one bit."""
    whole = as_json(report(of_test()))
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        with pytest.raises(DamagedError):
            check_report(bytes(changed), PUBLIC)


@given(texts, texts)
def test_whatever_a_disk_holds_comes_back_as_it_was(first: str, second: str) -> None:
    made = report(of_test(first), of_test(second, withheld=first))
    document, page = as_json(made), as_page(made)
    assert check_report(document, PUBLIC) == check_report(page, PUBLIC) == made
    assert canonical_json(json.loads(document)) == document  # there is one form, and this is it
    assert page.count(b"<script") == page.count(b"</script>") == 1
