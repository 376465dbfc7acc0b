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
