"""`dr-cloud find-clean` against the API over TLS, with a real manager behind it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import structlog
from clean_world import CleanWorld
from cli_run import Done, run_cli

from dr_cloud.actors.https import ApiServer
from dr_cloud.api.app import make_app
from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.model.cloud import TokenRequest
from dr_cloud.model.principal import Role
from dr_cloud.model.units import format_time
from dr_cloud.seal.authority import Authority

pytestmark = pytest.mark.system


class CommandWorld(CleanWorld):
    """Time passes by itself."""

    def serve(self, stack: ExitStack) -> None:
        """Open the API on a port, and make a profile of it."""
        tls = self.folder / "tls"
        tls.mkdir()
        credentials = Authority.open(tls, "provider").service_credentials("api", ["127.0.0.1"])
        server = ApiServer(make_app(self.cloud), "127.0.0.1", 0, credentials)
        stack.callback(server.close)
        (tls / "ca.pem").write_text(credentials.ca)
        request = TokenRequest(name="acme's", role=Role.ENTERPRISE_ADMIN, enterprise="acme")
        (tls / "token").write_text(self.cloud.create_token(SYSTEM, request).secret)
        url = f"https://127.0.0.1:{server.port}"
        words = ["--url", url, "--ca", str(tls / "ca.pem"), "--token-file", str(tls / "token")]
        assert run_cli("profile", "add", "acme", *words).code == 0
        stop = threading.Event()
        thread = threading.Thread(target=self._pass_time, args=(stop,), daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(stop.set)

    def _pass_time(self, stop: threading.Event) -> None:
        while not stop.wait(0.02):
            self.clock.pass_seconds(0.5)
            self.cloud._context.tasks.wake()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandWorld]:
    folder = tmp_path_factory.mktemp("provider")
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        # The provider is in this process: what it logs must not look like what a command prints.
        stack.callback(structlog.reset_defaults)
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        made = CommandWorld(folder / "state")
        stack.callback(made.close)
        made.populate()
        made.furnish(made.principal("acme"))
        made.serve(stack)
        yield made


def find(world: CommandWorld, since_ns: int, until_ns: int, *words: str) -> Done:
    bounds = ["--from", format_time(since_ns), "--to", format_time(until_ns)]
    return run_cli("find-clean", "erp", *bounds, *(words or ("--probe", "entropy")))


def test_rounds_and_the_answer_are_told_and_failed_over_to(world: CommandWorld) -> None:
    """R14.2, R21: each round as it ends, the answer in words, and the commands that come next."""
    times = world.journal_of_erp.times
    world.dirty_from(times[617])
    done = find(world, world.begun_ns, times[-1], "--probe", "entropy", "--parallel", "12", "--until", "one-write")
    assert (done.code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("search ")
    task = lines[0].split()[1]
    rounds = [line for line in lines if line.startswith("round ")]
    assert rounds[0].startswith("round 1: 12 tested; clean up to ") and "; dirty from " in rounds[0]
    assert rounds[-1].endswith("nothing left between") and len(rounds) == 3  # 13³ = 2197
    assert f"last clean:  {format_time(times[616])}" in lines
    assert f"first dirty: {format_time(times[617])}  entropy: looks encrypted at {times[617]}" in lines
    assert any(line.strip().endswith("tag 30") for line in lines)
    by_time, by_task = lines[-2].split("  ")[-1], lines[-1].split("  ")[-1]
    assert by_time == f"dr-cloud failover start erp --target dc1 --at {format_time(times[616])}"
    assert by_task == f"dr-cloud failover start erp --clean {task}"
    failed_over = run_cli(*by_task.split()[1:], "--json")
    assert failed_over.code == 0, failed_over.stderr
    assert [test["at_ns"] for test in failed_over.json] == [times[616]]
    assert run_cli("failover", "rollback", "erp").code == 0


def test_one_document_for_programs(world: CommandWorld) -> None:
    """R21: `--json` prints the answer alone; what is known needs no round; none clean is exit code 1."""
    times = world.journal_of_erp.times
    world.dirty_from(times[617])
    answer = find(world, times[614], times[620], "--probe", "entropy", "--json")
    assert (answer.code, answer.json["clean_ns"], answer.json["dirty_ns"]) == (0, times[616], times[617])
    none = find(world, times[618], times[620], "--probe", "entropy", "--json")
    assert (none.code, none.json["clean_ns"], none.json["dirty_ns"]) == (1, None, times[618])
    told = find(world, times[618], times[620])
    assert told.code == 1 and "no clean time is known" in told.stdout


def test_a_search_that_is_not_waited_for(world: CommandWorld, tmp_path: Path) -> None:
    times = world.journal_of_erp.times
    world.dirty_from(times[617])
    file = tmp_path / "probes.yaml"
    file.write_text("- {kind: entropy, name: again, disk: 'sd*'}\n")
    begun = find(world, times[600], times[602], "--probes-file", str(file), "--until", "1s", "--no-wait", "--json")
    assert (begun.code, begun.json["type"]) == (0, "clean.find")
    assert begun.json["inputs"]["precision_ns"] == 10**9
    assert [probe["name"] for probe in begun.json["inputs"]["probes"]] == ["again"]
    assert run_cli("task", "wait", begun.json["id"]).code == 0


def test_what_is_wrong_is_told(world: CommandWorld) -> None:
    """R21: what to do is said, and nothing is begun."""
    times = world.journal_of_erp.times
    world.dirty_from(0)
    for words, message in [
        (["--until", "1s"], "nothing says what clean is"),
        (["--probe", "no-such-probe"], "no-such-probe"),
        (["--probe", "entropy", "--until", "soon"], "is not a duration"),
        (["--probe", "entropy", "--parallel", "65"], "parallel"),
    ]:
        done = find(world, times[0], times[9], *words)
        assert (done.code, done.stdout) == (1, ""), done
        assert message in done.stderr
    backwards = find(world, times[9], times[0])
    assert backwards.code == 1 and "since_ns is after until_ns" in backwards.stderr
    none = find(world, times[618], times[620], "--probe", "entropy", "--no-wait", "--json")
    task = none.json["id"]
    assert run_cli("task", "wait", task).code == 0
    for words, message in [
        (["--clean", task], "has found no clean time"),
        (["--clean", task, "--checkpoint", "3"], "more than one time is given"),
        (["--clean", "f" * 32], "there is no task"),
    ]:
        done = run_cli("failover", "start", "erp", *words)
        assert (done.code, done.stdout) == (1, ""), done
        assert message in done.stderr
