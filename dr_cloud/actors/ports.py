"""Which port is whose connector's: given once, and never given to another while the enterprise is registered.

Files
    `ports.json` in the state folder, replaced whole.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Sequence

from dr_cloud.actors.https import free_port
from dr_cloud.actors.settings import ProviderSettings
from dr_cloud.model.errors import LimitError
from dr_cloud.seal.identity import replace_file


class Ports:
    """Which port is whose connector's."""

    def __init__(self, settings: ProviderSettings) -> None:
        """Read what was given before."""
        self._path = settings.config.state / "ports.json"
        self._host = settings.config.link_host
        self._range = settings.config.link_ports
        self._lock = threading.Lock()

    def _given(self) -> dict[str, int]:
        with contextlib.suppress(FileNotFoundError):
            ports: dict[str, int] = json.loads(self._path.read_text())
            return ports
        return {}

    def of(self, enterprise: str) -> int:
        """Return the port of an enterprise, given now if it has none. Raises `LimitError` if there is none left."""
        with self._lock:
            given = self._given()
            if enterprise not in given:
                taken = set(given.values())
                first, last = self._range
                wanted = [0] if not last else [port for port in range(first, last + 1) if port not in taken]
                given[enterprise] = self._free(wanted)
                replace_file(self._path, json.dumps(given, indent=1), 0o600)
            return given[enterprise]

    def _free(self, wanted: Sequence[int]) -> int:
        for port in wanted:
            with contextlib.suppress(OSError):
                return free_port(self._host, port)
        raise LimitError(
            f"no port from {self._range[0]} to {self._range[1]} is free for another connector",
            "Widen `link_ports` in the provider's configuration.",
        )

    def give_back(self, enterprise: str) -> None:
        """Forget the port of an enterprise that is gone."""
        with self._lock:
            given = self._given()
            if given.pop(enterprise, None) is not None:
                replace_file(self._path, json.dumps(given, indent=1), 0o600)
