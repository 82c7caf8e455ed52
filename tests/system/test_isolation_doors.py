"""R11: which certificate opens which door, and what a site, a connector and a VDSA take from whom.

The rules. A connector lets in sites of its own enterprise, whose certificate the manager gave and has not revoked. A
site stays only with a service of its provider. Between machines the provider's own streams are of services alone. Whose
certificate names nobody, or two, is nobody. The chain, the time and TLS 1.3 are TLS's part (`test_link_websocket.py`).
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from isolation_frames import greet
from isolation_world import HOST, OURS, THEIR_SITE, THEIRS, TO_THEIR_SITE, Aim, Provider, forged, provider_in, refused

from dr_cloud.actors.inner import Inner
from dr_cloud.link.purpose import LOGS, REPLICATION, replication_arguments
from dr_cloud.link.session import Session
from dr_cloud.link.stream import PlainStream, connect, listen
from dr_cloud.link.websocket import LinkServer, dial, serve
from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.model.replication import LogRequest, SourceOrders, TargetOrders
from dr_cloud.seal.authority import Authority
from dr_cloud.seal.identity import Credentials, Peer, new_key_and_csr
from dr_cloud.site.config import SiteSettings
from dr_cloud.site.logs import SiteLog
from dr_cloud.site.process import Site
from dr_cloud.site.state import Identity, StateFolder

pytestmark = [pytest.mark.system, pytest.mark.asyncio(loop_scope="module")]
SITE_A = "dr-cloud://provider/enterprise/acme/site/brit-hq"
SITE_B = "dr-cloud://provider/enterprise/brit/site/brit-hq"
CONNECTOR = "dr-cloud://provider/service/connector"
VDSA = "dr-cloud://provider/service/vdsa"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def provider(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Provider]:
    async with provider_in(tmp_path_factory.mktemp("p")) as made:
        yield made


def of_site(authority: Authority, enterprise: str, site: str) -> Credentials:
    """Return a certificate that the manager knows nothing of."""
    key, csr = new_key_and_csr()
    return Credentials(key, authority.issue_site(csr, enterprise, site).certificate, authority.certificate)


OPENS_NOTHING: dict[str, Callable[[Provider], tuple[str, Credentials]]] = {
    "one's own at another's door": lambda p: ("brit", p.credentials["acme"]),
    "another's at one's own door": lambda p: ("acme", p.credentials["brit"]),
    "of an enterprise that nobody has": lambda p: ("brit", of_site(p.authority, "none", "none-hq")),
    "not given by the manager": lambda p: ("brit", of_site(p.authority, "brit", "brit-hq")),
    "of a site that nobody has": lambda p: ("brit", of_site(p.authority, "brit", "none-hq")),
    "of a service: connector": lambda p: ("brit", p.authority.service_credentials("connector", [HOST])),
    "of a service: vdsa": lambda p: ("brit", p.authority.service_credentials("vdsa", [HOST])),
    "of another provider's name": lambda p: ("brit", forged(p.authority, [SITE_B.replace("provider", "another")])),
    "that was not given, for both ends of TLS": lambda p: ("brit", forged(p.authority, [SITE_B])),
}
NOBODY: dict[str, list[str]] = {
    "no name": [],
    "two sites": [SITE_A, SITE_B],
    "a site twice": [SITE_B, SITE_B],
    "a site and a service": [SITE_B, CONNECTOR],
    "another scheme": [SITE_B.replace("dr-cloud:", "spiffe:")],
    "a part too many": [f"{SITE_B}/x"],
    "an empty part": ["dr-cloud://provider/enterprise/brit/site/"],
    "dots": ["dr-cloud://provider/enterprise/../site/brit-hq"],
    "letters of another case": [SITE_B.replace("brit-hq", "BRIT-HQ")],
}


async def words(provider: Provider, door: str, credentials: Credentials) -> str:
    """Return in what words a door refuses a certificate."""
    count = len(provider.doors[door].sessions)
    answer = await refused(dial(provider.url(door), credentials.client_context()))
    assert len(provider.doors[door].sessions) <= count  # one that was closed before may be gone only now
    return answer


async def test_what_opens_nothing_is_told_in_one_way(provider: Provider) -> None:
    """R11: who is refused at a door does not learn why: another's, a missing and an unknown one get the same words."""
    told = {name: await words(provider, *make(provider)) for name, make in OPENS_NOTHING.items()}
    assert len(set(told.values())) == 1, told
    [answer] = set(told.values())
    assert "this certificate opens nothing here" in answer
    await provider.victim.unchanged()


