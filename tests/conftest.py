"""What every test shares: hypothesis profiles, the wall around Ray, tools that may be missing, short-lived places.

A tool that is missing skips its tests; with CI set it fails them.
"""

from __future__ import annotations

import gc
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
RAYLESS = (ROOT / "tests" / "unit", ROOT / "tests" / "property")
FILES_LEFT_MAX = 100
FUSE_PROGRAMS = ("nbdfuse", "fusermount3", "losetup", "mount", "mkfs.ext4")

settings.register_profile(
    "ci", deadline=None, print_blob=True, derandomize=False, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("long", settings.get_profile("ci"), max_examples=2000)
settings.load_profile("ci")

os.environ["PATH"] = os.pathsep.join([str(ROOT / ".tools" / "bin"), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def _unmet(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"{reason} (CI is set: nothing is skipped)", pytrace=False)
    pytest.skip(f"{reason}; see: python3 infra/tools.py")


def _fuse_lack() -> str:
    """Return why file systems cannot be mounted here, or the empty string."""
    if os.geteuid() != 0:
        return "mounting needs root"
    for path in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(path):
            return f"{path} is missing"
    lacking = [program for program in FUSE_PROGRAMS if shutil.which(program) is None]
    return f"{' '.join(lacking)} missing" if lacking else ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("fuse") and (lack := _fuse_lack()):
        _unmet(lack)


@pytest.fixture(autouse=True)
def _no_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit and property tests stand on pure cores: Ray cannot be started in them."""
    ray = sys.modules.get("ray")
    if ray is None or not any(request.path.is_relative_to(folder) for folder in RAYLESS):
        return

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("ray.init in a unit or property test: test the pure core, or move it to tests/system")

    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture(scope="module", autouse=True)
def _files_are_closed() -> Iterator[None]:
    """A module that leaves hundreds of files open fails here, and not as another one's riddle."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    left = len(os.listdir("/proc/self/fd")) - before
    if left > FILES_LEFT_MAX:
        gc.collect()  # what lies in cycles is not lost
        left = len(os.listdir("/proc/self/fd")) - before
    assert left <= FILES_LEFT_MAX, f"{left} files are still open"


@pytest.fixture(scope="session")
def require_tool() -> Callable[[str], str]:
    """Return a function from a program's name to its path; it skips the test (with CI: fails it) if there is none."""

    def require(program: str) -> str:
        path = shutil.which(program)
        return path if path is not None else _unmet(f"{program} is missing")

    return require


@pytest.fixture
def tmp_socket_dir() -> Iterator[Path]:
    """A new folder with a path short enough for unix sockets (107 bytes)."""
    folder = Path(tempfile.mkdtemp(prefix="drc-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def free_port() -> int:
    """A TCP port on 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
