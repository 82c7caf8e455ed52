"""What is asked of the rights manager, and what it answers (R13).

A question names things; it never says in which jurisdiction they lie. Engines look names up in their own data (data
centers, enterprises, regulation), so whoever asks cannot lie about a place, and what is not known is not allowed.

An answer is a yes only if it says so in every part: `Answer()` is a no. Times here are whole seconds since the epoch,
which every engine holds exactly.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.provider import Jurisdiction, Name
from dr_cloud.model.units import SECOND_NS, parse_time


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Action(StrEnum):
    """What is to be allowed. The policies have a rule for each, and allow nothing else."""

    CONNECT = "connect"
    """A site's connector connects."""
    REPLICATE = "replicate"
    """Writes travel from their source to a place."""
    KEEP = "keep"
    """Journal and replica lie in a datastore of a place, with the key that opens them."""
    TEST = "test"
    """A recovery test's stack runs at a place."""
    FAIL_OVER = "failover"
    """Servers run at a place, from a replica."""
    FAIL_BACK = "failback"
    """Servers and what they wrote go back to a site."""
    MOVE = "move"
    """Servers move to a place for good; a replica is promoted there."""
    READ = "read"
    """A person reads a checkpoint or an image."""
    LOGS = "logs"
    """A person takes an archive of logs."""
    OPERATE = "operate"
    """A person acts on an enterprise's protection."""


class Place(_Record):
    """A data center of the provider, or a site of the enterprise that the question is about."""

    kind: Literal["data center", "site"]
    name: Name
    datastore: str = ""
    """Of a data center: where the bytes lie, where that matters."""


class Operator(_Record):
    """Who acts. Where a person sits counts: access from a third country is a transfer."""

    role: str
    jurisdiction: str = ""
    """Of the person's place; empty if it is not known, and then nothing is allowed."""


class Question(_Record):
    """May this be done?"""

    action: Action
    enterprise: Name
    source: Place | None = None
    """Where the data comes from."""
    place: Place | None = None
    """Where it goes to, lies, or is used."""
    operator: Operator | None = None
    """Who asks for it; None where no person does."""
    vpg: str = ""
    target: str = ""
    territory: list[Jurisdiction] = []
    """Of the VPG: if not empty, the only jurisdictions that any of its data may come to (R13.2)."""


class Answer(_Record):
    """What an engine says."""

    allow: bool = False
    reasons: list[str] = ["no answer"]
    """In words: why not; or on which ground, where a transfer needs one. Never empty for a no."""
    revision: str = ""
    """Of policies and data together; empty if no engine has answered."""
    until_s: int | None = None
    """When the first of the mechanisms that it rests on ends; None if it rests on none."""
    jurisdictions: list[str] = []
    """For a yes about a place: where actors that touch this data may run. Selectors are made of it."""

    @property
    def answered(self) -> bool:
        """Whether an engine has decided. If not, what stands may go on for `GRACE_SECONDS`; what is new may not."""
        return bool(self.revision)


GRACE_SECONDS: Final = 900
"""How long what was allowed goes on while no engine answers. Grants live as long."""
CACHE_SECONDS: Final = 2.0
"""How long an answer may be used again for the same question under the same revision, wherever it is kept."""
JUDGE_SECONDS: Final = 60.0
"""How often everything that stands is judged again at least; a new revision is noticed within a second."""


def _time_ns(text: str) -> int:
    try:
        return parse_time(text)
    except DrCloudError as error:
        raise ValueError(f"{error}. {error.remedy}") from None


