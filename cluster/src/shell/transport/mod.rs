//! Messaging over QUIC with mutual TLS (`quinn`), and the tether that notices dead processes.
//!
//! Each node dials each peer that it has something to say to, and accepts what peers dial; answers travel on the node's own
//! connection. A service's messages to a peer are one ordered stream; a stream that breaks is a session's end for both.
//!
//! Invariants: those of [`Transport`]; and nothing is read from a connection whose other end has not shown a certificate of
//! the cluster's authority for the very node that it claims to be.
//! Once [`QuicTransport::shutdown`] has returned, both sockets are closed: the address can be bound again.
//!
//! Excludes: certificates and joining (`identity`), who is a member (`membership`).

mod frame;
mod link;
mod socket;
#[doc(hidden)]
pub mod testing;
mod tether;
mod tls;

pub use tls::{ALPN_JOIN, ALPN_MEMBER, TlsIdentity, is_certificate_of, node_name};

use crate::BoxFuture;
use crate::ids::{Incarnation, NodeId};
use crate::transport::{Message, Peer, PeerAddr, PeerWatcher, Receiver, Service, Transport};
use crate::watch;
use frame::Hello;
use link::{Link, Links};
use parking_lot::{Mutex, RwLock};
use quinn::Runtime;
use socket::Socket;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::task::JoinSet;

/// Wanted size of the UDP socket's buffers.
const SOCKET_BYTES: usize = 8 << 20;
/// How long a peer may be silent before its connection is given up.
const IDLE_MAX: Duration = Duration::from_secs(3);
/// How long a handshake may take.
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// The most connections that are served at a time, those of unknown origin included.
const CONNECTIONS_MAX: usize = 4096;
/// How often an address that is in use is tried, every [`RETRY`].
const BIND_TRIES_MAX: u32 = 20;
/// How long the end of its connections may take when a node shuts down.
const TELL_MAX: Duration = Duration::from_millis(500);
/// Pause after a failed attempt, so that a peer that is down costs nothing.
const RETRY: Duration = Duration::from_millis(100);

/// Serves connections of nodes that want to join (ALPN `pulsar-join/1`). Their bytes are not to be trusted.
pub trait JoinHandler: Send + Sync + 'static {
    /// Talks with the joining node until it is done or refused.
    fn join(&self, connection: quinn::Connection) -> BoxFuture<'static, ()>;
}

/// How the transport is set up.
pub struct QuicOptions {
    /// This node.
    pub me: NodeId,
    /// This life of it.
    pub incarnation: Incarnation,
    /// Where to listen (UDP, and TCP for tethers).
    pub listen: SocketAddr,
    /// Who this node is.
    pub identity: TlsIdentity,
    /// Serves joining nodes, on members that can.
    pub join: Option<Arc<dyn JoinHandler>>,
}

struct PeerState {
    addr: String,
    /// The newest life of it that is known: from the configuration, or its hello.
    life: Incarnation,
    links: Links,
    /// Signalled when the peer has just shown signs of life, or moved: attempts that wait for an answer begin anew.
    redial: Arc<tokio::sync::Notify>,
    /// Connections: bulk, and the one of `Membership`.
    connections: [Arc<tokio::sync::Mutex<Option<quinn::Connection>>>; 2],
}

/// The transport's state, shared with its tasks (which hold it weakly).
pub(crate) struct Shared {
    me: NodeId,
    cluster: [u8; 16],
    incarnation: watch::Sender<Incarnation>,
    endpoint: quinn::Endpoint,
    socket: Arc<Socket>,
    client: quinn::ClientConfig,
    peers: RwLock<BTreeMap<NodeId, PeerState>>,
    receivers: RwLock<[Option<Arc<dyn Receiver>>; Service::ALL.len()]>,
    sessions: AtomicU64,
    watcher: RwLock<Option<Arc<dyn PeerWatcher>>>,
    runtime: tokio::runtime::Handle,
    /// What this node sends to itself.
    local: Links,
    /// `None` once the transport is shut down: nothing is started any more.
    tasks: Mutex<Option<JoinSet<()>>>,
    join: Option<Arc<dyn JoinHandler>>,
}

fn service_index(service: Service) -> usize {
    service as usize - 1
}

/// The transport that daemons use.
pub struct QuicTransport {
    shared: Arc<Shared>,
}

