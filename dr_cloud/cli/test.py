"""`dr-cloud test`: recovery tests at any number of past times, in parallel."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.report import make
from dr_cloud.cli.rest import Call, NoWait, check_new, command, write_new
from dr_cloud.model.errors import DrCloudError, InvalidError
from dr_cloud.model.recovery import LIFETIME_SECONDS, TEST_TIMES_MAX, RecoveryTest, StopTest, TestsRequest, Verdict
from dr_cloud.model.task import Task
from dr_cloud.model.units import SECOND_NS, format_time, parse_duration, parse_size, parse_time
from dr_cloud.recovery.attach import attach as attach_texts
from dr_cloud.recovery.probes.spec import parse_spec, read_specs

app = group("Recovery tests at past times, in parallel.")
Vpg = Annotated[str, typer.Argument(help="The protection group.")]
TestId = Annotated[str, typer.Argument(help="The test's id.")]
_COLUMNS = "id vpg target origin status at_ns seconds rto_seconds probes verdict verdict_note problem"
_LOOK_SECONDS: Final = 1.0

command(app, "report")(make)


@command(app, "start")
def start(
    call: Call,
    vpg: Vpg,
    at: Annotated[
        list[str] | None, typer.Option(help="A time (RFC 3339 with a zone). Give as many as you like.")
    ] = None,
    every: Annotated[str, typer.Option(help="A test each 10m, 2h, 1d … between --from and --to.")] = "",
    since: Annotated[str, typer.Option("--from", help="The first time of --every.")] = "",
    until: Annotated[str, typer.Option("--to", help="The last time of --every.")] = "",
    probe: Annotated[
        list[str] | None, typer.Option(help="What is to be looked at: fsck, sqlite:path=/app.db … See probe list.")
    ] = None,
    probes_file: Annotated[Path | None, typer.Option(help="YAML or JSON file with a list of probes.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Serve the disks on after the probes.")] = False,
    ttl: Annotated[str, typer.Option(help="After which time a test ends by itself: 30m, 2h, 1d.")] = "",
    remote: Annotated[bool, typer.Option("--remote", help="Serve the disks to other machines too, over TLS.")] = False,
    target: Annotated[str | None, typer.Option(help="At which target; needed where there are several.")] = None,
    quota: Annotated[str | None, typer.Option(help="How much each test may write, e.g. 10GiB.")] = None,
    note: Annotated[str, typer.Option(help="Why it is tested.")] = "",
    no_wait: NoWait = False,
) -> None:
    """Start tests, one at each time, all at once.

    Without probes it shows where their disks are served. With probes it waits for what they say, and exits with 1 if
    one of the tests has failed.
    """
    if quota is not None and parse_size(quota) == 0:
        raise InvalidError("a test with a quota of 0 cannot run", "Leave --quota out for what the node allows.")
    request = TestsRequest(
        target=target,
        times_ns=_times(at or [], every, since, until),
        quota_bytes=None if quota is None else parse_size(quota),
        lifetime_seconds=int(parse_duration(ttl)) if ttl else LIFETIME_SECONDS,
        probes=[parse_spec(text) for text in probe or ()] + (read_specs(probes_file) if probes_file else []),
        keep=keep,
        remote=remote,
        note=note,
    )
    task = call.client.start_tests(vpg, request)
    if no_wait:
        call.task(task, no_wait=True, done="")
        return
    ended = call.wait(task)
    if not request.probes:
        call.out.rows(_tests_of(call, vpg, ended), "id at_ns status uris note problem denied")
        return
    tests = _judged(call, vpg, ended)
    call.out.rows(tests, "id at_ns status seconds rto_seconds verdict verdict_note note problem")
    if any(test.verdict != "pass" for test in tests):
        raise typer.Exit(1)


def _times(at: Sequence[str], every: str, since: str, until: str) -> list[int]:
    times = [parse_time(text) for text in at]
    if bool(every) != bool(since) or bool(since) != bool(until):
        raise InvalidError("--every, --from and --to belong together", "Give all three, or times by --at.")
    if every:
        step_ns, first_ns, last_ns = int(parse_duration(every) * SECOND_NS), parse_time(since), parse_time(until)
        if step_ns <= 0 or first_ns > last_ns:
            raise InvalidError("--every is 0, or --from is after --to", "Give a step, and the earlier time first.")
        if (last_ns - first_ns) // step_ns >= TEST_TIMES_MAX:
            raise InvalidError(f"these are more than {TEST_TIMES_MAX} times", "Choose a larger step for --every.")
        times += range(first_ns, last_ns + 1, step_ns)
    if not times:
        raise InvalidError("no time is given", "Give --at, or --every with --from and --to.")
    return list(dict.fromkeys(times))


def _tests_of(call: Call, vpg: str, task: Task) -> list[RecoveryTest]:
    """Return the tests that a task has started, by their times. The newest are listed first, so not all are read."""
    found: list[RecoveryTest] = []
    wanted = len((task.result or {}).get("tests", ()))
    for test in call.client.tests(vpg):
        if test.task == task.id:
            found.append(test)
            if len(found) == wanted:
                break
    return sorted(found, key=lambda test: test.asked_ns)


def _judged(call: Call, vpg: str, task: Task) -> list[RecoveryTest]:
    """Wait until all tests of a task have ended, or are judged and kept; tell of each as it comes."""
    told: set[str] = set()
    with call.out.progress("probes") as show:
        while True:
            tests = _tests_of(call, vpg, task)
            for test in tests:
                over = test.stopped_ns is not None or (test.keep and test.verdict is not None)
                if over and test.id not in told:
                    told.add(test.id)
                    why = f": {test.verdict_note}" if test.verdict_note else ""
                    call.out.note(f"{format_time(test.at_ns or test.asked_ns)} {test.verdict or 'no verdict'}{why}")
            show(len(told) / len(tests) if tests else 1.0)
            if all(test.id in told for test in tests):
                return tests
            time.sleep(_LOOK_SECONDS)


@command(app, "list")
def list_tests(call: Call, vpg: Annotated[str | None, typer.Argument(help="Only of this group.")] = None) -> None:
    """List tests: their times, how long they ran, how fast they were there, their verdicts."""
    call.out.rows(call.client.tests(vpg), _COLUMNS)


@command(app, "show")
def show(call: Call, test: TestId) -> None:
    """Show one test: what it was asked for, what it did, what each probe found and printed."""
    _show(call, call.client.test(test))


def _show(call: Call, test: RecoveryTest) -> None:
    if call.out.as_json:
        call.out.json(test.model_dump(mode="json"))
        return
    call.out.record(test.model_dump(mode="json", exclude={"results", "statistics"}))
    call.out.record(test.statistics)
    if test.results:
        call.out.rows(test.results, "probe verdict seconds reason")
    for result in test.results:
        if result.output:
            call.out.note(f"── {result.probe} printed:\n{result.output}")
        for artefact in result.artefacts:
            call.out.note(f"── {result.probe} left {artefact.path}: dr-cloud test artefact {test.id} {artefact.path}")


@command(app, "stop")
def stop(
    call: Call,
    test: TestId,
    verdict: Annotated[Verdict | None, typer.Option(help="How it went; else what its probes said.")] = None,
    note: Annotated[str, typer.Option(help="What was found.")] = "",
    no_wait: NoWait = False,
) -> None:
    """Stop one test and mark it; the others go on. Its writes are gone."""
    task = call.client.stop_test(test, StopTest(verdict=verdict, note=note))
    if no_wait:
        call.task(task, no_wait=True, done="")
        return
    call.wait(task)
    _show(call, call.client.test(test))


@command(app, "discard-old")
def discard_old(
    call: Call, vpg: Vpg, count: Annotated[int, typer.Option(min=1, help="How many, from the oldest on.")]
) -> None:
    """Forget the oldest tests that have ended, and what their probes left."""
    number = call.client.discard_tests(vpg, count)
    call.out.said({"discarded": number}, f"{number} tests of {vpg} are forgotten")


@command(app, "attach")
def attach(
    call: Call,
    test: TestId,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="New folder for the credential of a remote test.")
    ] = None,
) -> None:
    """Tell how QEMU, libvirt and Linux attach the disks of a test; of a remote one, write its credential."""
    shown = call.client.test(test)
    folder = out or Path(f"drtest-{shown.id}")
    if not shown.remote:
        texts, written = attach_texts(shown), []
    else:
        credential = call.client.test_credential(test)
        texts = attach_texts(shown, credential, folder.absolute())
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise DrCloudError(f"{folder} cannot be made: {error.strerror}", "Name a new folder.") from None
        written = [folder / name for name in texts.files]
        for path in written:
            write_new(path, texts.files[path.name].encode())
    if call.out.as_json:
        document = {"uris": texts.uris, "qemu": texts.qemu, "libvirt": texts.libvirt, "linux": texts.linux}
        call.out.json({"test": shown.id, "files": [str(path) for path in written], **document})
        return
    if written:
        call.out.note(f"The credential is in {folder}; it ends with the test. Keep it to yourself.")
    call.out.note(f"\nQEMU, all disks:\n{texts.qemu}")
    for disk, uri in texts.uris.items():
        commands = "\n".join(texts.linux[disk])
        call.out.note(f"\n{disk}: {uri}\nLinux:\n{commands}\nlibvirt:\n{texts.libvirt[disk]}")


@command(app, "artefact")
def artefact(
    call: Call,
    test: TestId,
    path: Annotated[str, typer.Argument(help="Which, as test show tells: PROBE/FILE.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write it to this new file.")],
) -> None:
    """Download a file that a probe left: a screenshot, a console."""
    check_new(out)
    content = call.client.test_artefact(test, path)
    write_new(out, content)
    call.out.said({"file": str(out), "size_bytes": len(content)}, f"{out}: {len(content)} bytes")
