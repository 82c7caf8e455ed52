"""Recovery tests with probes and an end, what probes said, drills."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
PASSED = "ix_recovery_tests_enterprise_vpg_kind_verdict_started_ns"
VPG = (["enterprise", "vpg"], ["vpgs.enterprise", "vpgs.name"])


def upgrade() -> None:
    """Make the tables, and add the columns."""
    op.create_table(
        "probe_verdicts",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("vpg", sa.String(length=63), nullable=False),
        sa.Column("target", sa.String(length=63), nullable=False),
        sa.Column("probes", sa.String(length=64), nullable=False),
        sa.Column("at_ns", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("clean", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("test", sa.String(length=32), nullable=False),
        sa.ForeignKeyConstraint(*VPG, name=op.f("fk_probe_verdicts_enterprise_vpg"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("enterprise", "vpg", "target", "probes", "at_ns", name=op.f("pk_probe_verdicts")),
    )
    op.create_table(
        "drills",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("vpg", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("settings", JSON, nullable=False),
        sa.Column("maker", JSON, nullable=False),
        sa.Column("next_ns", sa.BigInteger(), nullable=True),
        sa.Column("last_ns", sa.BigInteger(), nullable=True),
        sa.Column("last_tests", JSON, nullable=False),
        sa.Column("last_verdict", sa.String(length=8), nullable=True),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(*VPG, name=op.f("fk_drills_enterprise_vpg"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("enterprise", "vpg", "name", name=op.f("pk_drills")),
    )
    # Never by a copy of the table: dropping the old one would take along, on SQLite, every row that refers to it.
    for column in _columns():
        op.add_column("recovery_tests", column)
    op.create_index(op.f(PASSED), "recovery_tests", ["enterprise", "vpg", "kind", "verdict", "started_ns"])
    if op.get_bind().dialect.name == "postgresql":
        for table in ("probe_verdicts", "drills"):
            _secure(table)


def _columns() -> list[sa.Column[object]]:
    return [
        sa.Column("origin", sa.Text(), nullable=False, server_default=""),
        sa.Column("probes", JSON, nullable=False, server_default="[]"),
        sa.Column("results", JSON, nullable=False, server_default="[]"),
        sa.Column("keep", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("remote", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("expires_ns", sa.BigInteger(), nullable=True),
        sa.Column("ended", sa.Text(), nullable=False, server_default=""),
        sa.Column("then", sa.Text(), nullable=False, server_default=""),
    ]


def _secure(table: str) -> None:
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    # A setting that was local to an earlier transaction of the connection is empty, not missing; '' is the provider.
    setting = "nullif(current_setting('dr_cloud.enterprise', true), '')"
    op.execute(f"CREATE POLICY tenant ON {table} USING (enterprise = {setting} OR {setting} = '*')")


def downgrade() -> None:
    """Drop them."""
    op.drop_index(op.f(PASSED), "recovery_tests")
    for table in ("drills", "probe_verdicts"):
        op.drop_table(table)
    for column in _columns():
        op.drop_column("recovery_tests", column.name)
