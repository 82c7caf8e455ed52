"""A whole cloud on this machine, of real processes: `provider up`, a `site up` per enterprise, a `tap` per server.

Everything is in one directory with a short path (sockets lie in it): the provider's state in `provider/`, each
enterprise's files in a folder of its name. What is asked of the cloud goes through its API, as for anyone else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from dr_cloud.client.client import Client
from dr_cloud.demo.process import Process, Processes
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.task import CompletionCode, Task

_CLI: Final = "dr_cloud.cli.main"
_PROVIDER_STOP_SECONDS: Final = 30.0
HOST: Final = "host-1"
"""The one host of every site."""


class LocalCloud:
    """Everything that runs, started step by step and stopped as a whole."""

    def __init__(self, directory: Path) -> None:
        """Use `directory`, which is there, for all files."""
        self.directory = directory
        self.state = directory / "provider"
        self.processes = Processes(directory)
        self._provider: Process | None = None
        self._clients = contextlib.ExitStack()

    # The provider.

    def begin_provider(self, config: Mapping[str, Any]) -> None:
        """Start a provider: `config` is its file, but for state and ports, which are this directory's and any free."""
        document = {**config, "state": str(self.state), "api": "127.0.0.1:0", "link_ports": [0, 0]}
        file = self.directory / "provider.yaml"
        file.write_text(yaml.safe_dump(document))
        # Ray's own files lie here too, and go with the rest.
        environment = {"RAY_TMPDIR": str(self.directory), "RAY_USAGE_STATS_ENABLED": "0"}
        self._provider = Process(
            "provider", self.directory, _CLI, "provider", "up", "-c", str(file), environment=environment
        )

    def wait_provider(self) -> Client:
        """Wait until the provider is ready; return its administrator's client."""
        assert self._provider is not None, "begin_provider comes first"
        self._provider.wait_ready()
        return self.client("-", (self.state / "admin-token").read_text().strip())

    def client(self, enterprise: str, token: str) -> Client:
        """Return a client of the provider's API; it ends with the rest."""
        port = int((self.state / "api-port").read_text())
        ca = (self.state / "ca" / "ca-cert.pem").read_text()
        client = Client(f"https://127.0.0.1:{port}", token, ca_pem=ca, enterprise=enterprise, timeout_seconds=120.0)
        return self._clients.enter_context(client)

    # The enterprises.

    def begin_site(self, enterprise: str, pairing_token: str) -> Process:
        """Start an enterprise's site of one host; it pairs itself with the token."""
        place = self.folder(enterprise)
        hosts = [{"name": HOST, "listen": "unix:vdsa.sock"}]
        file = place / "site.yaml"
        file.touch(mode=0o600)
        file.write_text(yaml.safe_dump({"state": "state", "token": pairing_token, "hosts": hosts}))
        return self.processes.start(f"site-{enterprise}", _CLI, "site", "up", "-c", str(file))

    def begin_tap(self, enterprise: str, server: str, image: Path, copies: int = 1) -> Process:
        """Start the tap of a server whose one disk, `disk`, is `image`, on the host of its enterprise's site."""
        place = self.folder(enterprise)
        return self.processes.start(
            f"tap-{enterprise}-{server}", _CLI, "tap", "--server", server, "--disk", f"disk={image}",
            "--vdsa", str(place / "vdsa.sock"), "--state", str(place / f"{server}.state"),
            "--socket", str(place / f"{server}.sock"), "--copies", str(copies),
        )  # fmt: skip

    def uri(self, enterprise: str, server: str) -> str:
        """Return where a tap serves its disk."""
        return f"nbd+unix:///disk?socket={self.folder(enterprise) / f'{server}.sock'}"

    def folder(self, enterprise: str) -> Path:
        """Return the folder of an enterprise's files."""
        place = self.directory / enterprise
        place.mkdir(mode=0o700, exist_ok=True)
        return place

    # Waiting.

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_seconds: float = 90.0) -> None:
        """Wait for `condition`; `DrCloudError` that says what did not happen, or which process is gone."""

        def looked() -> bool:
            if self._provider is not None and self._provider.ended_by_itself():
                raise DrCloudError("the provider ended by itself")
            return condition()

        self.processes.wait_until(looked, what, timeout_seconds)

    def close(self) -> None:
        """Stop everything: sites and taps at once, the provider last."""
        self._clients.close()
        self.processes.stop()
        if self._provider is not None:
            self._provider.stop(_PROVIDER_STOP_SECONDS)


def done(client: Client, task: Task, timeout_seconds: float = 90.0) -> Task:
    """Wait for a task. Raises `DrCloudError` if it has not succeeded in time."""
    ended = client.wait_task(task.id, timeout_seconds, poll_seconds=0.1)
    if ended.completion is not CompletionCode.SUCCESS:
        raise DrCloudError(f"{ended.type} ended as {ended.completion.value}: {ended.exception}", ended.remedy or "")
    return ended
