#!/bin/bash
# cargo from several nodes into one target directory: `cargo.sh DIR…`, directories in which the same tree is to be seen.
# All build the same crate (with dependencies, those of this workspace) at once; cargo keeps them apart by file locks. Each
# builds again after a change made on another.
# needs: cargo cc
set -euo pipefail
lock=$(cd "$(dirname "$0")/../.." && pwd)/Cargo.lock
name=cargo-$$
mkdir -p "$1/$name/app/src"
cd "$1/$name/app"
cat >Cargo.toml <<'END'
[package]
name = "app"
version = "0.1.0"
edition = "2024"
[workspace]
[dependencies]
serde_json = "1"
END
cp "$lock" Cargo.lock
echo 'mod part; fn main() { let v: serde_json::Value = serde_json::from_str("[1]").unwrap(); println!("{} {}", v[0], part::PART); }' >src/main.rs
echo 'pub const PART: u32 = 0;' >src/part.rs
build() { # NODE NUMBER
    cd "$1/$name/app"
    CARGO_TARGET_DIR=$1/$name/target cargo build --offline --quiet 2>"../build$2.err" || { cat "../build$2.err" >&2; return 1; }
}
cd /
for round in 0 1 2; do
    node=$((round % $# + 1))
    echo "pub const PART: u32 = $round;" >"${!node}/$name/app/src/part.rs"
    pids=() n=0
    for dir in "$@"; do build "$dir" $((n++)) & pids+=($!); done
    good=0
    for pid in "${pids[@]}"; do wait "$pid" || good=1; done
    [ "$good" = 0 ] || { echo "a build failed in round $round" >&2; exit 1; }
    for dir in "$@"; do
        got=$("$dir/$name/target/debug/app")
        [ "$got" = "1 $round" ] || { echo "round $round: the program says '$got'" >&2; exit 1; }
    done
done
rm -rf "${1:?}/$name"
