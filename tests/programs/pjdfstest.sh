#!/bin/bash
# pjdfstest, all of it that applies to a file system on Linux: `pjdfstest.sh DIR…`, in the first directory, and beside it on an
# ext4 in a file. All must pass, and each have the same result on both, but for what docs/semantics.md names; the exit code does
# not say so, which is 0 for any number of tests skipped. The tests that mount the file system read-only for a while have a run
# of their own. 0.2.2 is what docs/semantics.md speaks of (`cargo install --locked pjdfstest`). Where the machine lets nobody
# mount an image, NO_EXT4=1 leaves the comparison out.
# needs: pjdfstest mkfs.ext4
set -euo pipefail
dir=$1/pjdfstest-$$ work=$(mktemp -d)
ext4=$work/ext4 other=$work/other
tidy() {
    if mountpoint -q "$ext4"; then umount "$ext4"; fi
    rm -rf "$dir" "$work"
}
trap tidy EXIT
mkdir "$dir" "$ext4" "$other"
chmod 755 "$dir" "$work" "$other"
# Skipped here only (docs/semantics.md says why).
expected='all link::link_count_max skipped'
settings() {
    cat >"$work/$1.toml" <<END
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.01
allow_remount = $2
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
END
}
settings all false
settings remount true
# All tests in a directory; writes RUN, TEST and RESULT of each into a file.
results() {
    local run only path summary count
    # A socket's path has at most 107 bytes: by a short way.
    ln -sfn "$1" "$work/d"
    for run in all remount; do
        only=() path=$work/d
        # What is mounted anew is found by the path.
        if [ $run = remount ]; then only=(erofs) path=$1; fi
        pjdfstest -c "$work/$run.toml" -p "$path" -s "$other" "${only[@]}" >"$work/log" 2>&1 || cat "$work/log"
        summary=$(grep ^Summary: "$work/log")
        echo "$1, $run: $summary"
        sed -nE "s/^([a-z0-9_]+(::[a-z0-9_]+)+) +([A-Za-z].*)\$/$run \\1 \\3/p" "$work/log" | sort >"$work/lines"
        # Every test must have been understood.
        count=$(wc -l <"$work/lines")
        [[ $summary == *" $count total" ]] || { echo "$1, $run: $count results were found" >&2; return 1; }
        cat "$work/lines" >>"$2"
    done
}
# The read-only ones have their own run.
results "$dir" "$work/here"
skipped=$(grep -v ' ok$' "$work/here" | grep -v '^all .*::erofs_[a-z_]* skipped$') || true
echo "not passed: $skipped"
[ "$skipped" = "$expected" ]
if [ -n "${NO_EXT4:-}" ]; then exit 0; fi
truncate -s 512M "$work/image"
mkfs.ext4 -q -F "$work/image"
mount -o loop "$work/image" "$ext4" || { echo "an ext4 image cannot be mounted; NO_EXT4=1 leaves the comparison out" >&2; exit 1; }
chmod 755 "$ext4"
mkdir -m 755 "$ext4/pjdfstest"
results "$ext4/pjdfstest" "$work/there"
different=$(diff "$work/there" "$work/here") || true
echo "ext4 (<) and $1 (>):"
echo "$different"
[ "$(grep '^[<>]' <<<"$different")" = "< ${expected% *} ok
> $expected" ]
