#!/bin/sh
# One-shot steps around the Temporal server, run in its admin-tools image:
#   setup.sh schema      before it starts: its two databases and their schema
#   setup.sh namespace   once it answers: the namespace our workflows live in
# Both are safe to repeat, and are repeated at every `docker compose up`: `create` and `setup-schema` leave alone what is
# there already, and `update-schema` brings an older schema up to this image's version.
set -eu

schema() {
    for name in temporal visibility; do
        database=temporal
        [ "$name" = temporal ] || database="temporal_$name"
        # The password comes from SQL_PASSWORD: an argument would show up in the list of processes.
        tool="temporal-sql-tool --plugin postgres12 --ep $POSTGRES_SEEDS -p $DB_PORT -u $POSTGRES_USER --db $database"
        $tool create
        $tool setup-schema -v 0.0
        $tool update-schema -d "/etc/temporal/schema/postgresql/v12/$name/versioned"
    done
}

namespace() {
    attempts=30
    until temporal operator cluster health; do
        attempts=$((attempts - 1))
        [ "$attempts" -gt 0 ] || exit 1
        sleep 2
    done
    temporal operator namespace describe --namespace "$NAMESPACE" >/dev/null 2>&1 ||
        temporal operator namespace create --namespace "$NAMESPACE" --retention "$RETENTION"
}

case "${1:-}" in
schema | namespace) "$1" ;;
*)
    echo "usage: setup.sh schema|namespace" >&2
    exit 2
    ;;
esac
