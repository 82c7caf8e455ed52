"""What the client's operations are made of: paths, records that go and come, lists that come in pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from dr_cloud.client.session import Parameters, Session, next_path
from dr_cloud.model.cloud import Page

M = TypeVar("M", bound=BaseModel)
_PAGE: Final = 200
"""How much of a list is fetched at a time."""


def path_of(*parts: str) -> str:
    """Return the path of an operation, its parts quoted."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def dump(body: BaseModel | None) -> Any:
    """Return a record as JSON can say it."""
    return None if body is None else body.model_dump(mode="json", by_alias=True)


class Calls:
    """A caller of one provider's API."""

    def __init__(
        self, url: str, token: str, *, ca_pem: str = "", enterprise: str = "-", timeout_seconds: float = 30.0
    ) -> None:
        """Prepare for calls to `url`. `ca_pem` is the provider's CA; empty trusts the machine's."""
        self.enterprise_name = enterprise
        self._session = Session(url, token, ca_pem=ca_pem, timeout_seconds=timeout_seconds)

    def _get(self, kind: type[M], path: str, parameters: Parameters | None = None) -> M:
        return kind.model_validate_json(self._session.call("GET", path, parameters=parameters).content)

    def _pages(self, kind: type[M], path: str, parameters: Parameters | None = None) -> Iterator[M]:
        answer = self._session.call("GET", path, parameters={"limit": _PAGE} | dict(parameters or {}))
        while True:
            yield from Page[kind].model_validate_json(answer.content).items  # type: ignore[valid-type]
            following = next_path(answer)
            if following is None:
                return
            answer = self._session.call("GET", following)

    def _send(
        self,
        kind: type[M],
        method: str,
        path: str,
        body: BaseModel | dict[str, Any] | None = None,
        parameters: Parameters | None = None,
    ) -> M:
        document = dump(body) if isinstance(body, BaseModel) else body
        answer = self._session.call(method, path, parameters=parameters, body=document, creates=method != "PATCH")
        return kind.model_validate_json(answer.content)

    def _own(self, *parts: str) -> str:
        return path_of("enterprises", self.enterprise_name, *parts)
