#!/bin/bash
# pjdfstest, all of it that applies to a file system on Linux: `pjdfstest.sh DIR…`, in the first directory. The tests that
# mount it read-only for a while have a run of their own. 0.2.2 is what docs/semantics.md speaks of
# (`cargo install --locked pjdfstest`). Where a test is skipped, that is shown.
# needs: pjdfstest
set -euo pipefail
dir=$1/pjdfstest-$$ other=$(mktemp -d) config=$(mktemp -d)
trap 'rm -rf "$dir" "$other" "$config"' EXIT
mkdir "$dir"
chmod 755 "$dir" "$other" "$config"
# A socket's path has at most 107 bytes: by a short way.
ln -s "$dir" "$config/d"
settings() {
    cat >"$config/$1.toml" <<END
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
bad=0
for run in all remount; do
    only=() path=$config/d
    # What is mounted anew is found by the path.
    if [ $run = remount ]; then only=(erofs) path=$dir; fi
    pjdfstest -c "$config/$run.toml" -p "$path" -s "$other" "${only[@]}" >"$config/log" 2>&1 || bad=1
    grep -E ' (skipped|FAILED)|panicked' "$config/log" | grep -v ^Summary | head -60 || true
    tail -3 "$config/log"
done
[ $bad = 0 ]
