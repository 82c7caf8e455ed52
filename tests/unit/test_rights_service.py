"""The service over the embedded engine: what it believes, remembers, refuses, and what it changes when it refuses."""

from __future__ import annotations

import threading

import pytest
from rights_engines import (
    NOW_S,
    EngineWorld,
    asked,
    center,
    center_facts,
    mechanism,
    seed_facts,
    site,
    sources_with,
)

from dr_cloud.model.errors import DamagedError, InvalidError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.rights import CACHE_SECONDS, Answer, EnterpriseFacts
from dr_cloud.rights.bundle import Signer, build_bundle
from dr_cloud.rights.dialect import check_dialect
from dr_cloud.rights.embedded import EmbeddedEngine
from dr_cloud.rights.engine import read_answer
from dr_cloud.rights.rights import GrantRequest
from dr_cloud.rights.service import RightsService

HOME = asked("keep", "acme-us", center("us-east", "ds-1"), vpg="erp", target="t1")
ABROAD = asked("keep", "brit-uk", center("us-east", "ds-1"))
OPEN = sources_with(mechanism("adequacy", "UK", "USA"))
HEAD = "package dr_cloud.rights\n\nimport rego.v1\n\n"


@pytest.fixture
def world(tmp_path):
    world = EngineWorld("embedded", tmp_path, sources_with(), seed_facts())
    yield world
    world.close()


# -- answers --

WHOLE = {"allow": True, "reasons": [], "until_s": None, "jurisdictions": ["USA"], "revision": "r1"}


def test_a_whole_decision_is_an_answer():
    assert read_answer(WHOLE) == Answer(**WHOLE)


@pytest.mark.parametrize(
    "decision",
    [
        None,
        True,
        [],
        {},
        {"allow": True},
        WHOLE | {"allow": 1},
        WHOLE | {"allow": "true"},
        WHOLE | {"allow": [True]},
        WHOLE | {"reasons": None},
        WHOLE | {"reasons": [1]},
        WHOLE | {"until_s": "soon"},
        WHOLE | {"until_s": 1.5},
        WHOLE | {"jurisdictions": "USA"},
        WHOLE | {"revision": ""},
        WHOLE | {"revision": None},
        WHOLE | {"more": 1},
        WHOLE | {"allow": False},
        {name: value for name, value in WHOLE.items() if name != "until_s"},
    ],
)
def test_what_is_not_exactly_a_decision_is_no_answer(decision):
    """R13: undefined, broken, incomplete: no."""
    answer = read_answer(decision)
    assert not answer.allow and not answer.answered and answer.reasons[0].startswith("no answer")


# -- before and after --


def test_without_policies_or_facts_nothing_is_answered(tmp_path):
    rights = RightsService(tmp_path, EmbeddedEngine(), lambda: NOW_S)
    for put in (lambda: None, lambda: rights.put_sources(sources_with())):
        put()
        assert not rights.decide([HOME])[0].answered
        assert rights.grant([GrantRequest(question=HOME, scope=Scope("acme-us", "erp", "t1"), store="x")])[0][1] == ""
        assert rights.state().wanted == "" and rights.state().problem
        with pytest.raises(UnavailableError):
            rights.bundle()
    assert rights.put_facts(seed_facts()) == rights.state().revision == rights.bundle()[0] != ""
    assert rights.decide([HOME])[0].allow
    assert rights.state().problem == ""
    rights.close()
    later = RightsService(tmp_path, EmbeddedEngine(), lambda: NOW_S)
    assert later.public_key == rights.public_key
    assert not later.decide([HOME])[0].answered


def test_an_answer_is_remembered_for_a_moment_and_under_its_revision_only(world, monkeypatch):
    counted = []
    ask = world.engine.answer
    monkeypatch.setattr(world.engine, "answer", lambda inputs: counted.extend(inputs) or ask(inputs))
    for _ in range(3):
        assert world.rights.decide([HOME, HOME])[0].allow
    assert len(counted) == 1
    world.now_s += CACHE_SECONDS
    world.decide(HOME)
    assert len(counted) == 2
    assert not world.decide(ABROAD).allow
    world.rights.put_sources(OPEN)
    assert world.decide(ABROAD).allow
    world.now_s -= 1  # a clock that goes back
    world.decide(ABROAD)
    assert len(counted) == 5


