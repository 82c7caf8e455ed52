import os

import pytest

from dr_cloud.model.errors import DrCloudError
from dr_cloud.store import StoreUnavailableError, open_store


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "unknown kind ''"),
        ("store", "unknown kind ''"),
        ("gopher://x/y", "unknown kind 'gopher'"),
        ("memory:name", "has no name"),
        ("file://relative/dir", "three slashes"),
        ("file:relative", "three slashes"),
        ("file:///", "three slashes"),
        ("file:///a?endpoint=http://x", "unknown option endpoint"),
        ("s3://", "not a bucket's name"),
        ("s3://Bad_Bucket", "not a bucket's name"),
        ("s3://bucket?colour=red", "unknown option colour"),
        ("s3://bucket?endpoint", "bad query field"),
        ("s3://bucket?endpoint=host:9000", "endpoint must be like"),
        ("s3://bucket?endpoint=ftp://host", "endpoint must be like"),
        ("s3://bucket/a#b", "'#' has no meaning"),
        ("s3://[bucket/a", "Invalid IPv6"),
    ],
)
def test_a_bad_url_is_refused_with_the_forms_that_work(url, why):
    with pytest.raises(DrCloudError, match=why) as caught:
        open_store(url)
    assert "s3://bucket/prefix" in caught.value.remedy


@pytest.mark.parametrize(
    "url", ["s3://key:hunter2@bucket/prefix", "s3://hunter2@bucket", "s3://bucket?endpoint=http://key:hunter2@host"]
)
def test_credentials_in_the_url_are_refused_and_not_repeated(url):
    with pytest.raises(DrCloudError) as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)
    assert "AWS_SECRET_ACCESS_KEY" in caught.value.remedy


def test_a_prefix_with_odd_letters_is_refused():
    with pytest.raises(DrCloudError, match="cannot be used"):
        open_store("s3://bucket/a b")


def test_a_directory_is_made_and_its_objects_are_there_again(tmp_path):
    url = (tmp_path / "new folder" / "store").as_uri()
    open_store(url).put_new("a/b", b"x")
    assert open_store(url).get("a/b") == b"x"


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailableError) as caught:
        open_store((tmp_path / "file" / "store").as_uri())
    assert "may create and write" in caught.value.remedy
    assert not caught.value.temporary


def test_each_memory_store_is_its_own():
    open_store("memory:").put_new("a", b"x")
    assert open_store("memory:").list("") == []


def test_opening_s3_makes_no_request():
    assert open_store("s3://bucket/prefix?endpoint=http://127.0.0.1:9&region=eu-central-1")


def test_paths_do_not_leave_the_root(tmp_path):
    store = open_store((tmp_path / "root").as_uri())
    for key in ("../outside", "a/../../outside", "/outside", ".partial/x"):
        with pytest.raises(DrCloudError, match="cannot be used"):
            store.put_new(key, b"x")
    assert os.listdir(tmp_path) == ["root"]
