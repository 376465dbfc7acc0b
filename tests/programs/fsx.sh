#!/bin/bash
# fsx with all its kinds of operations: `fsx.sh DIR…`, in the first directory. OPS operations (1,000,000 is what
# docs/semantics.md speaks of, with 0.3.2: `cargo install --locked fsx`), 10,000 in each run, the first begun with SEED.
# Not more in one run: fsx never unmaps what it read through a mapping, so each run gets slower, and ends at the kernel's limit
# of mappings (65,530). Sizes are those of the original fsx.
# needs: fsx
set -euo pipefail
dir=$1 config=$(mktemp -d) ops=${OPS:-20000} seed=${SEED:-1}
trap 'rm -rf "$config" "$dir/fsx-$$"*' EXIT
cat >"$config/fsx.toml" <<END
flen = 262144
[opsize]
min = 1
max = 65536
[weights]
close_open = 1
invalidate = 1
mapread = 10
mapwrite = 10
read = 10
write = 10
truncate = 5
fsync = 0.5
fdatasync = 0.5
posix_fallocate = 3
punch_hole = 3
sendfile = 3
posix_fadvise = 1
copy_file_range = 3
END
for ((done = 0; done < ops; done += 10000, seed++)); do
    count=$((ops - done < 10000 ? ops - done : 10000))
    if ! fsx -f "$config/fsx.toml" -N $count -S "$seed" -P "$config" "$dir/fsx-$$" >"$config/log" 2>&1; then
        echo "seed $seed, after $done operations of seeds before:"
        tail -60 "$config/log"
        exit 1
    fi
    rm -f "$dir/fsx-$$"*
done
echo "$ops operations, no difference"
