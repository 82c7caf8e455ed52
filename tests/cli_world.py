"""A provider with its API on a port, and a profile of the command line for one of its tenants."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import structlog
from api_world import ApiWorld
from cli_run import Done, run_cli

from dr_cloud.actors.https import ApiServer
from dr_cloud.client.client import Client
from dr_cloud.seal.authority import Authority


class Provider:
    """A provider with its API on a port, and the profile of one of its tenants."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.api = ApiWorld(folder / "state", stack)
        # The world's clock stands in the future; certificates are judged by today's.
        (folder / "tls").mkdir()
        credentials = Authority.open(folder / "tls", "provider").service_credentials("api", ["127.0.0.1"])
        self.server = ApiServer(self.api.app, "127.0.0.1", 0, credentials)
        stack.callback(self.server.close)
        self.url = f"https://127.0.0.1:{self.server.port}"
        self.ca = credentials.ca
        (folder / "ca.pem").write_text(self.ca)
        self._stop = threading.Event()
        follower = threading.Thread(target=self._follow, daemon=True)
        follower.start()
        stack.callback(follower.join)
        stack.callback(self._stop.set)

    def _follow(self) -> None:
        """Sites and hosts do as they are told, once and again."""
        while not self._stop.wait(0.1):
            self.api.world.clock.pass_seconds(0.25)
            for enterprise in ("acme", "brit"):
                self.api.world.report(enterprise)
            for host in ("h1", "h2", "h3"):
                self.api.world.report_host("us-east", host)

    def profile(self, name: str, token: str) -> Done:
        path = self.folder / f"{name}.token"
        path.write_text(token)
        return run_cli(
            "profile", "add", name, "--url", self.url, "--ca", str(self.folder / "ca.pem"), "--token-file", str(path)
        )

    def client(self, token: str) -> Client:
        return Client(self.url, token, ca_pem=self.ca)


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provider]:
    folder = tmp_path_factory.mktemp("provider")
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        # The provider is in this process: what it logs must not look like what a command prints.
        stack.callback(structlog.reset_defaults)
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        made = Provider(folder, stack)
        assert made.profile("acme", made.api.token_a).code == 0
        for role in ("auditor", "provider-admin"):
            assert made.profile(role, made.api.tokens[role]).code == 0
        yield made
