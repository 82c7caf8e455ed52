"""R11: an enterprise with valid credentials aims at another's things, through everything that can be said on a link.

It attacks from a site that it has given the same name as the other's site has.

What belongs to another must look exactly as what does not exist. So everything is said twice over real TLS, once with
the other's names and once with names that nobody has; with those names blanked, all that comes back must be equal, byte
by byte. After each attack the other's session, journal, registry and database are as they were.

The kinds of message, calls and purposes are taken from the code: one that no case here knows fails the test.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from types import UnionType
from typing import Any, get_args

import pytest
import pytest_asyncio
from api_world import MARKER
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from isolation_frames import durable, greet, heard
from isolation_world import OURS, THEIR_SITE, Aim, Provider, Recorder, provider_in, refused

from dr_cloud.link import control, purpose
from dr_cloud.link import messages as link
from dr_cloud.link.purpose import LOGS, REPLICATION, replication_arguments
from dr_cloud.link.session import ChannelStream, Session
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Disk
from dr_cloud.model.replication import HostReport, SeenServer, SiteReport, SourceReport, TargetReport
from dr_cloud.seal.identity import Peer

pytestmark = [pytest.mark.system, pytest.mark.asyncio(loop_scope="module")]
NOT_FOUND = r"NotFoundError: there is no such VPG and target\. Name one of your own\."
BROKEN = r"the other end closed the link: the other end broke the protocol: "


class Attack:
    """An attacker's session at its own door, with its own valid certificate."""

    def __init__(self, provider: Provider, session: Session, recorder: Recorder) -> None:
        self.provider = provider
        self.session = session
        self.heard = recorder.heard
        self.source = provider.source(OURS)

    async def say(self, message: control.Control) -> None:
        await self.session._carrier.send(message.model_dump_json())

    async def replicating(self) -> ChannelStream:
        """Return a channel of one's own VPG after its hello."""
        stream = await self.session.open(REPLICATION, replication_arguments(OURS))
        await greet(stream, self.source)
        self.heard.clear()
        return stream

    async def say_as_source(self, message: str | bytes) -> str:
        """Say one message to the target of one's own VPG; return how it is refused."""
        stream = await self.replicating()
        await stream.send(message)
        answer = await heard(stream)
        assert isinstance(answer, link.Refused), answer
        return f"{answer.code}: {answer.reason}"


Case = Callable[[Attack, Aim], Awaitable[str]]


def csr_that_says(uri: str) -> str:
    """Return a signing request that asks for this URI."""
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=False)
    request = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


# What a link's two ends tell each other.


async def link_open(attack: Attack, aim: Aim) -> str:
    return await refused(attack.session.open(REPLICATION, replication_arguments(aim.scope)))


async def link_credit(attack: Attack, aim: Aim) -> str:
    await attack.say(control.Credit(channel=aim.channel, bytes=1))
    return await attack.session.wait_closed()


async def link_close(attack: Attack, aim: Aim) -> str:
    await attack.say(control.Close(channel=aim.channel, fault=None))
    return await attack.session.wait_closed()


async def link_ping(attack: Attack, aim: Aim) -> str:
    await attack.say(control.Ping())
    while control.Pong().model_dump_json() not in attack.heard:
        await asyncio.sleep(0.005)
    return "pong"


async def link_pong(attack: Attack, aim: Aim) -> str:
    await attack.say(control.Pong())
    return await link_ping(attack, aim)


async def link_bye(attack: Attack, aim: Aim) -> str:
    await attack.say(control.Bye(reason=f"close the link of {aim.site} of {aim.scope.enterprise}"))
    return await attack.session.wait_closed()


# Calls of a site.


def all_names(aim: Aim) -> dict[str, Any]:
    return {"enterprise": aim.scope.enterprise, "site": aim.site, "scope": list(aim.scope), "serial": aim.serial}


async def call_orders(attack: Attack, aim: Aim) -> str:
    orders = await attack.session.call("orders", all_names(aim))
    own = await asyncio.to_thread(attack.provider.cloud.orders_for, "acme", THEIR_SITE)
    assert orders == own.model_dump(mode="json")
    return "own orders"


