from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dr_cloud.link import messages as link
from dr_cloud.model.errors import ProtocolError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Disk

TAP = "ab" * 16
EXAMPLES = [
    link.Hello(scope=Scope("acme", "shop", "dc1"), stream="0f" * 16, connection=1, connections=3),
    link.Taps(number=1, taps=[link.TapDisks(tap=TAP, disks=[Disk(index=0, name="d", size_bytes=4096)])]),
    link.CheckpointItem(number=9, kind="tag", time_ns=7, exact=True, cuts={TAP: 5}, tag="noon", request="r"),
    link.Ping(),
    link.Pong(),
    link.Welcome(generation=2, received=3, time_ns=4, credit_bytes=5),
    link.Durable(number=9, cuts={TAP: 5}, checkpoint=4, time_ns=7),
    link.RequestCheckpoint(id="r", tag="noon", description="before the update"),
    link.Refused(code="fenced", reason="another target", remedy="find it"),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.type)
def test_control_comes_back_as_it_was(message: link.Control) -> None:
    assert link.decode_control(link.encode_control(message)) == message


def test_every_message_is_in_the_table() -> None:
    documented = {line.split()[0] for line in (link.__doc__ or "").splitlines() if " → " in line}
    assert {message.type for message in EXAMPLES} | {"offer", "frame", "known"} == documented


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        '{"type":"nothing"}',
        '{"type":"ping","more":1}',
        '{"type":"welcome","generation":0,"received":0,"time_ns":0,"credit_bytes":1}',
        '{"type":"taps","number":-1,"taps":[]}',
        '{"type":"durable","number":1,"cuts":{"../x":1},"checkpoint":1,"time_ns":1}',
        '{"type":"request_checkpoint","id":"i","tag":"' + "x" * 300 + '"}',
        '{"type":"refused","code":"denied","reason":"' + "x" * link.SMALL_TEXT_BYTES_MAX + '"}',
        " " * (link.TEXT_BYTES_MAX + 1),
    ],
)
def test_bad_control_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        link.decode_control(text)


@given(st.text())
def test_any_text_is_a_message_or_a_protocol_error(text: str) -> None:
    try:
        link.decode_control(text)
    except ProtocolError:
        return


@pytest.mark.parametrize(("kind", "size"), [(link.OFFER, 32), (link.FRAME, 77), (link.KNOWN, 24), (link.KNOWN, 0)])
def test_data_comes_back_as_it_was(kind: int, size: int) -> None:
    body = bytes(range(size))
    decoded = link.decode_data(link.encode_data(kind, 12, body))
    assert (decoded.kind, decoded.number, bytes(decoded.body)) == (kind, 12, body)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(15),
        link.data_head(0, 1),
        link.data_head(4, 1),
        link.data_head(link.FRAME, 0) + b"x",
        link.data_head(link.OFFER, 1) + bytes(17),
        link.data_head(link.KNOWN, 1) + bytes(9),
        link.data_head(link.OFFER, 1) + bytes(link.DIGEST_BYTES * (link.OFFER_DIGESTS_MAX + 1)),
        link.data_head(link.FRAME, 1) + bytes(link.FRAME_BYTES_MAX + 1),
    ],
    ids=range(9),
)
def test_bad_data_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        link.decode_data(data)
