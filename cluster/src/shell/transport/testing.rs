//! A throw-away certificate authority, for tests and the transport's benchmark.

use super::{TlsIdentity, node_name};
use crate::ids::NodeId;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls_pki_types::PrivateKeyDer;

/// An authority that lives as long as the test.
pub struct Authority {
    cluster: [u8; 16],
    certificate: rcgen::Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// If no key can be made.
    pub fn new(cluster: [u8; 16]) -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key)?;
        Ok(Authority { cluster, certificate, issuer: Issuer::new(params, key) })
    }

    /// A node's identity, signed.
    ///
    /// # Errors
    /// If no key can be made.
    pub fn identity(&self, node: NodeId) -> Result<TlsIdentity, rcgen::Error> {
        let key = KeyPair::generate()?;
        let params = CertificateParams::new(vec![node_name(node, &self.cluster)])?;
        Ok(TlsIdentity {
            cluster: self.cluster,
            authority: self.certificate.der().clone(),
            certificate: params.signed_by(&key, &self.issuer)?.der().clone(),
            key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        })
    }
}
