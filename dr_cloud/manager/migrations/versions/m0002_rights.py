"""Rights: the record of decisions, policies in force, what policy has stopped, where people sit."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
NEW = (("sites", "denied"), ("tokens", "place"), ("vpg_targets", "denied"), ("recovery_tests", "denied"))


def upgrade() -> None:
    """Make the tables, and add the columns."""
    op.create_table(
        "decisions",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("at_ns", sa.BigInteger(), nullable=False),
        sa.Column("point", sa.String(length=16), nullable=False),
        sa.Column("action", sa.String(length=16), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=False),
        sa.Column("input", JSON, nullable=False),
        sa.Column("allow", sa.Boolean(), nullable=False),
        sa.Column("reasons", JSON, nullable=False),
        sa.Column("previous", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("enterprise", "number", name=op.f("pk_decisions")),
    )
    op.create_table(
        "decision_heads",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("enterprise", name=op.f("pk_decision_heads")),
    )
    op.create_table(
        "policy_revisions",
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at_ns", sa.BigInteger(), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=False),
        sa.Column("sources", JSON, nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_policy_revisions")),
    )
    for table, column in NEW:
        # Never by a copy of the table: dropping the old one would take along, on SQLite, every row that refers to it.
        op.add_column(table, sa.Column(column, sa.Text(), nullable=False, server_default=""))
    if op.get_bind().dialect.name == "postgresql":
        for table in ("decisions", "decision_heads"):
            _secure(table)


def _secure(table: str) -> None:
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    # A setting that was local to an earlier transaction of the connection is empty, not missing; '' is the provider.
    setting = "nullif(current_setting('dr_cloud.enterprise', true), '')"
    op.execute(f"CREATE POLICY tenant ON {table} USING (enterprise = {setting} OR {setting} = '*')")


def downgrade() -> None:
    """Drop them."""
    for table in ("policy_revisions", "decision_heads", "decisions"):
        op.drop_table(table)
    for table, column in NEW:
        op.drop_column(table, column)
