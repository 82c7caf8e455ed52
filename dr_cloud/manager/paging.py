"""Lists in pages: the cursor of a page names the keys of its last entry."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel
from sqlalchemy import ColumnElement, Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from dr_cloud.model.cloud import Page, PageRequest
from dr_cloud.model.errors import InvalidError

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R")


def encode_cursor(values: Sequence[Any]) -> str:
    """Return the cursor after an entry with these keys."""
    return base64.urlsafe_b64encode(json.dumps(values).encode()).decode().rstrip("=")


def decode_cursor(text: str, types: Sequence[type]) -> list[Any]:
    """Return the keys in a cursor. Raises `InvalidError`."""
    try:
        values = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        if not isinstance(values, list) or [type(value) for value in values] != list(types):
            raise ValueError
        if any(isinstance(value, int) and not -(1 << 63) <= value < 1 << 63 for value in values):
            raise ValueError
        if any(isinstance(value, str) and "\0" in value.encode().decode() for value in values):
            raise ValueError  # encode() refuses half a surrogate pair
    except (ValueError, binascii.Error, RecursionError):
        raise InvalidError("the cursor is none of this list", "Begin again without one.") from None
    return values


def paged(
    session: Session,
    wanted: Select[R],
    keys: Sequence[InstrumentedAttribute[Any]],
    page: PageRequest,
    view: Callable[[R], M],
    *,
    newest_first: bool = False,
) -> Page[M]:
    """Return one page of `wanted`, ordered by `keys`, each row turned into its view."""
    types = [key.type.python_type for key in keys]
    if page.cursor is not None:
        after = tuple_(*decode_cursor(page.cursor, types))
        here: ColumnElement[Any] = tuple_(*keys)
        wanted = wanted.where(here < after if newest_first else here > after)
    order = [key.desc() if newest_first else key.asc() for key in keys]
    rows = session.scalars(wanted.order_by(*order).limit(page.limit + 1)).all()
    more = len(rows) > page.limit
    last = rows[page.limit - 1] if more else None
    return Page(
        items=[view(row) for row in rows[: page.limit]],
        next_cursor=encode_cursor([getattr(last, key.key) for key in keys]) if last is not None else None,
    )