impl QuicTransport {
    /// Binds the sockets and begins to accept.
    ///
    /// # Errors
    /// If the address is in use, or the identity is not usable.
    pub async fn start(options: QuicOptions) -> io::Result<Arc<Self>> {
        let transport = Arc::new(tls::transport_config(IDLE_MAX)?);
        let server = tls::server_config(&options.identity, transport.clone())?;
        let client = tls::client_config(&options.identity, transport)?;
        let listener = patiently(async || tokio::net::TcpListener::bind(options.listen).await).await?;
        // With port 0 (tests) both sockets get the port that TCP was given.
        let addr = listener.local_addr()?;
        let mut config = quinn::EndpointConfig::default();
        config.max_udp_payload_size(9_000).map_err(io::Error::other)?;
        let socket = patiently(async || udp_socket(addr)).await?;
        let socket = Arc::new(Socket::new(quinn::TokioRuntime.wrap_udp_socket(socket)?)?);
        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint = quinn::Endpoint::new_with_abstract_socket(config, Some(server), socket.clone(), runtime)?;
        let shared = Arc::new(Shared {
            me: options.me,
            cluster: options.identity.cluster,
            incarnation: watch::Sender::new(options.incarnation),
            endpoint: endpoint.clone(),
            socket,
            client,
            peers: RwLock::default(),
            receivers: RwLock::default(),
            sessions: AtomicU64::new(1),
            watcher: RwLock::default(),
            runtime: tokio::runtime::Handle::current(),
            local: std::array::from_fn(|_| Arc::default()),
            tasks: Mutex::new(None),
            join: options.join,
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(tether::accept(listener));
        tasks.spawn(accept(Arc::downgrade(&shared), endpoint));
        for service in Service::ALL {
            let link = link::of(&shared.local, service).clone();
            tasks.spawn(link::deliver_locally(Arc::downgrade(&shared), service, link));
        }
        *shared.tasks.lock() = Some(tasks);
        Ok(Arc::new(QuicTransport { shared }))
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the socket is gone.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.shared.endpoint.local_addr()
    }

    /// Ends every task and connection, waits until peers have been told (not for long: they notice anyway), and gives the
    /// address back.
    pub async fn shutdown(&self) {
        let tasks = self.shared.tasks.lock().take();
        self.shared.endpoint.close(0u32.into(), b"shutting down");
        if let Some(mut tasks) = tasks {
            tasks.shutdown().await;
        }
        let _ = tokio::time::timeout(TELL_MAX, self.shared.endpoint.wait_idle()).await;
        self.shared.socket.release();
    }
}

impl Drop for QuicTransport {
    fn drop(&mut self) {
        self.shared.endpoint.close(0u32.into(), b"gone");
        // A `JoinSet` that is dropped aborts its tasks.
        drop(self.shared.tasks.lock().take());
    }
}

impl Transport for QuicTransport {
    fn local(&self) -> NodeId {
        self.shared.me
    }

    fn send(&self, to: NodeId, service: Service, message: Message) {
        if to == self.shared.me {
            link::of(&self.shared.local, service).push(message);
            return;
        }
        if let Some(peer) = self.shared.peers.read().get(&to) {
            link::of(&peer.links, service).push(message);
        } else {
            tracing::debug!(peer = %to, ?service, "a message for a node whose address is not known is dropped");
        }
    }

    fn register(&self, service: Service, receiver: Arc<dyn Receiver>) {
        self.shared.receivers.write()[service_index(service)] = Some(receiver);
    }

    fn configure(&self, incarnation: Incarnation, peers: &BTreeMap<NodeId, PeerAddr>) {
        self.shared.incarnation.send_if_modified(|i| std::mem::replace(i, incarnation) != incarnation);
        for (node, peer) in peers.iter().filter(|(n, _)| **n != self.shared.me) {
            Shared::set_peer(&self.shared, *node, peer);
        }
    }

    fn watch(&self, watcher: Arc<dyn PeerWatcher>) {
        *self.shared.watcher.write() = Some(watcher);
    }
}

impl Shared {
    fn receiver(&self, service: Service) -> Option<Arc<dyn Receiver>> {
        self.receivers.read()[service_index(service)].clone()
    }

    fn session_ended(&self, node: NodeId, service: Service) {
        if let Some(r) = self.receiver(service) {
            r.session_ended(node);
        }
    }

    fn set_peer(shared: &Arc<Shared>, node: NodeId, peer: &PeerAddr) {
        let mut peers = shared.peers.write();
        if let Some(known) = peers.get_mut(&node) {
            if known.addr != peer.addr {
                peer.addr.clone_into(&mut known.addr);
                known.redial.notify_waiters();
            }
            known.life = known.life.max(peer.incarnation);
            return;
        }
        let mut tasks = shared.tasks.lock();
        let Some(tasks) = tasks.as_mut() else { return };
        let links: Links = std::array::from_fn(|_| Arc::new(Link::default()));
        for service in Service::ALL {
            let link = link::of(&links, service).clone();
            tasks.spawn_on(link::run(Arc::downgrade(shared), node, service, link), &shared.runtime);
        }
        tasks.spawn_on(tether::watch(Arc::downgrade(shared), node), &shared.runtime);
        let connections = std::array::from_fn(|_| Arc::default());
        peers.insert(
            node,
            PeerState { addr: peer.addr.clone(), life: peer.incarnation, links, redial: Arc::default(), connections },
        );
    }

    /// The peer is there: attempts to reach it, which wait ever longer between their packets, begin anew.
    fn redial(&self, node: NodeId) {
        if let Some(peer) = self.peers.read().get(&node) {
            peer.redial.notify_waiters();
        }
    }

    fn address_and_life(&self, node: NodeId) -> Option<(String, Incarnation)> {
        self.peers.read().get(&node).map(|p| (p.addr.clone(), p.life))
    }

    /// Every life of a peer up to this one is over. Its connections are given up: its next life does not know them, and
    /// what is sent on them would vanish until they time out.
    fn process_gone(&self, node: NodeId, upto: Incarnation) {
        let connections = self.peers.read().get(&node).map(|p| p.connections.clone());
        for cell in connections.into_iter().flatten() {
            // One that is being made is to the new life, or fails by itself.
            if let Ok(mut connection) = cell.try_lock()
                && let Some(connection) = connection.take()
            {
                connection.close(6u32.into(), b"your process was taken for gone");
            }
        }
        let watcher = self.watcher.read().clone();
        if let Some(w) = watcher {
            w.process_gone(node, upto);
        }
    }

    /// The connection to a peer that a service uses, made if there is none.
    async fn connect(&self, node: NodeId, service: Service) -> io::Result<quinn::Connection> {
        let slot = usize::from(service == Service::Membership);
        let unknown = || io::Error::other("the node's address is not known");
        let (cell, redial) =
            self.peers.read().get(&node).map(|p| (p.connections[slot].clone(), p.redial.clone())).ok_or_else(unknown)?;
        let mut connection = cell.lock().await;
        if let Some(c) = connection.as_ref().filter(|c| c.close_reason().is_none()) {
            return Ok(c.clone());
        }
        *connection = None;
        let attempts = async {
            loop {
                let again = redial.notified();
                let (addr, _) = self.address_and_life(node).ok_or_else(unknown)?;
                tokio::select! {
                    biased;
                    made = self.dial(node, &addr) => return made,
                    () = again => {}
                }
            }
        };
        let made = tokio::time::timeout(CONNECT_MAX, attempts)
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not answer")));
        match made {
            Ok(c) => {
                *connection = Some(c.clone());
                Ok(c)
            }
            Err(e) => {
                // Still under the lock: the other services' attempts wait as well.
                tokio::time::sleep(RETRY).await;
                Err(e)
            }
        }
    }

    async fn dial(&self, node: NodeId, addr: &str) -> io::Result<quinn::Connection> {
        let addr =
            tokio::net::lookup_host(addr).await?.next().ok_or_else(|| io::Error::other(format!("{addr} has no address")))?;
        self.endpoint
            .connect_with(self.client.clone(), addr, &node_name(node, &self.cluster))
            .map_err(io::Error::other)?
            .await
            .map_err(io::Error::other)
    }

    /// Notes a peer's hello: in a new life of it, the older ones are over.
    fn greeted(&self, hello: Hello) {
        let mut peers = self.peers.write();
        let Some(p) = peers.get_mut(&hello.node) else { return };
        if p.life < hello.incarnation {
            p.life = hello.incarnation;
            p.redial.notify_waiters();
            drop(peers);
            self.process_gone(hello.node, Incarnation(hello.incarnation.0 - 1));
        }
    }
}

/// Binds a socket; if the address is in use, tries again for a while: a daemon that is just ending may still have it.
async fn patiently<T>(bind: impl AsyncFn() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..BIND_TRIES_MAX {
        match bind().await {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => tokio::time::sleep(RETRY).await,
            result => return result,
        }
    }
    bind().await
}

/// The UDP socket, with buffers that hold a burst (as root beyond the system's limit).
fn udp_socket(addr: SocketAddr) -> io::Result<std::net::UdpSocket> {
    use nix::sys::socket::{setsockopt, sockopt};
    let socket = socket2::Socket::new(socket2::Domain::for_address(addr), socket2::Type::DGRAM, None)?;
    socket.set_nonblocking(true)?;
    if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BYTES).is_err() {
        let _ = socket.set_recv_buffer_size(SOCKET_BYTES);
    }
    if setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BYTES).is_err() {
        let _ = socket.set_send_buffer_size(SOCKET_BYTES);
    }
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// Accepts connections.
async fn accept(shared: Weak<Shared>, endpoint: quinn::Endpoint) {
    let mut tasks = JoinSet::new();
    while let Some(incoming) = endpoint.accept().await {
        while tasks.try_join_next().is_some() {}
        if tasks.len() >= CONNECTIONS_MAX {
            incoming.refuse();
            continue;
        }
        let shared = shared.clone();
        tasks.spawn(async move {
            let from = incoming.remote_address();
            if let Err(e) = connection(shared, incoming).await {
                tracing::debug!(%from, "a connection ended: {e}");
            }
        });
    }
}

/// Serves one accepted connection.
async fn connection(shared: Weak<Shared>, incoming: quinn::Incoming) -> io::Result<()> {
    let connection = tokio::time::timeout(CONNECT_MAX, incoming.into_future())
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the handshake takes too long"))?
        .map_err(io::Error::other)?;
    let alpn = connection
        .handshake_data()
        .and_then(|d| d.downcast::<quinn::crypto::rustls::HandshakeData>().ok())
        .and_then(|d| d.protocol);
    if alpn.as_deref() == Some(ALPN_JOIN) {
        let join = shared.upgrade().and_then(|s| s.join.clone());
        match join {
            Some(join) => join.join(connection).await,
            None => connection.close(3u32.into(), b"this node does not take in others; ask a voter"),
        }
        return Ok(());
    }
    let certificate = connection
        .peer_identity()
        .and_then(|i| i.downcast::<Vec<rustls_pki_types::CertificateDer<'static>>>().ok())
        .and_then(|chain| chain.first().cloned());
    let Some(certificate) = certificate else {
        connection.close(4u32.into(), b"a certificate of the cluster is needed");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "a connection without a certificate was refused"));
    };
    let mut tasks = JoinSet::new();
    loop {
        let stream = connection.accept_uni().await.map_err(io::Error::other)?;
        while tasks.try_join_next().is_some() {}
        tasks.spawn(inbound(shared.clone(), connection.clone(), certificate.clone(), stream));
    }
}

