#!/bin/bash
# git from several nodes on one repository: `git.sh DIR…`, directories in which the same tree is to be seen.
# All commit and push at once, through clones of their own, while the repository is packed again and again.
# Then no commit is missing, and fsck finds nothing.
# needs: git
set -euo pipefail
rounds=${ROUNDS:-8}
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@t GIT_COMMITTER_NAME=t
export GIT_COMMITTER_EMAIL=t@t GIT_TERMINAL_PROMPT=0
nodes=("$@")
name=git-$$
mkdir "$1/$name"
git init -q --bare -b main "$1/$name/hub.git"
git clone -q "$1/$name/hub.git" "$1/$name/first" 2>/dev/null
for i in $(seq 200); do mkdir -p "$1/$name/first/d$((i % 9))"; echo "line $i" >"$1/$name/first/d$((i % 9))/f$i"; done
(cd "$1/$name/first" && git add -A && git commit -q -m first && git push -q origin HEAD:main)

worker() { # NODE NUMBER
    local at=$1/$name/clone$2 hub=$1/$name/hub.git i
    git clone -q "file://$hub" "$at"
    cd "$at"
    for i in $(seq "$rounds"); do
        echo "$2 $i" >>"own$2"
        echo "$2 $i" >"d$((i % 9))/of$2-$i"
        git add -A
        git commit -q -m "n$2 round $i"
        # Another one was faster: take in what it pushed, and try again.
        until git push -q origin HEAD:main 2>"../push$2.err"; do
            git pull -q --rebase origin main 2>"../pull$2.err" || { cat "../pull$2.err" "../push$2.err" >&2; return 1; }
        done
    done
}
packer() {
    while [ ! -e "$1/$name/done" ]; do git -C "$1/$name/hub.git" gc -q; sleep 0.2; done
}
pids=()
for n in "${!nodes[@]}"; do worker "${nodes[$n]}" "$n" & pids+=($!); done
packer "${nodes[-1]}" &
packing=$!
good=0
for pid in "${pids[@]}"; do wait "$pid" || good=1; done
touch "$1/$name/done"
wait "$packing" || good=1
[ "$good" = 0 ] || { echo "a node failed" >&2; exit 1; }

wanted=$((1 + rounds * ${#nodes[@]}))
for n in "${!nodes[@]}"; do
    cd "${nodes[$n]}/$name"
    git -C hub.git fsck --full --strict 2>&1 | grep -Ev '^(Checking|notice: |dangling )' >"fsck$n" || true
    [ ! -s "fsck$n" ] || { echo "fsck on node $n finds:" >&2; cat "fsck$n" >&2; exit 1; }
    found=$(git -C hub.git rev-list --count main)
    [ "$found" = "$wanted" ] || { echo "node $n sees $found commits of $wanted" >&2; exit 1; }
    # A clone that another node made.
    other=clone$(((n + 1) % ${#nodes[@]}))
    git -C "$other" fetch -q origin
    git -C "$other" reset -q --hard origin/main
    [ -z "$(git -C "$other" status --porcelain)" ] || { echo "node $n: $other is not clean" >&2; exit 1; }
    [ "$(wc -l <"$other/own$n")" = "$rounds" ] || { echo "node $n: lines of own$n are missing" >&2; exit 1; }
done
rm -rf "${1:?}/$name"
