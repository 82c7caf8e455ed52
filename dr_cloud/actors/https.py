"""The REST API's server: uvicorn over TLS 1.3, in a thread of the manager's process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Final

import uvicorn
from fastapi import FastAPI

from dr_cloud.model.errors import DrCloudError, UnavailableError
from dr_cloud.model.provider import ProviderConfig
from dr_cloud.seal.identity import Credentials, replace_file

_START_SECONDS: Final = 30.0
_GRACE_SECONDS: Final = 5
_BACKLOG: Final = 512


def split_listen(address: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`. Raises `DrCloudError`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 0xFFFF:
        raise DrCloudError(f"{address!r} is not HOST:PORT", "Write `api` like 127.0.0.1:8440.")
    return host.strip("[]"), int(port)


def free_port(host: str, port: int = 0) -> int:
    """Return `port` if it can be listened on (0: any that can). Raises `OSError`."""
    with socket.create_server((host, port)) as probe:
        free: int = probe.getsockname()[1]
        return free


def api_address(config: ProviderConfig) -> tuple[str, int]:
    """Return where the API listens: once a free port was taken, always the same."""
    host, port = split_listen(config.api)
    kept = config.state / "api-port"
    if port == 0:
        if not kept.exists():
            config.state.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(kept, str(free_port(host)), 0o600)
        port = int(kept.read_text())
    return host, port


class ApiServer:
    """Serves one application until closed."""

    def __init__(self, app: FastAPI, host: str, port: int, credentials: Credentials) -> None:
        """Listen, and serve; returns when it does.

        Args:
            app: The application.
            host: Where to listen.
            port: 0 takes any free one.
            credentials: The server's certificate. Clients show none: they have tokens.

        Raises:
            UnavailableError: The port is in use, or the server does not start.
        """
        context = credentials.server_context(clients=False)
        try:
            self._socket = socket.create_server((host, port), backlog=_BACKLOG)
        except OSError as error:
            raise UnavailableError(
                f"the API cannot listen on {host}:{port}: {error.strerror}", "Free the port, or change `api`."
            ) from error
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            http="httptools",
            timeout_graceful_shutdown=_GRACE_SECONDS,
            ssl_context_factory=lambda _config, _default: context,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="api", daemon=True)
        self._thread.start()
        self._wait(lambda: self._server.started)

    def _wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not done():
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise UnavailableError("the API's server did not start", "Look at the manager's log.")
            time.sleep(0.01)

    def close(self) -> None:
        """Answer what is under way, and end."""
        self._server.should_exit = True
        self._thread.join(2 * _GRACE_SECONDS)
        self._socket.close()
