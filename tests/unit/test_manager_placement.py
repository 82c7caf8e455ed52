"""Placement and orders: pure choices."""

from __future__ import annotations

import pytest
from cloud_world import CONFIG
from hypothesis import given
from hypothesis import strategies as st

from dr_cloud.manager.access import ALLOWED, READ
from dr_cloud.manager.paging import decode_cursor, encode_cursor
from dr_cloud.manager.placement import Load, choose, shown, store_of
from dr_cloud.model.errors import InvalidError, NotFoundError
from dr_cloud.model.principal import Role

(EAST,) = (center for center in CONFIG.data_centers if center.name == "us-east")
counts = st.dictionaries(st.sampled_from(["h1", "h2", "h3"]), st.integers(0, 100))
sizes = st.dictionaries(st.sampled_from(["ds-1", "ds-2", "ds-3"]), st.integers(0, 1 << 50))


@given(counts, sizes)
def test_the_host_with_the_fewest_scopes_and_the_datastore_with_the_fewest_bytes(scopes, held):
    """R8: a cluster and a pool become one host and one datastore that it reaches."""
    host, datastore = choose(EAST, "compute", "gold", Load(scopes, held), to_provider=False)
    assert scopes.get(host, 0) == min(scopes.get(name, 0) for name in ("h1", "h2"))
    assert held.get(datastore, 0) == min(held.get(name, 0) for name in ("ds-1", "ds-2"))
    assert (host, datastore) == choose(EAST, "compute", "gold", Load(scopes, held), to_provider=True)


def test_only_hosts_that_reach_the_datastore():
    assert choose(EAST, "compute", "ds-3", Load({"h1": 50}), to_provider=False) == ("h1", "ds-3")
    with pytest.raises(InvalidError, match="does not reach"):
        choose(EAST, "h3", "gold", Load(), to_provider=False)


@pytest.mark.parametrize("place", [("h1", "gold"), ("compute", "ds-1"), ("none", "gold")])
def test_what_is_hidden_cannot_be_named(place):
    """R8: the error offers what may be named, and nothing else."""
    with pytest.raises(NotFoundError) as told:
        choose(EAST, *place, Load(), to_provider=False)
    assert not {"h1", "h2", "ds-1", "ds-2"} & set(told.value.remedy.replace(",", " ").replace(".", " ").split())


def test_stores():
    assert store_of(EAST, "ds-2") == "file:///stores/us-east/ds-2"
    assert store_of(EAST, "ds-9") is None
    assert all(not place.members for place in shown(EAST, to_provider=False).hosts)


def test_roles_are_ordered():
    """R11: an operator may no more than an administrator; an auditor only reads."""
    assert ALLOWED[Role.ENTERPRISE_OPERATOR] < ALLOWED[Role.ENTERPRISE_ADMIN] < ALLOWED[Role.PROVIDER_ADMIN]
    assert ALLOWED[Role.PROVIDER_OPERATOR] < ALLOWED[Role.PROVIDER_ADMIN]
    assert ALLOWED[Role.AUDITOR] > READ
    assert {operation.split(".")[1] for operation in ALLOWED[Role.AUDITOR]} == {"read"}
    assert set(ALLOWED) == set(Role)


@given(st.text(), st.integers(-(1 << 63), (1 << 63) - 1))
def test_cursors_come_back_as_they_were(text, number):
    values = [text.replace("\0", ""), number]
    try:
        assert decode_cursor(encode_cursor(values), [str, int]) == values
    except InvalidError:
        pytest.fail("a cursor that was given is refused")


@given(st.text(max_size=60))
def test_a_cursor_that_is_none_is_refused(text):
    try:
        assert [type(value) for value in decode_cursor(text, [str, int])] == [str, int]
    except InvalidError as error:
        assert error.remedy
