"""R11: an enterprise with valid credentials aims at another's things, through every operation there is.

What belongs to another must look exactly as what does not exist. So each operation is called twice, once with the
other's name and once with a name that nothing has; with those names blanked, the two answers must be equal, headers
too. And nothing of the other's (all of it carries a marker) may be in any answer.

The operations are taken from the OpenAPI document: one that no case here knows fails the test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from api_world import BODIES, MARKER, OPEN, QUERIES, ApiWorld, Names, api_world, filled, operations
from httpx import Response

OF_PROVIDER = {
    "register_enterprise",
    "center_hosts",
    "deploy_center_vdsa",
    "undeploy_center_vdsa",
    "policies",
    "apply_policies",
    "what_if",
    "rights_bundle",
}
"""No enterprise's own people may: forbidden, whatever is aimed at."""
NO_NAMES = {
    "rights_state",
    "rights_matrix",
    "policies",
    "rights_bundle",
    "enterprises",
    "data_centers",
    "data_center",
    "health",
    "alerts",
    "audit",
    "tasks",
    "tokens",
    "events",
}
"""Nothing of an enterprise is named in their path; their query and what they tell have tests of their own."""
NARROWED = {"tokens", "tasks", "alerts", "audit", "health"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiWorld]:
    with api_world(tmp_path_factory.mktemp("world")) as made:
        yield made


def seen(response: Response, *blanked: Names) -> tuple[int, str, dict[str, str]]:
    """Return all that the caller can see, with the names that it sent taken out."""
    text = response.text
    for names in blanked:
        for name in sorted(names.values(), key=len, reverse=True):
            text = text.replace(name, "NAME")
    text = re.sub(r'"request_id":"[0-9a-f]+"', "", text)
    changing = {"x-request-id", "content-length"}
    return response.status_code, text, {k: v for k, v in response.headers.items() if k not in changing}


def call(world: ApiWorld, operation: str, in_path: Names, in_body: Names) -> Response:
    method, path, _ = operations()[operation]
    url = path.format(**in_path) + QUERIES.get(operation, "")
    return world.a.request(method, url, json=filled(BODIES.get(operation), in_body))


def test_every_operation_has_its_case() -> None:
    unknown = []
    for name, (_, path, has_body) in operations().items():
        if has_body and name not in BODIES and name not in OPEN:
            unknown.append(f"{name} takes a body: say in BODIES what of an enterprise it can name")
        if "{" not in path and name not in OPEN | NO_NAMES | set(BODIES):
            unknown.append(f"{name} names nothing in its path: how could it tell of another's things?")
    assert unknown == []


def test_what_one_may_list_tells_nothing_of_another(world: ApiWorld) -> None:
    """Every list and every record that enterprise A may read, and the whole stream of events."""
    # First of all: later A has written names of B's itself, into its own audit log.
    told = 0
    for operation, (method, path, _) in operations().items():
        if method != "GET" or operation in OF_PROVIDER | {"events"}:
            continue
        url = path.format(**world.names_a) + QUERIES.get(operation, "")
        response = world.a.get(url)
        assert MARKER not in response.text + str(response.headers), operation
        assert world.names_b["enterprise"] not in response.text, operation
        told += response.is_success
    assert told >= 25
    events = world.cloud.events(world.principal_a, 0, 1000)
    assert events
    assert {event.enterprise for event in events} == {world.names_a["enterprise"]}


@pytest.mark.parametrize("operation", [name for name in sorted(operations()) if name not in OPEN | NO_NAMES])
def test_anothers_things_are_as_things_that_are_not(world: ApiWorld, operation: str) -> None:
    own, others, missing = world.names_a, world.names_b, world.names_missing
    path = operations()[operation][1]
    inner = set(re.findall(r"{(\w+)}", path)) - {"enterprise"}
    aims: list[tuple[Names, Names]] = []
    if "{enterprise}" in path:
        # The other's enterprise by its name, and all that is in it.
        aims.append(({**own, **others}, {**own, **missing}))
    for kind in inner & set(others):
        # One thing of the other's among one's own: its VPG, its site's host, its test …
        aims.append(({**own, kind: others[kind]}, {**own, kind: missing[kind]}))
    for there, nowhere in aims:
        real, none = call(world, operation, there, own), call(world, operation, nowhere, own)
        assert seen(real, others, missing) == seen(none, others, missing)
        assert real.status_code == (403 if operation in OF_PROVIDER else 404), real.text
        assert MARKER not in seen(real, others)[1]


