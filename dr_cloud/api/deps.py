"""What the operations ask for: the manager, the caller, whose things are meant, which page, and that it is done once.

Paths. Things with a name lie under their enterprise: `/v1/enterprises/{enterprise}/vpgs/{vpg}`. `-` stands for the
token's own enterprise; for the provider's own people it stands for all where a list is asked for. Things with an id of
their own (tasks, tokens, alerts) lie at the top; `?enterprise=` narrows their lists.

What asks nobody is `async`: a function that is not costs a way to another thread and back, at every request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Annotated, Final, TypeVar
from urllib.parse import unquote

from fastapi import Depends, Header, Path, Query, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from dr_cloud.manager.cloud import Cloud
from dr_cloud.model.cloud import Page, PageRequest
from dr_cloud.model.errors import InvalidError, UnauthenticatedError
from dr_cloud.model.principal import Principal
from dr_cloud.model.task import Task

_NAME: Final = r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?"
_BEARER = HTTPBearer(auto_error=False, description="A token of `dr-cloud token create`.")

M = TypeVar("M", bound=BaseModel)
Q = TypeVar("Q", bound=BaseModel)
T = TypeVar("T")

NamePart = Annotated[str, Path(pattern=f"^{_NAME}$")]
"""A name as a part of a path."""
IdPart = Annotated[str, Path(pattern="^[0-9A-Za-z_-]{1,64}$")]
OfEnterprise = Annotated[str | None, Query(alias="enterprise", pattern=f"^{_NAME}$", description="Only this one's.")]
"""Narrows a list at the top."""
Pages = Annotated[PageRequest, Query()]


class Narrowed(PageRequest):
    """A page of a list at the top."""

    enterprise: Annotated[str | None, Query(pattern=f"^{_NAME}$", description="Only this one's.")] = None


class Waiting(BaseModel):
    """How long to wait, and how often to look."""

    model_config = ConfigDict(extra="forbid")

    timeout_seconds: float = Field(default=60.0, ge=0, le=300, allow_inf_nan=False)
    poll_seconds: float = Field(default=0.5, ge=0.05, le=60, allow_inf_nan=False)


def part(query: BaseModel, kind: type[Q]) -> Q:
    """Return those parameters of a query that make up a `kind`."""
    return kind(**{name: getattr(query, name) for name in kind.model_fields})


async def refuse_nul(request: Request) -> None:
    """Refuse a request that holds the character NUL anywhere: no database keeps it, and no name needs it."""
    if "\0" in unquote(request.url.query) or b"\\u0000" in await request.body():
        raise InvalidError("the request holds the character NUL", "Take it out.")


async def _cloud(request: Request) -> Cloud:
    cloud: Cloud = request.app.state.cloud
    return cloud


Manager = Annotated[Cloud, Depends(_cloud)]


async def _secret(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> str:
    if credentials is None:
        raise UnauthenticatedError("a token is needed", "Send it in the header: Authorization: Bearer TOKEN.")
    return credentials.credentials


Secret = Annotated[str, Depends(_secret)]


async def _who(request: Request, cloud: Manager, secret: Secret) -> Principal:
    who = cloud.known_caller(secret)
    if who is None:
        who = await run_in_threadpool(cloud.authenticate, secret)
    request.state.principal = who.id
    return who


Who = Annotated[Principal, Depends(_who)]


async def _any_tenant(
    who: Who,
    enterprise: Annotated[
        str, Path(pattern=f"^(-|{_NAME})$", description="An enterprise; - is the token's own, or all where that fits.")
    ],
) -> str | None:
    return who.enterprise if enterprise == "-" else enterprise


AnyTenant = Annotated[str | None, Depends(_any_tenant)]
"""An enterprise, or None for all."""


async def _tenant(enterprise: AnyTenant) -> str:
    if enterprise is None:
        raise InvalidError("this token belongs to no enterprise", "Name the enterprise in place of -.")
    return enterprise


Tenant = Annotated[str, Depends(_tenant)]


class GzipResponse(Response):
    """An archive."""

    media_type = "application/gzip"


class Links:
    """Adds to an answer where its next page is."""

    def __init__(self, request: Request, response: Response) -> None:
        self._url, self._response = request.url, response

    def of(self, page: Page[T]) -> Page[T]:
        """Return the page; the header Link names the one that follows."""
        if page.next_cursor is not None:
            following = self._url.include_query_params(cursor=page.next_cursor)
            self._response.headers["Link"] = f'<{following.path}?{following.query}>; rel="next"'
        return page


async def _links(request: Request, response: Response) -> Links:
    return Links(request, response)


Linked = Annotated[Links, Depends(_links)]


class Once:
    """Runs a call once for each Idempotency-Key of a caller; the same key again gets the same answer."""

    def __init__(self, cloud: Cloud, who: Principal, response: Response, key: str | None, digest: str) -> None:
        self._cloud, self._who, self._response = cloud, who, response
        self._key, self._digest = key, digest

    def __call__(self, kind: type[M], call: Callable[[], M]) -> M:
        """Return `call`'s answer, now or from before. Raises `ConflictError` if the key came with something else."""
        if self._key is None:
            return call()
        return self._cloud.once(self._who, self._key, self._digest, kind, call)

    def task(self, call: Callable[[], Task]) -> Task:
        """Return the task that `call` starts; the header Location says where it can be watched."""
        task = self(Task, call)
        self._response.headers["Location"] = f"/v1/tasks/{task.id}"
        return task


async def _once(
    request: Request,
    response: Response,
    cloud: Manager,
    who: Who,
    idempotency_key: Annotated[
        str | None,
        Header(pattern="^[!-~]{8,128}$", description="The same key with the same request is carried out once."),
    ] = None,
) -> Once:
    digest = hashlib.sha256(f"{request.method} {request.url.path}?{request.url.query}\n".encode())
    digest.update(await request.body())
    return Once(cloud, who, response, idempotency_key, digest.hexdigest())


OnlyOnce = Annotated[Once, Depends(_once)]
