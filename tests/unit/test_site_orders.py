"""What of a provider's orders a site follows, and what it tells of the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dr_cloud.model.errors import ProtocolError
from dr_cloud.model.ids import Scope
from dr_cloud.site.orders import read_orders


def source(vpg: str = "shop", enterprise: str = "acme", **changes: Any) -> dict[str, Any]:
    return {"scope": [enterprise, vpg, "dc1"], "copy_number": 0, "members": {"web": {"root": 0}}, **changes}


def orders(**changes: Any) -> dict[str, Any]:
    return {"revision": 7, "hosts": ["h1"], **changes}


def read(**changes: Any):
    return read_orders(json.dumps(orders(**changes)).encode(), "acme", ["ds-1"])


def test_good_orders_are_followed_as_they_are() -> None:
    target = {"scope": ["acme", "crm", "hq"], "store": "ds-1"}
    accepted = read(sources=[source(), source("erp")], targets=[target])
    assert [order.scope.vpg for order in accepted.orders.sources] == ["shop", "erp"]
    assert accepted.orders.targets[0].store == "ds-1"
    assert (accepted.sources, accepted.targets, accepted.problems) == ({}, {}, [])


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (source("bad", copy_number=9), "copy_number"),
        (source("bad", order="none"), "order"),
        (source("bad", members={"web": {"a": 1}, "db": {"b": 1}}), "two disks have the index 1"),
        (source("shop2", throttle={"bytes_per_second": -1}), "throttle"),
    ],
)
def test_a_broken_order_stops_no_other(broken: dict[str, Any], reason: str) -> None:
    accepted = read(sources=[source(), broken, source("erp")])
    assert [order.scope.vpg for order in accepted.orders.sources] == ["shop", "erp"]
    assert reason in accepted.sources[Scope(*broken["scope"])]


def test_a_scope_ordered_twice_is_followed_neither_way() -> None:
    accepted = read(sources=[source(), source(copy_number=1), source("erp")])
    assert [order.scope.vpg for order in accepted.orders.sources] == ["erp"]
    assert "twice" in accepted.sources[Scope("acme", "shop", "dc1")]


def test_another_enterprise_is_none_of_this_site() -> None:
    """R11: each end refuses a scope of another enterprise."""
    foreign = source("secret-vpg", enterprise="rival")
    accepted = read(sources=[foreign, source()], targets=[{"scope": foreign["scope"], "store": "ds-1"}])
    assert [order.scope.enterprise for order in accepted.orders.sources] == ["acme"]
    assert accepted.orders.targets == []
    assert len(accepted.problems) == 2
    assert "rival" not in str(accepted)
    assert "secret-vpg" not in str(accepted)


def test_a_target_lies_in_a_datastore_of_this_site() -> None:
    accepted = read(targets=[{"scope": ["acme", "crm", "hq"], "store": "file:///etc"}])
    assert accepted.orders.targets == []
    assert "no datastore" in accepted.targets[Scope("acme", "crm", "hq")]


@pytest.mark.parametrize("document", [b"", b"[]", b"{}", b'{"revision": -1, "hosts": []}', b"\xff", b"null"])
def test_what_is_no_order_is_refused_as_a_whole(document: bytes) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        read_orders(document, "acme", [])


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(_JSON | st.builds(lambda x: source("odd", members=x), _JSON), max_size=4), _JSON)
def test_whatever_comes_the_good_order_is_followed(others: list[Any], targets: Any) -> None:
    try:
        accepted = read_orders(orders(sources=[*others, source()], targets=targets), "acme", [])
    except ProtocolError:
        assert not isinstance(targets, list), "a list of orders is never refused as a whole"
        return
    assert isinstance(targets, list)
    assert "shop" in [order.scope.vpg for order in accepted.orders.sources]
