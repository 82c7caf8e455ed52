"""What the provider sent, turned into what this site will do. Pure: no I/O, no clock.

Each order stands alone: one that cannot be read, is of another enterprise, or contradicts itself is left out and told;
the others are followed. What an order means to the VDSA is the VDSA's business; what is refused here is what must
never reach it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from dr_cloud.model.errors import DrCloudError, ProtocolError
from dr_cloud.model.ids import Scope
from dr_cloud.model.replication import SiteOrders, SourceOrders, SourceReport, TargetOrders, TargetReport

_R = TypeVar("_R", SourceOrders, TargetOrders)


class Accepted(NamedTuple):
    """Orders that can be followed, and why the others cannot."""

    orders: SiteOrders
    sources: dict[Scope, str]
    """Problem of each source that is left out."""
    targets: dict[Scope, str]
    problems: list[str]
    """Of orders that name no scope of this enterprise."""


def read_orders(document: bytes | dict[str, Any], enterprise: str, datastores: Iterable[str]) -> Accepted:
    """Return what can be followed of a `SiteOrders` document. Raises `ProtocolError` if it is none.

    Args:
        document: JSON as it came.
        enterprise: Whose site this is.
        datastores: The names of the site's datastores.
    """
    try:
        whole = json.loads(document) if isinstance(document, bytes) else document
        orders = SiteOrders.model_validate({**whole, "sources": [], "targets": []})
        lists = [whole.get(name, []) for name in ("sources", "targets")]
        if not all(isinstance(each, list) for each in lists):
            raise TypeError("no list")
    except (ValueError, TypeError, AttributeError) as error:
        raise ProtocolError(f"the provider's orders cannot be read: {_short(error)}") from None
    known = set(datastores)
    problems: list[str] = []
    sources, refused_sources = _each(lists[0], SourceOrders, enterprise, _source_problem, problems)
    targets, refused_targets = _each(
        lists[1], TargetOrders, enterprise, lambda order: _target_problem(order, known), problems
    )
    orders = orders.model_copy(update={"sources": sources, "targets": targets})
    return Accepted(orders, refused_sources, refused_targets, problems)


def _each(
    documents: list[Any], kind: type[_R], enterprise: str, problem_of: Callable[[_R], str], problems: list[str]
) -> tuple[list[_R], dict[Scope, str]]:
    good: dict[Scope, _R] = {}
    refused: dict[Scope, str] = {}
    for document in documents:
        scope = _scope(document)
        if scope is None or scope.enterprise != enterprise:
            # A foreign name is not repeated: it is no business of this site's log either.
            problems.append("an order names no scope of this enterprise")
            continue
        try:
            order = kind.model_validate(document)
        except ValidationError as error:
            refused[scope] = f"the order cannot be read: {_short(error)}"
            continue
        if scope in good or scope in refused:
            refused[scope] = "the scope is ordered twice"
        elif problem := problem_of(order):
            refused[scope] = problem
        else:
            good[scope] = order
    return [order for scope, order in good.items() if scope not in refused], refused


def _scope(document: Any) -> Scope | None:
    try:
        scope = Scope(*document["scope"])
        return scope.checked() if all(isinstance(part, str) for part in scope) else None
    except (TypeError, KeyError, DrCloudError):
        return None


def _source_problem(order: SourceOrders) -> str:
    indexes = Counter(index for disks in order.members.values() for index in disks.values())
    if twice := [index for index, count in indexes.items() if count > 1]:
        return f"two disks have the index {twice[0]}"
    return ""


def _target_problem(order: TargetOrders, known: set[str]) -> str:
    return "" if order.store in known else f"this site has no datastore {order.store!r}"


def _short(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return type(error).__name__


def refused_source(scope: Scope, problem: str) -> SourceReport:
    """Return the report of a source that is not followed."""
    return SourceReport(
        scope=scope,
        linked=False,
        problem=problem,
        taps={},
        kept_bytes=0,
        durable_ns=0,
        lag_seconds=0.0,
        checkpoints=0,
        skipped=0,
        resyncs=0,
    )


def refused_target(scope: Scope, problem: str) -> TargetReport:
    """Return the report of a target that is not followed."""
    return TargetReport(
        scope=scope, generation=0, connections=0, newest=None, horizon_ns=None, newest_ns=None, problem=problem
    )
