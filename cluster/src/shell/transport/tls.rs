//! TLS of the transport: both ends show a certificate of the cluster's own authority, or nothing they send is read.
//!
//! The name in a node's certificate is `node-ID.CLUSTER.pulsar` (the cluster's id in hex). A connection without a certificate gets
//! as far as the join protocol, under its own ALPN name, and no further.

use crate::ids::NodeId;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::RootCertStore;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// ALPN name of traffic between members. Its number changes with that of any message (2: what nodes have open is told at recovery,
/// locks have spaces; 3: notices): members of two numbers do not understand each other, and are not connected.
pub const ALPN_MEMBER: &[u8] = b"pulsar/3";
/// ALPN name of the join protocol.
pub const ALPN_JOIN: &[u8] = b"pulsar-join/1";

/// What a node proves its identity with.
#[derive(Debug)]
pub struct TlsIdentity {
    /// The cluster.
    pub cluster: [u8; 16],
    /// The cluster's certificate authority.
    pub authority: CertificateDer<'static>,
    /// This node's certificate.
    pub certificate: CertificateDer<'static>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
}

/// The name in a node's certificate.
#[must_use]
pub fn node_name(node: NodeId, cluster: &[u8; 16]) -> String {
    use std::fmt::Write;
    let mut name = format!("node-{}.", node.0);
    for byte in cluster {
        let _ = write!(name, "{byte:02x}");
    }
    // A last label of digits only would be taken for a part of an IP address.
    name.push_str(".pulsar");
    name
}

/// Whether a certificate (already known to be of the cluster's authority) is that of a node.
#[must_use]
pub fn is_certificate_of(certificate: &CertificateDer<'_>, node: NodeId, cluster: &[u8; 16]) -> bool {
    let Ok(name) = ServerName::try_from(node_name(node, cluster)) else { return false };
    webpki::EndEntityCert::try_from(certificate).is_ok_and(|c| c.verify_is_valid_for_subject_name(&name).is_ok())
}

fn roots(identity: &TlsIdentity) -> io::Result<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.authority.clone()).map_err(io::Error::other)?;
    Ok(Arc::new(roots))
}

/// Settings of every connection: windows for a fast local network, and a peer that says nothing is given up soon.
pub(super) fn transport_config(idle: Duration) -> io::Result<quinn::TransportConfig> {
    let mut t = quinn::TransportConfig::default();
    t.max_idle_timeout(Some(idle.try_into().map_err(io::Error::other)?));
    t.keep_alive_interval(Some(idle / 4));
    t.stream_receive_window((16u32 << 20).into());
    t.receive_window((64u32 << 20).into());
    t.send_window(64 << 20);
    t.max_concurrent_uni_streams(64u32.into());
    t.max_concurrent_bidi_streams(4u32.into());
    t.initial_rtt(Duration::from_millis(1));
    t.initial_mtu(1452);
    let mut mtu = quinn::MtuDiscoveryConfig::default();
    // Loopback and jumbo frames: fewer packets for the same bytes. With 65,000, pipelined requests fell to 230/s (measured).
    mtu.upper_bound(9_000);
    t.mtu_discovery_config(Some(mtu));
    let mut congestion = quinn::congestion::CubicConfig::default();
    congestion.initial_window(1 << 20);
    t.congestion_controller_factory(Arc::new(congestion));
    Ok(t)
}

/// Settings of the accepting end.
pub(super) fn server_config(identity: &TlsIdentity, transport: Arc<quinn::TransportConfig>) -> io::Result<quinn::ServerConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(roots(identity)?, provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(io::Error::other)?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(io::Error::other)?
        .with_client_cert_verifier(clients)
        .with_single_cert(vec![identity.certificate.clone(), identity.authority.clone()], identity.key.clone_key())
        .map_err(io::Error::other)?;
    tls.alpn_protocols = vec![ALPN_MEMBER.to_vec(), ALPN_JOIN.to_vec()];
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).map_err(io::Error::other)?));
    config.transport_config(transport);
    Ok(config)
}

/// Settings of the dialling end.
pub(super) fn client_config(identity: &TlsIdentity, transport: Arc<quinn::TransportConfig>) -> io::Result<quinn::ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(io::Error::other)?
        .with_root_certificates(roots(identity)?)
        .with_client_auth_cert(vec![identity.certificate.clone(), identity.authority.clone()], identity.key.clone_key())
        .map_err(io::Error::other)?;
    tls.alpn_protocols = vec![ALPN_MEMBER.to_vec()];
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).map_err(io::Error::other)?));
    config.transport_config(transport);
    Ok(config)
}
