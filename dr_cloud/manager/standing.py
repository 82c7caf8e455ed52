"""Standing rights: what was allowed is judged again, and what is no longer allowed stops within seconds.

Purpose
    A round a second looks at how the rights manager stands. When its revision is not the one by which everything was
    judged last, when a mechanism has begun or ended, and at least every minute, everything that stands is judged: each
    target of a VPG, each paired site, each open test. A no by policy is carried out at once, a yes after it as well:

    target   paused for its source, with the reason, so that taps go on by bitmap; its orders are withdrawn, so that
             the VDSA lets go. Allowed again, both come back, and what was written meanwhile is sent as a delta.
    link     closed, and its certificate is refused at the door.
    test     its stack answers every request with an error; what was written to it is kept.

No answer
    What stands goes on for `GRACE_SECONDS` since its last yes, or since this process began, if that is later; then it
    is stopped too. Grants end by themselves at about the same time.

Consistency
    What is stopped or freed, and the decision for it, are one transaction. Only what changes something is written:
    a judgement that finds things as they are permits nothing. Sites, hosts and stacks are told after the commit; stacks
    again each second until they have heard, the others by fetching their orders.

Crash recovery
    What is stopped is in the rows. A new process judges everything at its first round, and tells every open stack.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal, NamedTuple

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session, selectinload

from dr_cloud.manager import tables
from dr_cloud.manager.desk import GRACE_NS, RENEWED_NS
from dr_cloud.manager.operations import Context
from dr_cloud.manager.orders import replicates
from dr_cloud.manager.protect import source_party, target_party
from dr_cloud.manager.publish import Party
from dr_cloud.manager.questions import HELD, about_target, connects
from dr_cloud.manager.record import Entry, append
from dr_cloud.manager.rounds import Rounds
from dr_cloud.manager.tenancy import EVERYONE, PROVIDER
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.rights import JUDGE_SECONDS, Action, Question, RightsState
from dr_cloud.model.units import SECOND_NS

LOOK_SECONDS: Final = 1.0
JUDGE_NS: Final = int(JUDGE_SECONDS * SECOND_NS)
AGAIN_NS: Final = 5 * SECOND_NS
"""When some have not been answered."""
_OPEN: Final = ("opening", "running")
log = structlog.get_logger(__name__)


class Standing(NamedTuple):
    """One thing that stands."""

    kind: Literal["vpg", "link", "test"]
    enterprise: str
    name: str
    """`erp/dc1`, the site, the test's id."""
    questions: list[Question]
    denied: str
    """Why it is stopped now; empty if it is not."""
    parties: list[Party]
    """Who has other orders when it is stopped or freed."""

    @property
    def subject(self) -> str:
        """How it is named in records and alerts."""
        return f"{'site' if self.kind == 'link' else self.kind}/{self.name}"


def everything(session: Session, answers_for: Callable[[str], bool] = lambda enterprise: True) -> list[Standing]:
    """Return all that stands, in a session that sees everyone."""
    found: list[Standing] = []
    vpgs = {}
    for vpg in session.scalars(select(tables.Vpg).options(selectinload(tables.Vpg.targets))):
        if not answers_for(vpg.enterprise):
            continue
        vpgs[vpg.enterprise, vpg.name] = vpg
        for target in vpg.targets if replicates(vpg) else ():
            parties = [source_party(vpg), target_party(target)]
            asked = about_target(vpg, target, HELD)
            found.append(Standing("vpg", vpg.enterprise, f"{vpg.name}/{target.name}", asked, target.denied, parties))
    for site in session.scalars(select(tables.Site).where(tables.Site.certificate != "")):
        if answers_for(site.enterprise):
            asked = [connects(site.enterprise, site.name)]
            found.append(Standing("link", site.enterprise, site.name, asked, site.denied, []))
    for test in session.scalars(select(tables.RecoveryTest).where(tables.RecoveryTest.status.in_(_OPEN))):
        owner = vpgs.get((test.enterprise, test.vpg))
        chosen = next((t for t in owner.targets if t.name == test.target), None) if owner is not None else None
        if owner is not None and chosen is not None:
            action = Action.TEST if test.kind == "test" else Action.FAIL_OVER
            asked = about_target(owner, chosen, [action])
            found.append(Standing("test", test.enterprise, test.id, asked, test.denied, []))
    return found


