"""Profiles: kept for one's own eyes, chosen in order, never shown with their tokens."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cli_run import run_cli

from dr_cloud.cli.profiles import Profile, Profiles

TOKEN = "a-token-that-is-secret"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("DR_CLOUD_PROFILE", raising=False)
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    return tmp_path


def add(folder: Path, name: str, *more: str) -> None:
    done = run_cli("profile", "add", name, "--url", f"https://{name}:1", "--token-file", str(folder / "token"), *more)
    assert (done.code, done.stderr) == (0, "")
    assert TOKEN not in done.stdout


def test_the_file_is_for_its_owner_alone(own_folder: Path) -> None:
    add(own_folder, "one")
    path = own_folder / "config" / "dr-cloud" / "profiles.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Profiles.load().get("").token == TOKEN
    assert [p.name for p in path.parent.iterdir()] == ["profiles.json"]


def test_tokens_are_never_shown(own_folder: Path) -> None:
    add(own_folder, "one")
    assert TOKEN not in run_cli("profile", "list").stdout
    assert TOKEN not in run_cli("profile", "list", "--json").stdout
    assert TOKEN not in repr(Profiles.load())


def test_the_first_is_the_default_until_another_is_chosen(own_folder: Path) -> None:
    add(own_folder, "one")
    add(own_folder, "two", "--enterprise", "acme")
    assert Profiles.load().get("").url == "https://one:1"
    assert run_cli("profile", "use", "two", "--json").json == {"default": "two"}
    assert Profiles.load().get("") == Profile(url="https://two:1", token=TOKEN, enterprise="acme")
    listed = run_cli("profile", "list", "--json").json
    assert [(row["profile"], row["default"]) for row in listed] == [("one", False), ("two", True)]
    assert run_cli("profile", "remove", "two").code == 0
    assert Profiles.load().get("").url == "https://one:1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vpg", "list"], "Add one: dr-cloud profile add"),
        (["vpg", "list", "--profile", "nine"], "there is no profile 'nine'"),
        (["profile", "use", "nine"], "there is no profile"),
        (["profile", "add", "x", "--url", "http://h:1", "--token-file", "/dev/null"], "https://"),
        (["profile", "add", "x", "--url", "https://h:1", "--token-file", "/dev/null"], "holds no token"),
        (["profile", "add", "x", "--url", "https://h:1", "--token-file", "/nowhere/t"], "Name an existing file"),
        (["profile", "add", "x", "--url", "https://h:1", "--token-file", "/dev/null", "--ca", "/dev/null"], "no"),
        (["profile", "add", "X X", "--url", "https://h:1", "--token-file", "/dev/null"], "Use 1 to 63"),
    ],
)
def test_what_is_wrong_is_told(arguments: list[str], message: str) -> None:
    done = run_cli(*arguments)
    assert (done.code, done.stdout) == (1, "")
    assert message in done.stderr


def test_a_damaged_file_is_told_without_what_it_holds(own_folder: Path) -> None:
    add(own_folder, "one")
    Profiles.path().write_text('{"profiles": {"one": {"token": "' + TOKEN + '"}}}')
    done = run_cli("vpg", "list")
    assert done.code == 1
    assert "cannot be read" in done.stderr
    assert TOKEN not in done.stderr


def test_a_provider_that_is_not_there_is_told(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = own_folder / "token"
    run_cli("profile", "add", "gone", "--url", "https://127.0.0.1:9", "--token-file", str(path))
    monkeypatch.setenv("DR_CLOUD_PROFILE", "gone")
    done = run_cli("vpg", "show", "erp", "--json")
    assert (done.code, done.stdout) == (1, "")
    assert "https://127.0.0.1:9 does not answer" in done.stderr
