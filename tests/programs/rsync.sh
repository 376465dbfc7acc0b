#!/bin/bash
# rsync -aHAX of a tree, twice: `rsync.sh DIR…`, directories in which the same tree is to be seen. The first time through the
# first, then through all others: nothing may be left to transfer, contents compared included.
# needs: rsync setfattr
set -euo pipefail
name=rsync-$$
from=$(mktemp -d)
trap 'rm -rf "$from"' EXIT
cp -r /usr/include/linux "$from/tree"
cd "$from/tree"
mkdir -p odd/empty odd/sticky
for i in 1 2 3; do ln "fs.h" "odd/name$i"; done
ln -s ../fs.h odd/link
ln -s /nowhere odd/dangling
mkfifo odd/fifo
mknod odd/null c 1 3
truncate -s 10M odd/sparse
echo end >>odd/sparse
echo x >"odd/$(printf 'odd name \n \xff')"
chmod 1777 odd/sticky
chmod 4755 odd/name1
chmod 0 odd/empty
chown 12:34 odd/name2
touch -d '1999-12-31 23:59:59.123456789' odd/link odd/sparse
setfattr -n user.color -v blue odd/sparse
setfattr -n user.empty odd/sticky
flags=-aHXS
if command -v setfacl >/dev/null && touch "$1/acl-$$" && setfacl -m u:5:rw "$1/acl-$$" 2>/dev/null; then
    flags=-aHAXS
    setfacl -m u:5:rw,g:6:r odd/sparse
    setfacl -d -m u:7:rwx odd/sticky
else
    echo "without ACLs"
fi
rm -f "$1/acl-$$"
rsync $flags "$from/tree/" "$1/$name/"
for dir in "$@"; do
    for how in "" --checksum; do
        left=$(rsync $flags $how --dry-run --delete --itemize-changes "$from/tree/" "$dir/$name/")
        [ -z "$left" ] || { echo "in $dir, rsync $how would still transfer:" >&2; echo "$left" | head -20 >&2; exit 1; }
    done
    # Back to a local directory, too.
    rsync $flags "$dir/$name/" "$from/back/"
    left=$(rsync $flags --checksum --dry-run --delete --itemize-changes "$from/tree/" "$from/back/")
    [ -z "$left" ] || { echo "from $dir back, this differs:" >&2; echo "$left" | head -20 >&2; exit 1; }
    rm -rf "$from/back"
done
# A change is found, and only that.
last=${!#}
echo more >>"$from/tree/fs.h"
sent=$(rsync $flags --itemize-changes "$from/tree/" "$last/$name/" | grep -c '^>f' || true)
[ "$sent" = 1 ] || { echo "after one change $sent files were sent" >&2; exit 1; }
left=$(rsync $flags --dry-run --itemize-changes "$from/tree/" "$1/$name/")
[ -z "$left" ] || { echo "after the change, in $1: $left" >&2; exit 1; }
rm -rf "${1:?}/$name"
