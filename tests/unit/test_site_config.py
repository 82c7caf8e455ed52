"""The site's configuration file, its state folder, its log."""

from __future__ import annotations

import io
import json
import logging
import stat
import tarfile
from pathlib import Path

import pytest
import structlog

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.pairing import PairingToken
from dr_cloud.model.replication import LogRequest
from dr_cloud.site import logs
from dr_cloud.site.config import load_settings
from dr_cloud.site.logs import SiteLog, archive, core_state
from dr_cloud.site.state import IDENTITY, Identity, StateFolder

TOKEN = PairingToken(api="https://127.0.0.1:8440", ca="ab" * 32, enterprise="acme", site="hq", secret="s3cret" * 6)


def settings(folder: Path, text: str):
    path = folder / "site.yaml"
    path.write_text(text)
    return load_settings(path)


def test_relative_paths_count_from_the_file(tmp_path: Path) -> None:
    read = settings(
        tmp_path,
        "state: st\ntoken_file: tok\nhosts: [{name: h1, listen: 'unix:h1.sock'}, {name: h2, listen: 'unix:/run/h2'}]\n"
        "datastores: [{name: a, store: 'file://ds/one'}, {name: b, store: 'file:///abs'}, {name: c, store: 's3://b/p'}]\n",
    )
    assert read.state == tmp_path / "st"
    assert [host.listen for host in read.hosts] == [f"unix:{tmp_path}/h1.sock", "unix:/run/h2"]
    assert [store.store for store in read.datastores] == [f"file://{tmp_path}/ds/one", "file:///abs", "s3://b/p"]
    assert read.pairing_token() == "", "a token that was taken away after pairing is not missed"
    (tmp_path / "tok").write_text("drp1.x\n")
    assert read.pairing_token() == "drp1.x"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("state: s\nhosts: []\n", "hosts"),
        ("state: s\nhosts: [{name: a, listen: 'tcp:1'}]\n", "unix:PATH or tls:HOST:PORT"),
        ("state: s\nhosts: [{name: a, listen: 'tls:h:0'}]\n", "unix:PATH or tls:HOST:PORT"),
        ("state: s\nhosts: [{name: a, listen: 'tls:h:1'}]\n", "needs certificate"),
        ("state: s\nhosts: [{name: a, listen: 'unix:x', ca: c}]\n", "no meaning"),
        ("state: s\nhosts: [{name: a, listen: 'unix:x'}, {name: a, listen: 'unix:y'}]\n", "host a is named twice"),
        ("state: s\nhosts: [{name: a, listen: 'unix:x'}, {name: b, listen: 'unix:x'}]\n", "named twice"),
        ("state: s\ntoken: t\ntoken_file: f\nhosts: [{name: a, listen: 'unix:x'}]\n", "not both"),
        ("state: s\nhost: 1\nhosts: [{name: a, listen: 'unix:x'}]\n", "Extra inputs"),
        ("state: s\nhosts: [{name: a, listen: 'unix:" + "x" * 107 + "'}]\n", "too long"),
        ("state: s\nproxy: 'ftp://x'\nhosts: [{name: a, listen: 'unix:x'}]\n", "proxy"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(DrCloudError, match=part):
        settings(tmp_path, text)


def test_secrets_are_in_no_text_of_the_settings(tmp_path: Path) -> None:
    read = settings(
        tmp_path, "state: s\ntoken: drp1.hush\nproxy: 'http://u:hush@p:1'\nhosts: [{name: a, listen: 'unix:x'}]\n"
    )
    assert "hush" not in repr(read) + str(read)
    assert "s3cret" not in repr(TOKEN) + str(TOKEN)


def test_a_token_is_read_as_it_was_written() -> None:
    text = TOKEN.encode()
    assert PairingToken.decode(f" {text[:30]}\n{text[30:]} ") == TOKEN, "also if it was broken over two lines"
    for wrong in ("", "drp1.", text[:-9], text[:20] + "A" + text[21:], "drp2." + text[5:], text + "A" * 9000):
        with pytest.raises(DrCloudError) as caught:
            PairingToken.decode(wrong)
        assert "s3cret" not in str(caught.value)
        assert caught.value.remedy


def test_a_state_folder_has_one_process(tmp_path: Path) -> None:
    first = StateFolder(tmp_path / "st")
    with pytest.raises(DrCloudError, match="another process runs the site"):
        StateFolder(tmp_path / "st")
    first.close()
    StateFolder(tmp_path / "st").close()


def test_state_is_private_and_replaced_whole(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "st")
    identity = Identity(
        enterprise="a", site="b", api="https://x", link="wss://x", ca="", certificate="", key="hush", token=""
    )
    assert state.load(IDENTITY, Identity) is None
    state.save(IDENTITY, identity)
    (tmp_path / "st" / "identity.json.0123.new").write_text("half of a fi")
    state.close()
    state = StateFolder(tmp_path / "st")
    state.save(IDENTITY, identity.model_copy(update={"site": "c"}))
    loaded = state.load(IDENTITY, Identity)
    assert loaded is not None
    assert loaded.site == "c"
    assert "hush" not in repr(loaded)
    assert stat.S_IMODE((tmp_path / "st").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "st").iterdir()} == {0o600}
    state.write(IDENTITY, '{"key": "hush"')
    with pytest.raises(DrCloudError, match="damaged") as caught:
        state.load(IDENTITY, Identity)
    assert "hush" not in str(caught.value)
    state.close()


