//! Puts a daemon's cluster part together: state directory, clock, QUIC transport, and the node that runs over them.

use super::clock::{BootClock, unix_seconds};
use super::driver::{ClusterNode, Options, StartError, start};
use super::identity::{Identity, IdentityError, Token, random};
use super::join::{Handler, JoinServer};
use super::state::{StateDir, StateLock};
use super::transport::{JoinHandler, QuicOptions, QuicTransport};
use crate::config::Command;
use crate::ids::{Incarnation, NodeId};
use crate::node::{Cluster, ProposeError};
use crate::store::Store;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// A daemon's cluster part, running.
pub struct Running {
    /// The cluster, for the layers above.
    pub cluster: Arc<ClusterNode>,
    /// Messaging.
    pub transport: Arc<QuicTransport>,
    /// Who this node is.
    pub identity: Identity,
    _lock: StateLock,
}

/// Why it does not run.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The sockets.
    #[error("cannot listen at {addr} (UDP and TCP): {source}")]
    Listen {
        /// Where.
        addr: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The node.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Keys.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Runs a node from its state directory (see [`super::state::open`]). `listen` is where its sockets are bound; `addr` is
/// `host:port` where the others reach it, if that has changed since it joined.
///
/// # Errors
/// If the sockets cannot be bound or the state cannot be used.
pub async fn launch(state: StateDir, listen: SocketAddr, addr: Option<String>) -> Result<Running, LaunchError> {
    let StateDir { identity, store, lock } = state;
    let life = store.load().map_err(StartError::from)?.incarnation;
    let join = JoinServer::new(identity.clone());
    let transport = QuicTransport::start(QuicOptions {
        me: identity.node,
        // The next life: `start` counts on the same.
        incarnation: Incarnation(life.0 + 1),
        listen,
        identity: identity.tls(),
        join: Some(Arc::new(Handler(Arc::clone(&join))) as Arc<dyn JoinHandler>),
    })
    .await
    .map_err(|source| LaunchError::Listen { addr: listen, source })?;
    let cluster = start(Options {
        me: identity.node,
        addr: Some(addr.unwrap_or_else(|| identity.addr.clone())),
        peers: identity.peers.iter().cloned().collect(),
        store: Arc::new(store),
        transport: transport.clone(),
        clock: Arc::new(BootClock),
        seed: u64::from_le_bytes(random()?),
        timing: identity.timing,
    })?;
    join.serve(&cluster);
    Ok(Running { cluster, transport, identity, _lock: lock })
}

impl Running {
    /// Makes a join token that may be used (by any number of nodes) for a time.
    ///
    /// # Errors
    /// If the cluster does not answer.
    pub async fn token(&self, lifetime: Duration) -> Result<Token, ProposeError> {
        let view = self.cluster.view().borrow().clone();
        // This one, too, when it has only just started and is not up in any configuration yet.
        let up = view.config.nodes.iter().filter(|(id, n)| n.up || **id == self.identity.node);
        let mut members: Vec<(NodeId, String)> = up.map(|(id, n)| (*id, n.addr.clone())).collect();
        // This one first: it is surely there.
        members.sort_by_key(|(id, _)| (*id != self.identity.node, *id));
        let token = Token::create(self.identity.cluster, &self.identity.authority, members)
            .map_err(|e| ProposeError::Refused(e.to_string()))?;
        let expires_unix = unix_seconds().saturating_add(lifetime.as_secs());
        self.cluster.propose(Command::TokenAdd { hash: token.hash(), expires_unix }).await?;
        Ok(token)
    }

    /// Stops everything, and tells the peers that the connections end.
    pub async fn shutdown(&self) {
        self.cluster.stop().await;
        self.transport.shutdown().await;
    }
}
