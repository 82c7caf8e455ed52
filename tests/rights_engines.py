"""What tests of the rights manager share: the seed's facts, questions, both engines, and a server of bundles."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dr_cloud.model.rights import (
    Action,
    Answer,
    DataCenterFacts,
    EnterpriseFacts,
    Facts,
    Operator,
    Place,
    PolicySources,
    Question,
    Regulation,
)
from dr_cloud.rights.bundle import Signer
from dr_cloud.rights.embedded import EmbeddedEngine
from dr_cloud.rights.opa import OpaEngine
from dr_cloud.rights.opa_process import OpaProcess
from dr_cloud.rights.regulation import load_policies
from dr_cloud.rights.service import RightsService

NOW_S = 1_800_000_000
SEED_CENTERS = {"us-east": "USA", "us-west": "USA", "uk-south": "UK", "apac-1": "APAC"}
SEED_ENTERPRISES = {"acme-us": "USA", "brit-uk": "UK", "coral-apac": "APAC"}
OWNERS = {"acme-us": "acme-holding", "brit-uk": "acme-holding", "coral-apac": "coral"}


def center_facts(jurisdiction: str, keys: str = "", **datastores: str) -> DataCenterFacts:
    stores = {"ds-1": jurisdiction} | {name.replace("_", "-"): where for name, where in datastores.items()}
    return DataCenterFacts(jurisdiction=jurisdiction, keys=keys or jurisdiction, datastores=stores)


def seed_facts(**centers: DataCenterFacts) -> Facts:
    """R13.1: USA enterprise A, UK enterprise B (of one owner), APAC enterprise C; four data centers."""
    return Facts(
        data_centers={name: center_facts(where) for name, where in SEED_CENTERS.items()}
        | {name.replace("_", "-"): facts for name, facts in centers.items()},
        enterprises={
            name: EnterpriseFacts(jurisdiction=where, owner=OWNERS[name], sites={"home": where, "branch": "UK"})
            for name, where in SEED_ENTERPRISES.items()
        },
    )


def mechanism(kind: str, from_: str, to: str, start_s: int = NOW_S - 100, end_s: int = NOW_S + 100, **more: Any) -> Any:
    def told(at_s: int) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s))

    return {
        "kind": kind,
        "from": from_,
        "to": to,
        "reference": f"{kind} {from_}-{to}",
        "valid_from": told(start_s),
        "valid_until": told(end_s),
        **more,
    }


def sources_with(*mechanisms: Any, modules: dict[str, str] | None = None) -> PolicySources:
    product = load_policies()
    regulation = product.regulation.model_dump(mode="json", by_alias=True)
    return PolicySources(
        modules=modules or product.modules,
        regulation=Regulation.model_validate(regulation | {"mechanisms": list(mechanisms)}),
    )


def center(name: str, datastore: str = "") -> Place:
    return Place(kind="data center", name=name, datastore=datastore)


def site(name: str = "home") -> Place:
    return Place(kind="site", name=name)


def asked(action: str, enterprise: str, place: Place | None = None, seat: str | None = None, **more: Any) -> Question:
    operator = None if seat is None else Operator(role="admin", jurisdiction=seat)
    return Question(action=Action(action), enterprise=enterprise, place=place, operator=operator, **more)


class BundleServer:
    """Serves what `current` returns as (ETag, bundle) at /bundle, to who brings the token."""

    def __init__(self, current: Callable[[], tuple[str, bytes]], token: str = "") -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                etag, bundle = current()
                if token and self.headers["Authorization"] != f"Bearer {token}":
                    self.answer(401, b"")
                elif self.headers["If-None-Match"] == f'"{etag}"':
                    self.answer(304, b"")
                else:
                    self.answer(200, bundle, etag)

            def answer(self, status: int, body: bytes, etag: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                if etag:
                    self.send_header("ETag", f'"{etag}"')
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/bundle"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def eventually(done: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


class EngineWorld:
    """A rights service over one kind of engine, with a clock that tests set."""

    def __init__(self, kind: str, folder: Path, sources: PolicySources, facts: Facts) -> None:
        self.now_s = float(NOW_S)
        self.tampered: bytes | None = None
        self._server: BundleServer | None = None
        self.process: OpaProcess | None = None
        if kind == "embedded":
            self.engine: EmbeddedEngine | OpaEngine = EmbeddedEngine()
        else:
            self._server = BundleServer(self._bundle, "a token")
            (folder / "token").write_text("a token")
            public = Signer.open(folder).public
            self.process = OpaProcess(folder / "opa", self._server.url, public, token_file=folder / "token")
            self.engine = OpaEngine(self.process.url)
        self.rights = RightsService(folder, self.engine, lambda: self.now_s)
        self.rights.put_sources(sources)
        self.rights.put_facts(facts)
        self.wait_current()

    def _bundle(self) -> tuple[str, bytes]:
        return ("tampered", self.tampered) if self.tampered is not None else self.rights.bundle()

    def wait_current(self) -> None:
        eventually(lambda: self.rights.state().revision == self.rights.state().wanted)

    def decide(self, question: Question) -> Answer:
        (answer,) = self.rights.decide([question])
        return answer

    def close(self) -> None:
        self.rights.close()
        if self.process is not None:
            self.process.close()
        if self._server is not None:
            self._server.close()