async def test_an_archive_has_the_lines_of_its_level_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """R20: level of detail, start and end time, VDSA and core information, one archive."""
    now = 1_700_000_000_000_000_000
    monkeypatch.setattr(logs, "FILE_BYTES_MAX", 400)
    monkeypatch.setattr(logs.time, "time_ns", lambda: now)
    log = SiteLog.start(tmp_path / "logs")
    try:
        named = structlog.get_logger("dr_cloud.test")
        for number in range(6):
            now = 1_700_000_000_000_000_000 + number * 1_000_000_000
            named.info("one", number=number)
            named.warning("two", number=number)
            named.debug("three", number=number)
        logging.getLogger("elsewhere").error("a library's line")
        logging.getLogger("elsewhere").info("is not wanted")
    finally:
        log.close()
    assert len(list((tmp_path / "logs").iterdir())) > 2, "the files take turns"
    with open(tmp_path / "logs" / "log.jsonl", "a") as file:
        file.write('{"level": "err')

    def lines(**changes):
        packed = archive(log, LogRequest(id="1", **changes), {"core.json": core_state()})
        with tarfile.open(fileobj=io.BytesIO(packed)) as opened:
            files = {name: opened.extractfile(name).read() for name in opened.getnames()}
        assert "threads" in json.loads(files["core.json"])
        return [json.loads(line) for line in files["log.jsonl"].splitlines()]

    everything = lines(level="debug")
    assert len(everything) == 19
    assert [line["time"] for line in everything] == sorted(line["time"] for line in everything)
    assert [line["event"] for line in lines(level="error")] == ["a library's line"]
    within = lines(level="warning", since_ns=1_700_000_002_000_000_000, until_ns=1_700_000_003_000_000_000)
    assert [(line["event"], line["number"]) for line in within] == [("two", 2), ("two", 3)]
    shown = capsys.readouterr().err
    assert shown.count("one") == 6
    assert "three" not in shown, "people are not shown the finest level"


def test_a_log_that_nobody_takes_stops_nothing(tmp_path: Path) -> None:
    log = SiteLog.start(tmp_path)
    try:
        for listener in log._listeners:
            listener.stop()
        for _ in range(logs._QUEUE_LINES_MAX + 10):
            structlog.get_logger("dr_cloud.test").debug("line")
        assert log.left_out == 10
        for listener in log._listeners:
            listener.queue.queue.clear()
            listener.start()
    finally:
        log.close()
