# Creates a cluster with the password, plain or as Postgres keeps it, and the database.
#
#   initdb.sh BIN FOLDER USER PASSWORD DATABASE
#
# shellcheck shell=sh
set -e
umask 077
mkdir "$2"
printf '%s\n' "$4" >"$2.password"
"$1/initdb" --pgdata="$2" --username="$3" --pwfile="$2.password" --auth=scram-sha-256 \
    --encoding=UTF8 --locale=C --no-sync --no-instructions
rm "$2.password"
echo "create database $5" | "$1/postgres" --single -F -D "$2" postgres