def test_what_is_put_again_changes_nothing(world):
    _, before = world.rights.bundle()
    world.rights.put_facts(seed_facts())
    world.rights.put_sources(sources_with())
    assert world.rights.bundle()[1] is before


def test_facts_are_looked_at_at_once(world):
    facts = seed_facts()
    moved = facts.data_centers | {"us-east": center_facts("UK")}
    world.rights.put_facts(facts.model_copy(update={"data_centers": moved}))
    assert not world.decide(HOME).allow
    assert world.decide(ABROAD).allow


# -- bundles --


def test_a_bad_bundle_leaves_the_old_one(world, tmp_path):
    """R13: and it is told."""
    bad = build_bundle(OPEN, seed_facts(), Signer.open(tmp_path / "forger"))[1]
    with pytest.raises(DamagedError):
        world.engine.load(bad, world.rights.public_key)
    assert "refused" in world.rights.state().problem
    assert world.decide(HOME).allow and not world.decide(ABROAD).allow


ALL_OPEN = 'decision := {"allow": true, "reasons": [], "until_s": null, "jurisdictions": [], "revision": "x"}'


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("package dr_cloud.rights\nallow if {", r"do not compile; .*rights\.rego:2:10"),
        (HEAD + "decision := {}", "no whole decision"),
        (HEAD + "allow := true", "undefined"),
        (HEAD + "decision := {} if input.nothing", "undefined"),
        (HEAD + ALL_OPEN, "not known at all"),
        (HEAD + "f(x) := [y | y := data.enterprises[x]]\ndecision := f(1)", "misunderstands"),
        (HEAD.replace("dr_cloud", "system") + ALL_OPEN, "in no package"),
    ],
)
def test_policies_that_cannot_be_used_change_nothing(world, module, part):
    """R13"""
    before = world.rights.state()
    with pytest.raises(InvalidError, match=part):
        world.rights.put_sources(sources_with(modules={"rights.rego": module}))
    assert world.rights.state() == before
    assert world.decide(HOME).allow


def test_what_ends_the_engines_process_does_not_end_this_one(world):
    """R13: new policies are tried in a process of their own."""
    modules = sources_with().modules
    # A rule that asks for the decision about something else: rego-cpp 1.5.2 aborts on it.
    recursive = (
        "\nothers[i] := answer if {\n\tsome i\n\tquestion := input.questions[i]\n"
        "\tanswer := decision with input as question\n}\n"
    )
    fatal = modules | {"rights.rego": modules["rights.rego"] + recursive}
    with pytest.raises(InvalidError, match="ends on them"):
        world.rights.put_sources(sources_with(modules=fatal))
    with pytest.raises(InvalidError, match="ends on them"):
        world.rights.what_if(sources_with(modules=fatal), [HOME])
    assert world.decide(HOME).allow


def test_policies_of_ones_own_are_taken(world):
    modules = sources_with().modules
    closed = modules | {"rights.rego": modules["rights.rego"].replace('"keep"', '"keep-nothing"')}
    revision = world.rights.put_sources(sources_with(modules=closed))
    assert not world.decide(HOME).allow
    assert world.decide(HOME).revision == revision
    assert world.decide(asked("test", "acme-us", center("us-east"))).allow


def test_what_if_changes_nothing(world):
    before = world.rights.state()
    answers = world.rights.what_if(OPEN, [HOME, ABROAD])
    assert [answer.allow for answer in answers] == [True, True]
    assert answers[1].reasons[0].startswith("UK to USA on adequacy")
    assert answers[0].revision != before.revision
    assert world.rights.state() == before
    assert not world.decide(ABROAD).allow


# -- grants --


