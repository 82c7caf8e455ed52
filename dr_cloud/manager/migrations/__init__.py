"""The schema of the manager's database, step by step (Alembic)."""
