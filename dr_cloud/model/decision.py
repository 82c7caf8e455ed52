"""What is kept and shown of rights: the record of decisions, who may go where, policies in force and their changes.

The record is a chain for each enterprise (the empty name: the provider's own). Each decision carries the hash of the
one before; its own hash is SHA-256 over that hash and the canonical JSON of the rest. So whoever has a later hash finds
what was changed or removed before it, with this module alone.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dr_cloud.model.rights import PolicySources, Regulation

Point = Literal[
    "connector",
    "vpg",
    "frames",
    "promote",
    "stack",
    "failover",
    "failback",
    "move",
    "read",
    "logs",
    "operator",
    "standing",
    "policies",
    "rebuild",
]
"""Where it was enforced. Two are no question: `policies` were put in force; a `rebuild` began a new record."""


class _View(BaseModel):
    model_config = ConfigDict(frozen=True)


class Decision(_View):
    """One decision. A secret is never in it: what is asked names things, and no name can hold one."""

    enterprise: str
    number: int
    """From 1, without gaps, in each enterprise."""
    id: str
    at_ns: int
    point: Point
    action: str
    subject: str
    """What it was about: `vpg/erp/dc1`, `site/leeds`, `test/…`."""
    revision: str
    """Of policies and data; empty if no engine answered."""
    input: dict[str, Any]
    """What was asked (`dr_cloud.model.rights.Question`)."""
    allow: bool
    reasons: list[str]
    previous: str
    hash: str

    def digest(self) -> str:
        """Return the hash that it should have."""
        rest = self.model_dump(mode="json", exclude={"previous", "hash"})
        return hashlib.sha256(self.previous.encode() + canonical(rest)).hexdigest()


def canonical(document: Any) -> bytes:
    """Return the one way to write a JSON document: sorted, without spaces, UTF-8."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


class DecisionCheck(_View):
    """Whether a record of decisions is whole."""

    enterprise: str
    whole: bool
    first: int
    """Number of the first decision that is there; 0 if there is none."""
    last: int
    hash: str
    """Of the last one: kept elsewhere, it proves the record up to there."""
    witnesses: int
    """How many heads, as kept in the object store, it was compared with."""
    problem: str = ""
    """What is wrong, with the number; empty if nothing is."""
    note: str = ""


class PlaceRight(_View):
    """Whether an enterprise's data may come to a data center."""

    data_center: str
    jurisdiction: str
    open: bool
    """To one of its sites at least."""
    sources: list[str]
    """The sites that it is open to."""
    reasons: list[str]
    """Why not, for the other sites; and on which ground, where one is needed."""


class EnterpriseRights(_View):
    """Where an enterprise's data may come to."""

    enterprise: str
    jurisdiction: str
    revision: str
    data_centers: list[PlaceRight]


class PolicyChange(BaseModel):
    """Other policies, or other data. What is left out stays as it is in force."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    modules: dict[str, str] | None = Field(default=None, min_length=1)
    """Rego by file name, all of it."""
    regulation: Regulation | None = None


class PolicyRevision(_View):
    """Policies that were put in force."""

    number: int
    at_ns: int
    by: str
    revision: str
    """Of the bundle that was first made of them."""
    sources: PolicySources
