"""A real OPA server that is killed, hung, fed a bad bundle; and others that are no OPA at all."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from rights_engines import EngineWorld, asked, center, eventually, mechanism, seed_facts, sources_with

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope
from dr_cloud.rights.bundle import Signer, build_bundle
from dr_cloud.rights.opa import ANSWER_SECONDS, OpaEngine
from dr_cloud.rights.rights import GrantRequest

pytestmark = pytest.mark.system
HOME = asked("keep", "acme-us", center("us-east", "ds-1"), vpg="erp", target="t1")
ABROAD = asked("keep", "brit-uk", center("us-east", "ds-1"))
GRANT = GrantRequest(question=HOME, scope=Scope("acme-us", "erp", "t1"), store="file:///x")


@pytest.fixture(scope="module")
def world(require_tool, tmp_path_factory):
    require_tool("opa")
    world = EngineWorld("opa", tmp_path_factory.mktemp("opa"), sources_with(), seed_facts())
    yield world
    world.close()


@pytest.fixture(autouse=True)
def answers_before_and_after(request):
    """Whatever a test did to the server, it answers again by itself."""
    if "world" not in request.fixturenames:
        yield
        return
    world = request.getfixturevalue("world")
    world.wait_current()
    assert world.decide(HOME).allow
    yield
    world.wait_current()
    assert world.decide(HOME).allow
    eventually(lambda: world.rights.state().problem == "")


def later(world):
    """The answers of the last moments are not used any more."""
    world.now_s += 10


def assert_closed(world, why):
    """Nothing new is granted; the state says why; and it is told within two seconds."""
    later(world)
    began = time.monotonic()
    (answer, grant) = world.rights.grant([GRANT])[0]
    assert time.monotonic() - began < 2.0
    assert not answer.allow and not answer.answered and grant == ""
    assert why in answer.reasons[0]
    assert why in world.rights.state().problem
    assert world.rights.state().revision == ""


def test_killed(world):
    """R13: an OPA server that is away opens nothing, and is started again."""
    pid = world.process.pid
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: world.process.pid != pid)
    assert_closed(world, "cannot be reached")


def test_hung(world):
    """R13"""
    os.kill(world.process.pid, signal.SIGSTOP)
    try:
        assert_closed(world, "has not answered in")
    finally:
        os.kill(world.process.pid, signal.SIGCONT)


def unsigned(bundle):
    """Return a bundle without its signature."""
    stripped = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(bundle)) as old, tarfile.open(fileobj=stripped, mode="w:gz") as new:
        for entry in old:
            if entry.name != ".signatures.json":
                new.addfile(entry, old.extractfile(entry))
    return stripped.getvalue()


@pytest.mark.parametrize("change", [lambda bundle: bundle, unsigned, lambda bundle: bundle[:-20]])
def test_a_bundle_that_is_not_signed_by_the_key_is_refused_and_the_old_one_stays(world, tmp_path, change):
    """R13: of another key, of none, or cut off."""
    before = world.rights.state().revision
    open_all = sources_with(mechanism("adequacy", "UK", "USA", end_s=2**33))
    world.tampered = change(build_bundle(open_all, seed_facts(), Signer.open(tmp_path / "forger"))[1])
    try:
        eventually(lambda: "refused a bundle" in world.rights.state().problem)
        later(world)
        assert not world.decide(ABROAD).allow
        assert world.decide(ABROAD).revision == world.rights.state().revision == before
    finally:
        world.tampered = None


def test_a_bundle_that_does_not_come_is_a_stale_revision(world):
    """R13: what is in force is not what is wanted: that is a problem, and it is told."""
    old, world.tampered = world.rights.state().wanted, world.rights.bundle()[1]
    try:
        wanted = world.rights.put_sources(sources_with(mechanism("adequacy", "APAC", "UK")))
        eventually(lambda: world.rights.state().problem == f"it decides by revision {old}, and {wanted} is the newest")
        later(world)
        assert world.decide(HOME).revision == old
    finally:
        world.tampered = None


def test_what_was_just_registered_is_not_refused(world):
    """A no of a revision that is about to be replaced is asked again."""
    facts = seed_facts()
    world.rights.put_facts(facts)
    world.wait_current()
    fresh = facts.model_copy(update={"enterprises": facts.enterprises | {"new-us": facts.enterprises["acme-us"]}})
    world.rights.put_facts(fresh)
    assert world.decide(asked("keep", "new-us", center("us-east", "ds-1"))).allow


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_it_listens_here_alone_and_dies_with_who_started_it(world, tmp_path):
    script = (
        "import sys,time,pathlib,socket\n"
        "from dr_cloud.rights.opa_process import OpaProcess\n"
        "p = OpaProcess(pathlib.Path(sys.argv[1]), 'http://127.0.0.1:9/bundle', sys.argv[2])\n"
        "while socket.socket().connect_ex(('127.0.0.1', int(p.url.rsplit(':')[-1]))): time.sleep(0.02)\n"
        "print(p.pid, p.url, flush=True)\n"
        "time.sleep(60)\n"
    )
    public = Signer.open(tmp_path).public
    owner = subprocess.Popen([sys.executable, "-c", script, tmp_path, public], stdout=subprocess.PIPE, text=True)
    try:
        pid, url = owner.stdout.readline().split()
        assert url.startswith("http://127.0.0.1:")
        assert "a token" not in (tmp_path / "opa.yaml").read_text()
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    eventually(lambda: not lives(pid))


# -- what is no OPA --


@contextmanager
def server_that(reply):
    """A TCP server that calls `reply(connection)` after each request."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve():
        while True:
            connection, _ = listener.accept()
            if stop.is_set():
                connection.close()
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection):
        with connection, suppress(OSError):  # whoever asked may be gone
            while connection.recv(65536):
                reply(connection, stop)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        socket.create_connection(listener.getsockname()).close()
        thread.join()
        listener.close()


