"""Hash chains, the audit trail, and episodes whose time to be kept is over."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision: str | None = "0001"

# SQLite cannot add a column without a default: the table is written anew. `chain_hash` is a
# function of the connection that executes this; it sees the rows in the order of their chains.
_SQLITE = """
DROP TRIGGER log_is_never_updated;
DROP TRIGGER log_is_never_deleted;
ALTER TABLE log RENAME TO log_0001;
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
    hash         BLOB    NOT NULL CHECK (length(hash) = 32),
    PRIMARY KEY (episode_id, seq),
    UNIQUE (episode_id, item_id)
) STRICT, WITHOUT ROWID;
INSERT INTO log
    SELECT *, chain_hash(episode_id, seq, kind, item_id, effective_at, available_at, recorded_at,
                         target, payload)
    FROM log_0001 ORDER BY episode_id, seq;
DROP TABLE log_0001;
CREATE TABLE audit (
    writer TEXT    NOT NULL,
    seq    INTEGER NOT NULL CHECK (seq > 0),
    at     INTEGER NOT NULL,
    record TEXT    NOT NULL,
    hash   BLOB    NOT NULL CHECK (length(hash) = 32),
    PRIMARY KEY (writer, seq)
) STRICT, WITHOUT ROWID;
CREATE INDEX audit_at ON audit (at);
CREATE TABLE retired (
    episode_id TEXT    NOT NULL PRIMARY KEY,
    seq        INTEGER NOT NULL CHECK (seq > 0),
    hash       BLOB    NOT NULL CHECK (length(hash) = 32),
    retired_at INTEGER NOT NULL,
    reason     TEXT    NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TRIGGER log_is_never_updated BEFORE UPDATE ON log
    BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER log_is_never_deleted BEFORE DELETE ON log
    WHEN NOT EXISTS (SELECT 1 FROM retired WHERE episode_id = OLD.episode_id)
    BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER log_takes_nothing_of_a_retired_episode BEFORE INSERT ON log
    WHEN EXISTS (SELECT 1 FROM retired WHERE episode_id = NEW.episode_id)
    BEGIN SELECT RAISE(ABORT, 'the episode is retired'); END;
CREATE TRIGGER log_is_never_replaced BEFORE INSERT ON log
    WHEN EXISTS (SELECT 1 FROM log WHERE episode_id = NEW.episode_id AND seq = NEW.seq)
        OR EXISTS (SELECT 1 FROM log WHERE episode_id = NEW.episode_id AND item_id = NEW.item_id)
    BEGIN SELECT RAISE(ABORT, 'the entry is there'); END;
CREATE TRIGGER audit_is_never_updated BEFORE UPDATE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END;
CREATE TRIGGER audit_is_never_deleted BEFORE DELETE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END;
CREATE TRIGGER audit_is_never_replaced BEFORE INSERT ON audit
    WHEN EXISTS (SELECT 1 FROM audit WHERE writer = NEW.writer AND seq = NEW.seq)
    BEGIN SELECT RAISE(ABORT, 'the line is there'); END;
CREATE TRIGGER retired_is_never_updated BEFORE UPDATE ON retired
    BEGIN SELECT RAISE(ABORT, 'what was retired stays so'); END;
CREATE TRIGGER retired_is_never_deleted BEFORE DELETE ON retired
    BEGIN SELECT RAISE(ABORT, 'what was retired stays so'); END;
CREATE TRIGGER retired_is_never_replaced BEFORE INSERT ON retired
    WHEN EXISTS (SELECT 1 FROM retired WHERE episode_id = NEW.episode_id)
    BEGIN SELECT RAISE(ABORT, 'the episode is retired'); END;
PRAGMA user_version = 2;
"""

# No PostgreSQL has rows of the schema before: with any, the new column is refused.
_POSTGRESQL = """
ALTER TABLE log ADD COLUMN hash bytea NOT NULL CHECK (length(hash) = 32);
CREATE TABLE audit (
    writer text   COLLATE "C" NOT NULL,
    seq    bigint NOT NULL CHECK (seq > 0),
    at     bigint NOT NULL,
    record text   NOT NULL,
    hash   bytea  NOT NULL CHECK (length(hash) = 32),
    PRIMARY KEY (writer, seq)
);
CREATE INDEX audit_at ON audit (at);
CREATE TABLE retired (
    episode_id text   COLLATE "C" NOT NULL PRIMARY KEY,
    seq        bigint NOT NULL CHECK (seq > 0),
    hash       bytea  NOT NULL CHECK (length(hash) = 32),
    retired_at bigint NOT NULL,
    reason     text   NOT NULL
);
CREATE FUNCTION refuse_delete_unless_retired() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF EXISTS (SELECT 1 FROM retired WHERE episode_id = OLD.episode_id) THEN
            RETURN OLD;
        END IF;
        RAISE EXCEPTION 'the log is append-only';
    END $$;
CREATE FUNCTION refuse_insert_if_retired() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF EXISTS (SELECT 1 FROM retired WHERE episode_id = NEW.episode_id) THEN
            RAISE EXCEPTION 'the episode is retired' USING ERRCODE = 'EHR01';
        END IF;
        RETURN NEW;
    END $$;
DROP TRIGGER log_is_never_deleted ON log;
CREATE TRIGGER log_is_never_deleted BEFORE DELETE ON log
    FOR EACH ROW EXECUTE FUNCTION refuse_delete_unless_retired();
CREATE TRIGGER log_takes_nothing_of_a_retired_episode BEFORE INSERT ON log
    FOR EACH ROW EXECUTE FUNCTION refuse_insert_if_retired();
CREATE TRIGGER audit_is_never_changed BEFORE UPDATE OR DELETE ON audit
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER audit_is_never_truncated BEFORE TRUNCATE ON audit
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER retired_is_never_changed BEFORE UPDATE OR DELETE ON retired
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER retired_is_never_truncated BEFORE TRUNCATE ON retired
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
"""


def upgrade() -> None:
    sqlite = op.get_context().dialect.name == "sqlite"
    op.execute(_SQLITE if sqlite else _POSTGRESQL)
