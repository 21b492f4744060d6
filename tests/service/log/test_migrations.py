"""The schema: made from nothing, and brought up from what older versions wrote."""

from __future__ import annotations

import psycopg

from service.log.migrate import SCHEMA, migrate_postgres, revision_of_postgres


def test_a_database_is_made_in_one_go(empty_postgres_url: str) -> None:
    migrate_postgres(empty_postgres_url)
    migrate_postgres(empty_postgres_url)
    with psycopg.connect(empty_postgres_url) as db:
        assert revision_of_postgres(db) == SCHEMA
