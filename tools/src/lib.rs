//! `tools`: the programs that people use, and the composition of the layers into a node.
//!
//! - `daemon`: `pulsard`. [`daemon::node::Node`] composes the layers from parts, so that the simulator can start the very
//!   same composition without sockets, disks or FUSE.
//! - `control`: how commands talk to the daemon of their machine (a unix socket, lines of JSON, passed descriptors).
//! - `status`, `events`: what the daemon tells about the cluster; pure functions of the view.
//! - `cli`: the commands. `dev`: a whole cluster on one machine.
//!
//! It holds no logic of a layer.

/// Prints a line; a reader that has gone is no failure.
macro_rules! say {
    () => {
        say!("")
    };
    ($($line:tt)+) => {{
        let _ = std::io::Write::write_fmt(&mut std::io::stdout(), format_args!("{}\n", format_args!($($line)+)));
    }};
}

pub mod cli;
pub mod control;
pub mod daemon;
pub mod dev;
pub mod events;
pub mod failure;
pub mod mount;
pub mod settings;
pub mod size;
pub mod status;

pub use failure::{Failure, Outcome};
/// What the daemon's memory comes from. Blocks that one thread fetches and another lets go, among millions of small things that
/// stay, leave the C library's allocator with more holes than contents (twice the memory, with a million files); this one not.
pub use mimalloc::MiMalloc as Allocator;