async def call_report(attack: Attack, aim: Aim) -> str:
    seen = SeenServer(
        name=aim.server,
        host=aim.host,
        tap=aim.tap,
        disks=[Disk(index=0, name="root", size_bytes=1 << 20)],
        connected=True,
        enterprise=aim.scope.enterprise,
    )
    source = SourceReport(
        scope=aim.scope,
        linked=True,
        problem="told by another",
        taps={aim.server: "whole"},
        kept_bytes=1,
        durable_ns=1,
        lag_seconds=1.0,
        checkpoints=1,
        skipped=1,
        resyncs=1,
    )
    target = TargetReport(
        scope=aim.back, generation=9, connections=9, newest=None, horizon_ns=1, newest_ns=2, problem="told by another"
    )
    report = SiteReport(
        revision=10**9,
        time_ns=1,
        version="1",
        hosts=[HostReport(host=aim.host, vdsa="installed", servers=[seen])],
        sources=[source],
        targets=[target],
        datastores=["ds"],
    )
    named = {**report.model_dump(mode="json"), "enterprise": aim.scope.enterprise, "site": aim.site}
    return f"taken: {await attack.session.call('report', named)}"


async def call_renew(attack: Attack, aim: Aim) -> str:
    """A request for a certificate that says the other's name, under the other's serial."""
    uri = Peer.of_site("provider", aim.scope.enterprise, aim.site).uri
    answer = await attack.session.call("renew", {**all_names(aim), "csr": csr_that_says(uri)})
    assert isinstance(answer, dict)
    certificate = x509.load_pem_x509_certificate(str(answer["certificate"]).encode())
    peer = Peer.of_certificate(certificate.public_bytes(serialization.Encoding.DER))
    assert attack.provider.cloud.certificate_ok(peer.serial)
    return peer.uri


# Purposes of channels.


async def channel_replication(attack: Attack, aim: Aim) -> str:
    """The other's scope in every shape, and the other's VPG as if it were one's own."""
    shapes: list[Any] = [
        {"scope": list(aim.scope)},
        {"scope": list(aim.back)},
        {"scope": list(aim.scope), "enterprise": "acme"},
        {"scope": "/".join(aim.scope)},
        {"scope": ["acme", f"../{aim.scope.enterprise}/{aim.scope.vpg}", aim.scope.target]},
        {"scope": [["acme", aim.scope.enterprise], aim.scope.vpg, aim.scope.target]},
    ]
    answers = {await refused(attack.session.open(REPLICATION, shape)) for shape in shapes}
    assert len(answers) == 1, answers
    own = Scope("acme", aim.scope.vpg, aim.scope.target)
    assert (await refused(attack.session.open(REPLICATION, replication_arguments(own)))).startswith("NotFoundError")
    return answers.pop()


async def channel_logs(attack: Attack, aim: Aim) -> str:
    return await refused(attack.session.open(LOGS, {"id": aim.log}))


async def channel_of_no_purpose(attack: Attack, aim: Aim) -> str:
    return await refused(attack.session.open("journal", {"scope": list(aim.scope)}))


# Messages of a replication.


async def say_hello(attack: Attack, aim: Aim) -> str:
    """In a channel for one's own scope: the other's hello as the first message, and after one's own."""
    other = link.encode_control(link.Hello(scope=aim.scope, stream=aim.stream, connection=0, connections=1))
    stream = await attack.session.open(REPLICATION, replication_arguments(OURS))
    await stream.send(other)
    with pytest.raises(OSError, match="the first message is of another scope than its channel"):
        await stream.receive()
    return await attack.say_as_source(other)


async def say_taps(attack: Attack, aim: Aim) -> str:
    """The other's tap, as if it were one's own: it is a name within one's own journal, and of no use beyond it."""
    attack.source.tap = aim.tap
    stream = await attack.replicating()
    await stream.send(attack.source.taps())
    await stream.send(attack.source.frame())
    answer = await durable(stream, attack.source)
    return f"durable: {list(answer.cuts) == [aim.tap]}"