def _time_text(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else value


_Time = Annotated[str, BeforeValidator(_time_text)]
"""YAML makes a time of what looks like one."""


class Mechanism(_Record):
    """A legal ground on which data may leave one jurisdiction for another."""

    kind: Literal["adequacy", "clauses", "derogation"]
    """In the order of preference. Adequacy holds for all; clauses and derogations for the enterprises they name."""
    from_: Jurisdiction = Field(alias="from")
    to: Jurisdiction
    reference: str = Field(min_length=1, max_length=255)
    """What it is called, in the words of the law or the contract."""
    assessment: str = Field(default="", max_length=255)
    """Of clauses: the reference of the transfer impact assessment. Without it they do not hold."""
    enterprises: list[Name] = []
    actions: list[Action] = []
    """Of a derogation: what it is for."""
    valid_from: _Time
    valid_until: _Time
    """RFC 3339 with a zone."""

    @model_validator(mode="after")
    def _whole(self) -> Mechanism:
        if self.kind == "clauses" and not (self.assessment and self.enterprises):
            raise ValueError("clauses need `assessment` and `enterprises`")
        if self.kind == "derogation" and not (self.actions and self.enterprises):
            raise ValueError("a derogation needs `actions` and `enterprises`")
        if self.valid_from_s >= self.valid_until_s:
            raise ValueError("`valid_until` must be after `valid_from`")
        return self

    @property
    def valid_from_s(self) -> int:
        """The first whole second in which it holds."""
        return -(-_time_ns(self.valid_from) // SECOND_NS)

    @property
    def valid_until_s(self) -> int:
        """The first whole second in which it does not hold any more."""
        return _time_ns(self.valid_until) // SECOND_NS


class JurisdictionRecord(_Record):
    """A jurisdiction. Data moves freely inside of it, and among its parts."""

    title: str = ""
    parts: list[Jurisdiction] = []


class Regulation(_Record):
    """`policies/regulation.yaml`: what the law says, as data. From one jurisdiction to another only mechanisms lead."""

    jurisdictions: dict[Jurisdiction, JurisdictionRecord] = Field(min_length=1)
    mechanisms: list[Mechanism] = []

    @property
    def wholes(self) -> dict[str, list[str]]:
        """Each jurisdiction that there is, with itself and every whole that it is a part of."""
        parts = {part for record in self.jurisdictions.values() for part in record.parts}
        return {
            name: [name, *(whole for whole, record in self.jurisdictions.items() if name in record.parts)]
            for name in sorted(parts | set(self.jurisdictions))
        }

    @model_validator(mode="after")
    def _refers_to_itself(self) -> Regulation:
        known = self.wholes
        for mechanism in self.mechanisms:
            for name in (mechanism.from_, mechanism.to):
                if name not in known:
                    raise ValueError(f"mechanism {mechanism.reference!r} names {name}, which is not listed")
        return self


class DataCenterFacts(_Record):
    """Where a data center's parts lie."""

    jurisdiction: Jurisdiction
    keys: Jurisdiction
    """Where the keys are held that open what lies here."""
    datastores: dict[str, Jurisdiction]


class EnterpriseFacts(_Record):
    """An enterprise. Its owner is told so that policies can be read, and opens no door."""

    jurisdiction: Jurisdiction
    owner: str = ""
    sites: dict[str, Jurisdiction]


class Facts(_Record):
    """What the provider is made of, as far as policies need it. Its registry says so, never a caller."""

    data_centers: dict[str, DataCenterFacts]
    enterprises: dict[str, EnterpriseFacts]


class PolicySources(_Record):
    """All that decides, but for the facts: what an administrator puts in force, as one."""

    modules: dict[str, str] = Field(min_length=1)
    """Rego by file name, without tests."""
    regulation: Regulation


class RightsState(_Record):
    """How the rights manager stands."""

    engine: Literal["embedded", "opa"]
    wanted: str
    """Revision of the newest bundle."""
    revision: str = ""
    """The revision that the engine answers by; empty if it does not answer."""
    problem: str = ""
    """Empty if all is well; else what an alert is to say: no answer, a refused bundle, a stale revision."""
    boundary_s: int | None = None
    """When the next mechanism begins or ends."""


class WhatIf(_Record):
    """One thing that stands, before and after a change."""

    kind: Literal["vpg", "link", "test"]
    enterprise: str
    subject: str
    """vpg/target, the site, or the test's id."""
    before: bool
    after: bool
    reasons: list[str]
    """Of the answer after the change."""
