"""Every decision, on both engines: they must say the same, and it must be right."""

from __future__ import annotations

import itertools
import random

import pytest
from rights_engines import (
    NOW_S,
    SEED_CENTERS,
    SEED_ENTERPRISES,
    EngineWorld,
    asked,
    center,
    center_facts,
    mechanism,
    seed_facts,
    site,
    sources_with,
)

from dr_cloud.model.ids import Scope
from dr_cloud.model.rights import GRACE_SECONDS, Action, EnterpriseFacts, Place
from dr_cloud.rights.grant import verify
from dr_cloud.rights.rights import GrantRequest

pytestmark = pytest.mark.system
TO_PLACES = ("replicate", "keep", "test", "failover", "failback", "move")
BY_PERSONS = ("read", "logs", "operate")
GRANTED = [
    mechanism("adequacy", "UK", "CA"),
    mechanism("adequacy", "UK", "CA", end_s=NOW_S + 50, reference="the shorter"),
    mechanism("clauses", "UK", "BR", assessment="TIA-7", enterprises=["brit-uk"]),
    mechanism("derogation", "UK", "IN", enterprises=["brit-uk"], actions=["failover", "read"]),
    mechanism("adequacy", "APAC", "EU"),
    mechanism("adequacy", "EU-DE", "CH"),
    mechanism("adequacy", "USA", "CN", start_s=NOW_S + 10, end_s=NOW_S + 20),
]


def law_facts():
    facts = seed_facts(
        **{f"in_{where.lower()}": center_facts(where) for where in ("CA", "BR", "IN", "CH", "CN", "EU-DE", "EU-FR")},
        keys_abroad=center_facts("UK", keys="USA"),
        store_abroad=center_facts("UK", ds_far="USA"),
    )
    german = EnterpriseFacts(jurisdiction="EU-DE", sites={"home": "EU-DE"})
    stray = EnterpriseFacts(jurisdiction="MARS", sites={"home": "MARS"})
    return facts.model_copy(update={"enterprises": facts.enterprises | {"gut-de": german, "stray": stray}})


@pytest.fixture(scope="module", params=["embedded", "opa"])
def engine_kind(request, require_tool):
    if request.param == "opa":
        require_tool("opa")
    return request.param


@pytest.fixture(scope="module")
def seed(engine_kind, tmp_path_factory):
    world = EngineWorld(engine_kind, tmp_path_factory.mktemp("seed"), sources_with(), seed_facts())
    yield world
    world.close()


@pytest.fixture(scope="module")
def law(engine_kind, tmp_path_factory):
    world = EngineWorld(engine_kind, tmp_path_factory.mktemp("law"), sources_with(*GRANTED), law_facts())
    yield world
    world.close()


@pytest.fixture
def at(law):
    def set_to(now_s):
        law.now_s = now_s
        return law

    yield set_to
    law.now_s = NOW_S


@pytest.mark.parametrize("action", TO_PLACES)
def test_the_seeds_matrix(seed, action):
    """R13.1: USA enterprise A, UK enterprise B, APAC enterprise C; A and B have one owner, which opens nothing."""
    pairs = list(itertools.product(SEED_ENTERPRISES, SEED_CENTERS))
    answers = seed.rights.decide([asked(action, e, center(c, "ds-1"), source=site()) for e, c in pairs])
    allowed = {pair for pair, answer in zip(pairs, answers, strict=True) if answer.allow}
    assert allowed == {
        ("acme-us", "us-east"),
        ("acme-us", "us-west"),
        ("brit-uk", "uk-south"),
        ("coral-apac", "apac-1"),
    }
    for (enterprise, name), answer in zip(pairs, answers, strict=True):
        assert answer.revision == seed.rights.state().wanted
        home, there = SEED_ENTERPRISES[enterprise], SEED_CENTERS[name]
        if answer.allow:
            assert (answer.reasons, answer.until_s, answer.jurisdictions) == ([], None, [there])
        else:
            assert answer.reasons == [f"{name} lies in {there}: nothing opens {home} to {there}"]
            assert answer.jurisdictions == []


@pytest.mark.parametrize("action", BY_PERSONS)
def test_the_operators_place_counts(seed, action):
    """R13.3: access from a third country is a transfer."""
    for enterprise, home in SEED_ENTERPRISES.items():
        for seat in ("USA", "UK", "APAC"):
            answer = seed.decide(asked(action, enterprise, seat=seat))
            assert answer.allow == (seat == home)
            if seat != home:
                assert answer.reasons == [f"the person sits in {seat}: nothing opens {home} to {seat}"]
        assert seed.decide(asked(action, enterprise, seat="")).reasons == ["it is not known where the person sits"]
        assert seed.decide(asked(action, enterprise)).reasons == ["it is not said who asks"]


