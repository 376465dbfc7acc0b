//! Runs the cores: locks around them, tasks, messages. Works unchanged in the deterministic simulator.

mod disk;
mod fetch;
mod lease;
mod locks;
mod losses;
mod node;
mod notices;

pub use disk::{PulsarDisk, Status, TokenSet};
pub use locks::{Locks, LostLocks};
pub use node::{Options, Sld};
pub use notices::{Heed, Notices};