@pytest.mark.parametrize("operation", [name for name in sorted(operations()) if name in BODIES])
def test_anothers_things_in_a_body_are_as_things_that_are_not(world: ApiWorld, operation: str) -> None:
    own, others, missing = world.names_a, world.names_b, world.names_missing
    for kind in sorted(set(re.findall(r"{(\w+)}", json.dumps(BODIES[operation]))) & set(others)):
        real = call(world, operation, own, {**own, kind: others[kind]})
        if real.is_success:
            # A server that no tap has announced yet is a name to come. Nothing may be told of the other's server.
            assert kind == "server"
            assert MARKER not in seen(real, others)[1]
            spare = {**own, "fresh": "fresh-2", "vpg": "crm"}
            assert call(world, operation, spare, {**spare, kind: missing[kind]}).status_code == real.status_code
            continue
        none = call(world, operation, own, {**own, kind: missing[kind]})
        assert seen(real, others, missing) == seen(none, others, missing)
        assert 400 <= real.status_code < 500


@pytest.mark.parametrize("operation", sorted(NARROWED))
def test_a_list_cannot_be_narrowed_to_another(world: ApiWorld, operation: str) -> None:
    path = operations()[operation][1]
    real = world.a.get(path, params={"enterprise": world.names_b["enterprise"]})
    none = world.a.get(path, params={"enterprise": world.names_missing["enterprise"]})
    assert seen(real, world.names_b, world.names_missing) == seen(none, world.names_b, world.names_missing)
    assert real.status_code == 404


def test_anothers_cursor_opens_nothing(world: ApiWorld) -> None:
    theirs = world.b.get("/v1/enterprises/-/vpgs", params={"limit": 1}).json()["next_cursor"]
    assert theirs
    mine = world.a.get("/v1/enterprises/-/vpgs", params={"cursor": theirs})
    assert MARKER not in mine.text


def test_one_key_of_two_callers_is_two_keys(world: ApiWorld) -> None:
    """An idempotency key belongs to its caller: another's with the same letters gets its own answer."""
    made = []
    for client, names in ((world.a, world.names_a), (world.b, world.names_b)):
        body = {"name": "k", "role": "auditor", "enterprise": names["enterprise"]}
        made.append(client.post("/v1/tokens", json=body, headers={"Idempotency-Key": "the-same"}).json())
    assert [one["token"]["enterprise"] for one in made] == [world.names_a["enterprise"], world.names_b["enterprise"]]
    assert made[0]["secret"] != made[1]["secret"] != ""


def test_pairing_tells_nothing_of_who_is_there(world: ApiWorld) -> None:
    answers = [
        world.anyone.post(
            "/v1/pair", json={**world.pair_body, "enterprise": names["enterprise"], "site": names["site"]}
        )
        for names in (world.names_b, world.names_missing)
    ]
    blank = (world.names_b, world.names_missing)
    assert seen(answers[0], *blank) == seen(answers[1], *blank)
    assert answers[0].status_code in (401, 404)


@pytest.mark.parametrize("operation", [name for name in sorted(operations()) if name not in OPEN])
def test_nobody_gets_in_without_a_token(world: ApiWorld, operation: str) -> None:
    method, path, _ = operations()[operation]
    body = filled(BODIES.get(operation), world.names_a)
    url = path.format(**world.names_a) + QUERIES.get(operation, "")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic YTpi"}):
        response = world.anyone.request(method, url, json=body, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["content-type"] == "application/problem+json"
