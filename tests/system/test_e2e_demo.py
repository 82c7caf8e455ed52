"""`dr-cloud demo`: the main job on real input, as a user runs it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_world import wait_until

from dr_cloud.model.units import parse_time

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
PROGRAM = Path(sys.executable).parent / "dr-cloud"
HOMES = {"acme-us": ["us-east", "us-west"], "brit-uk": ["uk-south"], "coral-apac": ["apac-1"]}


def environment(place: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(place), "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}


def left_behind(place: Path) -> list[str]:
    """Return the files under `place`, and the processes that were told of it."""
    found = [str(path) for path in place.iterdir()]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            alive = "\nState:\tZ" not in (entry / "status").read_text()
        except OSError:
            continue
        if alive and str(place).encode() in command:
            found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_the_demonstration(tmp_socket_dir: Path) -> None:
    """R14.1, R14.2, R14.3: stacks at arbitrary times give right images and verdicts; the last clean time is found.

    R13.1: each is refused, with the reason, in every data center of another jurisdiction.
    R11, R13.2: three enterprises at once, each in its own jurisdiction, and none sees anything of another.
    """
    report = tmp_socket_dir / "report.json"
    place = tmp_socket_dir / "t"
    place.mkdir()
    done = subprocess.run(
        [PROGRAM, "demo", "--json", report],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=environment(place),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(report.read_text())
    stacks = told["stacks"]
    assert len(stacks) >= 8
    centers = [center for home in HOMES.values() for center in home]
    closed = {(name, center) for name, home in HOMES.items() for center in centers if center not in home}
    assert {(one["enterprise"], one["data_center"]) for one in told["denied"]} == closed
    assert all("nothing opens" in " ".join(one["reasons"]) for one in told["denied"])
    assert {(name, center) for name, row in told["rights"].items() for center in row if not row[center]} == closed
    assert len({stack["at"] for stack in stacks}) == len(stacks)
    for stack in stacks:
        assert stack["blocks_checked"] > 0
        assert stack["blocks_wrong"] == 0
    # Everything up to the last clean time passes, everything after it fails; both were seen.
    last_clean_ns = parse_time(told["last_clean"])
    for stack in stacks:
        assert stack["verdict"] == ("pass" if parse_time(stack["at"]) <= last_clean_ns else "fail")
    assert {stack["verdict"] for stack in stacks} == {"pass", "fail"}
    assert told["seconds"]
    assert all(seconds >= 0 for seconds in told["seconds"].values())
    # The others were tested at the same time, and have their rows; all data lies at home.
    assert {one["enterprise"]: one["data_centers"] for one in told["enterprises"]} == HOMES
    assert told["enterprises"][0]["stacks"] == stacks
    for one in told["enterprises"]:
        assert len(one["lag_seconds"]) == len(one["data_centers"])
        assert one["enterprise"] == "acme-us" or len(one["stacks"]) >= 2
        for stack in one["stacks"]:
            assert stack["blocks_checked"] > 0
            assert stack["blocks_wrong"] == 0
            assert one["enterprise"] == "acme-us" or (stack["verdict"], stack["rows"] > 0) == ("pass", True)
    for line in ("last clean time", "Recovery tests", "Enterprises", "not found", "All right"):
        assert line in done.stdout
    assert left_behind(place) == []


def test_an_interrupted_demonstration_leaves_nothing(tmp_socket_dir: Path) -> None:
    """Ctrl-C while everything starts."""
    with subprocess.Popen(
        [PROGRAM, "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(tmp_socket_dir),
    ) as demo:
        wait_until(lambda: any(tmp_socket_dir.glob("drc-*/ray/session_*/sockets/raylet")), 60)
        demo.send_signal(signal.SIGINT)
        said, _ = demo.communicate(timeout=90)
    assert demo.returncode != 0
    assert "Traceback" not in said
    # A process that was killed is there for a moment yet.
    with contextlib.suppress(AssertionError):
        wait_until(lambda: left_behind(tmp_socket_dir) == [], 10)
    assert left_behind(tmp_socket_dir) == []