def test_an_operator_abroad_may_not_start_a_test(seed):
    """R13.3"""
    place = center("us-east")
    for action in ("test", "failover", "failback", "move"):
        assert seed.decide(asked(action, "acme-us", place, seat="USA")).allow
        assert not seed.decide(asked(action, "acme-us", place, seat="UK")).allow


def test_a_site_abroad_is_where_its_data_comes_from(seed):
    assert seed.decide(asked("replicate", "acme-us", center("uk-south"), source=site("branch"))).allow
    assert not seed.decide(asked("replicate", "acme-us", center("us-east"), source=site("branch"))).allow
    assert not seed.decide(asked("failback", "acme-us", site("branch"), source=center("us-east"))).allow
    assert seed.decide(asked("failback", "acme-us", site(), source=center("us-east"))).allow


def test_who_connects(seed, law):
    """R13.1"""
    answer = seed.decide(asked("connect", "acme-us", source=site()))
    assert (answer.allow, answer.jurisdictions) == (True, ["USA"])
    assert seed.decide(asked("connect", "acme-us", source=site("moon"))).reasons == ["site moon is not known"]
    assert not law.decide(asked("connect", "stray", source=site())).allow
    assert law.decide(asked("connect", "brit-uk", source=site())).jurisdictions == ["BR", "CA", "UK"]
    german = law.decide(asked("connect", "gut-de", source=site()))
    assert german.jurisdictions == ["CH", "EU-DE", "EU-FR"]
    assert german.until_s == NOW_S + 100


@pytest.mark.parametrize(
    ("now_s", "allow", "ground"),
    [
        (NOW_S - 101, False, ""),
        (NOW_S - 100, True, "adequacy UK-CA"),
        (NOW_S + 60, True, "adequacy UK-CA"),
        (NOW_S + 99, True, "adequacy UK-CA"),
        (NOW_S + 100, False, ""),
    ],
)
def test_adequacy_holds_for_all_while_it_lasts(at, now_s, allow, ground):
    """R13.1: a mechanism begins and ends by itself."""
    for enterprise in ("brit-uk",):
        answer = at(now_s).decide(asked("keep", enterprise, center("in-ca", "ds-1")))
        assert answer.allow is allow
        if allow:
            assert answer.until_s == NOW_S + 100  # the longer of two
            assert answer.reasons[0].startswith(f"UK to CA on adequacy: {ground}, until ")
        else:
            assert answer.reasons == ["in-ca lies in CA: nothing opens UK to CA"]


def test_the_state_tells_the_next_boundary(at):
    assert at(NOW_S - 101).rights.state().boundary_s == NOW_S - 100
    assert at(NOW_S + 10).rights.state().boundary_s == NOW_S + 20
    assert at(NOW_S + 100).rights.state().boundary_s is None


def test_an_answer_is_not_used_across_a_boundary(at):
    question = asked("keep", "acme-us", center("in-cn", "ds-1"))
    assert not at(NOW_S + 9.9).decide(question).allow
    assert at(NOW_S + 10.0).decide(question).allow
    assert at(NOW_S + 19.9).decide(question).allow
    assert not at(NOW_S + 20.0).decide(question).allow


def test_clauses_hold_for_whom_they_name(law):
    yes = law.decide(asked("keep", "brit-uk", center("in-br", "ds-1")))
    assert yes.allow and yes.reasons[0].startswith("UK to BR on contract clauses: clauses UK-BR, until ")
    facts = law_facts()
    other = EnterpriseFacts(jurisdiction="UK", owner="acme-holding", sites={"home": "UK"})
    law.rights.put_facts(facts.model_copy(update={"enterprises": facts.enterprises | {"other-uk": other}}))
    law.wait_current()
    assert not law.decide(asked("keep", "other-uk", center("in-br", "ds-1"))).allow
    assert law.decide(asked("keep", "other-uk", center("in-ca", "ds-1"))).allow


def test_a_derogation_holds_for_what_it_names(law):
    assert law.decide(asked("failover", "brit-uk", center("in-in"))).allow
    assert law.decide(asked("read", "brit-uk", seat="IN")).allow
    assert not law.decide(asked("replicate", "brit-uk", center("in-in"))).allow
    assert not law.decide(asked("logs", "brit-uk", seat="IN")).allow
    assert not law.decide(asked("failover", "acme-us", center("in-in"))).allow


