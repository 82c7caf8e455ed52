"""An OPA server of our own: `opa run --server` as a child that fetches signed bundles.

It listens on 127.0.0.1 alone, and allows nothing but questions to the policies. It ends with this process, however that
ends, and is started again if it ends by itself. Its configuration names the file of the token with which it fetches
bundles; the token itself is nowhere else.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import yaml

from dr_cloud.model.errors import DrCloudError
from dr_cloud.rights.bundle import ALGORITHM, KEY_ID
from dr_cloud.seal.identity import replace_file

_AGAIN_SECONDS: Final = 0.5
_STOP_SECONDS: Final = 3.0
_LEASH: Final = (
    "import ctypes,os,sys\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"  # PR_SET_PDEATHSIG, SIGKILL
    "os.getppid() == int(sys.argv[1]) or os._exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)
"""Run first in the child: it is killed when the thread that started it ends, and that is the keeper."""


class OpaProcess:
    """One OPA server, kept running."""

    def __init__(
        self,
        folder: Path,
        bundle_url: str,
        public: str,
        *,
        token_file: Path | None = None,
        ca_file: Path | None = None,
        poll_seconds: int = 1,
    ) -> None:
        """Start it. It answers as soon as it has fetched its first bundle.

        Args:
            folder: For its configuration and its log.
            bundle_url: Where the bundle is fetched from.
            public: The key that must have signed the bundle, PEM.
            token_file: Holds the bearer token that is sent along.
            ca_file: Certificate of the CA that must vouch for the bundle's server, PEM.
            poll_seconds: How often it asks for a new bundle.

        Raises:
            DrCloudError: The program `opa` is not on the PATH.
            OSError: The folder cannot be used.
        """
        program = shutil.which("opa")
        if program is None:
            raise DrCloudError("the program `opa` is not on the PATH", "Install it: python3 infra/tools.py opa")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "opa.log"
        config = folder / "opa.yaml"
        replace_file(config, yaml.safe_dump(_config(bundle_url, public, token_file, ca_file, poll_seconds)), 0o600)
        self._command = [sys.executable, "-c", _LEASH, str(os.getpid()), program]
        self._command += ["run", "--server", "--addr", f"127.0.0.1:{port}", "--config-file", str(config)]
        self._command += ["--skip-version-check", "--log-level", "error"]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="opa-keeper", daemon=True)
        self._keeper.start()

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def close(self) -> None:
        """Stop it. Idempotent."""
        self._closed.set()
        with self._lock:
            if self._process is not None:
                self._process.send_signal(signal.SIGTERM)
        self._keeper.join(_STOP_SECONDS)
        if self._keeper.is_alive() and self._process is not None:
            self._process.kill()
            self._keeper.join()

    def _keep(self) -> None:
        while not self._closed.is_set():
            with self._lock:
                if self._closed.is_set():
                    return
                with open(self._log, "wb") as log:
                    self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            self._process.wait()
            self._closed.wait(_AGAIN_SECONDS)


def _config(url: str, public: str, token: Path | None, ca: Path | None, poll_seconds: int) -> dict[str, Any]:
    parts = urlsplit(url)
    service: dict[str, Any] = {"url": f"{parts.scheme}://{parts.netloc}", "response_header_timeout_seconds": 5}
    if token is not None:
        service["credentials"] = {"bearer": {"token_path": str(token)}}
    if ca is not None:
        service["tls"] = {"ca_cert": str(ca)}
    polling = {"min_delay_seconds": poll_seconds, "max_delay_seconds": poll_seconds}
    return {
        "services": {"provider": service},
        "keys": {KEY_ID: {"algorithm": ALGORITHM, "key": public}},
        "bundles": {
            "rights": {
                "service": "provider",
                "resource": parts.path.lstrip("/"),
                "polling": polling,
                "signing": {"keyid": KEY_ID},
            }
        },
        "status": {"prometheus": True},
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
