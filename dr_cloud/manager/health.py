"""What is well and what is not: pure judgements over the last reports, with hysteresis.

An alert is raised at one limit and cleared at a lower one, so that a value at the limit does not flicker:

    lag               raised over 2 checkpoint intervals, cleared under 1.5
    history           raised under 85 % of what was promised, cleared over 90 %
    history-critical  raised under 75 %, cleared over 80 %
    checkpoint        raised when there is none after 10 intervals (at least 60 s), cleared with the first
    replication       raised by a problem that the source or target tells, cleared without
    link              raised when a paired site does not report, cleared when it does
    vdsa              raised when a host that should have a VDSA has none, cleared when it has
    rights            raised when policy has stopped something, or the rights manager is not well; cleared when not
    drill             raised when a drill has failed or could not begin, cleared when its next run has passed
    untested          raised when a VPG has passed no recovery test for so many days, cleared when one has passed

The forecast of history: what a journal holds now, and what its datastore's free space gives at the present rate of all
journals in it, up to what was promised. Without a bound, or before a journal has a rate, there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from dr_cloud.model.recovery import Verdict
from dr_cloud.model.units import SECOND_NS
from dr_cloud.model.watch import AlertKind

STALE_NS: Final = 15 * SECOND_NS
"""A report older than this is no news: what it said grows older with it."""
LAG_RAISED_INTERVALS: Final = 2.0
LAG_CLEARED_INTERVALS: Final = 1.5
HISTORY: Final[dict[AlertKind, tuple[float, float]]] = {"history": (0.85, 0.90), "history-critical": (0.75, 0.80)}
FIRST_CHECKPOINT_SECONDS: Final = 60.0
_RATE_SECONDS_MIN: Final = 60.0


class Judgement(NamedTuple):
    """Whether an alert is to stand."""

    kind: AlertKind
    subject: str
    raised: bool
    message: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class TargetFacts:
    """What is known of one replication."""

    subject: str
    replicating: bool
    """False while it is paused, being removed, or failed over: nothing is expected then."""
    interval_seconds: float
    promised_seconds: float
    age_seconds: float
    """Since the VPG was created."""
    lag_seconds: float | None
    history_seconds: float
    forecast_seconds: float | None
    problem: str


def lag_now(lag_seconds: float | None, reported_ns: int, now_ns: int) -> float | None:
    """Return the lag now: as reported, and older with the report if that is stale."""
    if lag_seconds is None:
        return None
    age_ns = now_ns - reported_ns
    return lag_seconds if age_ns < STALE_NS else lag_seconds + age_ns / SECOND_NS


def history_seconds(newest_ns: int | None, horizon_ns: int | None) -> float:
    """Return how far back a journal goes from its newest time."""
    return max(0.0, (newest_ns - horizon_ns) / SECOND_NS) if newest_ns is not None and horizon_ns is not None else 0.0


def promised_seconds(history_hours: float) -> float:
    """Return the promised history."""
    return history_hours * 3600


def lags(lag_seconds: float, interval_seconds: float, raised: bool) -> bool:
    """Return whether this is too much, given whether it was."""
    return lag_seconds > interval_seconds * (LAG_CLEARED_INTERVALS if raised else LAG_RAISED_INTERVALS)


def judge_target(facts: TargetFacts, raised: frozenset[str]) -> list[Judgement]:
    """Judge one replication; `raised` are the kinds that stand for it now."""
    subject = facts.subject
    if not facts.replicating:
        return [Judgement(kind, subject, False) for kind in ("lag", "checkpoint", "replication", *HISTORY)]
    found = []
    late = facts.lag_seconds is not None and lags(facts.lag_seconds, facts.interval_seconds, "lag" in raised)
    lag_text = f"{facts.lag_seconds or 0:.1f} s behind; checkpoints are due every {facts.interval_seconds:g} s"
    found.append(Judgement("lag", subject, late, lag_text, "Look at the link's bandwidth and the target's load."))
    first_seconds = max(FIRST_CHECKPOINT_SECONDS, 10 * facts.interval_seconds)
    none = facts.lag_seconds is None and facts.age_seconds > first_seconds
    found.append(
        Judgement(
            "checkpoint",
            subject,
            none,
            f"no checkpoint {facts.age_seconds:.0f} s after the VPG was created",
            "See whether its servers' taps run and the first synchronisation goes on.",
        )
    )
    found.append(Judgement("replication", subject, bool(facts.problem), facts.problem, "Act on what it says."))
    return found + _judge_history(facts, raised)


def _judge_history(facts: TargetFacts, raised: frozenset[str]) -> list[Judgement]:
    expected = [facts.forecast_seconds] if facts.forecast_seconds is not None else []
    if facts.age_seconds >= facts.promised_seconds:
        expected.append(facts.history_seconds)
    share = min([*expected, facts.promised_seconds]) / facts.promised_seconds
    text = f"{share * facts.promised_seconds / 3600:.1f} h of history of the promised {facts.promised_seconds / 3600:g}"
    return [
        Judgement(
            kind, facts.subject, share < (cleared if kind in raised else low), text, "Give the journal more space."
        )
        for kind, (low, cleared) in HISTORY.items()
    ]


def judge_link(subject: str, paired: bool, last_seen_ns: int | None, now_ns: int) -> Judgement:
    """Judge the link of one site."""
    silent = paired and last_seen_ns is not None and now_ns - last_seen_ns > STALE_NS
    seconds = (now_ns - last_seen_ns) / SECOND_NS if last_seen_ns is not None else 0
    return Judgement(
        "link",
        subject,
        silent,
        f"nothing heard for {seconds:.0f} s",
        "See whether the site runs and reaches the provider.",
    )


def judge_vdsa(subject: str, wanted: bool, up: bool, problem: str) -> Judgement:
    """Judge the VDSA of one host."""
    return Judgement("vdsa", subject, wanted and not up, problem or "the VDSA is not up", "Look at the host.")


def judge_denied(subject: str, denied: str) -> Judgement:
    """Judge what policy may have stopped."""
    remedy = "It goes on by itself when it is allowed again; see: dr-cloud rights explain"
    return Judgement("rights", subject, bool(denied), f"policy denies it: {denied}", remedy)


def judge_rights(problem: str) -> Judgement:
    """Judge the rights manager itself."""
    remedy = "What stands goes on for a while, nothing new is allowed: look at the engine and its log."
    return Judgement("rights", "rights", bool(problem), problem, remedy)


def judge_drill(subject: str, verdict: Verdict | None, problem: str, raised: bool) -> Judgement:
    """Judge a drill by its last run. While that goes on, an alert that stands stays."""
    failed = bool(problem) or verdict == "fail" or (verdict is None and raised)
    message = (problem and f"it could not begin: {problem}") or "its last run has failed, or has not passed since"
    return Judgement("drill", subject, failed, message, "See what it found: dr-cloud drill show, dr-cloud test list")


def judge_untested(subject: str, created_ns: int, passed_ns: int | None, days: int, now_ns: int) -> Judgement:
    """Judge how long ago a VPG has passed a recovery test; if it never has, since it was created."""
    age_days = (now_ns - (passed_ns or created_ns)) / (86400 * SECOND_NS)
    message = f"no recovery test has passed for {age_days:.0f} days"
    return Judgement("untested", subject, age_days > days, message, "Start one, or have a drill do it regularly.")


def forecast(
    history_seconds: float, promised_seconds: float, free_bytes: int | None, bytes_per_second: float
) -> float | None:
    """Return how much history there will be when the datastore is full; at most what was promised.

    Args:
        history_seconds: What the journal holds.
        promised_seconds: What it is to hold.
        free_bytes: What its datastore can take; None if it has no bound.
        bytes_per_second: At which all journals in the datastore grow together.
    """
    if free_bytes is None or history_seconds < _RATE_SECONDS_MIN:
        return None
    if bytes_per_second <= 0:
        return promised_seconds
    return min(promised_seconds, history_seconds + free_bytes / bytes_per_second)