@pytest.mark.parametrize(
    "request_",
    [
        GrantRequest(question=ABROAD, scope=Scope("brit-uk", "erp", "t1"), store="x"),
        GrantRequest(question=HOME, scope=Scope("brit-uk", "erp", "t1"), store="x"),
        GrantRequest(question=HOME, scope=Scope("acme-us", "crm", "t1"), store="x"),
        GrantRequest(question=HOME, scope=Scope("acme-us", "erp", "t2"), store="x"),
        GrantRequest(
            question=asked("test", "acme-us", center("us-east", "ds-1"), vpg="erp", target="t1"),
            scope=Scope("acme-us", "erp", "t1"),
            store="x",
        ),
        GrantRequest(
            question=asked("keep", "acme-us", site(), vpg="erp", target="t1"),
            scope=Scope("acme-us", "erp", "t1"),
            store="x",
        ),
    ],
)
def test_no_grant_for_what_was_not_asked_and_allowed(world, request_):
    """R13.3"""
    ((answer, grant),) = world.rights.grant([request_])
    assert not answer.allow and grant == "" and answer.reasons != []


# -- the embedded engine's ways --

NASTY = ['say "no"', 'x","allow":true,"y":"', "back\\slash", "new\nline", "é€😀", "%22", "100% {}", "[]", "\t"]


@pytest.mark.parametrize("name", NASTY)
def test_no_letter_in_a_name_changes_an_answer(world, name):
    facts = seed_facts()
    strange = facts.enterprises | {name: EnterpriseFacts(jurisdiction="USA", sites={"home": "USA"})}
    far = facts.data_centers | {name: center_facts("UK")}
    world.rights.put_facts(facts.model_copy(update={"enterprises": strange, "data_centers": far}))
    question = HOME.model_dump(mode="json") | {"now_s": NOW_S}

    def answer(**change):
        (given,) = world.engine.answer([question | change])
        return given

    assert answer(enterprise=name).allow
    place = {"kind": "data center", "name": name, "datastore": "ds-1"}
    assert answer(place=place).reasons == [f"{name} lies in UK: nothing opens USA to UK"]
    assert not answer(enterprise=name + "x").allow
    assert answer(action=name).reasons == [f"the action {name} is not known"]


def test_a_reference_of_any_letters_is_told_as_it_is(world):
    told = 'the "bridge", 100 % \\ é'
    world.rights.put_sources(sources_with(mechanism("adequacy", "UK", "USA", reference=told)))
    assert world.decide(ABROAD).reasons[0].startswith(f"UK to USA on adequacy: {told}, until ")


def test_many_may_ask_at_once(world):
    wrong = []

    def ask(enterprise, allowed):
        for i in range(30):
            answer = world.decide(asked("keep", enterprise, center("us-east", "ds-1"), vpg=f"{enterprise}{i}"))
            if answer.allow is not allowed:
                wrong.append(answer)

    threads = [threading.Thread(target=ask, args=pair) for pair in (("acme-us", True), ("brit-uk", False)) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    "text",
    [
        "f(name) := data.sites[name]",
        "f(name) := [s | s := data.sites[name][_]]",
        "f(a, name) if {\n\tsome s in input.x[ name ]\n\ts == a\n}",
        "x := 1\n\nf(name) := 1 if {\n\tname == 2\n}\nelse := 2 if {\n\tdata.x.y[name]\n}",
        "default f(_) := 1\n\nf(name) := rule[name]",
        "f([name, b]) := data.x[name]",
        'f(name) := data.x["a"][name]',
    ],
)
def test_an_argument_as_an_index_is_refused(text):
    with pytest.raises(InvalidError, match=r"x\.rego: function f uses its argument name as an index"):
        check_dialect("x.rego", f"package dr_cloud.x\n\n{text}\n")


@pytest.mark.parametrize(
    "text",
    [
        "f(place) := data.sites[place.name]",
        "f(name) := [s | key := name; s := data.sites[key][_]]",
        "f(name) := [name]",
        "f(name) := g([name])",
        '# data.x[name]\nf(name) := "data.x[name]"',
        "f(name) := 1\n\ng := data.x[name] if name := 1",
    ],
)
def test_what_the_embedded_engine_understands_is_taken(text):
    check_dialect("x.rego", f"package dr_cloud.x\n\n{text}\n")
