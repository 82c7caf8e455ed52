"""`dr-cloud demo`: the main job on real input, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dr_cloud.model.units import parse_time

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]


def test_the_demonstration(tmp_socket_dir: Path) -> None:
    """R14.1, R14.2, R14.3: stacks at arbitrary times give right images and verdicts; the last clean time is found."""
    report = tmp_socket_dir / "report.json"
    place = tmp_socket_dir / "t"
    place.mkdir()
    program = Path(sys.executable).parent / "dr-cloud"
    done = subprocess.run(
        [program, "demo", "--json", report],
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
        env={**os.environ, "TMPDIR": str(place), "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(report.read_text())
    stacks = told["stacks"]
    assert len(stacks) >= 8
    assert len({stack["at"] for stack in stacks}) == len(stacks)
    for stack in stacks:
        assert stack["blocks_checked"] > 0
        assert stack["blocks_wrong"] == 0
    # Everything up to the last clean time passes, everything after it fails; both were seen.
    last_clean_ns = parse_time(told["last_clean"])
    for stack in stacks:
        assert stack["verdict"] == ("pass" if parse_time(stack["at"]) <= last_clean_ns else "fail")
    assert {stack["verdict"] for stack in stacks} == {"pass", "fail"}
    assert isinstance(told["denied"], list)
    assert told["seconds"]
    assert all(seconds >= 0 for seconds in told["seconds"].values())
    for line in ("last clean time", "Recovery tests", "All right"):
        assert line in done.stdout
    assert [path.name for path in place.iterdir() if path.name.startswith("drc-")] == []
