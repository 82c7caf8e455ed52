"""What each answer of an S3 server means, against a server that answers as told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dr_cloud.store import ObjectExistsError, ObjectMissingError, StoreUnavailableError
from dr_cloud.store.objects import ObstoreStore, open_s3


class Server(ThreadingHTTPServer):
    """Answers by method from `answers`: (status, code of the error or None for a body of five bytes)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int, str | None]] = {}
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[str, str | None]] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, self.headers.get("If-None-Match")))
        status, code = self.server.answers[self.command]
        body = b"12345" if code is None else f"<Error><Code>{code}</Code><Message>so it is</Message></Error>".encode()
        body = body if code != "" else b""
        self.send_response(status)
        headers = {
            "Content-Length": str(len(body)),
            "ETag": '"x"',
            "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
        } | self.server.headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_DELETE = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def store(server: Server, monkeypatch: pytest.MonkeyPatch) -> ObstoreStore:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    return open_s3("s3://bucket", "bucket", "", f"http://127.0.0.1:{server.server_port}", "us-east-1")


@pytest.mark.parametrize(
    ("status", "code", "temporary"),
    [
        (500, "InternalError", True),
        (502, "", True),
        (503, "SlowDown", True),
        (429, "TooManyRequests", True),
        (408, "RequestTimeout", True),
        (400, "InvalidRequest", False),
        (403, "AccessDenied", False),
        (403, "RequestTimeTooSkewed", False),
        (404, "NoSuchBucket", False),
        (404, "SomethingElse", False),
    ],
)
def test_a_failure_is_temporary_or_not(server, store, status, code, temporary):
    """A 404 that is not about the key must never read as "no such object"."""
    server.answers = dict.fromkeys(("GET", "PUT", "DELETE"), (status, code))
    server.answers["HEAD"] = (status, "")
    for call in (
        lambda: store.put_new("a", b"x"),
        lambda: store.get("a"),
        lambda: store.get_range("a", 0, 1),
        lambda: store.size("a"),
        lambda: store.list(""),
    ):
        server.asked.clear()
        with pytest.raises(StoreUnavailableError) as caught:
            call()
        assert caught.value.temporary == temporary
        # obstore does not try again by itself: retries would multiply.
        assert len([method for method, _ in server.asked if method != "HEAD"]) <= 1


def test_no_such_key_is_missing(server, store):
    server.answers = {"GET": (404, "NoSuchKey"), "HEAD": (404, "")}
    for call in (lambda: store.get("a"), lambda: store.get_range("a", 0, 1), lambda: store.size("a")):
        with pytest.raises(ObjectMissingError):
            call()


def test_a_put_asks_for_a_new_object_in_one_request(server, store):
    server.answers = {"PUT": (200, "")}
    store.put_new("a", b"x" * (6 << 20))
    assert server.asked == [("PUT", "*")]


@pytest.mark.parametrize("status", [409, 412])
def test_exists_is_believed_once_the_object_can_be_seen(server, store, status):
    server.answers = {"PUT": (status, "ConditionalRequestConflict"), "HEAD": (200, "")}
    with pytest.raises(ObjectExistsError):
        store.put_new("a", b"x")
    server.answers |= {"HEAD": (404, ""), "GET": (404, "NoSuchKey")}
    with pytest.raises(StoreUnavailableError, match="being written by another") as caught:
        store.put_new("a", b"x")
    assert caught.value.temporary


def test_an_answer_of_another_length_is_a_failure(server, store):
    server.answers = {"GET": (206, None)}
    server.headers = {"Content-Range": "bytes 0-9/100"}
    with pytest.raises(StoreUnavailableError, match="10 bytes of a asked for, 5 came"):
        store.get_range("a", 0, 10)
    server.headers = {"Content-Range": "bytes 0-4/5"}
    assert store.get_range("a", 0, 10) == b"12345"
