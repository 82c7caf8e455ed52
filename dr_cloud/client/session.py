"""One caller's way to a provider: HTTPS, its token, retries, and problem documents turned back into errors.

Consistency and retries. Calls that may safely be repeated are: reads, PUT, DELETE, and a POST that carries an
Idempotency-Key, which the provider answers the second time as it did the first. These are tried again, with back-off,
when the provider cannot be reached or says that it is busy. Nothing else is ever sent twice.
"""

from __future__ import annotations

import re
import secrets
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import httpx
import stamina

from dr_cloud.model.errors import (
    ConflictError,
    DeniedError,
    DrCloudError,
    ForbiddenError,
    LimitError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)

_ERRORS: Final[dict[int, type[DrCloudError]]] = {
    401: UnauthenticatedError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    429: LimitError,
    503: UnavailableError,
}
_NEXT: Final = re.compile(r'<([^>]*)>; rel="next"')

Parameters = Mapping[str, str | int | float | bool | list[str] | None]


def tls_context(ca_pem: str) -> ssl.SSLContext:
    """Return a context that trusts only this CA (PEM), or the machine's own CAs where it is empty."""
    try:
        return ssl.create_default_context(cadata=ca_pem or None)
    except ssl.SSLError as error:
        raise DrCloudError(f"that is no CA certificate: {error.reason}", "Give the provider's ca.pem.") from None


class Session:
    """Sends requests and returns their documents. Not for several threads at once."""

    def __init__(
        self, url: str, token: str, *, ca_pem: str = "", timeout_seconds: float = 30.0, attempts: int = 4
    ) -> None:
        """Prepare for calls to `url`, e.g. `https://127.0.0.1:8440`. `attempts` counts the first."""
        self._url = url
        self._attempts = attempts
        headers = {"User-Agent": "dr-cloud"} | ({"Authorization": f"Bearer {token}"} if token else {})
        try:
            self._http = httpx.Client(
                base_url=url, verify=tls_context(ca_pem), headers=headers, timeout=timeout_seconds, trust_env=False
            )
        except (httpx.InvalidURL, UnicodeEncodeError):
            raise DrCloudError(f"{url!r} or its token cannot be used", "Give https://HOST:PORT.") from None

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        parameters: Parameters | None = None,
        body: Any = None,
        creates: bool = False,
        timeout_seconds: float | None = None,
    ) -> httpx.Response:
        """Send one request.

        Args:
            method: Of HTTP.
            path: With its parts already quoted.
            parameters: Of the query; None leaves one out.
            body: What JSON can say, or None.
            creates: Whether to give it an Idempotency-Key, so that it may be sent again.
            timeout_seconds: How long the provider may keep silent, if not as usual.

        Raises:
            DrCloudError: The kind that the provider's problem document tells; `UnavailableError` if there is no answer.
        """
        request = self._http.build_request(
            method,
            path,
            # None, not an empty dict: that would take away the query of a path that has one (the next page).
            params={name: value for name, value in (parameters or {}).items() if value is not None} or None,
            json=body,
            headers={"Idempotency-Key": secrets.token_hex(16)} if creates else None,
            timeout=httpx.USE_CLIENT_DEFAULT if timeout_seconds is None else timeout_seconds,
        )
        attempts = self._attempts if creates or method in ("GET", "PUT", "DELETE") else 1
        for attempt in stamina.retry_context((UnavailableError, LimitError), attempts=attempts, timeout=60):
            with attempt, self._told():
                return _checked(self._http.send(request))
        raise AssertionError("stamina raises or returns")

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str], timeout_seconds: float) -> Iterator[httpx.Response]:
        """Open a GET whose answer is read as it comes; silence of `timeout_seconds` ends it."""
        with self._told(), self._http.stream("GET", path, headers=headers, timeout=timeout_seconds) as response:
            if response.is_error:
                response.read()
            yield _checked(response)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except httpx.UnsupportedProtocol:
            raise DrCloudError(f"{self._url!r} is no address of a provider", "Give https://HOST:PORT.") from None
        except httpx.TransportError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise DrCloudError(
                    f"the certificate of {self._url} is not trusted: {error}", "Give the CA of that provider."
                ) from None
            text = str(error) or type(error).__name__
            raise UnavailableError(
                f"{self._url} does not answer: {text}", "See that it runs, and its address."
            ) from None


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        problem = response.json()
        detail, remedy = str(problem["detail"]), str(problem.get("remedy", ""))
        request_id = str(problem.get("request_id", ""))
        if str(problem.get("type", "")).endswith(":denied"):
            told = problem["reasons"], str(problem["revision"]), problem["open"]
            raise DeniedError(detail, remedy, *told)
    except (ValueError, KeyError, TypeError, AttributeError):
        detail, remedy, request_id = f"the answer was {response.status_code}", "Is that a provider's API?", ""
    if response.status_code >= 500 and response.status_code != 503:
        detail += f" (request {request_id})"
    raise _ERRORS.get(response.status_code, DrCloudError)(detail, remedy)


def next_path(response: httpx.Response) -> str | None:
    """Return where the page after this one is, from the header Link; None after the last."""
    match = _NEXT.search(response.headers.get("link", ""))
    return match[1] if match else None
