//! The cluster as the layers above see it: the view of the current epoch, the node lease, and changes to the
//! configuration.

use crate::BoxFuture;
use crate::config::{Applied, Command, Config};
use crate::ids::{Epoch, NodeId};
use crate::time::Instant;
use crate::transport::Transport;
use crate::watch;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The layers, in the order in which they recover at the start of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Layer {
    /// The configuration of the epoch is committed; nothing has recovered yet.
    None = 0,
    /// Every member that is up has made the epoch durable and rejects requests of older ones.
    Cluster = 1,
    /// Copies of the mirrors agree on what was in flight.
    Mirror = 2,
    /// Tokens are re-asserted.
    Sld = 3,
    /// Locks and open files are recovered; the application has been told.
    Fs = 4,
}

/// One epoch, as this node knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// This node.
    pub me: NodeId,
    /// The configuration, with the epoch in it.
    pub config: Arc<Config>,
    /// How far the recovery of this epoch has come on *all* members that are up in it.
    pub recovered: Layer,
    /// Whether this daemon is a member in this epoch: up, with its own incarnation. If not, it holds nothing: its
    /// tokens are gone, and it waits to be let back in.
    pub member: bool,
}

impl View {
    /// The epoch.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.config.epoch
    }
}

/// Why a configuration change did not happen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// No answer in time: it may yet happen.
    #[error("no majority of the voters answered in time; the change may or may not happen later")]
    Unavailable,
    /// Not allowed.
    #[error("{0}")]
    Refused(String),
}

/// What the layers above may ask of the cluster.
///
/// A node that was declared dead while alive is let back in under a new incarnation without a restart. The `watch` of
/// views keeps only the newest, so a layer may miss the view in which it was no member: it has lost everything it held
/// whenever `view.config.nodes[me].incarnation` differs from the one that it acquired it under, or `member` is false.
/// `view().borrow()` is the fence: it shows an epoch before this node reports [`Layer::Cluster`] for it.
pub trait Cluster: Send + Sync + 'static {
    /// This node.
    fn local(&self) -> NodeId;

    /// The current view, and a signal for each change of it (a new epoch, or recovery reaching the next layer).
    fn view(&self) -> watch::Receiver<Arc<View>>;

    /// Until when this node may serve from what it holds; past it, it must not (it may be declared dead at any moment).
    fn lease_until(&self) -> Instant;

    /// The clock that `lease_until` is on.
    fn now(&self) -> Instant;

    /// Whether the node lease holds now.
    fn lease_valid(&self) -> bool {
        self.now() < self.lease_until()
    }

    /// Reports that a layer of this node has recovered for an epoch. Outdated reports are ignored.
    fn finish(&self, epoch: Epoch, layer: Layer);

    /// Changes the configuration. Resolves when the change is committed and applied here.
    fn propose(&self, command: Command) -> BoxFuture<'_, Result<Applied, ProposeError>>;

    /// Messaging.
    fn transport(&self) -> Arc<dyn Transport>;
}