class StandingRights:
    """See the module's docstring."""

    def __init__(self, context: Context, answers_for: Callable[[str], bool]) -> None:
        self._context = context
        self._database = context.database
        self._desk = context.desk
        self._answers_for = answers_for
        self._began_ns = context.clock_ns()
        self._judged_revision = ""
        self._judge_at_ns = 0
        self._boundary_s: int | None = None
        self._renewed: tuple[str, int] = ("", self._began_ns)
        """The revision and the time for which hosts were last told to fetch grants."""
        self._told: dict[str, bool] = {}
        """By open test: whether its stack has heard that it is stopped, or that it is not."""
        self._unheard = True
        self._heads: dict[str, int] = {}
        """By enterprise: the number of the last decision whose head is on its way into the store."""
        self._heads_at_ns = 0
        self._round = threading.Lock()
        self._rounds = Rounds("standing", LOOK_SECONDS, (self.look,))
        self.start, self.close = self._rounds.start, self._rounds.close

    def look(self) -> None:
        """Take one round."""
        with self._round:
            self._look()

    def _look(self) -> None:
        state = self._desk.state()
        now_ns = self._context.clock_ns()
        if state is not None and self._answers_for(PROVIDER):
            self._context.policies.reconcile(state)
        if self._is_due(state, now_ns):
            self._boundary_s = state.boundary_s if state is not None else None
            whole = self.judge(state.revision if state is not None else "")
            self._judge_at_ns = now_ns + (JUDGE_NS if whole else AGAIN_NS)
            self._unheard = True
        if self._unheard:
            self._tell_stacks()
        if state is not None and state.revision:
            self._renew(state.revision, now_ns)
        if now_ns - self._heads_at_ns >= JUDGE_NS:
            self._heads_at_ns = now_ns
            self._note_heads()

    def _is_due(self, state: RightsState | None, now_ns: int) -> bool:
        if now_ns >= self._judge_at_ns:
            return True
        if state is None or not state.revision:
            self._judged_revision = ""  # when it comes back, everything is judged at once
            return False
        passed = self._boundary_s is not None and now_ns >= self._boundary_s * SECOND_NS
        return passed or state.revision != self._judged_revision

    # Judging.

    def judge(self, revision: str) -> bool:
        """Judge everything that stands, and carry it out; return whether all was answered and carried out.

        Args:
            revision: That is said to be in force. It counts as judged only if every answer names it: the rights manager
                may have come to another one since it said so.
        """
        self._judged_revision = ""
        with self._database.read(EVERYONE) as session:
            standing = everything(session, self._answers_for)
        answers = iter(self._desk.ask_standing([question for one in standing for question in one.questions]))
        changes: dict[str, list[tuple[Standing, list[Entry]]]] = {}
        whole, judged = True, {revision}
        for one in standing:
            entries = [Entry("standing", one.subject, question, next(answers)) for question in one.questions]
            whole = whole and all(entry.answer.answered for entry in entries)
            judged |= {entry.answer.revision for entry in entries if entry.answer.answered}
            if (decisive := self._decisive(one, entries)) is not None:
                changes.setdefault(one.enterprise, []).append((one, decisive))
        for enterprise, some in changes.items():
            try:
                self._carry_out(enterprise, some)
            except DrCloudError as error:
                log.warning("standing.carry_out", enterprise=enterprise, error=str(error))
                whole = False
        if judged == {revision}:
            self._judged_revision = revision
        return whole

    def _decisive(self, one: Standing, entries: Sequence[Entry]) -> list[Entry] | None:
        """Return the decisions that change how it stands; None if it stays as it is."""
        refused = [entry for entry in entries if entry.answer.answered and not entry.answer.allow]
        if refused:
            return None if one.denied == _why(refused) else refused
        silent = [entry for entry in entries if not entry.answer.allow]
        if silent:
            # Not even remembered: nobody has said yes for as long as that counts.
            return silent if not one.denied and self._context.clock_ns() - self._began_ns >= GRACE_NS else None
        return list(entries) if one.denied else None

    def _carry_out(self, enterprise: str, changes: Sequence[tuple[Standing, Sequence[Entry]]]) -> None:
        now_ns = self._context.clock_ns()
        told: list[tuple[str, str, dict[str, object]]] = []
        parties: list[Party] = []
        links: list[str] = []
        with self._database.write(enterprise) as session:
            for one, entries in changes:
                denied = _why(entries)
                row = _row(session, one)
                if row is None or row.denied == denied:
                    continue
                append(session, enterprise, entries, now_ns)
                if bool(row.denied) != bool(denied):
                    parties += one.parties
                    links += [one.name] if one.kind == "link" and denied else []
                row.denied = denied
                if isinstance(row, tables.Site) and denied:
                    row.connected = False
                kind = "site" if one.kind == "link" else one.kind
                told.append((kind, one.name.split("/")[0], {"subject": one.subject, "denied": denied}))
                log.info("standing.changed", enterprise=enterprise, subject=one.subject, denied=denied)
            if told:
                self._context.registry.touch(session, enterprise)
        for site in links:
            try:
                self._context.fabric.disconnect(enterprise, site)
            except DrCloudError as error:  # its certificate is refused, which its door looks at every few seconds
                log.warning("standing.disconnect", enterprise=enterprise, site=site, error=str(error))
        if parties:
            self._context.publisher.publish(parties)
        self._context.events.emit(enterprise, now_ns, told)
        self._context.registry.wake()

    # What follows from it.

    def _tell_stacks(self) -> None:
        """Have the stack of each open test know whether it is stopped."""
        table = tables.RecoveryTest
        with self._database.read(EVERYONE) as session:
            tests = session.scalars(select(table).where(table.status.in_(_OPEN))).all()
        tests = [test for test in tests if self._answers_for(test.enterprise)]
        self._told = {test.id: self._told[test.id] for test in tests if test.id in self._told}
        self._unheard = False
        for test in tests:
            if test.status != "running":
                self._unheard = self._unheard or bool(test.denied)  # it is told once it runs
            elif self._told.get(test.id) is not bool(test.denied):
                try:
                    if test.denied:
                        self._context.fabric.pause_stack(test.id, test.denied)
                    else:
                        self._context.fabric.resume_stack(test.id)
                    self._told[test.id] = bool(test.denied)
                except DrCloudError as error:
                    self._unheard = True
                    log.warning("standing.stack", test=test.id, error=str(error))

    def _renew(self, revision: str, now_ns: int) -> None:
        """Have hosts fetch new grants before theirs are half spent, and when there is another revision."""
        if not self._answers_for(PROVIDER):
            return
        before, at_ns = self._renewed
        if revision == before and now_ns - at_ns < RENEWED_NS:
            return
        self._renewed = revision, now_ns
        table = tables.VpgTarget
        wanted = select(table.site, table.placed_host).where(table.in_center, table.denied == "").distinct()
        with self._database.read(EVERYONE) as session:
            hosts = session.execute(wanted).all()
        if before:  # at the start everyone is told anyhow
            self._context.publisher.publish(Party("host", site, host) for site, host in hosts)

    def _note_heads(self) -> None:
        """Have the heads of records written into the store where decisions have been added."""
        table = tables.DecisionHead
        with self._database.read(EVERYONE) as session:
            heads = session.execute(select(table.enterprise, table.number)).all()
        moved = [(enterprise, number) for enterprise, number in heads if self._heads.get(enterprise) != number]
        for enterprise, number in moved:
            if self._answers_for(enterprise):
                with self._database.write(enterprise or EVERYONE) as session:
                    self._context.registry.touch(session, enterprise)
                self._heads[enterprise] = number
        if moved:
            self._context.registry.wake()


def _why(entries: Iterable[Entry]) -> str:
    """Return the reasons of those that are a no; empty if none is."""
    reasons = [reason for entry in entries if not entry.answer.allow for reason in entry.answer.reasons]
    return "; ".join(dict.fromkeys(reasons))


def _row(session: Session, one: Standing) -> tables.VpgTarget | tables.Site | tables.RecoveryTest | None:
    if one.kind == "vpg":
        return session.get(tables.VpgTarget, (one.enterprise, *one.name.split("/")))
    if one.kind == "link":
        return session.get(tables.Site, (one.enterprise, one.name))
    return session.get(tables.RecoveryTest, (one.enterprise, one.name))
