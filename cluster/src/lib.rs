//! `cluster`: the base that every layer of Pulsar shares.
//!
//! It owns the replicated *configuration* (members, disks, mirrors with their in-sync sets, file systems, the epoch
//! number), *membership* (heartbeats, node leases, epochs with layer-by-layer recovery) and *messaging* between nodes.
//! It carries the messages of the other layers as opaque bytes and never looks into them.
//!
//! The vocabulary (`ids`, `time`, `config`) and the interfaces (`Cluster`, `Transport`) are what the upper layers use;
//! only modules under `shell` touch the operating system.
//!
//! Cores, without clock or I/O: `config` (what is agreed on) with `layout` (where mirrors go), `machine` (applies requests
//! once), `raft` (agreement), `membership` (leases, who is dead, the barrier of recoveries). `shell::driver` runs them, in
//! a daemon as in the simulator.
//!
//! # How a daemon is put together
//!
//! ```no_run
//! use cluster::shell::{identity::Token, join, launch, state};
//! use cluster::{Cluster, membership::Timing};
//! # use std::{path::Path, time::Duration};
//! # async fn example(dir: &Path, listen: std::net::SocketAddr) -> Result<(), Box<dyn std::error::Error>> {
//! // `pulsar init`: files only, no daemon runs yet.
//! let token = state::init(dir, "n1", "10.0.0.1:7440", "home", Timing::default())?.print();
//! // `pulsar join TOKEN`, on another machine: asks a running member, then files only.
//! let node = join::join(dir, &Token::parse(&token)?, "n2", "10.0.0.2:7440").await?;
//! // `pulsard`, on every machine:
//! let state = state::open(dir)?;
//! let running = launch::launch(state, listen, None).await?;
//! let cluster = running.cluster.clone(); // an `Arc<dyn Cluster>` for the layers above
//! let _ = cluster.view();
//! // `pulsar token`, and the end:
//! let another = running.token(Duration::from_secs(3600)).await?.print();
//! running.shutdown().await;
//! # Ok(()) }
//! ```
//!
//! Each layer that is run must call [`Cluster::finish`] for itself in every epoch in which its node is a member, and a
//! daemon that does not run a layer for it: the layers above wait until all nodes have.
//!
//! The simulator calls `shell::driver::start` with its own transport, clock and a `store::MemoryStore` that outlives the
//! node (filled by `raft::bootstrap` for the first one, empty for those that join).

pub mod config;
pub mod ids;
mod layout;
pub mod machine;
pub mod membership;
pub mod node;
pub mod prng;
pub mod raft;
pub mod shell;
pub mod sim;
pub mod store;
pub mod time;
pub mod transport;
pub mod watch;

pub use config::{Command, Config};
pub use ids::{BLOCK_SIZE, BlockNo, DiskId, Epoch, FsId, Incarnation, MirrorId, NodeId};
pub use node::{Cluster, Layer, ProposeError, View};
pub use time::Instant;
pub use transport::{Message, Peer, PeerAddr, PeerWatcher, Receiver, Service, Transport};

/// A boxed future, for the interfaces that are used as trait objects.
pub type BoxFuture<'a, T> = std::pin::Pin<Box<dyn std::future::Future<Output = T> + Send + 'a>>;
