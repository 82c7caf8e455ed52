"""Pairing over real TLS: who is proven to whom, what is kept, what a crash in the middle leaves."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from site_provider import ENTERPRISE, KEY, SITE, PairingApi, open_authority

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.seal.authority import Authority
from dr_cloud.seal.identity import Credentials
from dr_cloud.seal.keyring import Keyring
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.site.pairing import paired
from dr_cloud.site.state import ATTEMPT, IDENTITY, StateFolder

LINK = "wss://127.0.0.1:1/link"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[PairingApi]:
    api = PairingApi(open_authority(tmp_path / "provider"), LINK)
    yield api
    api.close()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateFolder]:
    state = StateFolder(tmp_path / "site")
    yield state
    state.close()


def test_a_token_becomes_a_certificate_once(api: PairingApi, state: StateFolder) -> None:
    """R16: pair. The site keeps what it needs, private, and no later start needs the token."""
    identity = paired(state, api.token(), None)
    assert (identity.enterprise, identity.site, identity.link) == (ENTERPRISE, SITE, LINK)
    credentials = Credentials(identity.key, identity.certificate, identity.ca)
    assert (credentials.peer.enterprise, credentials.peer.site) == (ENTERPRISE, SITE)
    scope = Scope(ENTERPRISE, "shop", "dc1")
    mine = Keyring.open(state.path / "keyring.json").vpg_keys(scope)
    assert mine.digest(b"x" * 4096) == VpgKeys(bytes.fromhex(KEY), scope).digest(b"x" * 4096)
    assert {stat.S_IMODE(path.stat().st_mode) for path in state.path.glob("*.json")} == {0o600}
    assert paired(state, "", None) == identity
    assert paired(state, api.token(), None) == identity, "the used token may stay in the configuration"
    assert len(api.requests) == 1
    stored = b"".join(path.read_bytes() for path in state.path.iterdir() if path.is_file())
    assert b"s" * 32 not in stored, "the secret is not kept"


def test_another_provider_gets_no_secret(api: PairingApi, state: StateFolder, tmp_path: Path) -> None:
    """R11: sites and provider prove themselves to each other."""
    impostor = PairingApi(Authority.open(tmp_path / "impostor", "provider"), LINK)
    try:
        with pytest.raises(DrCloudError, match="is not the provider"):
            paired(state, api.token(api=impostor.url), None)
        assert impostor.requests == []
    finally:
        impostor.close()


def test_an_answer_that_was_lost_is_asked_for_again(api: PairingApi, state: StateFolder) -> None:
    """A crash or a cut after the token was sent: the same request again, so the token is not wasted."""
    api.lose_answers = 1
    with pytest.raises(DrCloudError, match="cannot be reached"):
        paired(state, api.token(), None)
    assert state.read(IDENTITY) is None
    assert paired(state, api.token(), None).site == SITE
    assert api.requests[0] == api.requests[1]
    assert state.read(ATTEMPT) is None


def test_refusals_say_what_to_do(api: PairingApi, state: StateFolder) -> None:
    cases = {
        "not paired with a provider": "",
        "no pairing token": "hello",
        "no such pairing": api.token(secret="t" * 32),
    }
    for reason, token in cases.items():
        with pytest.raises(DrCloudError, match=reason) as caught:
            paired(state, token, None)
        assert caught.value.remedy
    api.secrets["s" * 32] = "another site's request"
    with pytest.raises(DrCloudError, match="has been used"):
        paired(state, api.token(), None)
    api.secrets["s" * 32], api.expired = "", True
    with pytest.raises(DrCloudError, match="has expired"):
        paired(state, api.token(), None)
    api.close()
    with pytest.raises(DrCloudError, match="cannot be reached"):
        paired(state, api.token(), None)


def test_a_new_token_pairs_anew_but_not_as_another_site(api: PairingApi, state: StateFolder) -> None:
    first = paired(state, api.token(), None)
    api.secrets["t" * 32] = api.secrets["u" * 32] = ""
    second = paired(state, api.token(secret="t" * 32), None)
    assert second.certificate != first.certificate
    with pytest.raises(DrCloudError, match="state folder"):
        paired(state, api.token(secret="u" * 32, site="branch"), None)
    assert paired(state, "", None) == second


def test_an_answer_for_another_site_is_refused(api: PairingApi, state: StateFolder) -> None:
    answer = api.pair
    api.pair = lambda body: answer(body | {"site": "branch"})  # type: ignore[method-assign]
    with pytest.raises(DrCloudError, match="for another site"):
        paired(state, api.token(), None)
    assert state.read(IDENTITY) is None
