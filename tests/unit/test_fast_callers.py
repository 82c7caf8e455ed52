"""Whose token it is: known for a moment, and never longer than it is true."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud_world import SYSTEM, Clock, World
from fastapi.testclient import TestClient

from dr_cloud.api.app import make_app
from dr_cloud.manager import enterprises
from dr_cloud.manager.callers import KNOWN_NS, Callers
from dr_cloud.model.cloud import NewToken, TokenRequest
from dr_cloud.model.errors import UnauthenticatedError
from dr_cloud.model.principal import Principal, Role
from dr_cloud.model.units import SECOND_NS

WHO = Principal(id="t", name="someone", role=Role.AUDITOR)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    made.populate()
    yield made
    made.close()


def token(world: World, enterprise: str | None = "acme", lifetime_seconds: int = 3600) -> NewToken:
    role = Role.ENTERPRISE_ADMIN if enterprise is not None else Role.PROVIDER_ADMIN
    request = TokenRequest(name="n", role=role, enterprise=enterprise, lifetime_seconds=lifetime_seconds)
    return world.cloud.create_token(SYSTEM, request)


def test_a_caller_is_known_for_a_moment_by_its_own_secret(world: World) -> None:
    made = token(world)
    assert world.cloud.known_caller(made.secret) is None
    who = world.cloud.authenticate(made.secret)
    assert world.cloud.known_caller(made.secret) == who
    assert world.cloud.known_caller(made.secret + "x") is None
    assert world.cloud.known_caller("") is None
    world.clock.now_ns += KNOWN_NS
    assert world.cloud.known_caller(made.secret) is None
    world.cloud.authenticate(made.secret)
    world.clock.now_ns -= KNOWN_NS  # a clock that goes back
    assert world.cloud.known_caller(made.secret) is None


def test_a_token_that_ends_is_known_no_longer(world: World) -> None:
    made = token(world, lifetime_seconds=60)
    world.clock.pass_seconds(59.5)
    world.cloud.authenticate(made.secret)
    world.clock.pass_seconds(0.5)
    assert world.cloud.known_caller(made.secret) is None
    with pytest.raises(UnauthenticatedError):
        world.cloud.authenticate(made.secret)


def test_a_revoked_token_is_refused_at_once(world: World) -> None:
    """Over the API, while the clock stands: nothing that was known of it counts."""
    made, other = token(world), token(world, None)
    with TestClient(make_app(world.cloud)) as http:

        def ask(secret: str) -> int:
            return http.get("/v1/enterprises/acme", headers={"Authorization": f"Bearer {secret}"}).status_code

        assert [ask(made.secret), ask(made.secret), ask(other.secret)] == [200, 200, 200]
        assert world.cloud.known_caller(made.secret) is not None
        world.cloud.revoke_token(SYSTEM, made.token.id)
        assert [ask(made.secret), ask(other.secret)] == [401, 200]


def test_the_tokens_of_a_removed_enterprise_are_refused_at_once(world: World) -> None:
    made = token(world)
    world.cloud.authenticate(made.secret)
    world.cloud.remove_enterprise(SYSTEM, "acme")
    assert world.cloud.known_caller(made.secret) is None
    with pytest.raises(UnauthenticatedError):
        world.cloud.authenticate(made.secret)


def test_a_look_from_before_a_revocation_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads: one has read the token's row, then it is revoked, then the first goes on."""
    made = token(world)
    read, revoked = threading.Event(), threading.Event()
    inner = enterprises.Principal

    def slowly(**values: object) -> Principal:
        read.set()
        assert revoked.wait(10)
        return inner(**values)  # type: ignore[arg-type]

    monkeypatch.setattr(enterprises, "Principal", slowly)
    asking = threading.Thread(target=world.cloud.authenticate, args=[made.secret])
    asking.start()
    assert read.wait(10)
    world.cloud.revoke_token(SYSTEM, made.token.id)
    revoked.set()
    asking.join()
    assert world.cloud.known_caller(made.secret) is None


def test_not_more_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dr_cloud.manager.callers._KEPT_MAX", 2)
    callers = Callers(Clock())
    for name in ("a", "b", "c"):
        callers.put(name, WHO, 1 << 62, callers.age)
    assert [callers.get(name) for name in ("a", "b", "c")] == [None, None, WHO]
    assert KNOWN_NS <= SECOND_NS