async def say_checkpoint(attack: Attack, aim: Aim) -> str:
    """One's own checkpoint, that claims to be the one which the other has been asked for."""
    attack.source.tap = aim.tap
    stream = await attack.replicating()
    await stream.send(attack.source.taps())
    answer = await durable(stream, attack.source, aim.request)
    return f"durable: {answer.request == aim.request}"


async def say_ping(attack: Attack, aim: Aim) -> str:
    stream = await attack.replicating()
    await stream.send(link.encode_control(link.Ping()))
    return (await heard(stream)).type


async def say_offer(attack: Attack, aim: Aim) -> str:
    """The digests of what the other has stored: nothing may tell that somebody has it."""
    stream = await attack.replicating()
    await stream.send(link.encode_data(link.OFFER, 7, aim.digests))
    message = await asyncio.wait_for(stream.receive(), 10)
    assert message is not None and not isinstance(message, str)
    return f"known: {bytes(message[link.HEAD_BYTES :]).hex()}"


async def say_frame(attack: Attack, aim: Aim) -> str:
    """The other's sealed frame, under the number that it has."""
    stream = await attack.replicating()
    await stream.send(attack.source.taps())
    await stream.send(aim.frame)
    answer = await heard(stream)
    assert isinstance(answer, link.Refused), answer
    return f"{answer.code}: {answer.reason}"


def as_source(make: Callable[[Aim], link.Control]) -> Case:
    """What only targets say."""

    async def case(attack: Attack, aim: Aim) -> str:
        return await attack.say_as_source(link.encode_control(make(aim)))

    return case


async def say_known(attack: Attack, aim: Aim) -> str:
    return await attack.say_as_source(link.encode_data(link.KNOWN, 2, bytes(8)))


def _welcome(aim: Aim) -> link.Control:
    return link.Welcome(generation=9, received=9, time_ns=9, credit_bytes=1, cuts={aim.tap: 9})


def _durable(aim: Aim) -> link.Control:
    return link.Durable(number=9, cuts={aim.tap: 9}, checkpoint=9, time_ns=9, request=aim.request)