def http(body):
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


YES = b'{"allow":true,"reasons":[],"until_s":null,"jurisdictions":["USA"],"revision":"r1"}'
GARBAGE = {
    "no-http": b"\x00\xff garbage\r\n\r\n",
    "no-json": http(b"<html>"),
    "empty": http(b""),
    "null": http(b"null"),
    "list": http(b"[]"),
    "undefined": http(b"{}"),
    "no-revision": http(b'{"result":{"revision":"","decisions":{"0":' + YES + b"}}}"),
    "no-decision": http(b'{"result":{"revision":"r1","decisions":{}}}'),
    "decisions-list": http(b'{"result":{"revision":"r1","decisions":[' + YES + b"]}}"),
    "yes-as-word": http(
        b'{"result":{"revision":"r1","decisions":{"0":' + YES.replace(b"true", b'"true"') + b"}}}",
    ),
    "yes-as-number": http(b'{"result":{"revision":"r1","decisions":{"0":' + YES.replace(b"true", b"1") + b"}}}"),
    "only-allow": http(b'{"result":{"revision":"r1","decisions":{"0":{"allow":true}}}}'),
    "just-true": http(b'{"result":true}'),
    "not-utf8": http(b'{"result":"\xff\xfe"}'),
    "500": b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n",
    "cut": http(b'{"result":{"revision":"r1","decisions":{"0":' + YES + b"}}}")[:-30],
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_no_answer(kind):
    """R13"""

    def reply(connection, _):
        connection.sendall(GARBAGE[kind])
        connection.shutdown(socket.SHUT_RDWR)

    with server_that(reply) as url:
        engine = OpaEngine(url)
        try:
            (answer,) = engine.answer([{"x": 1}])
            assert not answer.allow and not answer.answered and "no answer" in answer.reasons[0]
        finally:
            engine.close()


def test_the_same_server_with_a_whole_answer_is_believed():
    """Otherwise the test before would prove nothing."""
    whole = http(b'{"result":{"revision":"r1","decisions":{"0":' + YES + b"}}}")
    with server_that(lambda connection, _: connection.sendall(whole)) as url:
        engine = OpaEngine(url)
        try:
            (answer,) = engine.answer([{"x": 1}])
            assert answer.allow and answer.revision == engine.revision == "r1" and engine.problem == ""
        finally:
            engine.close()


@pytest.mark.parametrize("at_once", [1, 450])
def test_late_and_dripping_answers_are_not_read(at_once):
    """R13: all of it together takes two seconds at most, however many questions there are."""
    whole = http(b'{"result":{"revision":"r1","decisions":{"0":' + YES + b"}}}")

    def drip(connection, stop):
        for i in range(len(whole)):
            connection.sendall(whole[i : i + 1])
            if stop.wait(0.05):
                return

    with server_that(drip) as url:
        engine = OpaEngine(url)
        try:
            began = time.monotonic()
            answers = engine.answer([{"x": i} for i in range(at_once)])
            assert time.monotonic() - began < ANSWER_SECONDS + 0.4
            assert len(answers) == at_once and not any(answer.answered for answer in answers)
        finally:
            engine.close()


def test_an_engine_is_closed_while_its_time_is_over():
    """A timer that goes off just then must not keep it alive."""
    whole = http(b'{"result":1}')

    def drip(connection, stop):
        for i in range(len(whole)):
            connection.sendall(whole[i : i + 1])
            if stop.wait(0.05):
                return

    def seconds_to_close(early):
        engine = OpaEngine(url)
        time.sleep(ANSWER_SECONDS - early)
        began = time.monotonic()
        engine.close()
        return time.monotonic() - began

    with server_that(drip) as url, ThreadPoolExecutor(40) as pool:
        assert max(pool.map(seconds_to_close, [i * 0.0005 - 0.01 for i in range(40)])) < 2.0


def test_an_url_that_is_none_is_told():
    for url in ("", "127.0.0.1:8181", "ftp://x", "http://x:8181/v1"):
        with pytest.raises(DrCloudError, match="no OPA server"):
            OpaEngine(url)


def test_a_closed_engine_does_not_answer():
    engine = OpaEngine("http://127.0.0.1:9")
    engine.close()
    engine.close()
    assert not engine.answer([{}])[0].answered
