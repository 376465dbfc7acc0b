//! `pulsard`: the daemon of a node; the same as `pulsar daemon`.

/// See `tools::Allocator`.
#[global_allocator]
static ALLOCATOR: tools::Allocator = tools::Allocator;

fn main() -> std::process::ExitCode {
    tools::cli::main_as("pulsard")
}
