"""What all tables have in common."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, MetaData, String, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Json = dict[str, Any]
_JSON = JSON().with_variant(JSONB(), "postgresql")


class Base(DeclarativeBase):
    """All tables. Every integer has 64 bits."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {
        int: BigInteger(),
        str: Text(),
        Json: _JSON,
        list[Any]: _JSON,
    }


class Owned:
    """A row that belongs to an enterprise; the empty string is the provider. Tenancy hangs on this column."""

    enterprise: Mapped[str] = mapped_column(String(63), primary_key=True, sort_order=-1)
