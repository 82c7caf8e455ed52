"""What a VDSA serves: by orders, as long as a grant says that it may."""

from __future__ import annotations

import pytest

from dr_cloud.model.errors import DrCloudError, ForbiddenError, NotFoundError
from dr_cloud.model.ids import Scope
from dr_cloud.model.replication import TargetOrders
from dr_cloud.vdsa.granted import Granted

SHOP = Scope("acme", "shop", "east")
BOOKS = Scope("acme", "books", "east")


def orders(scope: Scope = SHOP, grant: str = "100", store: str = "file:///ds") -> TargetOrders:
    return TargetOrders(scope=scope, store=store, grant=grant)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def granted(clock: Clock) -> Granted:
    """Here a grant is the time until which it is good."""

    def check(target: TargetOrders) -> float:
        if not target.grant.isdecimal():
            raise DrCloudError("there is no grant" if not target.grant else "the grant is forged")
        return float(target.grant)

    return Granted(check, clock)


def test_what_is_granted_is_served_until_the_grant_ends(granted: Granted, clock: Clock) -> None:
    """R13.3: no grant, no store."""
    assert granted.add([orders()]) and not granted.add([orders()])
    assert granted.admit(SHOP) == "file:///ds" and granted.refused() == {}
    with pytest.raises(NotFoundError):
        granted.admit(BOOKS)
    clock.now_s = 100
    assert "has ended" in granted.refused()[SHOP]
    with pytest.raises(ForbiddenError, match="has ended"):
        granted.admit(SHOP)
    assert granted.replace([orders(grant="200")]) == (True, [])
    assert granted.admit(SHOP) == "file:///ds"


@pytest.mark.parametrize(("grant", "why"), [("", "no grant"), ("!", "forged")])
def test_orders_without_a_good_grant_open_nothing(granted: Granted, grant: str, why: str) -> None:
    """R13.3: whoever can write orders cannot write grants."""
    granted.replace([orders(grant=grant), orders(BOOKS)])
    with pytest.raises(ForbiddenError, match=why):
        granted.admit(SHOP)
    assert granted.admit(BOOKS)
    assert list(granted.refused()) == [SHOP]


@pytest.mark.parametrize("worse", ["", "!", "50"])
def test_a_good_grant_outlives_worse_ones_but_not_its_store(granted: Granted, clock: Clock, worse: str) -> None:
    granted.add([orders()])
    assert granted.replace([orders(grant=worse)]) == (False, [])
    clock.now_s = 99
    assert granted.admit(SHOP)
    granted.replace([orders(grant=worse, store="file:///elsewhere")])
    with pytest.raises(ForbiddenError):
        granted.admit(SHOP)


def test_what_orders_name_no_more_is_gone_whatever_its_grant(granted: Granted) -> None:
    granted.add([orders(), orders(BOOKS)])
    assert granted.replace([orders(BOOKS)]) == (True, [SHOP])
    with pytest.raises(NotFoundError):
        granted.admit(SHOP)
    assert [one.scope for one in granted.orders] == [BOOKS]