async def test_a_certificate_that_names_nobody_is_nobodys(provider: Provider) -> None:
    """R11: none, two, or no proper name: refused at every door, for what it is and in the same words at each."""
    for name, uris in NOBODY.items():
        credentials = forged(provider.authority, uris)
        answers = {await words(provider, door, credentials) for door in ("acme", "brit")}
        assert len(answers) == 1, name
        [answer] = answers
        assert "ForbiddenError" in answer, name
        assert "acme" not in answer and "brit" not in answer, name
    await provider.victim.unchanged()


async def test_a_revoked_site_is_out_at_once(tmp_path: Path) -> None:
    """R11: unpaired, its link is closed, its streams end, and its certificate opens what a stranger's does."""
    async with provider_in(tmp_path) as provider:
        stranger = await words(provider, "brit", of_site(provider.authority, "brit", "brit-hq"))
        session, _ = await provider.dial("acme")
        async with session:
            stream = await session.open(REPLICATION, replication_arguments(OURS))
            await greet(stream, provider.source(OURS))
            await asyncio.to_thread(provider.cloud.unpair, SYSTEM, "acme", THEIR_SITE)
            assert "revoked" in await asyncio.wait_for(session.wait_closed(), 5)
            with pytest.raises(OSError):
                await stream.receive()
        await provider.victim.unchanged()
        await asyncio.to_thread(provider.cloud.unpair, SYSTEM, "brit", THEIR_SITE)
        assert "revoked" in await asyncio.wait_for(provider.victim.session.wait_closed(), 5)
        for enterprise in ("acme", "brit"):
            assert await words(provider, enterprise, provider.credentials[enterprise]) == stranger


# Who poses as the provider.


@asynccontextmanager
async def posing(credentials: Credentials) -> AsyncIterator[LinkServer]:
    async def nobody(session: Session) -> None:
        raise AssertionError("somebody has come in")

    async def anybody(peer: Peer) -> None:
        pass

    server = await serve(HOST, 0, credentials.server_context(), nobody, anybody)
    yield server
    await server.close()


@pytest.mark.parametrize("uris", [[SITE_A], *NOBODY.values(), [CONNECTOR, VDSA]])
async def test_a_site_stays_only_with_a_service_of_its_provider(provider: Provider, uris: list[str]) -> None:
    """R11: even with a certificate that TLS would take for a server's, a site cannot pose as a connector."""
    async with posing(forged(provider.authority, uris)) as server:
        with pytest.raises(DrCloudError):
            await dial(f"wss://{HOST}:{server.port}/link", provider.credentials["brit"].client_context())


# Within the provider.


@pytest.mark.parametrize("uris", [[SITE_A], [CONNECTOR.replace("provider", "another")], *NOBODY.values()])
async def test_within_the_provider_only_services_meet(provider: Provider, tmp_path: Path, uris: list[str]) -> None:
    """R11: a site poses neither as a connector to a VDSA, nor as a VDSA to a connector; services meet."""
    got: list[Any] = []

    async def note(stream: PlainStream) -> None:
        got.append(await stream.receive())

    service = Inner(HOST, provider.authority.service_credentials("vdsa", [HOST]))
    impostor = Inner(HOST, forged(provider.authority, uris))
    impostor._credentials.peer = service._credentials.peer  # type: ignore[union-attr]
    for listener, dialler in ((service, impostor), (impostor, service)):
        server, address = await listener.listen(tmp_path / "unused", note)
        with pytest.raises((OSError, DrCloudError)):
            stream = await dialler.connect(address)
            await stream.send("hello")
            assert await asyncio.wait_for(stream.receive(), 10) is None
            raise ConnectionResetError
        server.close()
    await asyncio.sleep(0.02)
    assert not any(got)
    server, address = await service.listen(tmp_path / "unused", note)
    connector = Inner(HOST, provider.authority.service_credentials("connector", [HOST]))
    await (await connector.connect(address)).send("hello")
    async with asyncio.timeout(5):
        while got[-1:] != ["hello"]:
            await asyncio.sleep(0.01)
    server.close()


