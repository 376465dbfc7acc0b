#!/bin/bash
# PostgreSQL on a mount: `postgres.sh DIR…`, directories in which the same tree is to be seen. A database is made and loaded
# through the first, killed under load, recovered and checked through the next, and so on.
# needs: initdb pgbench pg_ctl psql
set -euo pipefail
seconds=${SECONDS_OF_LOAD:-4}
PATH=$PATH:$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | tail -n 1)
name=postgres-$$
user=nobody # PostgreSQL refuses to run as root.
run() { setpriv --reuid="$user" --regid=nogroup --clear-groups env PATH="$PATH" HOME=/tmp LC_ALL=C "$@"; }
sockets=$(mktemp -d)
chown "$user" "$sockets"
mkdir "$1/$name"
chown "$user" "$1/$name"
cd /
data=
stop() {
    [ -z "$data" ] || run pg_ctl -D "$data" -m immediate -w stop >/dev/null 2>&1 || true
    rm -rf "$sockets"
}
trap stop EXIT
start() {
    data=$1/$name/data
    run pg_ctl -D "$data" -w -t 60 -o "-k $sockets -h ''" -l "$1/$name/log" start >/dev/null || { tail "$1/$name/log" >&2; exit 1; }
}
ask() { run psql -X -q -t -A -h "$sockets" -d postgres -c "$1"; }
run initdb -D "$1/$name/data" -A trust --data-checksums -U "$user" >/dev/null
start "$1"
run pgbench -q -h "$sockets" -i -s 2 postgres >/dev/null 2>&1
total=0
for dir in "$@"; do
    run pgbench -h "$sockets" -c 4 -j 2 -T "$seconds" -n postgres >"$sockets/bench" 2>&1 || { cat "$sockets/bench" >&2; exit 1; }
    done=$(sed -n 's/^number of transactions actually processed: \([0-9]*\).*/\1/p' "$sockets/bench")
    echo "$dir: $(sed -n 's/^tps = \([0-9.]*\).*/\1/p' "$sockets/bench") transactions per second"
    total=$((total + done))
    # As after a power loss of the server: what was committed is there, seen through the next node.
    run pg_ctl -D "$data" -m immediate -w stop >/dev/null
    start "$dir"
    sums=$(ask 'select (select count(*) from pgbench_history), (select sum(delta) from pgbench_history) = (select sum(abalance) from pgbench_accounts),
        (select sum(bbalance) from pgbench_branches) = (select sum(tbalance) from pgbench_tellers)')
    [ "$sums" = "$total|t|t" ] || { echo "in $dir: $sums; $total transactions were committed" >&2; exit 1; }
done
run pg_ctl -D "$data" -m fast -w stop >/dev/null
data=
for dir in "$@"; do
    if command -v pg_checksums >/dev/null; then run pg_checksums --check -D "$dir/$name/data" >/dev/null; fi
done
rm -rf "${1:?}/$name"
