"""R13: what the asking process knows of the rights manager's last answers, and when that counts no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dr_cloud.actors import rights
from dr_cloud.actors.cluster import Placement
from dr_cloud.actors.rights import RightsDesk
from dr_cloud.model.errors import UnavailableError
from dr_cloud.model.rights import CACHE_SECONDS, Action, Answer, Facts, Operator, Question, RightsState
from dr_cloud.rights.cache import KEPT_SECONDS

NOW_S = 1_800_000_000.0
FACTS = Facts(data_centers={}, enterprises={})
READS = Question(action=Action.READ, enterprise="acme", operator=Operator(role="enterprise-admin", jurisdiction="USA"))


class Actor:
    """A rights manager that says what a test tells it to, and counts what it is asked."""

    def __init__(self) -> None:
        self.revision = "r1"
        self.allow = True
        self.until_s: int | None = None
        self.away = False
        self.asked = 0
        self.during = lambda: None

    def call(self, timeout_seconds: float, method: str, *arguments: Any) -> Any:
        if self.away:
            raise UnavailableError("it is away")
        if method in ("put_facts", "put_sources"):
            return self.revision
        if method == "state":
            return RightsState(engine="embedded", wanted=self.revision, revision=self.revision)
        questions: Sequence[Question] = arguments[0]
        self.asked += len(questions)
        answer = Answer(allow=self.allow, reasons=["told"], revision=self.revision, until_s=self.until_s)
        self.during()
        return [answer for _ in questions]


@pytest.fixture
def actor() -> Actor:
    return Actor()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    at = [NOW_S]
    monkeypatch.setattr(rights.time, "time", lambda: at[0])
    return at


@pytest.fixture
def desk(actor: Actor, now: list[float], monkeypatch: pytest.MonkeyPatch) -> RightsDesk:
    desk = RightsDesk(Placement(namespace="n", local=True), "embedded")
    monkeypatch.setattr(desk, "_ask", actor.call)
    desk.put_facts(FACTS)
    return desk


def test_a_yes_is_known_for_a_moment(desk: RightsDesk, actor: Actor, now: list[float]) -> None:
    """R13: never longer than is stated, with what the rights manager itself keeps."""
    assert KEPT_SECONDS * 2 <= CACHE_SECONDS
    for _ in range(3):
        assert [answer.allow for answer in desk.decide([READS, READS])] == [True, True]
    assert actor.asked == 1
    now[0] += KEPT_SECONDS
    desk.decide([READS])
    assert actor.asked == 2
    now[0] -= 1  # a clock that goes back
    desk.decide([READS])
    assert actor.asked == 3


def test_a_no_is_always_asked_for(desk: RightsDesk, actor: Actor) -> None:
    actor.allow = False
    assert not desk.decide([READS])[0].allow
    actor.allow = True
    assert desk.decide([READS])[0].allow


def test_nobody_answers_for_another(desk: RightsDesk, actor: Actor) -> None:
    desk.decide([READS])
    actor.allow = False
    operator = Operator(role="enterprise-admin", jurisdiction="UK")
    for change in ({"enterprise": "brit"}, {"operator": operator}, {"action": Action.LOGS}, {"vpg": "erp"}):
        asked = READS.model_copy(update=change)
        assert [answer.allow for answer in desk.decide([asked, READS])] == [False, True]


def test_what_is_put_ends_what_was_known(desk: RightsDesk, actor: Actor) -> None:
    """R13: policies and facts count at once where they are put, also if nobody knows how that went."""
    desk.decide([READS])
    actor.revision, actor.allow = "r2", False
    desk.put_facts(FACTS)
    assert not desk.decide([READS])[0].allow
    actor.allow = True
    desk.decide([READS])
    actor.away = True
    with pytest.raises(UnavailableError):
        desk.put_facts(FACTS)
    actor.away, actor.allow = False, False
    assert not desk.decide([READS])[0].allow


def test_an_answer_of_before_is_not_kept(desk: RightsDesk, actor: Actor) -> None:
    """R13: one that was on its way while policies were put, and one of an engine that has not come to them."""

    def put() -> None:
        actor.revision = "r2"
        desk.put_facts(FACTS)

    actor.during = put
    assert desk.decide([READS])[0].revision == "r1"
    actor.during = lambda: None
    actor.revision = "r0"
    for _ in range(2):
        desk.decide([READS])
    assert actor.asked == 3


def test_a_yes_ends_with_what_it_rests_on(desk: RightsDesk, actor: Actor, now: list[float]) -> None:
    actor.until_s = int(NOW_S)
    desk.decide([READS])
    desk.decide([READS])
    assert actor.asked == 2


def test_who_puts_nothing_knows_nothing(actor: Actor, now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """R13: another process does not hear at once that policies have changed, so it asks each time."""
    desk = RightsDesk(Placement(namespace="n", local=True), "embedded")
    monkeypatch.setattr(desk, "_ask", actor.call)
    desk.state()
    for _ in range(3):
        desk.decide([READS])
    assert actor.asked == 3


def test_without_an_answer_it_is_a_no(desk: RightsDesk, actor: Actor, now: list[float]) -> None:
    """R13: what was known is over in a moment; then nothing is a yes."""
    desk.decide([READS])
    actor.away = True
    assert desk.decide([READS])[0].allow
    now[0] += KEPT_SECONDS
    (answer,) = desk.decide([READS])
    assert not answer.allow and not answer.answered