@pytest.mark.parametrize("scope", [TO_THEIR_SITE, THEIRS, Scope("none", "erp", "dc1"), OURS])
async def test_a_door_leads_to_its_own_enterprises_sites_alone(provider: Provider, site: Site, scope: Scope) -> None:
    """R11: a stream from within is closed without a word, though a site of the name that it goes to is linked here."""
    session = provider.gates["acme"]._control[THEIR_SITE]
    opened = session._core._next_number
    address = f"unix:{provider.folder}/door.sock"
    server = await listen(address, provider.gates["acme"].serve_inner)
    stream = await connect(address)
    source = provider.source(OURS)
    source.scope = scope
    await stream.send(source.hello())
    assert await asyncio.wait_for(stream.receive(), 10) is None
    server.close()
    assert session._core._next_number == opened, "the site was asked"
    await provider.victim.unchanged()


# What a site takes from its provider.


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(provider: Provider) -> AsyncIterator[Site]:
    """A real site of `acme`, linked."""
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    state = StateFolder(folder / "site")
    credentials = provider.credentials["acme"]
    identity = Identity(
        enterprise="acme",
        site=THEIR_SITE,
        api="https://unused",
        link=provider.url("acme"),
        ca=credentials.ca,
        certificate=credentials.certificate,
        key=credentials.key,
        token="",
    )
    settings = SiteSettings.model_validate(
        {
            "state": state.path,
            "hosts": [{"name": "h1", "listen": f"unix:{folder}/h1.sock"}],
            "datastores": [{"name": "ds", "store": f"file://{folder}/ds"}],
        }
    )
    made = Site(settings, state, identity, SiteLog(folder / "logs"))
    running = asyncio.create_task(made.run(lambda line: None))
    async with asyncio.timeout(20):
        while not made.uplink.linked:
            await asyncio.sleep(0.02)
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    state.close()
    shutil.rmtree(folder, ignore_errors=True)


async def told_orders(session: Session, aim: Aim) -> str:
    """Orders to be the source, and the target, of what is not its own."""
    source = SourceOrders(scope=aim.scope, copy_number=0, members={aim.server: {"root": 0}})
    target = TargetOrders(scope=aim.scope, store="ds")
    orders: dict[str, Any] = {"revision": 10**6, "hosts": ["h1"], "sources": [source.model_dump(mode="json")]}
    orders["targets"] = [target.model_dump(mode="json")]
    return str(await session.call("orders", orders))


async def told_logs(session: Session, aim: Aim) -> str:
    """To send its logs in answer to what another was asked."""
    return await refused(session.call("logs", LogRequest(id=aim.log).model_dump(mode="json")))


async def opened_replication(session: Session, aim: Aim) -> str:
    return await refused(session.open(REPLICATION, replication_arguments(aim.scope)))


async def opened_logs(session: Session, aim: Aim) -> str:
    return await refused(session.open(LOGS, {"id": aim.log}))


SITE_CASES = {
    "call orders": (told_orders, "{}"),
    "call logs": (told_logs, "NotFoundError: nobody has asked for these logs. "),
    "channel replication": (
        opened_replication,
        "NotFoundError: there is no such VPG and target. Name one of your own.",
    ),
    "channel logs": (
        opened_logs,
        "NotFoundError: a site serves no channel of purpose 'logs'. Bring both sides to one release.",
    ),
}


@pytest.mark.parametrize("name", SITE_CASES)
async def test_a_site_takes_nothing_of_anothers(provider: Provider, site: Site, name: str) -> None:
    """R11: what the provider sends by mistake, with another's names, is to a site as what does not exist."""
    methods = {f"call {method}" for method in site.uplink._methods}
    assert methods == {case for case in SITE_CASES if case.startswith("call")}, "a new call has no case here"
    case, expected = SITE_CASES[name]
    session = provider.gates["acme"]._control[THEIR_SITE]
    for aim in (provider.victim.aim, Aim.nowhere()):
        assert await case(session, aim) == expected
        known = site.follower.accepted
        assert not known.orders.sources or known.orders.sources[0].scope.enterprise == "acme"
        assert known.orders.targets == []
        assert not any(aim.scope.enterprise in scope for scope in (*known.sources, *known.targets))
        report = site.follower.report().model_dump_json()
        assert not any(name in report for name in (*aim.scope, aim.server, aim.tap, aim.log))
    await provider.victim.unchanged()
