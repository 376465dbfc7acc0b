//! `pulsar`: every command of Pulsar in one file. What it does is decided by the name it was called by (`pulsard`,
//! `mkfs.pulsarfs`, `mount.pulsarfs`, `fsck.pulsarfs`, usually links to it), else by its first argument.

/// See `tools::Allocator`.
#[global_allocator]
static ALLOCATOR: tools::Allocator = tools::Allocator;

fn main() -> std::process::ExitCode {
    tools::cli::main_by_name()
}
