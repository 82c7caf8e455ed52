"""Pairing: a one-time token becomes a certificate, once.

Steps
    1. Look at the API's certificates without trusting them; the one whose fingerprint the token tells is the provider's
       CA. From here on nothing else is trusted. The secret has not been sent.
    2. Make a key and a request for a certificate, and keep both (`request.json`).
    3. `POST /v1/pair`.
    4. Keep the enterprise's key, then `identity.json`. Now the site is paired.

Crash recovery
    Before 4 the next start sends the very same request again; a provider that has answered it answers the same. After
    4 the token is not looked at again, unless the configuration names another one: then the site is paired anew.
"""

from __future__ import annotations

import hashlib
import ssl
from typing import Any, Final

import httpx
import structlog
from pydantic import ValidationError

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.pairing import PairAnswer, PairingToken, PairRequest
from dr_cloud.seal.identity import Credentials, fingerprint, new_key_and_csr, trust_context
from dr_cloud.seal.keyring import Keyring
from dr_cloud.site.state import ATTEMPT, IDENTITY, Identity, PairingAttempt, StateFolder

TIMEOUT_SECONDS: Final = 30.0
_DER: Final = 2
"""`_ssl.ENCODING_DER`."""

_log = structlog.get_logger(__name__)


def paired(state: StateFolder, token_text: str, proxy: str | None) -> Identity:
    """Return who this site is, paired now if it is not or if the token is a new one. Blocks. Raises `DrCloudError`."""
    identity = state.load(IDENTITY, Identity)
    digest = hashlib.sha256("".join(token_text.split()).encode()).hexdigest()
    if identity is not None and (not token_text or identity.token == digest):
        return identity
    if not token_text:
        raise DrCloudError(
            "this site is not paired with a provider",
            "Ask the provider for a pairing token and put it into the configuration (token or token_file).",
        )
    token = PairingToken.decode(token_text)
    if identity is not None and (identity.enterprise, identity.site) != (token.enterprise, token.site):
        raise DrCloudError(
            f"the state folder {state.path} is that of {identity.enterprise}/{identity.site}, "
            f"the token is for {token.enterprise}/{token.site}",
            "Name a state folder of its own for each site.",
        )
    attempt = state.load(ATTEMPT, PairingAttempt)
    if attempt is None or attempt.token != digest:
        key, csr = new_key_and_csr()
        attempt = PairingAttempt(token=digest, key=key, csr=csr)
        state.save(ATTEMPT, attempt)
    request = PairRequest(enterprise=token.enterprise, site=token.site, secret=token.secret, csr=attempt.csr)
    answer = _ask(token, request, proxy)
    _check(token, answer, attempt.key)
    Keyring.open(state.path / "keyring.json").put(token.enterprise, bytes.fromhex(answer.enterprise_key))
    identity = Identity(
        enterprise=token.enterprise,
        site=token.site,
        api=token.api,
        link=answer.link,
        ca=answer.ca,
        certificate=answer.certificate,
        key=attempt.key,
        token=digest,
    )
    state.save(IDENTITY, identity)
    state.remove(ATTEMPT)
    _log.info("site.paired", enterprise=token.enterprise, site=token.site, serial=answer.serial, link=answer.link)
    return identity


def _ask(token: PairingToken, request: PairRequest, proxy: str | None) -> PairAnswer:
    """Prove the API, then send the request."""
    try:
        ca = _provider_ca(token, proxy)
        with httpx.Client(verify=trust_context(ca), proxy=proxy, trust_env=False, timeout=TIMEOUT_SECONDS) as client:
            response = client.post(f"{token.api}/v1/pair", json=request.model_dump())
    except httpx.HTTPError as error:
        raise DrCloudError(
            f"the provider's API at {token.api} cannot be reached: {error or type(error).__name__}",
            "Check that it runs, that this site may connect to it (or set `proxy`), and start again.",
        ) from None
    if response.status_code not in (200, 201):
        raise _refusal(token, response)
    try:
        return PairAnswer.model_validate_json(response.content)
    except ValidationError:
        # It is not repeated: it holds a key.
        raise DrCloudError(
            f"the answer of {token.api} cannot be understood", "Bring both sides to the same release."
        ) from None


def _refusal(token: PairingToken, response: httpx.Response) -> DrCloudError:
    try:
        problem: dict[str, Any] = response.json()
        reason = str(problem.get("detail") or problem.get("title") or response.reason_phrase)
        remedy = str(problem.get("remedy") or "")
    except (ValueError, AttributeError):
        reason, remedy = f"{response.status_code} {response.reason_phrase}", ""
    return DrCloudError(
        f"the provider does not pair {token.enterprise}/{token.site}: {reason}",
        remedy or "A token works once and for a limited time: ask the provider for a new one.",
    )


def _provider_ca(token: PairingToken, proxy: str | None) -> str:
    """Return the certificate (PEM) that the token's fingerprint names, from the chain that the API shows."""
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.minimum_version = ssl.TLSVersion.TLSv1_3
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    with (
        httpx.Client(verify=blind, proxy=proxy, trust_env=False, timeout=TIMEOUT_SECONDS) as client,
        client.stream("GET", token.api) as response,
    ):
        # httpcore hands out the innermost TLS object: it shows the chain in every Python, the public one from 3.13.
        tls = response.extensions["network_stream"].get_extra_info("ssl_object")
        chain = tls.get_unverified_chain() or []
    for certificate in chain:
        der = certificate.public_bytes(_DER)
        if hashlib.sha256(der).hexdigest() == token.ca:
            return ssl.DER_cert_to_PEM_cert(der)
    raise DrCloudError(
        f"who answers at {token.api} is not the provider that this token is from",
        "Nothing secret was sent. Check the address and what stands between, or ask for a new token.",
    )


def _check(token: PairingToken, answer: PairAnswer, key: str) -> None:
    """The answer must be what the token promised: that CA, that enterprise, that site, the key that was made here."""
    peer = Credentials(key, answer.certificate, answer.ca).peer
    if fingerprint(answer.ca) != token.ca or (peer.enterprise, peer.site) != (token.enterprise, token.site):
        raise DrCloudError("the provider's answer is for another site or of another authority", "Tell the provider.")
