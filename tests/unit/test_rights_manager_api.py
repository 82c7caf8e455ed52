"""R13, R21: rights by the REST API: what a denial says, explain, matrix, what-if, policies, bundle, record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from api_world import VPG_BODY, ApiWorld, api_world, filled
from cloud_world import LAW, OPEN_LAW
from fastapi.testclient import TestClient

from dr_cloud.model.decision import Decision
from dr_cloud.rights.bundle import open_bundle

CLOSED = {"regulation": LAW.model_dump(mode="json", by_alias=True)}
OPEN = {"regulation": OPEN_LAW.model_dump(mode="json", by_alias=True)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiWorld]:
    with api_world(tmp_path_factory.mktemp("world")) as made:
        yield made


@pytest.fixture
def admin(world: ApiWorld) -> Iterator[TestClient]:
    """The provider's administrator. Whatever a test puts in force is taken back."""
    client = world.by_role["provider-admin"]
    yield client
    assert client.post("/v1/rights/policies", json=OPEN).status_code == 201


def create(world: ApiWorld, site: str) -> Any:
    body = filled(VPG_BODY, {**world.names_a, "fresh": "denied", "target_site": site})
    body["targets"][0] |= {"host": "h1", "datastore": "ds-1"}
    return world.a.post("/v1/enterprises/-/vpgs", json=body)


def test_a_denial_says_why_and_where_it_would_be_allowed(world: ApiWorld, admin: TestClient) -> None:
    """R13.1: a problem of its own kind, with reasons, revision and the data centers that are open."""
    assert admin.post("/v1/rights/policies", json=CLOSED).status_code == 201
    answer = create(world, "uk-south")
    told = answer.json()
    assert answer.status_code == 403
    assert told["type"] == "urn:dr-cloud:problem:denied"
    assert told["reasons"] == ["uk-south lies in UK: nothing opens USA to UK"]
    assert told["detail"] == "policy denies it: uk-south lies in UK: nothing opens USA to UK"
    assert told["revision"] == world.by_role["auditor"].get("/v1/rights").json()["revision"]
    assert told["open"] == ["us-east"]
    assert told["remedy"] == "Open to acme: us-east."


def test_who_may_go_where(world: ApiWorld, admin: TestClient) -> None:
    """R13.1: for an enterprise each data center, open or why not; for the provider all of them."""
    admin.post("/v1/rights/policies", json=CLOSED)
    explained = world.a.get("/v1/enterprises/-/rights").json()
    assert explained["enterprise"] == "acme"
    places = {place["data_center"]: place for place in explained["data_centers"]}
    assert (places["us-east"]["open"], places["us-east"]["sources"]) == (True, ["acme-hq"])
    assert (places["uk-south"]["open"], places["uk-south"]["sources"]) == (False, [])
    assert places["uk-south"]["reasons"] == ["uk-south lies in UK: nothing opens USA to UK"]
    matrix = admin.get("/v1/rights/matrix").json()
    assert [row["enterprise"] for row in matrix] == ["acme", "brit"]
    assert matrix[0] == explained
    assert world.a.get("/v1/rights/matrix").json() == [explained]
    shown = {center["name"]: center["denied"] for center in world.a.get("/v1/data-centers").json()["items"]}
    assert shown == {"us-east": "", "uk-south": "uk-south lies in UK: nothing opens USA to UK"}


def test_a_change_can_be_looked_at_before(world: ApiWorld, admin: TestClient) -> None:
    """R13: nothing is changed by asking; what does not compile is told."""
    before = admin.get("/v1/rights").json()["revision"]
    assert admin.post("/v1/rights/what-if", json=CLOSED).json() == []
    wider = {"jurisdictions": {"UK": {}}}
    found = admin.post("/v1/rights/what-if", json={"regulation": wider}).json()
    stopped = {(one["enterprise"], one["kind"], one["after"]) for one in found}
    assert {("acme", "vpg", False), ("brit", "vpg", False), ("acme", "test", False)} <= stopped
    bad = admin.post("/v1/rights/what-if", json={"modules": {"x.rego": "package dr_cloud.x\n\n:::"}})
    assert (bad.status_code, bad.json()["type"]) == (422, "urn:dr-cloud:problem:invalid")
    assert admin.get("/v1/rights").json()["revision"] == before


def test_policies_are_applied_once_for_a_key(admin: TestClient) -> None:
    """R13, R21: the same key gets the same answer."""
    key = {"Idempotency-Key": "apply-once"}
    first = admin.post("/v1/rights/policies", json=CLOSED, headers=key)
    assert first.status_code == 201
    assert admin.post("/v1/rights/policies", json=CLOSED, headers=key).json() == first.json()
    newest = admin.get("/v1/rights/policies?limit=1").json()["items"]
    assert newest == [first.json()]
    assert newest[0]["by"] == "provider-admin of None"


def test_the_bundle_is_signed_and_has_its_revision(world: ApiWorld, admin: TestClient) -> None:
    """R13: what OPA servers fetch: the same revision is not sent twice, another is."""
    answer = admin.get("/v1/rights/bundle")
    assert answer.headers["content-type"] == "application/gzip"
    revision = answer.headers["etag"].strip('"')
    assert open_bundle(answer.content, world.world.rights.public_key).revision == revision
    again = admin.get("/v1/rights/bundle", headers={"If-None-Match": f'"x", "{revision}"'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", f'"{revision}"')
    admin.post("/v1/rights/policies", json=CLOSED)
    assert admin.get("/v1/rights/bundle", headers={"If-None-Match": f'"{revision}"'}).status_code == 200


def test_the_record_is_read_in_pages_and_verified(world: ApiWorld, admin: TestClient) -> None:
    """R13: each enterprise its own; the provider's people any, and their own."""
    seen: list[Decision] = []
    url: str | None = "/v1/enterprises/-/decisions?limit=3"
    while url is not None:
        answer = world.a.get(url)
        seen += [Decision.model_validate(item) for item in answer.json()["items"]]
        link = answer.headers.get("link", "")
        url = link[1 : link.index(">")] if link else None
    assert [decision.number for decision in seen] == list(range(1, len(seen) + 1))
    assert all(decision.digest() == decision.hash for decision in seen)
    check = world.a.get("/v1/enterprises/-/decisions/verify").json()
    assert (check["whole"], check["last"], check["hash"]) == (True, len(seen), seen[-1].hash)
    assert admin.get("/v1/enterprises/acme/decisions/verify").json()["whole"]
    own = admin.get("/v1/enterprises/-/decisions").json()["items"]
    assert {decision["point"] for decision in own} == {"policies"}


def test_no_secret_is_on_record(world: ApiWorld, admin: TestClient) -> None:
    """R13: neither tokens nor grants nor keys, in decisions, policies, problems."""
    secrets = [token.split(".")[1] for token in (*world.tokens.values(), world.token_b)]
    assert world.cloud.host_orders("us-east", "h1").targets[0].grant.startswith("eyJ")
    texts = [
        admin.get("/v1/enterprises/acme/decisions?limit=1000").text,
        admin.get("/v1/enterprises/-/decisions").text,
        admin.get("/v1/rights").text,
        admin.get("/v1/audit").text,
    ]
    assert not [secret for secret in secrets for text in texts if secret in text]
    assert "eyJ" not in "".join(texts)
