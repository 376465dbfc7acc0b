#!/bin/bash
# tar, cp -a, mv, find and du: `listing.sh DIR…`, directories in which the same tree is to be seen. A tree goes there by each
# of them, and what find, du, ls and tar then say on every node is what they say of the original.
# needs: tar find du
set -euo pipefail
name=listing-$$
from=$(mktemp -d)
trap 'rm -rf "$from"' EXIT
cp -r /usr/include/linux "$from/tree"
cd "$from/tree"
ln fs.h hard
ln -s fs.h soft
mkdir -p deep/$(printf 'd%.0s/' $(seq 60))
chmod 750 deep
chown 7:8 hard
touch -d '2001-02-03 04:05:06.789' soft hard deep
truncate -s 5M sparse
echo end >>sparse
mkfifo fifo
# The sizes and link counts of directories are each file system's own business; all else is to be equal.
list() {
    (cd "$1" && find . ! -type d -printf '%P %y %m %U %G %s %n %l %T@\n' | sort)
    (cd "$1" && find . -type d ! -path . -printf '%P %y %m %U %G %T@\n' | sort)
    (cd "$1" && find . -type f -links +1 -printf '%P\n' | sort)
    (cd "$1" && find . -type f -size +3 -newermt 2002-01-01 -perm -g=r | sort)
    (cd "$1" && find . -type f -print0 | sort -z | xargs -0 du --apparent-size --bytes)
    (cd "$1" && find . -type f -print0 | sort -z | xargs -0 cksum)
}
list "$from/tree" >"$from/right"
compare() { # WHAT DIRECTORY
    list "$2" >"$from/got"
    diff "$from/right" "$from/got" >"$from/differ" || { echo "$1, seen in $2:" >&2; head -20 "$from/differ" >&2; exit 1; }
}
mkdir "$1/$name"
cp -a "$from/tree" "$1/$name/copied"
tar -C "$from" --format=posix -cf - tree | tar -C "$1/$name" -xpf - --numeric-owner
mv "$1/$name/tree" "$1/$name/extracted"
for dir in "$@"; do
    compare "cp -a" "$dir/$name/copied"
    compare "tar -x" "$dir/$name/extracted"
    # Archives made there are as those made here.
    tar -C "$dir/$name/copied" --sort=name --numeric-owner -cf - . | tar -tvf - --numeric-owner | sed 's/^d[^ ]* */d /' >"$from/there"
    tar -C "$from/tree" --sort=name --numeric-owner -cf - . | tar -tvf - --numeric-owner | sed 's/^d[^ ]* */d /' >"$from/here"
    diff "$from/here" "$from/there" >&2 || { echo "tar -c in $dir makes another archive" >&2; exit 1; }
    # A sparse file takes no room there, either; all others do.
    [ "$(du -k "$dir/$name/copied/sparse" | cut -f1)" -lt 100 ] || { echo "$dir: a sparse file is not sparse" >&2; exit 1; }
    here=$(du -sk --exclude=sparse "$from/tree" | cut -f1) there=$(du -sk --exclude=sparse "$dir/$name/copied" | cut -f1)
    [ "$there" -gt $((here / 2)) ] && [ "$there" -lt $((here * 2)) ] || { echo "$dir: du says $there KiB, of $here here" >&2; exit 1; }
    next=$dir
done
# cp -a and mv from node to node, within the file system and out of it.
cp -a "$1/$name/copied" "$next/$name/again"
compare "cp -a from node to node" "$1/$name/again"
mv "$next/$name/again" "$from/moved"
compare "mv out of it" "$from/moved"
[ ! -e "$1/$name/again" ] || { echo "mv left something" >&2; exit 1; }
rm -rf "${1:?}/$name"
