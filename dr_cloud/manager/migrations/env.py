"""What Alembic runs: the migrations, on the connection that `dr_cloud.manager.db` gives, in its transaction."""

from __future__ import annotations

from alembic import context

from dr_cloud.manager.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
