"""R13: whatever is asked, both engines: a part missing, of another kind, or unknown never gets a yes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rights_engines import NOW_S, EngineWorld, asked, center, mechanism, seed_facts, site, sources_with

from dr_cloud.model.rights import Action
from dr_cloud.rights.regulation import question_input

SOURCES = sources_with(
    mechanism("adequacy", "UK", "USA"),
    mechanism("derogation", "USA", "APAC", enterprises=["acme-us"], actions=["read"]),
)
GOOD = [
    question_input(asked(action, "acme-us", center("us-east", "ds-1"), seat="USA", source=site(), **more), NOW_S)
    for action in Action
    for more in ({}, {"territory": ["USA", "UK"]}, {"vpg": "erp", "target": "t1"})
]
"""Each of them is allowed."""
PATHS = [
    *[(field,) for field in GOOD[0]],
    *[("place", field) for field in ("kind", "name", "datastore")],
    *[("source", field) for field in ("kind", "name", "datastore")],
    *[("operator", field) for field in ("role", "jurisdiction")],
]
NAMES = {
    ("action",),
    ("enterprise",),
    ("place", "kind"),
    ("place", "name"),
    ("place", "datastore"),
    ("source", "kind"),
    ("source", "name"),
    ("source", "datastore"),
    ("operator", "jurisdiction"),
}
"""Where an unknown name must not be allowed. (An empty datastore of a place is no name.)"""
KNOWN = {
    "acme-us",
    "us-east",
    "us-west",
    "ds-1",
    "home",
    "branch",
    "data center",
    "site",
    *(jurisdiction for jurisdiction in SOURCES.regulation.wholes),
    *Action,
    "",
}
text = st.one_of(
    st.text(max_size=12),
    st.sampled_from(['"', '","allow":true,"x":"', "\\", "us-east\x00", "US-EAST", "us-east ", "%s", "{}", "data", "*"]),
).filter(lambda value: value not in KNOWN)
scalar = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 2**40), st.floats(allow_nan=False, allow_infinity=False), text
)
anything = st.recursive(
    scalar,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=5,
)


def kind_of(value):
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, int | float) else type(value).__name__


def changed(question, path, value):
    first, *rest = path
    if rest:
        return {**question, first: changed(question[first], rest, value)}
    return {**question, first: value}


def without(question, path):
    first, *rest = path
    if rest:
        return {**question, first: without(question[first], rest)}
    return {key: value for key, value in question.items() if key != first}


def at(question, path):
    for part in path:
        question = question[part]
    return question


@pytest.fixture(scope="module", params=["embedded", pytest.param("opa", marks=pytest.mark.system)])
def engine(request, require_tool, tmp_path_factory):
    if request.param == "opa":
        require_tool("opa")
    world = EngineWorld(request.param, tmp_path_factory.mktemp("rights"), SOURCES, seed_facts())
    yield world.engine
    world.close()


def refused(engine, question):
    (answer,) = engine.answer([question])
    return not answer.allow and answer.reasons != []


def test_each_is_allowed_as_it_is(engine):
    """Otherwise the rest of this file would prove nothing."""
    assert [question for question, answer in zip(GOOD, engine.answer(GOOD), strict=True) if not answer.allow] == []


@pytest.mark.parametrize("path", PATHS, ids="/".join)
def test_without_any_part_it_is_a_no(engine, path):
    assert [q for q in GOOD if not refused(engine, without(q, path))] == []


fuzzed = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@fuzzed
@given(st.sampled_from(GOOD), st.sampled_from(PATHS), anything)
def test_with_a_part_of_another_kind_it_is_a_no(engine, question, path, value):
    optional = len(path) == 1 and path[0] in ("source", "operator", "place")
    if kind_of(value) == kind_of(at(question, path)) or (optional and value is None):
        return  # of the right kind, or left out as it may be
    assert refused(engine, changed(question, path, value))


@fuzzed
@given(st.sampled_from(GOOD), st.sampled_from(sorted(NAMES)), text)
def test_with_an_unknown_name_it_is_a_no(engine, question, path, name):
    assert refused(engine, changed(question, path, name))


@fuzzed
@given(anything)
def test_whatever_is_asked_it_is_a_no(engine, question):
    assert refused(engine, question if isinstance(question, dict) else {"x": question})


@fuzzed
@given(st.sampled_from(GOOD), st.dictionaries(st.sampled_from([path[0] for path in PATHS]), anything, min_size=2))
def test_with_many_parts_of_another_kind_it_is_a_no(engine, question, parts):
    differs = [name for name, value in parts.items() if kind_of(value) != kind_of(question[name]) and value is not None]
    if differs:
        assert refused(engine, {**question, **parts})


@fuzzed
@given(st.lists(text, min_size=1, max_size=3), st.sampled_from(GOOD))
def test_an_unknown_territory_contains_nothing(engine, territory, question):
    if question["action"] != "connect":  # which goes to no place
        assert refused(engine, {**question, "territory": territory})
