"""What every request goes through: an id, a line in the log, a bound on its size, headers that keep browsers from harm.

Written as plain ASGI, so that a stream of events passes through unbuffered. Neither the query nor any header is logged:
they may hold secrets.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any, Final

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

_LOG = structlog.get_logger(__name__)
BODY_BYTES_MAX: Final = 1 << 20
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{8,64}")
_SECURITY: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Strict-Transport-Security": "max-age=31536000",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class RequestHeaders:
    """Gives each request its id, bounds its body, sets the headers of each answer, writes the access log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        began = time.monotonic()
        status = 0

        received_bytes = 0

        async def receive_bounded() -> MutableMapping[str, Any]:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > BODY_BYTES_MAX:
                raise HTTPException(413, f"the body is larger than {BODY_BYTES_MAX} bytes")
            return message

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                for name, value in _SECURITY.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive_bounded, send_with_headers)
        finally:
            # Reads that went well are told to the file alone: people look for what was changed, or went wrong.
            tell = _LOG.debug if scope["method"] == "GET" and 0 < status < 400 else _LOG.info
            tell(
                "request",
                request_id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=status,
                principal=scope["state"].get("principal", ""),
                milliseconds=round((time.monotonic() - began) * 1000, 1),
            )
