#!/bin/bash
# SQLite with a rollback journal from several nodes at once: `sqlite.sh DIR…`, directories in which the same tree is to be
# seen. All write transactions that read what is there; none may be lost, doubled or torn.
# needs: sqlite3
set -euo pipefail
rounds=${ROUNDS:-40}
name=sqlite-$$
mkdir "$1/$name"
run() { sqlite3 -batch -bail -cmd '.timeout 120000' "$@"; }
run "$1/$name/base" 'pragma journal_mode=delete; create table total(n integer); insert into total values(0);
    create table t(id integer primary key, node, round, seen integer); create index i on t(node, round);' >/dev/null
worker() { # NODE NUMBER
    local i
    for i in $(seq "$rounds"); do
        echo "begin immediate; insert into t(node, round, seen) select $2, $i, n from total; update total set n = n + 1; commit;"
    done | run "$1/$name/base"
}
pids=() n=0
for dir in "$@"; do worker "$dir" $((n++)) & pids+=($!); done
good=0
for pid in "${pids[@]}"; do wait "$pid" || good=1; done
[ "$good" = 0 ] || { echo "a node failed" >&2; exit 1; }
all=$((rounds * $#))
for dir in "$@"; do
    got=$(run "$dir/$name/base" 'pragma integrity_check; select n from total; select count(*), count(distinct seen), max(seen) from t;')
    [ "$got" = "$(printf 'ok\n%s\n%s|%s|%s' "$all" "$all" "$all" $((all - 1)))" ] || { echo "in $dir: $got" >&2; exit 1; }
    [ ! -e "$dir/$name/base-journal" ] || { echo "$dir: a journal was left" >&2; exit 1; }
done
rm -rf "${1:?}/$name"