def test_parts_of_one_whole_are_open(law):
    assert law.decide(asked("keep", "gut-de", center("in-eu-fr", "ds-1"))).until_s is None
    assert law.decide(asked("keep", "gut-de", center("in-ch", "ds-1"))).allow
    assert law.decide(asked("keep", "coral-apac", center("in-eu-fr", "ds-1"))).allow
    assert not law.decide(asked("keep", "gut-de", center("uk-south", "ds-1"))).allow


def test_keys_and_datastores_elsewhere_count(law):
    """R13.3"""
    no = law.decide(asked("keep", "brit-uk", center("keys-abroad", "ds-1")))
    assert no.reasons == ["the key of keys-abroad is held in USA: nothing opens UK to USA"]
    no = law.decide(asked("keep", "brit-uk", center("store-abroad", "ds-far")))
    assert no.reasons == ["datastore ds-far of store-abroad lies in USA: nothing opens UK to USA"]
    assert law.decide(asked("keep", "brit-uk", center("store-abroad", "ds-1"))).allow
    assert law.decide(asked("keep", "brit-uk", center("store-abroad"))).reasons == ["it is not said in which datastore"]


def test_the_territory_binds(law):
    """R13.2"""
    place = center("in-ca", "ds-1")
    assert law.decide(asked("keep", "brit-uk", place, territory=["UK", "CA"])).allow
    no = law.decide(asked("keep", "brit-uk", place, territory=["UK"]))
    assert no.reasons == ["in-ca lies in CA outside of the territory UK"]
    assert law.decide(asked("keep", "gut-de", center("in-eu-fr", "ds-1"), territory=["EU"])).allow
    assert not law.decide(asked("keep", "gut-de", center("in-ch", "ds-1"), territory=["EU"])).allow
    assert law.decide(asked("read", "brit-uk", seat="CA")).allow
    assert not law.decide(asked("read", "brit-uk", seat="CA", territory=["UK"])).allow


def test_a_grant_follows_the_yes_and_ends_with_its_ground(law):
    scope = Scope("brit-uk", "erp", "t1")

    def wanted(place, **more):
        question = asked("keep", "brit-uk", place, vpg="erp", target="t1", **more)
        return GrantRequest(question=question, scope=scope, store="file:///x")

    (answer, token), (ends, short), (no, none) = law.rights.grant(
        [
            wanted(center("uk-south", "ds-1")),
            wanted(center("in-ca", "ds-1")),
            wanted(center("us-east", "ds-1")),
        ]
    )
    grant = verify(token, law.rights.public_key, scope, "uk-south", "file:///x", NOW_S)
    assert answer.allow and grant.until_s == NOW_S + GRACE_SECONDS and grant.revision == answer.revision
    assert ends.allow and verify(short, law.rights.public_key, scope, "in-ca", "file:///x", NOW_S).until_s == (
        NOW_S + 100
    )
    assert not no.allow and none == ""


def all_questions():
    """A question of every kind about every enterprise and place, and a little of what is not known."""
    enterprises = ["brit-uk", "acme-us", "gut-de", "stray", "nobody"]
    centers = [*law_facts().data_centers, "nowhere"]
    places: list[Place | None] = [None, site(), site("moon"), center("store-abroad", "ds-far")]
    places += [center(name, datastore) for name in centers for datastore in ("", "ds-1")]
    sources: list[Place | None] = [None, site(), site(), center("uk-south", "ds-1")]
    territories = [[], [], [], ["UK", "EU"], ["MARS"]]
    homes = {name: facts.jurisdiction for name, facts in law_facts().enterprises.items()}
    chance = random.Random(13)
    for enterprise, place, action in itertools.product(enterprises, places, Action):
        seat = chance.choice([None, None, None, *[homes.get(enterprise, "")] * 3, "UK", "EU-FR", "", "MARS"])
        source, territory = chance.choice(sources), chance.choice(territories)
        yield asked(action, enterprise, place, seat, source=source, territory=territory)


def test_both_engines_say_the_same(tmp_path, require_tool):
    """The same answer to every question: allowed or not, with the same reasons, ends and jurisdictions."""
    require_tool("opa")
    questions = list(all_questions())
    answers = []
    for kind in ("embedded", "opa"):
        world = EngineWorld(kind, tmp_path, sources_with(*GRANTED), law_facts())
        try:
            answers.append(world.rights.decide(questions))
        finally:
            world.close()
    differing = [(q, e, o) for q, e, o in zip(questions, *answers, strict=True) if e != o]
    assert differing == []
    allowed = sum(answer.allow for answer in answers[0])
    assert 50 < allowed < len(questions) / 2
    assert all(answer.answered for answer in answers[0])
