//! How a machine becomes a node: it shows a token's secret, and gets an id and a certificate.
//!
//! On a QUIC connection of its own (ALPN `pulsar-join/1`), one stream both ways:
//!
//! 1. The new node checks the member's certificate against the authority's fingerprint in the token, and sends the secret
//!    (32 bytes).
//! 2. The member compares its hash with those in the configuration, in constant time. Nothing else is read before.
//! 3. The new node sends its public key, name and address; the member proposes it, and answers with its id, certificate, the
//!    authority and the other nodes' addresses, or why not.
//!
//! Excludes: what a token looks like (`identity`), becoming up (`membership`, when the daemon starts).

use super::clock::unix_seconds;
use super::driver::ClusterNode;
use super::identity::{Identity, IdentityError, NodeKey, Token, hash_secret};
use super::state::{NewState, StateError};
use super::transport::{ALPN_JOIN, JoinHandler, node_name};
use crate::BoxFuture;
use crate::config::{Applied, Command};
use crate::ids::NodeId;
use crate::membership::Timing;
use crate::node::{Cluster, ProposeError};
use quinn::crypto::rustls::QuicClientConfig;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;
use tokio::sync::Semaphore;

const REQUEST_BYTES_MAX: usize = 4 << 10;
const ANSWER_BYTES_MAX: usize = 256 << 10;
/// Joins served at a time.
const JOINS_MAX: usize = 4;
/// How long one may take in all.
const JOIN_TIME: Duration = Duration::from_secs(30);
/// How long the secret may take to arrive.
const SECRET_TIME: Duration = Duration::from_secs(5);
/// How long one member is tried.
const DIAL_TIME: Duration = Duration::from_secs(5);

/// Why joining failed.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The token, or keys.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Nobody answered.
    #[error("no member of the cluster could be reached ({0}); is a daemon running there, and UDP allowed between the machines?")]
    Unreachable(String),
    /// The cluster said no.
    #[error("the cluster refused: {0}")]
    Refused(String),
}

#[derive(Serialize, Deserialize)]
struct Request {
    public_key: Vec<u8>,
    name: String,
    addr: String,
}

#[derive(Serialize, Deserialize)]
enum Answer {
    Welcome(Box<Welcome>),
    Refused(String),
}

#[derive(Serialize, Deserialize)]
struct Welcome {
    node: NodeId,
    cluster_name: String,
    authority: Vec<u8>,
    authority_key: Vec<u8>,
    certificate: Vec<u8>,
    timing: Timing,
    peers: Vec<(NodeId, String)>,
}

/// Takes in new nodes, on a member.
pub struct JoinServer {
    identity: Identity,
    cluster: OnceLock<Weak<ClusterNode>>,
    slots: Arc<Semaphore>,
}

impl JoinServer {
    /// A server with a member's identity. It refuses everybody until [`JoinServer::serve`].
    #[must_use]
    pub fn new(identity: Identity) -> Arc<Self> {
        Arc::new(JoinServer { identity, cluster: OnceLock::new(), slots: Arc::new(Semaphore::new(JOINS_MAX)) })
    }

    /// From now on it takes in nodes to this cluster.
    pub fn serve(&self, cluster: &Arc<ClusterNode>) {
        let _ = self.cluster.set(Arc::downgrade(cluster));
    }

    async fn talk(&self, connection: &quinn::Connection) -> Result<(), String> {
        let cluster = self.cluster.get().and_then(Weak::upgrade).ok_or("this node is starting or stopping")?;
        let (mut send, mut recv) = connection.accept_bi().await.map_err(|e| e.to_string())?;
        let mut secret = [0u8; 32];
        let read = tokio::time::timeout(SECRET_TIME, recv.read_exact(&mut secret)).await;
        read.map_err(|_| "no secret came")?.map_err(|e| e.to_string())?;
        let answer = if self.known(&cluster, &secret) {
            let bytes = recv.read_to_end(REQUEST_BYTES_MAX).await.map_err(|e| e.to_string())?;
            match postcard::from_bytes::<Request>(&bytes) {
                Ok(request) => self.admit(&cluster, request).await,
                Err(e) => Answer::Refused(format!("the request is not understood ({e}); do both run the same version?")),
            }
        } else {
            tracing::warn!(from = %connection.remote_address(), "a join was refused: its token is not known, or has expired");
            Answer::Refused("the token is not known, or has expired; print a new one with `pulsar token` on a member".into())
        };
        let bytes = postcard::to_allocvec(&answer).map_err(|e| e.to_string())?;
        send.write_all(&bytes).await.map_err(|e| e.to_string())?;
        send.finish().map_err(|e| e.to_string())?;
        // Until the other end has it all and closes.
        connection.closed().await;
        Ok(())
    }

    fn known(&self, cluster: &ClusterNode, secret: &[u8; 32]) -> bool {
        let hash = blake3::Hash::from_bytes(hash_secret(secret));
        let now = unix_seconds();
        let view = cluster.view().borrow().clone();
        // Every one is compared, each in constant time.
        view.config.tokens.iter().fold(false, |known, (token, expires)| {
            let same = blake3::Hash::from_bytes(*token) == hash;
            known | (same & (*expires > now))
        })
    }

