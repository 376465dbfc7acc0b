#!/bin/bash
# The file system stressors of stress-ng, each verifying what it does: `stress.sh DIR…`, one after the other, on the
# directories in turn. STRESSORS names others; SECONDS_EACH is how long each runs.
# needs: stress-ng
set -euo pipefail
stressors=${STRESSORS:-access chmod chown copy-file dentry dir dirdeep dirmany fallocate fcntl filename flock fpunch fsize
    fstat getdent hdd iomix link locka lockf lockofd metamix mmapfork msync open readahead rename revio seek symlink sync-file
    touch utime xattr}
seconds=${SECONDS_EACH:-2}
known=" $(stress-ng --stressors) "
dirs=("$@")
bad=() at=0
for stressor in $stressors; do
    # Older versions know fewer.
    case $known in *" $stressor "*) ;; *) echo "this stress-ng has no $stressor"; continue ;; esac
    dir=${dirs[at % ${#dirs[@]}]}/stress-$$-$stressor
    at=$((at + 1))
    mkdir "$dir"
    if ! stress-ng --temp-path "$dir" --verify --"$stressor" 2 --timeout "$seconds" --no-rand-seed --oomable >"/tmp/stress-$$" 2>&1; then
        bad+=("$stressor")
        echo "--- $stressor, in $dir:" >&2
        grep -E 'fail|error|terminated' "/tmp/stress-$$" | head -5 >&2 || tail -5 "/tmp/stress-$$" >&2
    fi
    rm -rf "$dir" "/tmp/stress-$$"
done
[ ${#bad[@]} = 0 ] || { echo "failed: ${bad[*]}" >&2; exit 1; }
