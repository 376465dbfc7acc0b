#!/bin/bash
# One Maildir, used from several nodes: `maildir.sh DIR…`, directories in which the same tree is to be seen. All deliver into
# it, all take new messages for themselves, all expunge what they took. Every message is taken and expunged exactly once,
# by whoever won; what was delivered is whole.
# needs: cksum
set -euo pipefail
messages=${MESSAGES:-120}
name=mail-$$
log=$(mktemp -d)
trap 'rm -rf "$log"' EXIT
mkdir -p "$1/$name/tmp" "$1/$name/new" "$1/$name/cur"
deliver() { # NODE NUMBER
    cd "$1/$name"
    local i sum
    for i in $(seq "$messages"); do
        { seq "$i" $((i + 400)); echo "$2"; } >"tmp/$2.$i"
        sum=$(cksum <"tmp/$2.$i")
        ln "tmp/$2.$i" "new/$2.$i.${sum/ /.}"
        rm "tmp/$2.$i"
    done
    touch "$log/delivered$2"
}
take() { # NODE NUMBER
    cd "$1/$name"
    local file rest sum got last
    while :; do
        # Looked at before the directory is: whatever was delivered until then is found in it.
        last=$(find "$log" -name 'delivered*' | wc -l)
        got=0
        for file in new/*; do
            [ "$file" != 'new/*' ] || break
            file=${file#new/}
            # Who moves it has it; for the others it is gone. (Not mv -n, which succeeds if it does nothing.)
            mv -f "new/$file" "cur/$file:2,S" 2>/dev/null || continue
            got=1
            rest=${file#*.}
            sum=$(cksum <"cur/$file:2,S")
            [ "${sum/ /.}" = "${rest#*.}" ] || { echo "node $2: $file is damaged: $sum" >&2; return 1; }
            mv "cur/$file:2,S" "cur/$file:2,ST"
            rm "cur/$file:2,ST"
            echo "$file" >>"$log/taken$2"
        done
        if [ "$got" = 0 ] && [ "$last" = "$nodes" ]; then return 0; fi
    done
}
nodes=$#
pids=() n=0
for dir in "$@"; do
    deliver "$dir" "$n" & pids+=($!)
    take "$dir" "$n" & pids+=($!)
    n=$((n + 1))
done
good=0
for pid in "${pids[@]}"; do wait "$pid" || good=1; done
[ "$good" = 0 ] || { echo "a node failed" >&2; exit 1; }
all=$(cat "$log"/taken* | wc -l) once=$(cat "$log"/taken* | sort -u | wc -l)
[ "$all" = $((messages * nodes)) ] && [ "$once" = "$all" ] || { echo "$all messages taken, $once different, of $((messages * nodes))" >&2; exit 1; }
for dir in "$@"; do
    left=$(find "$dir/$name" -type f)
    [ -z "$left" ] || { echo "left in $dir: $left" >&2; exit 1; }
done
rm -rf "${1:?}/$name"
