"""One end of a link in a process of its own, so that it can run in a network namespace. It prints JSON lines.

    link_end.py serve FOLDER ENTERPRISE…                     the provider's end; first line: the port of each enterprise
    link_end.py dial FOLDER ENTERPRISE URL [PROXY] [--stay]  a site's end; a line for each link it had, and for its end

FOLDER holds the provider's authority. With --stay the site keeps its link, and dials again when it is cut.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from dr_cloud.link.session import ChannelStream, Session
from dr_cloud.link.websocket import dial, serve
from dr_cloud.model.errors import DrCloudError
from dr_cloud.seal.authority import Authority
from dr_cloud.seal.identity import Credentials, Peer, check_site, new_key_and_csr

PROVIDER_ADDRESS = "198.51.100.1"
PING_SECONDS = 0.25
BODY = os.urandom(1 << 20)


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


async def echo(purpose: str, arguments: dict[str, Any], stream: ChannelStream) -> None:
    while (message := await stream.receive()) is not None:
        await stream.send(message)


async def talk(session: Session) -> bool:
    """Open a channel; return whether everything came back."""
    stream = await session.open("replication", {})
    for _ in range(4):
        await stream.send(BODY)
        if await stream.receive() != BODY:
            return False
    stream.end()
    return True


async def serve_all(folder: Path, enterprises: list[str]) -> None:
    authority = Authority.open(folder, "provider")
    together: set[Session] = set()

    async def admit(enterprise: str, peer: Peer) -> None:
        check_site(peer, "provider", enterprise, lambda serial: False)

    async def on_session(enterprise: str, session: Session) -> None:
        async def who(params: dict[str, Any]) -> dict[str, Any]:
            address = session._carrier._connection.remote_address[0]  # type: ignore[attr-defined]
            return {
                "enterprise": enterprise,
                "seen_from": address,
                "place": await session.call("place"),
                "reached_back": await talk(session),
                "together": len(together),
            }

        session.methods["who"] = who
        session.on_channel = echo
        session._ping_seconds = PING_SECONDS
        together.add(session)
        async with session:
            await session.wait_closed()
        together.remove(session)

    ports = {}
    for enterprise in enterprises:
        context = authority.service_credentials(f"connector-{enterprise}", [PROVIDER_ADDRESS]).server_context()
        server = await serve("0.0.0.0", 0, context, partial(on_session, enterprise), partial(admit, enterprise))
        ports[enterprise] = server.port
    say(ports)
    await asyncio.Event().wait()


async def dial_once(credentials: Credentials, url: str, proxy: str | None, stay: bool) -> None:
    session = await dial(url, credentials.client_context(), proxy)

    async def place(params: dict[str, Any]) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("10.0.0.1", 9))
            address: str = probe.getsockname()[0]
            return address

    session.methods["place"] = place
    session.on_channel = echo
    session._ping_seconds = PING_SECONDS
    async with session:
        who = await session.call("who")
        assert isinstance(who, dict)
        say({"linked": who | {"sent": await talk(session)}})
        if stay:
            say({"closed": await session.wait_closed()})


async def dial_all(folder: Path, enterprise: str, url: str, proxy: str | None, stay: bool) -> None:
    authority = Authority.open(folder, "provider")
    key, csr = new_key_and_csr()
    credentials = Credentials(key, authority.issue_site(csr, enterprise, "site").certificate, authority.certificate)
    while True:
        try:
            await dial_once(credentials, url, proxy, stay)
        except (OSError, TimeoutError, DrCloudError) as error:
            say({"failed": str(error), "kind": type(error).__name__})
        if not stay:
            return
        await asyncio.sleep(PING_SECONDS)


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    arguments = [argument for argument in sys.argv[2:] if argument != "--stay"]
    if sys.argv[1] == "serve":
        asyncio.run(serve_all(Path(arguments[0]), arguments[1:]))
    else:
        way = arguments[3] if len(arguments) > 3 else None
        asyncio.run(dial_all(Path(arguments[0]), arguments[1], arguments[2], way, "--stay" in sys.argv))
