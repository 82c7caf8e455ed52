"""The first schema: every table of `dr_cloud.manager.tables`, and row-level security on PostgreSQL."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
OWNED = (
    "alerts",
    "audit",
    "certificates",
    "enterprises",
    "events",
    "hosts",
    "idempotency",
    "inserted_checkpoints",
    "pairings",
    "recovery_tests",
    "registry",
    "servers",
    "sites",
    "tasks",
    "tokens",
    "vpg_disks",
    "vpg_members",
    "vpg_targets",
    "vpgs",
)
TABLES = (
    "vpg_targets",
    "vpg_members",
    "recovery_tests",
    "pairings",
    "inserted_checkpoints",
    "hosts",
    "vpgs",
    "sites",
    "vpg_disks",
    "tokens",
    "tasks",
    "servers",
    "registry",
    "idempotency",
    "events",
    "enterprises",
    "certificates",
    "center_hosts",
    "audit",
    "alerts",
)


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "alerts",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("remedy", sa.Text(), nullable=False),
        sa.Column("raised_ns", sa.BigInteger(), nullable=False),
        sa.Column("cleared_ns", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("enterprise", "id", name=op.f("pk_alerts")),
    )
    op.create_index(op.f("ix_alerts_enterprise_raised_ns"), "alerts", ["enterprise", "raised_ns"], unique=False)
    op.create_table(
        "audit",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("at_ns", sa.BigInteger(), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("principal_name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("enterprise", "id", name=op.f("pk_audit")),
    )
    op.create_index(op.f("ix_audit_enterprise_at_ns"), "audit", ["enterprise", "at_ns"], unique=False)
    op.create_table(
        "center_hosts",
        sa.Column("data_center", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("wanted", sa.Boolean(), nullable=False),
        sa.Column("deployment", JSON, nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.Column("last_seen_ns", sa.BigInteger(), nullable=True),
        sa.Column("orders_revision", sa.BigInteger(), nullable=False),
        sa.Column("followed_revision", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("data_center", "name", name=op.f("pk_center_hosts")),
    )
    op.create_table(
        "certificates",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("serial", sa.String(length=80), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("issued_ns", sa.BigInteger(), nullable=False),
        sa.Column("revoked_ns", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("enterprise", "serial", name=op.f("pk_certificates")),
    )
    op.create_index(op.f("ix_certificates_serial"), "certificates", ["serial"], unique=True)
    op.create_table(
        "enterprises",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("jurisdiction", sa.Text(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("link", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("enterprise", name=op.f("pk_enterprises")),
    )
    op.create_table(
        "events",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at_ns", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("data", JSON, nullable=False),
        sa.PrimaryKeyConstraint("enterprise", "number", name=op.f("pk_events")),
    )
    op.create_index(op.f("ix_events_number"), "events", ["number"], unique=False)
    op.create_table(
        "idempotency",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("principal", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("enterprise", "principal", "key", name=op.f("pk_idempotency")),
    )
    op.create_index(op.f("ix_idempotency_created_ns"), "idempotency", ["created_ns"], unique=False)
    op.create_table(
        "registry",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("changed", sa.BigInteger(), nullable=False),
        sa.Column("written", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("enterprise", name=op.f("pk_registry")),
    )
    op.create_table(
        "servers",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("connected", sa.Boolean(), nullable=False),
        sa.Column("disks", JSON, nullable=False),
        sa.Column("last_seen_ns", sa.BigInteger(), nullable=False),
        sa.Column("analysis", JSON, nullable=False),
        sa.Column("analysed_ns", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("enterprise", "site", "name", name=op.f("pk_servers")),
    )
    op.create_table(
        "tasks",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("vpg", sa.String(length=63), nullable=True),
        sa.Column("site", sa.String(length=63), nullable=True),
        sa.Column("inputs", JSON, nullable=False),
        sa.Column("state", JSON, nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("completion", sa.String(length=16), nullable=False),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("result", JSON, nullable=True),
        sa.Column("exception", sa.Text(), nullable=False),
        sa.Column("remedy", sa.Text(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("started_ns", sa.BigInteger(), nullable=True),
        sa.Column("ended_ns", sa.BigInteger(), nullable=True),
        sa.Column("due_ns", sa.BigInteger(), nullable=False),
        sa.Column("abort", sa.Boolean(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("enterprise", "id", name=op.f("pk_tasks")),
    )
    op.create_index(op.f("ix_tasks_enterprise_created_ns"), "tasks", ["enterprise", "created_ns"], unique=False)
    op.create_index(op.f("ix_tasks_id"), "tasks", ["id"], unique=False)
    op.create_index(op.f("ix_tasks_status_due_ns"), "tasks", ["status", "due_ns"], unique=False)
    op.create_table(
        "tokens",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("expires_ns", sa.BigInteger(), nullable=False),
        sa.Column("revoked_ns", sa.BigInteger(), nullable=True),
        sa.Column("last_used_ns", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("enterprise", "id", name=op.f("pk_tokens")),
    )
    op.create_index(op.f("ix_tokens_digest"), "tokens", ["digest"], unique=True)
    op.create_table(
        "vpg_disks",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("vpg", sa.String(length=63), nullable=False),
        sa.Column("index", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("server", sa.String(length=63), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("removed", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("enterprise", "vpg", "index", name=op.f("pk_vpg_disks")),
    )
    op.create_table(
        "sites",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("jurisdiction", sa.Text(), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("contact", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("port", sa.BigInteger(), nullable=False),
        sa.Column("vdsa_port", sa.BigInteger(), nullable=False),
        sa.Column("throttle", JSON, nullable=False),
        sa.Column("certificate", sa.Text(), nullable=False),
        sa.Column("connected", sa.Boolean(), nullable=False),
        sa.Column("last_seen_ns", sa.BigInteger(), nullable=True),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("orders_revision", sa.BigInteger(), nullable=False),
        sa.Column("followed_revision", sa.BigInteger(), nullable=False),
        sa.Column("problems", JSON, nullable=False),
        sa.Column("datastores", JSON, nullable=False),
        sa.ForeignKeyConstraint(
            ["enterprise"], ["enterprises.enterprise"], name=op.f("fk_sites_enterprise"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("enterprise", "name", name=op.f("pk_sites")),
    )
    op.create_table(
        "vpgs",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("settings", JSON, nullable=False),
        sa.Column("source_site", sa.String(length=63), nullable=False),
        sa.Column("source_in_center", sa.Boolean(), nullable=False),
        sa.Column("source_host", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=63), nullable=False),
        sa.Column("paused", sa.Text(), nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["enterprise"], ["enterprises.enterprise"], name=op.f("fk_vpgs_enterprise"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("enterprise", "name", name=op.f("pk_vpgs")),
    )
    op.create_index(op.f("ix_vpgs_enterprise_source_site"), "vpgs", ["enterprise", "source_site"], unique=False)
    op.create_index(op.f("ix_vpgs_enterprise_status"), "vpgs", ["enterprise", "status"], unique=False)
    op.create_index(op.f("ix_vpgs_source_site_source_host"), "vpgs", ["source_site", "source_host"], unique=False)
    op.create_table(
        "hosts",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("wanted", sa.Boolean(), nullable=False),
        sa.Column("vdsa", sa.Text(), nullable=False),
        sa.Column("present", sa.Boolean(), nullable=False),
        sa.Column("deployment", JSON, nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.Column("last_seen_ns", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["enterprise", "site"],
            ["sites.enterprise", "sites.name"],
            name=op.f("fk_hosts_enterprise_site"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("enterprise", "site", "name", name=op.f("pk_hosts")),
    )
    op.create_table(
        "inserted_checkpoints",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("vpg", sa.String(length=63), nullable=False),
        sa.Column("tag", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("inserted_ns", sa.BigInteger(), nullable=False),
        sa.Column("requests", JSON, nullable=False),
        sa.Column("arrived", JSON, nullable=False),
        sa.ForeignKeyConstraint(
            ["enterprise", "vpg"],
            ["vpgs.enterprise", "vpgs.name"],
            name=op.f("fk_inserted_checkpoints_enterprise_vpg"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("enterprise", "id", name=op.f("pk_inserted_checkpoints")),
    )
    op.create_index(
        op.f("ix_inserted_checkpoints_enterprise_vpg_inserted_ns"),
        "inserted_checkpoints",
        ["enterprise", "vpg", "inserted_ns"],
        unique=False,
    )
    op.create_table(
        "pairings",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("created_ns", sa.BigInteger(), nullable=False),
        sa.Column("expires_ns", sa.BigInteger(), nullable=False),
        sa.Column("used_ns", sa.BigInteger(), nullable=True),
        sa.Column("csr_digest", sa.Text(), nullable=False),
        sa.Column("certificate", sa.Text(), nullable=False),
        sa.Column("serial", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["enterprise", "site"],
            ["sites.enterprise", "sites.name"],
            name=op.f("fk_pairings_enterprise_site"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("enterprise", "digest", name=op.f("pk_pairings")),
    )
    op.create_table(
        "recovery_tests",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("vpg", sa.String(length=63), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("asked_ns", sa.BigInteger(), nullable=False),
        sa.Column("at_ns", sa.BigInteger(), nullable=True),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("quota_bytes", sa.BigInteger(), nullable=True),
        sa.Column("uris", JSON, nullable=False),
        sa.Column("started_ns", sa.BigInteger(), nullable=False),
        sa.Column("running_ns", sa.BigInteger(), nullable=True),
        sa.Column("stopped_ns", sa.BigInteger(), nullable=True),
        sa.Column("verdict", sa.Text(), nullable=True),
        sa.Column("verdict_note", sa.Text(), nullable=False),
        sa.Column("statistics", JSON, nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.Column("started_by", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["enterprise", "vpg"],
            ["vpgs.enterprise", "vpgs.name"],
            name=op.f("fk_recovery_tests_enterprise_vpg"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("enterprise", "id", name=op.f("pk_recovery_tests")),
    )
    op.create_index(
        op.f("ix_recovery_tests_enterprise_vpg_started_ns"),
        "recovery_tests",
        ["enterprise", "vpg", "started_ns"],
        unique=False,
    )
    op.create_table(
        "vpg_members",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("vpg", sa.String(length=63), nullable=False),
        sa.Column("server", sa.String(length=63), nullable=False),
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("all_disks", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["enterprise", "vpg"],
            ["vpgs.enterprise", "vpgs.name"],
            name=op.f("fk_vpg_members_enterprise_vpg"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("enterprise", "vpg", "server", name=op.f("pk_vpg_members")),
    )
    op.create_index(
        op.f("ix_vpg_members_enterprise_site_server"), "vpg_members", ["enterprise", "site", "server"], unique=False
    )
    op.create_table(
        "vpg_targets",
        sa.Column("enterprise", sa.String(length=63), nullable=False),
        sa.Column("vpg", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("copy_number", sa.BigInteger(), nullable=False),
        sa.Column("site", sa.String(length=63), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("datastore", sa.Text(), nullable=False),
        sa.Column("in_center", sa.Boolean(), nullable=False),
        sa.Column("placed_host", sa.Text(), nullable=False),
        sa.Column("placed_datastore", sa.Text(), nullable=False),
        sa.Column("sync_number", sa.BigInteger(), nullable=False),
        sa.Column("reported_ns", sa.BigInteger(), nullable=False),
        sa.Column("linked", sa.Boolean(), nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.Column("durable_ns", sa.BigInteger(), nullable=False),
        sa.Column("lag_seconds", sa.Double(), nullable=True),
        sa.Column("lag_bytes", sa.BigInteger(), nullable=False),
        sa.Column("taps", JSON, nullable=False),
        sa.Column("checkpoints", sa.BigInteger(), nullable=False),
        sa.Column("skipped", sa.BigInteger(), nullable=False),
        sa.Column("resyncs", sa.BigInteger(), nullable=False),
        sa.Column("target_reported_ns", sa.BigInteger(), nullable=False),
        sa.Column("target_problem", sa.Text(), nullable=False),
        sa.Column("newest_ns", sa.BigInteger(), nullable=True),
        sa.Column("horizon_ns", sa.BigInteger(), nullable=True),
        sa.Column("journal_bytes", sa.BigInteger(), nullable=False),
        sa.Column("forecast_seconds", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["enterprise", "vpg"],
            ["vpgs.enterprise", "vpgs.name"],
            name=op.f("fk_vpg_targets_enterprise_vpg"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("enterprise", "vpg", "name", name=op.f("pk_vpg_targets")),
    )
    op.create_index(op.f("ix_vpg_targets_enterprise_site"), "vpg_targets", ["enterprise", "site"], unique=False)
    op.create_index(op.f("ix_vpg_targets_site_placed_host"), "vpg_targets", ["site", "placed_host"], unique=False)
    if op.get_bind().dialect.name == "postgresql":
        for table in OWNED:
            _secure(table)


def _secure(table: str) -> None:
    """Let a row be seen and written by its own enterprise only; the table's owner is held to it as well."""
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    # A setting that was local to an earlier transaction of the connection is empty, not missing; '' is the provider.
    setting = "nullif(current_setting('dr_cloud.enterprise', true), '')"
    op.execute(f"CREATE POLICY tenant ON {table} USING (enterprise = {setting} OR {setting} = '*')")


def downgrade() -> None:
    """Drop them, with everything in them."""
    for table in TABLES:
        op.drop_table(table)