/// Serves one stream: a service's messages of one life of a peer, in order.
async fn inbound(
    shared: Weak<Shared>,
    connection: quinn::Connection,
    certificate: rustls_pki_types::CertificateDer<'static>,
    mut stream: quinn::RecvStream,
) {
    let Ok(hello) = Hello::read(&mut stream).await.inspect_err(|e| tracing::warn!("a peer's stream was refused: {e}")) else {
        return connection.close(5u32.into(), b"bad hello");
    };
    let Some(strong) = shared.upgrade() else { return };
    if hello.node == strong.me || !is_certificate_of(&certificate, hello.node, &strong.cluster) {
        tracing::warn!(claimed = %hello.node, "a peer claims to be a node that its certificate is not for; refused");
        return connection.close(4u32.into(), b"the certificate is not of that node");
    }
    strong.greeted(hello);
    let session = strong.sessions.fetch_add(1, Ordering::Relaxed);
    let from = Peer { node: hello.node, incarnation: hello.incarnation, session };
    drop(strong);
    let why = loop {
        match frame::read(&mut stream).await {
            Ok(Some(message)) => {
                let Some(shared) = shared.upgrade() else { return };
                if let Some(r) = shared.receiver(hello.service) {
                    r.receive(from, message);
                }
            }
            Ok(None) => break "the peer closed it".to_owned(),
            Err(e) => break e.to_string(),
        }
    };
    if let Some(shared) = shared.upgrade() {
        tracing::debug!(peer = %hello.node, service = ?hello.service, "an incoming session is over: {why}");
        shared.session_ended(hello.node, hello.service);
    }
}
