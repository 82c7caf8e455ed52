"""The command: what it lists, what it loads, how it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dr_cloud.cli.main import COMMANDS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dr_cloud.cli.main", *arguments], capture_output=True, text=True)


def test_help_lists_every_command() -> None:
    shown = run("--help").stdout
    for name in COMMANDS:
        assert f" {name} " in shown


def test_a_tap_carries_no_more_than_it_needs() -> None:
    """R1: what runs beside a guest is small: no Ray, no object store, no index."""
    code = (
        "import sys, dr_cloud.cli.main, dr_cloud.cli.tap; print(*sorted({'ray', 'obstore', 'lmdb'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["bogus"], 2, "No such command"),
        (["tap"], 2, "Missing option"),
        (["keyring", "create", "Not A Name", "--keyring", "k"], 1, "Use 1 to 63 of a-z"),
    ],
)
def test_what_is_wrong_is_told(arguments: list[str], code: int, message: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr


def test_a_key_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for _ in range(2):
        assert run("keyring", "create", "acme", "--keyring", str(path)).returncode == 0
    assert path.read_text().count("acme") == 1
