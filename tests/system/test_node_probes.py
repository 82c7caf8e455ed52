"""Probes beside a stack: results as they come, slots, artefacts, ends of every kind; nothing of them is left."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from node_world import LETTER, Node, node, nothing_left, processes_below, results, specs
from probe_world import wait_until
from stack_journal import KEYS, SCOPE

from dr_cloud.actors.stack import StackProcess
from dr_cloud.model.errors import InvalidError, NotFoundError
from dr_cloud.model.probe import ProbeLimits
from dr_cloud.nbd.client import NbdClient
from dr_cloud.recovery.artefacts import read_artefact
from dr_cloud.recovery.probes import runner
from dr_cloud.recovery.probing import Probing

__all__ = ["node", "nothing_left"]
pytestmark = [pytest.mark.system, pytest.mark.fuse]
SECRET = "what a console shows is no less secret than a disk"


def shell(script: str, *fields: str) -> str:
    return f"command:/bin/sh -c {shlex.quote(script)}"


def test_each_result_is_seen_when_its_probe_has_ended(node: Node) -> None:
    """R14.6, R14.7: probes pass, fail and hang, one after another, and the stack answers meanwhile."""
    stack = node.open("seen")
    assert stack.probe_progress("seen").model_dump() == {"started": False, "done": False, "results": []}
    wanted = specs("files:path=/letter.txt", "files:name=lost,path=/lost.txt", "command:sleep 100")
    wanted[2] = wanted[2].model_copy(update={"timeout_seconds": 3})
    stack.start_probes("seen", wanted)
    stack.start_probes("seen", specs("command:/bin/false"))
    assert wait_until(lambda: len(stack.probe_progress("seen").results) == 2, 30)
    assert not stack.probe_progress("seen").done
    begun = time.monotonic()
    assert stack.statistics().blocks_read > 0
    stack.pause("policy")
    stack.resume()
    with NbdClient.connect(stack.opened().uris["web/root"][0]) as client:  # type: ignore[union-attr]
        assert client.pread(1024 + 56, 2) == b"\x53\xef"
    assert time.monotonic() - begun < 2, "the stack does not wait for a probe"
    first, second, third = results(stack, "seen")
    assert first.passed and first.conclusive
    assert not second.passed and second.conclusive and "/lost.txt" in second.reason
    assert third.reason == "no verdict within 3 s" and not third.conclusive
    assert len(results(stack, "seen")) == 3, "once per stack"
    with pytest.raises(NotFoundError):
        stack.start_probes("another", specs("fsck"))
    stack.close()
    with pytest.raises(NotFoundError):
        stack.probe_progress("seen")


def test_bad_probes_are_refused_before_anything_runs(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """R14.6: and a node that cannot run any says so."""
    stack = node.open("bad")
    mark = node.folder / "ran"
    for wrong, why in (("nothing", "no probe"), ("fsck:disk=db/*", "not here"), ("files:size=x", "files")):
        with pytest.raises(InvalidError, match=why):
            stack.start_probes("bad", specs(f"command:/usr/bin/touch {mark}", wrong))
    with monkeypatch.context() as patch:
        patch.setattr(runner.os, "geteuid", lambda: 1000)
        with pytest.raises(InvalidError, match="root"):
            stack.start_probes("bad", specs("fsck"))
    assert not stack.probe_progress("bad").started and node.left() == [] and not mark.exists()
    stack.start_probes("bad", specs("fsck"))
    assert results(stack, "bad")[0].passed, "what was refused is no start"


def test_the_end_of_a_test_ends_its_probe(node: Node) -> None:
    """R14.5, R14.8: in the midst of it; the next test in the same process knows nothing of it."""
    stack = node.open("ended")
    stack.start_probes("ended", specs(shell("touch $HOME/x; setsid sleep 100 & sleep 100"), "fsck"))
    assert wait_until(lambda: len(processes_below(node)) >= 5, 20)
    begun = time.monotonic()
    stack.close()
    assert time.monotonic() - begun < 5
    assert processes_below(node) == []
    assert wait_until(lambda: node.left() == [], 2)
    stack.open("after", node.plan, node.store_url)
    assert not stack.probe_progress("after").started
    stack.start_probes("after", specs("fsck"))
    assert results(stack, "after")[0].passed


def test_so_many_probes_at_once_and_the_others_wait(node: Node) -> None:
    """R8, R14.2: two slots, eight tests; what waits has not begun, so its time-out does not run."""
    stacks = {f"queued-{number}": node.open(f"queued-{number}") for number in range(8)}
    probe = specs("command:sleep 1.5")[0].model_copy(update={"timeout_seconds": 5.5})
    begun = time.monotonic()
    for test, stack in stacks.items():
        stack.start_probes(test, [probe])
    ended = [results(stack, test)[0] for test, stack in stacks.items()]
    assert all(result.passed for result in ended), ended
    assert time.monotonic() - begun > 5.5, "the last could not have waited within its time-out"
    spans = [(result.started_ns, result.started_ns + int(result.seconds * 1e9)) for result in ended]
    at_once = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert max(at_once) == 2


def test_a_probe_that_waits_can_be_stopped(node: Node) -> None:
    first, second, third = (node.open(f"waits-{number}") for number in range(3))
    for number, stack in enumerate((first, second)):
        stack.start_probes(f"waits-{number}", specs("command:sleep 100"))
    assert wait_until(lambda: len(processes_below(node)) >= 8, 20)
    third.start_probes("waits-2", specs("fsck"))
    begun = time.monotonic()
    third.close()
    assert time.monotonic() - begun < 1
    assert first.probe_progress("waits-0").results == []


def test_artefacts_are_sealed_in_the_store_and_nowhere_else(node: Node) -> None:
    """R3, R14.8: what a probe leaves is read by its path, and its bytes are in the clear nowhere."""
    stack = node.open("kept")
    script = f'echo "{SECRET}" > "$DRC_ARTEFACTS/console.txt"; echo told'
    stack.start_probes("kept", specs(shell(script), "command:sleep 1"))
    assert wait_until(lambda: len(stack.probe_progress("kept").results) == 1, 20)
    assert files_with(SECRET.encode(), node.settings.work_dir) == [], "not even until the next has ended"
    first, _ = results(stack, "kept")
    assert first.passed and first.output.endswith("\ntold\n")
    (artefact,) = first.artefacts
    assert artefact.path == "command/console.txt" and artefact.size_bytes == len(SECRET) + 1
    assert read_artefact(node.store, KEYS, "kept", artefact.path) == SECRET.encode() + b"\n"
    listed = node.store.list(f"{SCOPE.prefix}/artefacts/kept")
    assert len(listed) == 1
    assert wait_until(lambda: node.left() == [], 2)
    for word in (SECRET.encode(), b"console.txt"):
        assert files_with(word, node.folder / "store", node.settings.work_dir, node.settings.cache_dir) == []
    assert files_with(LETTER, node.folder / "tree") != [], "the search does find"


def files_with(word: bytes, *places: Path) -> list[Path]:
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    return [path for path in files if word in path.read_bytes() or word in path.name.encode()]


def test_too_much_is_left_out_and_said(node: Node) -> None:
    """R14.8: 4 MiB a file, 16 MiB a test."""
    stack = node.open("large")
    script = "cd $DRC_ARTEFACTS; head -c 5000000 /dev/zero > a; for f in b c d; do head -c 4194304 /dev/zero > $f; done"
    more = specs(shell(script), shell("cd $DRC_ARTEFACTS; head -c 4194304 /dev/zero > e; echo -n x > f; echo said"))
    stack.start_probes("large", more)
    first, second = results(stack, "large")
    assert [artefact.path for artefact in first.artefacts] == ["command/b", "command/c", "command/d"]
    assert first.output.splitlines()[-1] == "command/a is left out: of its 5000000 bytes 4194304 may be kept"
    assert [artefact.path for artefact in second.artefacts] == ["command-2/e"]
    assert second.output.endswith("\nsaid\ncommand-2/f is left out: of its 1 bytes 0 may be kept")


def test_a_store_that_is_away_costs_artefacts_and_no_verdict(node: Node) -> None:
    def away(path: str, content: bytes) -> None:
        raise NotFoundError("the store is away")

    stack = node.open("away")
    uris = {disk: found[0] for disk, found in stack.opened().uris.items()}  # type: ignore[union-attr]
    probing = Probing(specs(shell("echo x > $DRC_ARTEFACTS/f")), uris, node.settings.probes_dir, 1, away, ProbeLimits())
    assert wait_until(lambda: probing.done, 20)
    (result,) = probing.results
    assert result.passed and result.artefacts == []
    assert result.output.splitlines()[-1] == "command/f is left out: the store is away"
    assert probing.stop(2)


def test_a_node_without_room_fails_the_probe_and_goes_on(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """R14.7: with the reason, and without the paths of the node."""
    stack = node.open("full")

    def full(*_: object) -> tuple[Path, int]:
        raise OSError(28, "No space left on device", str(node.folder))

    with monkeypatch.context() as patch:
        patch.setattr(runner, "make_folder", full)
        stack.start_probes("full", specs("fsck", "entropy"))
        first, second = results(stack, "full")
    assert first.reason == "the node could not run it: No space left on device" == second.reason
    assert not first.passed and not first.conclusive
    assert stack.statistics().at_ns == node.plan.at_ns


def test_a_node_may_refuse_mounts(node: Node) -> None:
    """R14.6: what needs none runs; what does fails, and says nothing about the disk."""
    stack = StackProcess(node.settings.model_copy(update={"kernel_mounts": False}))
    stack.open("unmounted", node.plan, node.store_url)
    stack.start_probes("unmounted", specs("files:path=/letter.txt", "fsck"))
    refused, passed = results(stack, "unmounted")
    stack.close()
    assert not refused.passed and not refused.conclusive and "switched off on this node" in refused.reason
    assert passed.passed


def _die_in_a_probe(node: Node, pid: Sequence[int]) -> None:
    stack = StackProcess(node.settings)
    stack.open("dies", node.plan, node.store_url)
    stack.start_probes("dies", specs(shell("echo x > $DRC_ARTEFACTS/f; setsid sleep 100 & sleep 100")))
    time.sleep(100)


def test_a_killed_process_takes_its_probe_along(node: Node) -> None:
    """R14.5: the next stack process of the node removes its files; its neighbour's probe goes on."""
    neighbour = node.open("lives")
    neighbour.start_probes("lives", specs("command:sleep 4"))
    assert wait_until(lambda: len(processes_below(node)) >= 4, 20)
    own = set(node.left())
    process = multiprocessing.get_context("fork").Process(target=_die_in_a_probe, args=(node, [os.getpid()]))
    process.start()
    assert wait_until(lambda: len(node.left()) == 2 and len(processes_below(node)) >= 8, 20)
    (left,) = set(node.left()) - own
    process.kill()
    process.join()
    assert wait_until(lambda: not any(str(left) in _mounts(entry) for entry in Path("/proc").iterdir()))
    assert left.exists()
    StackProcess(node.settings)
    assert not left.exists() and own <= set(node.left())
    assert results(neighbour, "lives")[0].passed


def _mounts(entry: Path) -> str:
    try:
        return (entry / "mountinfo").read_text() if entry.name.isdigit() else ""
    except OSError:
        return ""
