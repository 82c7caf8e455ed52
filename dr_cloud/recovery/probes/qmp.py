"""The few words that are spoken with QEMU's control socket (QMP)."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Final

from dr_cloud.recovery.probes.errors import CannotRunError, FailedError

_TIMEOUT_SECONDS: Final = 10.0
_LINE_BYTES_MAX: Final = 1 << 20


class Qmp:
    """One connection. Any trouble on it is a `FailedError`."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_TIMEOUT_SECONDS)
        try:
            self._socket.connect(str(path))
            self._lines = self._socket.makefile("rb")
            self._lines.readline(_LINE_BYTES_MAX)  # the greeting
            self.do("qmp_capabilities")
        except OSError as error:
            raise CannotRunError(f"QEMU cannot be controlled: {error}") from error

    def do(self, command: str, **arguments: Any) -> Any:
        """Give a command; return its answer."""
        try:
            self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
            while line := self._lines.readline(_LINE_BYTES_MAX):
                answer = json.loads(line)
                if "error" in answer:
                    raise CannotRunError(f"QEMU refuses {command}: {answer['error'].get('desc', '')}")
                if "return" in answer:
                    return answer["return"]
        except (OSError, ValueError) as error:
            raise FailedError(f"QEMU does not answer to {command}: {error}") from error
        raise FailedError(f"QEMU ended at {command}")

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()
