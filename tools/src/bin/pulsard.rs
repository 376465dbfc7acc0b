//! `pulsard`: the daemon of a node; the same as `pulsar daemon`.

fn main() -> std::process::ExitCode {
    tools::cli::main_as("pulsard")
}
