"""The log: entries that are numbered within each episode and never changed."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision: str | None = None

# Times are microseconds since 1970, UTC.
_SQLITE = """
CREATE TABLE log (
    episode_id   TEXT    NOT NULL,
    seq          INTEGER NOT NULL CHECK (seq > 0),
    kind         TEXT    NOT NULL,
    item_id      TEXT,
    effective_at INTEGER,
    available_at INTEGER,
    recorded_at  INTEGER NOT NULL,
    target       TEXT,
    payload      TEXT    NOT NULL,
    PRIMARY KEY (episode_id, seq),
    UNIQUE (episode_id, item_id)
) STRICT, WITHOUT ROWID;
CREATE TRIGGER log_is_never_updated BEFORE UPDATE ON log
    BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER log_is_never_deleted BEFORE DELETE ON log
    BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
PRAGMA user_version = 1;
"""

# Text is compared by its bytes, as SQLite does: order and equality depend on no locale.
_POSTGRESQL = """
CREATE TABLE log (
    episode_id   text   COLLATE "C" NOT NULL,
    seq          bigint NOT NULL CHECK (seq > 0),
    kind         text   NOT NULL,
    item_id      text   COLLATE "C",
    effective_at bigint,
    available_at bigint,
    recorded_at  bigint NOT NULL,
    target       text,
    payload      text   NOT NULL,
    PRIMARY KEY (episode_id, seq),
    UNIQUE (episode_id, item_id)
);
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION 'the log is append-only'; END $$;
CREATE TRIGGER log_is_never_updated BEFORE UPDATE ON log
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER log_is_never_deleted BEFORE DELETE ON log
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER log_is_never_truncated BEFORE TRUNCATE ON log
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
"""


def upgrade() -> None:
    sqlite = op.get_context().dialect.name == "sqlite"
    op.execute(_SQLITE if sqlite else _POSTGRESQL)
