//! The tether: an idle TCP connection to each peer, by which a process that has died is noticed at once.
//!
//! When a process ends, however it ends, its kernel closes its connections and refuses new ones. So a tether that breaks and
//! is then refused means that the peer's process is gone for sure, as opposed to a network that is down. Nothing is ever
//! said over a tether: whatever arrives is thrown away and the connection closed.
//!
//! Excludes: what is done about it (membership), and every conclusion from silence (heartbeats).

use super::Shared;
use crate::ids::NodeId;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};

/// The most tethers that are accepted at a time.
const TETHERS_MAX: usize = 1024;
/// Pause between attempts to reach a peer that does not answer.
const RETRY: Duration = Duration::from_millis(200);
/// How long an attempt may take.
const CONNECT_MAX: Duration = Duration::from_secs(2);

/// Accepts tethers and holds them until the other end lets go.
pub(super) async fn accept(listener: TcpListener) {
    let held = Arc::new(tokio::sync::Semaphore::new(TETHERS_MAX));
    // Dropped with this task: the tethers end with the process's other tasks.
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        let Ok((mut stream, _)) = listener.accept().await else {
            tokio::time::sleep(RETRY).await;
            continue;
        };
        while tasks.try_join_next().is_some() {}
        if let Ok(permit) = held.clone().try_acquire_owned() {
            tasks.spawn(async move {
                let mut byte = [0u8; 1];
                let _ = stream.read(&mut byte).await;
                drop(permit);
            });
        }
    }
}

/// Keeps a tether to a peer, and reports when its process is gone.
pub(super) async fn watch(shared: Weak<Shared>, node: NodeId) {
    let mut was_tied = false;
    loop {
        let Some((addr, life)) = shared.upgrade().and_then(|s| s.address_and_life(node)) else { return };
        // The life is read before the attempt: its process had begun to listen before anybody could hear of it.
        match tokio::time::timeout(CONNECT_MAX, TcpStream::connect(addr.as_str())).await {
            Ok(Ok(mut stream)) => {
                was_tied = true;
                if let Some(shared) = shared.upgrade() {
                    shared.redial(node);
                }
                let mut byte = [0u8; 1];
                let _ = stream.read(&mut byte).await;
                continue;
            }
            Ok(Err(e)) if was_tied && e.kind() == std::io::ErrorKind::ConnectionRefused => {
                was_tied = false;
                if let Some(shared) = shared.upgrade() {
                    shared.process_gone(node, life);
                }
            }
            _ => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}
