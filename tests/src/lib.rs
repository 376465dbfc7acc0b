//! `tests`: what checks Pulsar as a whole: the POSIX oracle, the deterministic simulator, adapters for the model checker,
//! and a harness for real clusters. See `docs/testing.md`.

pub mod cluster;
pub mod driver;
pub mod generate;
pub mod history;
pub mod linear;
pub mod locker;
pub mod model;
pub mod op;
pub mod reference;
pub mod sim;
pub mod sys;

/// How a program that compares (`coherence`, `fsx2`, `linear`, `oracle`) ends if it has found a difference. It ends so for nothing
/// else: what it cannot do ends with 1, a wrong argument with 2, a panic with 101. So a test knows that a planted bug was found.
pub const FOUND: u8 = 3;

/// The same for the programs' `--help`.
pub const ENDS: &str = "Ends with 0 if all was as it should be, with 3 if a difference was found, and with another number if it could \
                        not compare (to the end).";
