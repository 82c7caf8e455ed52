"""R13: where the manager asks: whatever goes wrong is a no, what stands is remembered for a while, grants are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from cloud_world import Clock

from dr_cloud.manager.desk import Desk
from dr_cloud.model.ids import Scope
from dr_cloud.model.rights import GRACE_SECONDS, Action, Answer, Operator, Place, Question, RightsState
from dr_cloud.model.units import SECOND_NS
from dr_cloud.rights.rights import GrantRequest

YES, NO, NONE = Answer(allow=True, reasons=[], revision="r1"), Answer(reasons=["no"], revision="r1"), Answer()
ASKED = Question(action=Action.REPLICATE, enterprise="acme", place=Place(kind="data center", name="us-east"))
SCOPE = Scope("acme", "erp", "dc1")


class Told:
    """A rights manager that says what a test tells it to."""

    def __init__(self) -> None:
        self.say: Callable[[Sequence[Any]], Any] = lambda asked: [YES] * len(asked)
        self.revision = "r1"
        self.asked = 0

    def decide(self, questions: Sequence[Question]) -> Any:
        self.asked += 1
        return self.say(questions)

    def grant(self, requests: Sequence[GrantRequest]) -> Any:
        self.asked += 1
        return [(answer, f"grant {self.asked}" if answer.allow else "") for answer in self.say(requests)]

    def state(self) -> RightsState:
        return RightsState(engine="embedded", wanted=self.revision, revision=self.revision)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def desk(told: Told, clock: Clock) -> Desk:
    return Desk(told, clock)  # type: ignore[arg-type]


def raises(asked: object) -> Any:
    raise TimeoutError("late")


@pytest.mark.parametrize(
    "say",
    [
        raises,
        lambda asked: [],
        lambda asked: [YES, YES],
        lambda asked: [Answer(allow=True, reasons=[])],
        lambda asked: [NO],
        lambda asked: [NONE],
        lambda asked: None,
    ],
    ids=["raises", "too few", "too many", "yes of nobody", "no", "no answer", "nothing"],
)
def test_whatever_goes_wrong_is_a_no(desk: Desk, told: Told, say: Callable[[Any], Any]) -> None:
    """R13: no answer, a broken answer, an answer to something else."""
    told.say = say
    for ask in (desk.ask, desk.ask_standing):
        (answer,) = ask([ASKED])
        assert not answer.allow
        assert answer.reasons
    assert desk.ask([]) == []


def test_answers_are_never_to_another_question(desk: Desk, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """R13: where many are asked in parts, each part has as many answers as questions, or none is a yes."""
    monkeypatch.setattr("dr_cloud.manager.desk._ASKED_AT_ONCE", 2)
    lengths = iter([1, 3])
    told.say = lambda asked: [YES] * next(lengths)
    asked = [ASKED.model_copy(update={"vpg": f"v{number}"}) for number in range(4)]
    assert not any(answer.allow for answer in desk.ask(asked))
    told.say = lambda asked: [YES] * len(asked)
    assert [answer.allow for answer in desk.ask(asked)] == [True] * 4
    wanted = [request(f"file:///{number}") for number in range(4)]
    lengths = iter([2, 1])
    told.say = lambda asked: [YES] * next(lengths)
    given = [bool(grant) for _, grant in desk.grants(wanted)]
    assert given == [True, True, False, False]


def test_a_yes_to_what_stands_is_remembered_while_there_is_no_answer(desk: Desk, told: Told, clock: Clock) -> None:
    """R13: for the time that is stated, never beyond its ground, and only by who asks for what stands."""
    told.say = lambda asked: [YES.model_copy(update={"until_s": clock() // SECOND_NS + 100})] * len(asked)
    desk.ask([ASKED])
    told.say = raises
    clock.pass_seconds(99)
    assert desk.ask_standing([ASKED])[0].allow
    assert not desk.ask([ASKED])[0].allow
    clock.pass_seconds(1)
    assert not desk.ask_standing([ASKED])[0].allow
    told.say = lambda asked: [YES]
    desk.ask([ASKED])
    told.say = raises
    clock.pass_seconds(GRACE_SECONDS - 1)
    assert desk.ask_standing([ASKED])[0].revision == "r1"
    clock.pass_seconds(1)
    assert not desk.ask_standing([ASKED])[0].allow


def test_a_no_is_the_end_of_a_yes(desk: Desk, told: Told) -> None:
    desk.ask([ASKED])
    told.say = lambda asked: [NO]
    assert not desk.ask_standing([ASKED])[0].allow
    told.say = raises
    assert not desk.ask_standing([ASKED])[0].allow


def test_what_a_person_was_allowed_is_not_remembered(desk: Desk, told: Told) -> None:
    """R13.3: who reads or acts needs an answer each time."""
    asked = ASKED.model_copy(update={"operator": Operator(role="enterprise-admin", jurisdiction="USA")})
    desk.ask([asked])
    told.say = raises
    assert not desk.ask_standing([asked])[0].allow


def test_another_question_is_another_answer(desk: Desk, told: Told) -> None:
    desk.ask([ASKED])
    told.say = raises
    for change in ({"enterprise": "brit"}, {"territory": ["UK"]}, {"action": Action.KEEP}, {"vpg": "erp"}):
        assert not desk.ask_standing([ASKED.model_copy(update=change)])[0].allow


def request(store: str = "file:///a") -> GrantRequest:
    return GrantRequest(question=ASKED.model_copy(update={"action": Action.KEEP}), scope=SCOPE, store=store)


def test_grants_are_kept_while_fresh(desk: Desk, told: Told, clock: Clock) -> None:
    """R13: a third of their life; under another revision, or for another store, a new one."""
    assert desk.grants([request()])[0][1] == "grant 1"
    clock.pass_seconds(299)
    assert desk.grants([request()])[0][1] == "grant 1"
    assert desk.grants([request("file:///b")])[0][1] == "grant 2"
    clock.pass_seconds(1)
    assert desk.grants([request()])[0][1] == "grant 3"
    told.revision = "r2"
    desk.state()
    assert desk.grants([request()])[0][1] == "grant 4"


def test_without_an_answer_the_old_grant_is_given_until_it_ends(desk: Desk, told: Told, clock: Clock) -> None:
    """R13: and a no takes it away at once."""
    desk.grants([request()])
    told.say = raises
    clock.pass_seconds(GRACE_SECONDS - 1)
    answer, grant = desk.grants([request()])[0]
    assert (answer.allow, grant) == (True, "grant 1")
    clock.pass_seconds(1)
    answer, grant = desk.grants([request()])[0]
    assert (answer.allow, answer.answered, grant) == (False, False, "")
    told.say = lambda asked: [YES]
    desk.grants([request()])
    told.say = lambda asked: [NO]
    clock.pass_seconds(300)
    assert desk.grants([request()]) == [(NO, "")]
    told.say = raises
    assert desk.grants([request()])[0][1] == ""


def test_what_has_run_out_is_forgotten(desk: Desk, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dr_cloud.manager.desk._KEPT_MAX", 10)
    for number in range(11):
        desk.ask([ASKED.model_copy(update={"vpg": f"v{number}"})])
        desk.grants([request(f"file:///{number}")])
    clock.pass_seconds(GRACE_SECONDS + 1)
    desk.ask([ASKED])
    desk.grants([request()])
    assert len(desk._allowed) == 1
    assert len(desk._grants) == 1


def test_a_rights_manager_that_is_gone_has_no_state(desk: Desk, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    assert desk.state() is not None
    monkeypatch.setattr(told, "state", lambda: raises(None))
    assert desk.state() is None
