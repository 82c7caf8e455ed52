"""Recovery tests, failover, the search for the last clean point, drills: the records of their API and of the manager.

Views are frozen and say what is; requests refuse fields they do not know. Times are nanoseconds since the epoch.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dr_cloud.model.cloud import ShortText, Text, TimeNs
from dr_cloud.model.probe import ProbeResult, ProbeSpec
from dr_cloud.model.provider import Name

TEST_TIMES_MAX: Final = 256
PROBES_MAX: Final = 32
PARALLEL_MAX: Final = 64
LIFETIME_SECONDS: Final = 86400
"""How long a test lives that was given no other time."""
LIFETIME_SECONDS_MAX: Final = 30 * 86400

TestTimes = Annotated[list[TimeNs], Field(min_length=1, max_length=TEST_TIMES_MAX)]
Probes = Annotated[list[ProbeSpec], Field(max_length=PROBES_MAX)]
Lifetime = Annotated[int, Field(ge=10, le=LIFETIME_SECONDS_MAX)]


class _View(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FailoverRequest(_Request):
    """To which time, at which target. Neither a checkpoint nor a time means the latest."""

    target: Name | None = None
    """None: the only one there is."""
    checkpoint: int | None = Field(default=None, ge=0)
    at_ns: TimeNs | None = None
    reverse: bool = True
    """Whether replication back is wanted after the commit."""
    then: Literal["wait", "commit", "rollback"] = "wait"
    """What happens by itself `after_seconds` after the servers were recovered; `wait`: nothing, until a person says."""
    after_seconds: int = Field(default=3600, ge=0, le=LIFETIME_SECONDS_MAX)


class TestsRequest(_Request):
    """Recovery tests of one VPG, one at each of these times, all at once."""

    __test__ = False
    target: Name | None = None
    """None: the only one there is."""
    times_ns: TestTimes
    quota_bytes: int | None = Field(default=None, gt=0)
    """How much each test may write."""
    lifetime_seconds: Lifetime = LIFETIME_SECONDS
    """A test that nobody stops before ends by itself then."""
    probes: Probes = []
    """Run one after another once the disks are served; all must pass."""
    keep: bool = False
    """Whether a test with probes is served on after them; one without always is."""
    remote: bool = False
    """Whether the disks are served over TLS too, to whoever holds the test's credential."""
    note: Text = ""


TestStatus = Literal["opening", "running", "closing", "stopped", "failed"]
Verdict = Literal["pass", "fail"]


class RecoveryTest(_View):
    """One recovery test (FailoverTestInfo), or one failover before its commit: the disks at one time, served."""

    id: str
    enterprise: str
    vpg: str
    target: str
    kind: Literal["test", "failover"]
    task: str
    """The task that started it."""
    origin: str = ""
    """What started it, if no person did: `clean/<task>` a search, `drill/<name>` a drill."""
    status: TestStatus
    asked_ns: int
    at_ns: int | None = None
    """The time that is served."""
    note: str = ""
    """What its starter said; and why `at_ns` is not `asked_ns`, where it is not."""
    uris: dict[str, list[str]] = {}
    """The NBD URIs of each disk, by the disk's name, while it runs: shown to whom policy lets read."""
    remote: bool = False
    denied: str = ""
    """Why policy has stopped it, or does not let the caller read; empty otherwise."""
    probes: list[ProbeSpec] = []
    results: list[ProbeResult] = []
    """Of the probes that have ended so far, in their order. What they printed and left is not in lists of tests."""
    keep: bool = False
    started_ns: int
    running_ns: int | None = None
    """When its disks were served."""
    expires_ns: int | None = None
    """When it ends by itself; of a failover: when it is committed or rolled back by itself, if it is."""
    then: Literal["", "commit", "rollback"] = ""
    """What happens then to a failover."""
    stopped_ns: int | None = None
    ended: str = ""
    """Why it ended: by whom, its time, its probes, its stack; empty while it has not."""
    seconds: float | None = None
    """From its start to its end."""
    rto_seconds: float | None = None
    """Achieved recovery time: from its start until its disks were served; with probes, until the last has passed."""
    verdict: Verdict | None = None
    verdict_note: str = ""
    statistics: dict[str, float | int | None] = {}
    problem: str = ""
    started_by: str = ""


class StopTest(_Request):
    """How a test ends."""

    verdict: Verdict | None = None
    """None: what its probes said, if there were any."""
    note: Text = ""


class TestCredential(_View):
    """What a client needs to attach the disks of one test over TLS. It ends with the test; nothing of it is stored."""

    __test__ = False
    uris: dict[str, list[str]]
    """`nbds://…`, by the disk's name."""
    ca: str = Field(repr=False)
    """PEM; the only one to trust."""
    certificate: str = Field(repr=False)
    key: str = Field(repr=False)


