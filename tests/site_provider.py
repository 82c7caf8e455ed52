"""For the tests of sites: a provider's API that pairs, over real TLS with a real authority."""

from __future__ import annotations

import base64
import json
import selectors
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dr_cloud.model.pairing import PairingToken
from dr_cloud.seal.authority import Authority

ENTERPRISE = "acme"
SITE = "hq"
KEY = "5a" * 32


class PairingApi:
    """`POST /v1/pair` of one site. A secret pairs one key; the same request is answered again."""

    def __init__(self, authority: Authority, link: str, **issue: Any) -> None:
        self.authority = authority
        self.link = link
        self.issue = issue
        self.secrets = {"s" * 32: ""}
        """Each secret and the request that it was used with."""
        self.requests: list[dict[str, Any]] = []
        self.lose_answers = 0
        self.expired = False
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(404, {"title": "not found"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                api.requests.append(body)
                if self.path != "/v1/pair" or body["secret"] not in api.secrets:
                    self.answer(404, {"title": "Not found", "detail": "no such pairing", "remedy": "Ask anew."})
                elif api.expired:
                    self.answer(410, {"title": "Gone", "detail": "the pairing token has expired"})
                elif api.secrets[body["secret"]] not in ("", body["csr"]):
                    self.answer(409, {"title": "Conflict", "detail": "the pairing token has been used"})
                else:
                    api.secrets[body["secret"]] = body["csr"]
                    if api.lose_answers:
                        api.lose_answers -= 1
                        self.close_connection = True
                        return
                    self.answer(200, api.pair(body))

            def answer(self, status: int, document: dict[str, Any]) -> None:
                data = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """A client that went away is no news."""

        self.server = Server(("127.0.0.1", 0), Handler)
        credentials = authority.service_credentials("api", ["127.0.0.1"])
        self.server.socket = credentials.server_context(clients=False).wrap_socket(
            self.server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server.server_address[1]}"

    def pair(self, body: dict[str, Any]) -> dict[str, Any]:
        issued = self.authority.issue_site(body["csr"], body["enterprise"], body["site"], **self.issue)
        return {
            "certificate": issued.certificate,
            "ca": self.authority.certificate,
            "link": self.link,
            "enterprise_key": KEY,
            "serial": issued.serial,
        }

    def token(self, **changes: str) -> str:
        fields = {
            "api": self.url,
            "ca": self.authority.fingerprint,
            "enterprise": ENTERPRISE,
            "site": SITE,
            "secret": "s" * 32,
        }
        return PairingToken.model_validate(fields | changes).encode()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


class ConnectProxy(ThreadingHTTPServer):
    """An HTTP proxy that does CONNECT for one user, and notes whereto."""

    daemon_threads = True

    def __init__(self, password: str) -> None:
        super().__init__(("127.0.0.1", 0), _Connect)
        self.authorization = "Basic " + base64.b64encode(f"site:{password}".encode()).decode()
        self.url = f"http://site:{password}@127.0.0.1:{self.server_address[1]}"
        self.asked: list[str] = []
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join(5)


class _Connect(BaseHTTPRequestHandler):
    server: ConnectProxy

    def do_CONNECT(self) -> None:
        if self.headers["Proxy-Authorization"] != self.server.authorization:
            self.send_error(407)
            return
        self.server.asked.append(self.path)
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as far:
            self.send_response(200)
            self.end_headers()
            ways = {self.connection: far, far: self.connection}
            with selectors.DefaultSelector() as selector:
                for one, other in ways.items():
                    selector.register(one, selectors.EVENT_READ, other)
                while True:
                    for key, _ in selector.select():
                        data = key.fileobj.recv(1 << 16)
                        if not data:
                            self.close_connection = True
                            return
                        key.data.sendall(data)

    def log_message(self, *_: Any) -> None:
        pass


def open_authority(folder: Path) -> Authority:
    """The authority of the tests' provider."""
    return Authority.open(folder, "provider")
