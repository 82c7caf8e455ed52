"""Errors as RFC 9457 problem documents: what is wrong, and what to do about it.

Every answer of the API that is not a success is a `Problem`, also for an unknown path and a body that cannot be read.
A program looks at `type`; people read `detail` and `remedy`. An error that nobody foresaw is a 500 which tells nothing
of the inside: the log has it, under the request id that the problem carries.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

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

MEDIA_TYPE: Final = "application/problem+json"
_LOG = structlog.get_logger(__name__)

_STATUS: Final[dict[type[DrCloudError], tuple[int, str]]] = {
    UnauthenticatedError: (401, "unauthenticated"),
    DeniedError: (403, "denied"),
    ForbiddenError: (403, "forbidden"),
    NotFoundError: (404, "not-found"),
    ConflictError: (409, "conflict"),
    LimitError: (429, "limit"),
    UnavailableError: (503, "unavailable"),
}
"""Any other `DrCloudError` is about what was asked for: 422."""
_REMEDIES: Final = {
    400: "Send a request as the OpenAPI document at /v1/openapi.json describes it.",
    404: "Look the path up in the OpenAPI document at /v1/openapi.json.",
    405: "Use a method that the header Allow names.",
    413: "Send less at once.",
}
_RETRY_SECONDS: Final = {429: "5", 503: "2"}


class FieldProblem(BaseModel):
    """One field that was refused."""

    where: str
    """`body.targets.0.host`, `query.limit` …"""
    message: str


class Problem(BaseModel):
    """An RFC 9457 problem document."""

    type: str
    """`urn:dr-cloud:problem:` and a word that never changes: not-found, conflict …"""
    title: str
    status: int
    detail: str
    remedy: str = ""
    """What to do about it."""
    request_id: str = ""
    """As in the answer's header X-Request-ID and in the provider's log."""
    errors: list[FieldProblem] = []
    reasons: list[str] = []
    """Of a denial by policy: why."""
    revision: str = ""
    """Of the policies that denied it; empty if no engine answered."""
    open: list[str] = []
    """The data centers where policy would allow it, if it is about one."""


def _answer(
    request: Request,
    status: int,
    word: str,
    detail: str,
    remedy: str = "",
    *,
    errors: list[FieldProblem] | None = None,
    denial: DeniedError | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    problem = Problem(
        type=f"urn:dr-cloud:problem:{word}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        remedy=remedy,
        request_id=getattr(request.state, "request_id", ""),
        errors=errors or [],
    )
    if denial is not None:
        told = {"reasons": denial.reasons, "revision": denial.revision, "open": denial.open}
        problem = problem.model_copy(update=told)
    more = dict(headers or {})
    if status == 401:
        more["WWW-Authenticate"] = "Bearer"
    if status in _RETRY_SECONDS:
        more["Retry-After"] = _RETRY_SECONDS[status]
    return JSONResponse(problem.model_dump(), status, more, MEDIA_TYPE)


async def _operating(request: Request, error: DrCloudError) -> JSONResponse:
    known = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), (422, "invalid"))
    denial = error if isinstance(error, DeniedError) else None
    return _answer(request, *known, str(error), error.remedy, denial=denial)


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    # What was sent is not repeated: it may hold a secret.
    errors = [
        FieldProblem(where=".".join(str(part) for part in item["loc"]), message=item["msg"])
        for item in error.errors()[:20]
    ]
    detail = f"{errors[0].where}: {errors[0].message}" if errors else "the request cannot be read"
    return _answer(request, 422, "invalid", detail, "Correct the fields that `errors` names.", errors=errors)


async def _http(request: Request, error: HTTPException) -> JSONResponse:
    word = HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
    remedy = _REMEDIES.get(error.status_code, "")
    detail = "there is nothing at this path" if error.status_code == 404 else str(error.detail)
    return _answer(request, error.status_code, word, detail, remedy, headers=error.headers)


async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    request_id = getattr(request.state, "request_id", "")
    _LOG.error("request failed", request_id=request_id, path=request.url.path, exc_info=error)
    remedy = "Give the provider this request id; the provider's log says more."
    return _answer(request, 500, "internal", "the request failed inside the provider", remedy)


def install(app: FastAPI) -> None:
    """Make every error answer of `app` a problem document."""
    handlers: list[tuple[type[Exception], Callable[..., Awaitable[JSONResponse]]]] = [
        (DrCloudError, _operating),
        (RequestValidationError, _invalid),
        (HTTPException, _http),
        (Exception, _unforeseen),
    ]
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)


def documented(*statuses: int) -> dict[str, dict[str, Any]]:
    """Return what the OpenAPI document says of these error answers."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {str(status): {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}
