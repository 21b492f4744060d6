#!/bin/sh
# Run once by the image of PostgreSQL, when it makes the database: the owner of the log, which
# migrates it, and the role of the service, which may read and append and nothing else.
set -eu

password() {
    cat "/run/secrets/$1-password"
}

psql --no-psqlrc --set ON_ERROR_STOP=1 --username postgres --dbname llm4ehr \
    --set owner="$(password owner)" --set app="$(password app)" <<'SQL'
CREATE ROLE llm4ehr_owner LOGIN PASSWORD :'owner';
CREATE ROLE llm4ehr_app LOGIN PASSWORD :'app';
ALTER DATABASE llm4ehr OWNER TO llm4ehr_owner;
REVOKE ALL ON DATABASE llm4ehr FROM PUBLIC;
GRANT CONNECT ON DATABASE llm4ehr TO llm4ehr_app;
ALTER SCHEMA public OWNER TO llm4ehr_owner;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO llm4ehr_app;
SQL
