#!/bin/bash
# fsx with all its kinds of operations: `fsx.sh DIR…`, in the first directory. OPS operations (1,000,000 is what
# docs/semantics.md speaks of, with 0.3.2: `cargo install --locked fsx`), begun with SEED.
# needs: fsx
set -euo pipefail
dir=$1 config=$(mktemp -d)
trap 'rm -rf "$config" "$dir/fsx-$$"*' EXIT
cat >"$config/fsx.toml" <<END
flen = 1048576
[opsize]
max = 131072
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
if ! fsx -f "$config/fsx.toml" -N "${OPS:-20000}" -S "${SEED:-1}" -P "$config" "$dir/fsx-$$" >"$config/log" 2>&1; then
    tail -60 "$config/log"
    exit 1
fi
tail -1 "$config/log"
