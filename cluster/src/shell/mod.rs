//! What touches the operating system, and what runs the cores.
//!
//! Only the clock, the transport, the store on disk and the state directory use system calls; the driver runs as well
//! over their simulated counterparts.

#![allow(clippy::disallowed_methods, reason = "shells may read clocks")]

pub mod clock;
pub mod driver;
pub mod identity;
pub mod join;
pub mod launch;
pub mod redb_store;
pub mod state;
pub mod transport;
