"""The history of the log's schema: one for both databases, in Alembic's form."""
