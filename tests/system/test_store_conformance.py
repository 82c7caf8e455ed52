"""One suite for every object store: memory, a directory, moto's S3 and a real S3 server, all through `open_store`."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_servers import ACCESS, BUCKET, REGION, SECRET, moto, versitygw

from dr_cloud.model.errors import DrCloudError
from dr_cloud.store import ObjectExistsError, ObjectMissingError, Store, StoreUnavailableError, open_store
from dr_cloud.store.faults import FailingStore, Fault
from dr_cloud.store.objects import open_s3
from dr_cloud.store.retry import RetryingStore

pytestmark = pytest.mark.system

KINDS = ("memory", "local", "moto", "versitygw")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for name in ("AWS_SESSION_TOKEN", "AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    with moto() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def versitygw_endpoint(require_tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with versitygw(require_tool("versitygw"), tmp_path_factory.mktemp("versitygw")) as endpoint:
        yield endpoint


@pytest.fixture(params=["moto", "versitygw"])
def s3_endpoint(request: pytest.FixtureRequest) -> str:
    endpoint: str = request.getfixturevalue(f"{request.param}_endpoint")
    return endpoint


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return open_store("memory:")
    if request.param == "local":
        return open_store((tmp_path / "store").as_uri())
    endpoint = request.getfixturevalue(f"{request.param}_endpoint")
    return open_store(f"s3://{BUCKET}/{secrets.token_hex(8)}/deep?endpoint={endpoint}&region={REGION}")


@pytest.mark.parametrize("size", [0, 1, 4096, 5 * MIB, 5 * MIB + 1, 11 * MIB])
def test_what_was_put_comes_back(store, size):
    data = secrets.token_bytes(size)
    store.put_new("a/b/c", data)
    assert store.get("a/b/c") == data
    assert store.size("a/b/c") == size
    assert store.list("") == [("a/b/c", size)]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: memoryview(b"x" + data + b"x")[1:-1]])
def test_any_buffer_can_be_put(store, kind):
    store.put_new("key", kind(b"0123456789"))
    assert store.get("key") == b"0123456789"


def test_an_object_is_created_once(store):
    store.put_new("a/b", b"first")
    for data in (b"second", b"first", b""):
        with pytest.raises(ObjectExistsError, match="a/b exists"):
            store.put_new("a/b", data)
    assert store.get("a/b") == b"first"


@pytest.mark.parametrize("attempt", range(4))
def test_sixteen_threads_create_one_object_and_exactly_one_wins(store, attempt):
    start = threading.Barrier(16)

    def race(number: int) -> int | None:
        start.wait()
        try:
            store.put_new("race/key", b"%02d" % number * 50_000)
            return number
        except ObjectExistsError:
            return None

    with ThreadPoolExecutor(16) as pool:
        winners = [number for number in pool.map(race, range(16)) if number is not None]
    assert len(winners) == 1
    assert store.get("race/key") == b"%02d" % winners[0] * 50_000


def test_sixteen_threads_create_sixteen_objects_in_one_new_folder(store):
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: store.put_new(f"new/folder/{number:02d}", b"%d" % number), range(16)))
    assert [store.get(f"new/folder/{number:02d}") for number in range(16)] == [b"%d" % n for n in range(16)]


def test_ranges(store):
    data = bytes(range(256)) * 40
    store.put_new("a", data)
    for start, length in [(0, 1), (0, 10_240), (0, 20_000), (100, 4096), (10_239, 1), (10_239, 2), (10_000, 1 << 30)]:
        assert store.get_range("a", start, length) == data[start : start + length]
    for start in (10_240, 10_241, 1 << 40):
        assert store.get_range("a", start, 1) == b""


def test_a_range_of_an_empty_object_is_empty(store):
    store.put_new("a", b"")
    assert store.get_range("a", 0, 100) == b""


def test_a_range_that_is_none_is_a_bug(store):
    store.put_new("a", b"x")
    for start, length in [(0, 0), (-1, 1), (0, -1)]:
        with pytest.raises(ValueError, match="no range"):
            store.get_range("a", start, length)


def test_missing_objects(store):
    store.put_new("folder/there", b"x")
    for key in ("none", "folder/none", "folder"):
        for ask in (store.get, store.size, lambda key: store.get_range(key, 0, 1)):
            with pytest.raises(ObjectMissingError):
                ask(key)
        store.delete(key)
    assert store.get("folder/there") == b"x"
    assert store.list("none") == []


def test_a_deleted_object_is_gone_and_its_key_is_free(store):
    store.put_new("a/b", b"old")
    store.put_new("a/c", b"kept")
    store.delete("a/b")
    with pytest.raises(ObjectMissingError):
        store.get("a/b")
    assert store.list("") == [("a/c", 4)]
    store.put_new("a/b", b"new")
    assert store.get("a/b") == b"new"


def test_list_is_sorted_whole_and_begins_after(store):
    keys = ["a/b/1", "a/b/10", "a/b/2", "a/b-c/1", "a/bc", "b/0000000001", "b/0000000002-x.jrn", "A/z", "a.b/c"]
    for number, key in enumerate(keys):
        store.put_new(key, b"x" * number)
    expected = sorted((key, number) for number, key in enumerate(keys))
    assert store.list("") == expected
    for key, _ in expected:
        assert store.list("", key) == [entry for entry in expected if entry[0] > key]
    assert [key for key, _ in store.list("a/b")] == ["a/b/1", "a/b/10", "a/b/2"]
    assert store.list("a/b/") == store.list("a/b")
    assert [key for key, _ in store.list("a/b", "a/b/1")] == ["a/b/10", "a/b/2"]
    assert [key for key, _ in store.list("a/b", "a/b/10")] == ["a/b/2"]
    assert [key for key, _ in store.list("a/b", "a/b/15")] == ["a/b/2"]
    assert store.list("a/b", "a/c") == []


def test_list_goes_on_past_a_page(store):
    """S3 hands out at most 1000 keys per answer."""
    keys = [f"many/{number:05d}" for number in range(1003)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put_new(key, b""), keys))
    assert [key for key, _ in store.list("many")] == keys
    assert [key for key, _ in store.list("many", "many/00000")] == keys[1:]


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a/", "a//b", ".", "..", "a/../b", "a/./b", ".a", "a b", "a\n", "ä", "a#1", "a%2Fb", "a?b", "a" * 513],
)
def test_odd_keys_are_refused(store, key):
    calls = [
        lambda: store.put_new(key, b"x"),
        lambda: store.get(key),
        lambda: store.get_range(key, 0, 1),
        lambda: store.size(key),
        lambda: store.delete(key),
    ]
    for call in calls:
        with pytest.raises(DrCloudError, match="cannot be used") as caught:
            call()
        assert caught.value.remedy
    assert store.list("") == []


def test_every_letter_that_is_allowed_works(store):
    key = "Az0._-9/x.Y_z-/0123456789-0123456789.jrn"
    store.put_new(key, b"x")
    assert store.get(key) == b"x"
    assert store.list("Az0._-9") == [(key, 1)]


def test_a_lost_answer_is_found_to_be_ours(store):
    failing = FailingStore(store, [Fault("put", when="after"), Fault("get"), Fault("list")])
    retrying = RetryingStore(failing, wait_seconds=0.001)
    retrying.put_new("a/b", b"mine")
    assert retrying.get("a/b") == b"mine"
    assert retrying.list("a") == [("a/b", 4)]
    assert failing.fired == [1, 1, 1]


def test_many_threads_read_at_once(store):
    data = secrets.token_bytes(MIB)
    store.put_new("a", data)

    def read(number: int) -> bool:
        start = number * 4099 % (MIB - 70_000)
        return store.get_range("a", start, 65_536) == data[start : start + 65_536]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(100)))


def test_prefixes_of_one_bucket_are_apart(s3_endpoint):
    base = secrets.token_hex(8)
    first, second = (
        open_store(f"s3://{BUCKET}/{base}/{n}?endpoint={s3_endpoint}&region={REGION}") for n in ("a", "ab")
    )
    first.put_new("x", b"first")
    second.put_new("x", b"second")
    assert (first.get("x"), second.get("x")) == (b"first", b"second")
    assert first.list("") == [("x", 5)]
    whole = open_store(f"s3://{BUCKET}?endpoint={s3_endpoint}&region={REGION}")
    assert whole.list(base) == [(f"{base}/a/x", 5), (f"{base}/ab/x", 6)]


def test_a_missing_bucket_is_told_at_once(s3_endpoint):
    store = open_store(f"s3://no-such-bucket/p?endpoint={s3_endpoint}&region={REGION}")
    for call in (
        lambda: store.put_new("a", b"x"),
        lambda: store.get("a"),
        lambda: store.size("a"),
        lambda: store.list(""),
    ):
        with pytest.raises(StoreUnavailableError, match="no such bucket") as caught:
            call()
        assert not caught.value.temporary
        assert "Create the bucket" in caught.value.remedy


@pytest.mark.parametrize(("name", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "nobody")])
def test_wrong_credentials_are_told_at_once(versitygw_endpoint, monkeypatch, name, value):
    """Moto does not check signatures, so this is for the real server."""
    monkeypatch.setenv(name, value)
    store = open_store(f"s3://{BUCKET}/p?endpoint={versitygw_endpoint}&region={REGION}")
    for call in (
        lambda: store.put_new("a", b"x"),
        lambda: store.get("a"),
        lambda: store.size("a"),
        lambda: store.list(""),
    ):
        with pytest.raises(StoreUnavailableError, match="access denied") as caught:
            call()
        assert not caught.value.temporary
        assert "AWS_SECRET_ACCESS_KEY" in caught.value.remedy


def test_a_server_that_is_away_is_a_temporary_failure(free_port):
    away = open_s3("s3://bucket", "bucket", "", f"http://127.0.0.1:{free_port}", REGION)
    store = RetryingStore(away, attempts_max=3, wait_seconds=0.001)
    with pytest.raises(StoreUnavailableError, match="error sending request") as caught:
        store.put_new("a", b"x")
    assert caught.value.temporary
    assert "endpoint" in caught.value.remedy