    async fn admit(&self, cluster: &ClusterNode, request: Request) -> Answer {
        let Request { public_key, name, addr } = request;
        let authority = match self.identity.authority() {
            Ok(authority) => authority,
            Err(e) => return Answer::Refused(e.to_string()),
        };
        if let Err(e) = authority.certify(NodeId(0), &public_key) {
            return Answer::Refused(e.to_string());
        }
        let node = match cluster.propose(Command::NodeJoin { name: name.clone(), addr: addr.clone() }).await {
            Ok(Applied::Node(node)) => node,
            Ok(other) => return Answer::Refused(format!("unexpected answer {other:?}")),
            Err(ProposeError::Refused(why)) => return Answer::Refused(why),
            Err(e) => return Answer::Refused(e.to_string()),
        };
        let certificate = match authority.certify(node, &public_key) {
            Ok(certificate) => certificate.to_vec(),
            Err(e) => return Answer::Refused(e.to_string()),
        };
        tracing::info!("{name} at {addr} joins as {node}");
        let view = cluster.view().borrow().clone();
        let peers = view.config.nodes.iter().filter(|(id, _)| **id != node).map(|(id, n)| (*id, n.addr.clone())).collect();
        Answer::Welcome(Box::new(Welcome {
            node,
            cluster_name: view.config.name.clone(),
            authority: self.identity.authority.clone(),
            authority_key: authority.key(),
            certificate,
            timing: self.identity.timing,
            peers,
        }))
    }
}

/// Held by the transport.
pub(super) struct Handler(pub(super) Arc<JoinServer>);

impl JoinHandler for Handler {
    fn join(&self, connection: quinn::Connection) -> BoxFuture<'static, ()> {
        let server = Arc::clone(&self.0);
        Box::pin(async move {
            let Ok(_slot) = Arc::clone(&server.slots).try_acquire_owned() else {
                return connection.close(2u32.into(), b"too many nodes join at once; try again");
            };
            match tokio::time::timeout(JOIN_TIME, server.talk(&connection)).await {
                Ok(Ok(())) => {}
                Ok(Err(why)) => tracing::debug!("a join ended: {why}"),
                Err(_) => tracing::debug!("a join took too long"),
            }
            connection.close(0u32.into(), b"");
        })
    }
}

/// Makes this machine a node of the cluster that the token is for; fills its state directory. `addr` is `host:port`, where
/// the other nodes reach this one. The daemon is to be started then.
///
/// # Errors
/// If there is a node in the directory already, no member can be reached, or the cluster refuses.
pub async fn join(dir: &Path, token: &Token, name: &str, addr: &str) -> Result<NodeId, JoinError> {
    let new = NewState::prepare(dir)?;
    let key = NodeKey::create()?;
    let request = Request { public_key: key.public(), name: name.to_owned(), addr: addr.to_owned() };
    let mut tried = Vec::new();
    for (member, at) in &token.members {
        match tokio::time::timeout(JOIN_TIME, ask(token, *member, at, &request)).await {
            Ok(Ok(Answer::Refused(why))) => return Err(JoinError::Refused(why)),
            Ok(Ok(Answer::Welcome(welcome))) => {
                let Welcome { node, cluster_name, authority, authority_key, certificate, timing, peers } = *welcome;
                // Makes the file, so that opening it later cannot be mistaken for a loss of state.
                drop(new.store()?);
                new.finish(&Identity {
                    cluster: token.cluster,
                    cluster_name,
                    node,
                    name: name.to_owned(),
                    addr: addr.to_owned(),
                    timing,
                    peers,
                    authority,
                    authority_key,
                    certificate,
                    key: key.private(),
                })?;
                return Ok(node);
            }
            Ok(Err(why)) => tried.push(format!("{at}: {why}")),
            Err(_) => tried.push(format!("{at}: no answer")),
        }
    }
    Err(JoinError::Unreachable(tried.join("; ")))
}

async fn ask(token: &Token, member: NodeId, at: &str, request: &Request) -> Result<Answer, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Pinned { authority: token.authority, provider: Arc::clone(&provider) });
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| text(&e))?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN_JOIN.to_vec()];
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).map_err(|e| text(&e))?));
    let addr = tokio::net::lookup_host(at).await.map_err(|e| text(&e))?.next().ok_or("the name has no address")?;
    let local: std::net::SocketAddr = if addr.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let endpoint = quinn::Endpoint::client(local).map_err(|e| text(&e))?;
    let connecting = endpoint.connect_with(config, addr, &node_name(member, &token.cluster)).map_err(|e| text(&e))?;
    let connection = tokio::time::timeout(DIAL_TIME, connecting).await.map_err(|_| "no answer")?.map_err(|e| text(&e))?;
    let (mut send, mut recv) = connection.open_bi().await.map_err(|e| text(&e))?;
    send.write_all(&token.secret).await.map_err(|e| text(&e))?;
    let bytes = postcard::to_allocvec(request).map_err(|e| text(&e))?;
    send.write_all(&bytes).await.map_err(|e| text(&e))?;
    send.finish().map_err(|e| text(&e))?;
    let bytes = recv.read_to_end(ANSWER_BYTES_MAX).await.map_err(|e| text(&e))?;
    connection.close(0u32.into(), b"");
    let _ = tokio::time::timeout(Duration::from_secs(1), endpoint.wait_idle()).await;
    postcard::from_bytes(&bytes).map_err(|e| text(&e))
}

/// Trusts the authority with a known fingerprint, and no other.
#[derive(Debug)]
struct Pinned {
    authority: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unknown = || rustls::Error::General("this is not the cluster that the token is for".into());
        let pinned = intermediates.iter().find(|c| *blake3::hash(c).as_bytes() == self.authority).ok_or_else(unknown)?;
        let mut roots = RootCertStore::empty();
        roots.add(pinned.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|e| rustls::Error::General(e.to_string()))?
            .verify_server_cert(end_entity, &[], server_name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("QUIC has TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