class CleanRequest(_Request):
    """Which is the last time between two at which all probes pass."""

    target: Name | None = None
    since_ns: TimeNs
    until_ns: TimeNs
    probes: Annotated[list[ProbeSpec], Field(min_length=1, max_length=PROBES_MAX)]
    parallel: int = Field(default=8, ge=1, le=PARALLEL_MAX)
    """Stacks a round."""
    precision_ns: int = Field(default=0, ge=0)
    """Enough if the last clean and the first dirty time are this close; 0: down to one write."""

    @model_validator(mode="after")
    def _ascending(self) -> CleanRequest:
        if self.since_ns > self.until_ns:
            raise ValueError("since_ns is after until_ns")
        return self


class CleanEdge(_View):
    """Two tested neighbours, the earlier clean, the later dirty."""

    clean_ns: int
    dirty_ns: int
    reason: str
    """Of the probe that failed at `dirty_ns`."""


class CleanRound(_View):
    """One round of a search, and what was known after it."""

    tests: int
    silent: int
    """How many of them ended without saying whether their time is clean."""
    clean_ns: int | None
    dirty_ns: int | None
    left: int
    """How many times there are still to choose between."""


class CleanCheckpoint(_View):
    """A tagged checkpoint near the last clean time."""

    number: int
    time_ns: int
    tag: str


class CleanPoint(_View):
    """What a search for the last clean point has found so far, or in the end: the result of its task."""

    target: str
    clean_ns: int | None
    """The last clean time before the first dirty one; None: none is known."""
    dirty_ns: int | None
    """The first dirty time; None: none is known."""
    reason: str = ""
    """Of the probe that failed at `dirty_ns`."""
    writes: int
    """Changed blocks between which it chooses: those written after the first time, up to the last."""
    known: int
    """Times whose verdict was known before from other tests."""
    rounds: list[CleanRound]
    monotone: bool
    """False: after a dirty time a clean one was seen."""
    edges: list[CleanEdge]
    """Every clean→dirty edge that was seen, ascending. The first is the answer: nothing dirty is known before it."""
    checkpoints: list[CleanCheckpoint] = []
    """Tagged, nearest before and after `clean_ns`, at most three on each side; once it is found."""
    problem: str = ""
    """Why an edge is wider than was asked for; empty where none is."""


class DrillSettings(_Request):
    """Recovery tests that come by themselves."""

    name: Name
    schedule: str = Field(min_length=1, max_length=255)
    """Five fields as in crontab(5), in UTC."""
    target: Name | None = None
    ages_seconds: list[Annotated[float, Field(ge=0)]] = Field(default=[0.0], min_length=1, max_length=TEST_TIMES_MAX)
    """How long ago each test's time is; 0 is the latest."""
    probes: Annotated[list[ProbeSpec], Field(min_length=1, max_length=PROBES_MAX)]
    quota_bytes: int | None = Field(default=None, gt=0)
    lifetime_seconds: Lifetime = 3600
    enabled: bool = True
    note: ShortText = ""


class Drill(_View):
    """A drill of a VPG, and how its last run went."""

    enterprise: str
    vpg: str
    settings: DrillSettings
    created_by: str
    next_ns: int | None
    """None while it is not enabled."""
    last_ns: int | None = None
    last_tests: list[str] = []
    last_verdict: Verdict | None = None
    """None before it has ended; pass only if all of its tests passed."""
    problem: str = ""
    """Why its last run could not begin; empty if it could."""
    resting: bool = False
    """Whether the VPG is in a status in which no test can begin: due times pass by, and that is no problem."""


class ReportKey(_View):
    """The key by which a provider's reports of tests are signed: its public half."""

    id: str
    """SHA-256 of the 32 bytes of the key, hexadecimal: reports name it."""
    public: str
    """PEM."""


ReportFormat = Literal["json", "html"]


class ReportQuery(_Request):
    """Of which recovery tests a report is wanted: those for which all that is given is true."""

    test: list[Annotated[str, Field(pattern="^[0-9A-Za-z_-]{1,64}$")]] = Field(default=[], max_length=TEST_TIMES_MAX)
    """Ids."""
    task: Annotated[str, Field(pattern="^[0-9A-Za-z_-]{1,64}$")] | None = None
    """The task that started them."""
    vpg: Name | None = None
    drill: Name | None = None
    """The last run of this drill of the VPG."""

    @model_validator(mode="after")
    def _names_something(self) -> ReportQuery:
        if not (self.test or self.task or self.vpg):
            raise ValueError("name tests, a task or a VPG")
        if self.drill is not None and self.vpg is None:
            raise ValueError("name the VPG of the drill")
        return self
