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
clients=4
total=0
for dir in "$@"; do
    run pgbench -h "$sockets" -c $clients -j 2 -T 600 -n postgres >"$sockets/bench" 2>&1 &
    bench=$!
    sleep "$seconds"
    # As a power loss of the server, amid the load: pgbench ends because its connections do.
    run pg_ctl -D "$data" -m immediate -w stop >/dev/null
    if wait $bench; then echo "the load had ended before the server" >&2; exit 1; fi
    told=$(sed -n 's/^number of transactions actually processed: \([0-9]*\).*/\1/p' "$sockets/bench")
    [ "${told:-0}" -gt 0 ] || { cat "$sockets/bench" >&2; exit 1; }
    # What was committed is there, seen through the next node; of each client there may be one more, which was not told any more.
    start "$dir"
    found=$(ask 'select count(*) from pgbench_history')
    echo "$dir: $total transactions before, $told were committed in $seconds s, $found are found"
    [ "$found" -ge $((total + told)) ] && [ "$found" -le $((total + told + clients)) ] || exit 1
    sums=$(ask 'select (select sum(delta) from pgbench_history) = (select sum(abalance) from pgbench_accounts),
        (select sum(bbalance) from pgbench_branches) = (select sum(tbalance) from pgbench_tellers)')
    [ "$sums" = "t|t" ] || { echo "in $dir: the sums differ: $sums" >&2; exit 1; }
    total=$found
done
run pg_ctl -D "$data" -m fast -w stop >/dev/null
data=
for dir in "$@"; do
    if command -v pg_checksums >/dev/null; then run pg_checksums --check -D "$dir/$name/data" >/dev/null; fi
done
rm -rf "${1:?}/$name"
