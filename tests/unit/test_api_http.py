"""The API as HTTP: problems, idempotency, pages, waiting, what every answer carries."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from api_world import ApiWorld, api_world
from structlog.testing import capture_logs

from dr_cloud.api.app import make_app
from dr_cloud.api.headers import BODY_BYTES_MAX


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiWorld]:
    with api_world(tmp_path_factory.mktemp("world")) as made:
        yield made


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "word"),
    [
        ("GET", "/v1/nowhere", {}, 404, "not-found"),
        ("GET", "/", {}, 404, "not-found"),
        ("GET", "/v1/vpgs/", {}, 404, "not-found"),
        ("PATCH", "/v1/tasks", {}, 405, "method-not-allowed"),
        ("GET", "/v1/enterprises/-/vpgs/none", {}, 404, "not-found"),
        ("GET", "/v1/enterprises/-/vpgs/No%00Name", {}, 422, "invalid"),
        ("GET", "/v1/enterprises/-/vpgs?limit=0", {}, 422, "invalid"),
        ("GET", "/v1/enterprises/-/vpgs?limit=1001", {}, 422, "invalid"),
        ("GET", "/v1/enterprises/-/vpgs?limits=1", {}, 422, "invalid"),
        ("GET", "/v1/enterprises/-/vpgs?cursor=nonsense", {}, 422, "invalid"),
        ("GET", "/v1/tasks/x/wait?timeout_seconds=inf", {}, 422, "invalid"),
        ("POST", "/v1/tokens", {"content": b"{", "headers": {"content-type": "application/json"}}, 422, "invalid"),
        ("POST", "/v1/tokens", {"content": b"\xff\xfe", "headers": {"content-type": "application/json"}}, 422, ""),
        ("POST", "/v1/tokens", {"content": b"x" * (BODY_BYTES_MAX + 1)}, 413, ""),
        ("POST", "/v1/tokens", {"json": {"name": "x", "role": "auditor", "extra": 1}}, 422, "invalid"),
        ("POST", "/v1/tokens", {"json": {"name": "x", "role": "king"}}, 422, "invalid"),
    ],
)
def test_what_is_wrong_is_a_problem_that_says_what_to_do(
    world: ApiWorld, method: str, path: str, more: dict[str, object], status: int, word: str
) -> None:
    """R21: RFC 9457 for everything that fails, also before an operation is reached."""
    response = world.a.request(method, path, **more)  # type: ignore[arg-type]
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert problem["type"].startswith(f"urn:dr-cloud:problem:{word}")
    assert problem["detail"]
    assert problem["remedy"]
    assert problem["request_id"] == response.headers["x-request-id"]


def test_what_was_sent_is_not_repeated(world: ApiWorld) -> None:
    body = {"enterprise": "brit-uk", "site": "x", "secret": "tell-nobody" * 100, "csr": 5}
    assert "tell-nobody" not in world.anyone.post("/v1/pair", json=body).text


def test_every_answer_carries_its_headers(world: ApiWorld) -> None:
    for path in ("/v1/enterprises", "/v1/nowhere"):
        headers = world.a.get(path, headers={"X-Request-ID": "abc-123-def"}).headers
        assert headers["x-request-id"] == "abc-123-def"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "strict-transport-security" in headers
    assert world.a.get("/v1/enterprises", headers={"X-Request-ID": "evil id\t"}).headers["x-request-id"] != "evil id\t"


def test_the_log_names_the_request_and_no_secret(world: ApiWorld) -> None:
    with capture_logs() as lines:
        made = world.a.post(
            "/v1/tokens", json={"name": "n", "role": "auditor", "enterprise": world.names_a["enterprise"]}
        )
        world.a.get("/v1/enterprises", params={"cursor": "in-the-query"})
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["path"] for line in requests] == ["/v1/tokens", "/v1/enterprises"]
    assert requests[0]["principal"] == world.principal_a.id
    assert requests[0]["request_id"] == made.headers["x-request-id"]
    for secret in (made.json()["secret"], world.token_a, "in-the-query"):
        assert secret not in str(lines)


def test_the_same_key_is_carried_out_once(world: ApiWorld) -> None:
    """R21: a POST whose answer was lost may be sent again."""
    key = {"Idempotency-Key": "one-and-only"}
    body = {"name": "idem", "role": "auditor", "enterprise": world.names_a["enterprise"]}
    first, again = (world.a.post("/v1/tokens", json=body, headers=key) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json()["token"] == again.json()["token"]
    assert first.json()["secret"]
    assert again.json()["secret"] == ""  # only its hash was kept
    listed = [token["name"] for token in world.a.get("/v1/tokens").json()["items"]]
    assert listed.count("idem") == 1
    other = world.a.post("/v1/tokens", json={**body, "name": "other"}, headers=key)
    assert other.status_code == 409
    assert "Draw a new key" in other.json()["remedy"]
    elsewhere = world.a.post(f"/v1/enterprises/-/sites/{world.names_a['site']}/pairing", headers=key)
    assert elsewhere.status_code == 409


def test_a_list_is_whole_over_its_pages(world: ApiWorld) -> None:
    whole = [vpg["name"] for vpg in world.a.get("/v1/enterprises/-/vpgs").json()["items"]]
    assert len(whole) >= 3
    names, url = [], "/v1/enterprises/-/vpgs?limit=1&name_begins="
    while url:
        response = world.a.get(url)
        names += [vpg["name"] for vpg in response.json()["items"]]
        url = response.links.get("next", {}).get("url", "")
        assert bool(url) == (response.json()["next_cursor"] is not None)
    assert names == whole


def test_long_work_is_a_task_that_can_be_waited_for(world: ApiWorld) -> None:
    """R19: a task is told at once; waiting has an interval and a time-out."""
    begun = world.a.post(f"/v1/enterprises/-/vpgs/{world.names_a['vpg']}/force-sync")
    assert begun.status_code == 202, begun.text
    assert begun.headers["location"] == f"/v1/tasks/{begun.json()['id']}"
    before = time.monotonic()
    waited = world.a.get(begun.headers["location"] + "/wait", params={"timeout_seconds": 0.3, "poll_seconds": 0.05})
    assert time.monotonic() - before < 2
    assert waited.json()["id"] == begun.json()["id"]


def test_provider_people_name_the_enterprise(world: ApiWorld) -> None:
    admin = world.by_role["provider-admin"]
    assert {vpg["enterprise"] for vpg in admin.get("/v1/enterprises/-/vpgs").json()["items"]} >= {
        world.names_a["enterprise"],
        world.names_b["enterprise"],
    }
    asked = admin.get("/v1/enterprises/-/sites")
    assert (asked.status_code, asked.json()["remedy"]) == (422, "Name the enterprise in place of -.")


def test_what_nobody_foresaw_tells_nothing_of_the_inside(world: ApiWorld) -> None:
    class Broken:
        def authenticate(self, secret: str) -> None:
            raise RuntimeError("the inside: " + secret)

    app = make_app(Broken())  # type: ignore[arg-type]
    with capture_logs() as lines:
        response = world.client("s3cret", app).get("/v1/enterprises")
    assert (response.status_code, response.headers["content-type"]) == (500, "application/problem+json")
    assert "inside:" not in response.text
    assert any(line["event"] == "request failed" for line in lines)
