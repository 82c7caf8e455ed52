"""The client reads the stream of events as the standard says it is written."""

from __future__ import annotations

from fastapi.sse import format_sse_event

from dr_cloud.client.events import parse_events
from dr_cloud.model.watch import Event


def event(number: int) -> Event:
    return Event(number=number, at_ns=1, enterprise="acme", kind="task", subject="task/1", data={"text": "a\nb: c é"})


def test_events_comments_and_places_are_told_apart() -> None:
    wire = (
        format_sse_event(id="6", comment="where the stream begins")
        + b": ping\n\n"
        + format_sse_event(data_str=event(7).model_dump_json(), event="task", id="7")
        + format_sse_event(data_str=event(8).model_dump_json(indent=1), event="task", id="8")
    )
    lines = wire.decode().split("\n")
    assert list(parse_events(lines)) == [(6, None), (7, event(7)), (8, event(8))]


def test_an_event_that_was_cut_off_is_not_told() -> None:
    whole = format_sse_event(data_str=event(7).model_dump_json(), id="7").decode().split("\n")
    assert list(parse_events(whole[:-2])) == []