NO_SUCH_SENDER = r"stream: a source does not send {}"
LINK: dict[str, tuple[Case, str]] = {
    "open": (link_open, NOT_FOUND),
    "credit": (link_credit, BROKEN + "the peer used the number of a channel that it cannot have"),
    "close": (link_close, BROKEN + "the peer used the number of a channel that it cannot have"),
    "ping": (link_ping, "pong"),
    "pong": (link_pong, "pong"),
    "bye": (link_bye, r"the other end closed .*"),
}
CALLS: dict[str, tuple[Case, str]] = {
    "orders": (call_orders, "own orders"),
    "report": (call_report, r"taken: {}"),
    "renew": (call_renew, "dr-cloud://provider/enterprise/acme/site/SITE"),
}
PURPOSES: dict[str, tuple[Case, str]] = {
    REPLICATION: (channel_replication, NOT_FOUND),
    LOGS: (channel_logs, r"NotFoundError: nobody has asked for these logs\. "),
    "another": (channel_of_no_purpose, r"NotFoundError: channels of purpose 'journal' are not served here\. .*"),
}
MESSAGES: dict[str, tuple[Case, str]] = {
    "hello": (say_hello, NO_SUCH_SENDER.format("hello")),
    "taps": (say_taps, "durable: True"),
    "checkpoint": (say_checkpoint, "durable: True"),
    "ping": (say_ping, "pong"),
    "offer": (say_offer, "known: " + "00" * 16),
    "frame": (say_frame, r"stream: item 2 holds frame 2 of stream NAME"),
    "welcome": (as_source(_welcome), NO_SUCH_SENDER.format("welcome")),
    "durable": (as_source(_durable), NO_SUCH_SENDER.format("durable")),
    "request_checkpoint": (
        as_source(lambda aim: link.RequestCheckpoint(id=aim.request, tag=aim.site)),
        NO_SUCH_SENDER.format("request_checkpoint"),
    ),
    "refused": (
        as_source(lambda aim: link.Refused(code="replaced", reason=f"{aim.scope.prefix} is mine")),
        NO_SUCH_SENDER.format("refused"),
    ),
    "pong": (as_source(lambda aim: link.Pong()), NO_SUCH_SENDER.format("pong")),
    "known": (say_known, r"stream: a source does not send binary messages of kind 3"),
}
ALL = {
    f"{where} {name}": case
    for where, cases in (("link", LINK), ("call", CALLS), ("channel", PURPOSES), ("message", MESSAGES))
    for name, case in cases.items()
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def provider(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Provider]:
    async with provider_in(tmp_path_factory.mktemp("p")) as made:
        yield made


def types(union: UnionType) -> set[str]:
    return {str(kind.model_fields["type"].default) for kind in get_args(union)}


async def test_everything_that_can_be_said_has_its_case(provider: Provider) -> None:
    """A new message, call or purpose is to be aimed at another enterprise before it is used."""
    assert set(LINK) == types(control.Control)
    kinds = {name.lower() for name in ("OFFER", "FRAME", "KNOWN")}
    assert len(kinds) == len(link._BODY_RULES)
    assert set(MESSAGES) == types(link.Control) | kinds
    assert set(PURPOSES) - {"another"} == {v for k, v in vars(purpose).items() if k.isupper() and isinstance(v, str)}
    session, _ = await provider.dial("acme")
    async with session:
        await session.call("orders")
        assert set(CALLS) == set(provider.gates["acme"]._control[THEIR_SITE].methods)


def seen(attack: Attack, aim: Aim) -> list[str]:
    """Return all that came over the wire, with the names that the attacker sent and what is random taken out."""
    found = []
    for message in attack.heard:
        text = message if isinstance(message, str) else message[:8].decode("latin-1") + message[12:].decode("latin-1")
        if re.match(r'{"type":"(credit|ping|pong)"', text):
            continue  # They come when they come.
        text = re.sub(r'"(certificate|serial)":"[^"]*"', r'"\1":""', text)
        found.append(re.sub(r'"(checkpoint|time_ns)":\d+', r'"\1":0', aim.blank(text)))
    return sorted(found)


async def attacked(provider: Provider, case: Case, aim: Aim) -> tuple[str, list[str]]:
    session, recorder = await provider.dial("acme")
    attack = Attack(provider, session, recorder)
    async with session:
        told = await asyncio.wait_for(case(attack, aim), 20)
        return aim.blank(told), seen(attack, aim)


@pytest.mark.parametrize("name", ALL)
async def test_what_is_anothers_is_as_what_is_not(provider: Provider, name: str) -> None:
    """R11: see the module's docstring."""
    case, expected = ALL[name]
    theirs = await attacked(provider, case, provider.victim.aim)
    await provider.victim.unchanged()
    nobodys = await attacked(provider, case, Aim.nowhere())
    assert theirs == nobodys
    assert re.fullmatch(expected, theirs[0]), theirs[0]
    assert MARKER not in str(theirs) and "brit" not in str(theirs)


@pytest.mark.parametrize("method", ["route", "target", "certificate_ok", "site_lost", "unpair", "logs", "host_orders"])
async def test_a_site_can_call_nothing_else(provider: Provider, method: str) -> None:
    async def case(attack: Attack, aim: Aim) -> str:
        return await refused(attack.session.call(method, all_names(aim)))

    theirs = await attacked(provider, case, provider.victim.aim)
    assert theirs == await attacked(provider, case, Aim.nowhere())
    assert theirs[0].startswith(f"NotFoundError: there is no method {method!r} here")
    await provider.victim.unchanged()


async def test_the_other_goes_on_as_if_nothing_had_been(provider: Provider) -> None:
    """R11: what was under way during the attacks ends as it should: its checkpoint, its image, its logs."""
    await provider.victim.unchanged()
    await provider.victim.go_on()
