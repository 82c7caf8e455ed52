"""The REST API as one ASGI application over a `Cloud`.

Purpose. HTTP in front of the manager: who calls, what is asked, in which form the answer goes back. It decides nothing:
rights, tenancy, idempotency and audit are the manager's.
Layout. A module of operations for each noun; `deps.py` says what they ask for, `problems.py` how they fail. Each
operation has the name of the manager's method, of the client's method, and of its operationId.
Consistency. No state is kept here: any number of these may run over one database.
Retries. Every POST, and every call that starts a task, takes an Idempotency-Key and may be sent again with it.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Final

from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from dr_cloud.api import drills, enterprises, problems, recovery, rights, sites, tasks, vpgs, watch
from dr_cloud.api.deps import refuse_nul
from dr_cloud.api.headers import RequestHeaders
from dr_cloud.manager.cloud import Cloud

_ERRORS: Final = (400, 401, 403, 404, 409, 413, 422, 429, 503)
_DESCRIPTION: Final = """Continuous data protection for many enterprises, and recovery tests at any past time.

Things with a name lie under their enterprise, `/v1/enterprises/{enterprise}/…`; `-` stands for the token's own. What
belongs to another enterprise is not found, exactly as what does not exist. Times are nanoseconds since the epoch. Long
work answers 202 with a task. Errors are RFC 9457 problem documents that say what to do; what policy forbids is a 403 of
type `denied`, with the reasons and the data centers that are open. Lists come in pages; the header `Link` names the
next."""


def _operation_name(route: APIRoute) -> str:
    return route.name


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
        )
        schemas = document["components"]["schemas"]
        problem = problems.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= problem.pop("$defs") | {"Problem": problem}
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"] |= problems.documented(*_ERRORS)
        app.openapi_schema = document
    return app.openapi_schema


def make_app(cloud: Cloud) -> FastAPI:
    """Return the API over this manager."""
    app = FastAPI(
        title="dr_cloud",
        version=version("dr-cloud"),
        description=_DESCRIPTION,
        openapi_url="/v1/openapi.json",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_name,
    )
    app.state.cloud = cloud
    for module in (enterprises, sites, vpgs, drills, recovery, tasks, rights, watch):
        app.include_router(module.router, prefix="/v1", dependencies=[Depends(refuse_nul)])
    problems.install(app)
    app.add_middleware(RequestHeaders)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app
