"""What Alembic runs. It writes SQL and connects to nothing: the log's own drivers execute it."""

from __future__ import annotations

from alembic import context

context.configure(
    dialect_name=context.config.attributes["dialect"],
    transactional_ddl=False,  # whoever executes it puts all steps into one transaction
    as_sql=True,
)
context.run_migrations()
