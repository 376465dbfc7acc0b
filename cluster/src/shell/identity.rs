//! Who a node is: the cluster's certificate authority, nodes' certificates, and join tokens.
//!
//! The authority is made by `init`; its key is given to every node that joins (over the authenticated join connection), so
//! that any member can take in others. A node's certificate names its node id and the cluster, and nothing else is needed
//! to be heard: so the keys are kept in one file that only the owner may read.
//!
//! Excludes: checking certificates of connections (`transport`), the join protocol (`join`).

use super::transport::{TlsIdentity, node_name};
use crate::ids::NodeId;
use crate::membership::Timing;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes of a node's public key: an uncompressed point of P-256.
pub const PUBLIC_KEY_BYTES: usize = 65;

/// Why something about keys or tokens failed.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Of the library.
    #[error("the certificate could not be made: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The operating system gives no random numbers.
    #[error("the operating system gives no random numbers")]
    Random,
    /// A token that is not one.
    #[error("this is not a join token: {0}; copy the whole line that `pulsar token` printed")]
    Token(&'static str),
    /// A public key of another form.
    #[error("the public key is not an uncompressed point of P-256")]
    PublicKey,
}

/// Random bytes from the operating system.
///
/// # Errors
/// If it has none.
pub fn random<const N: usize>() -> Result<[u8; N], IdentityError> {
    let mut bytes = [0; N];
    rustls::crypto::ring::default_provider().secure_random.fill(&mut bytes).map_err(|_| IdentityError::Random)?;
    Ok(bytes)
}

/// The cluster's certificate authority, with its key.
pub struct Authority {
    cluster: [u8; 16],
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

fn authority_params(cluster: &[u8; 16]) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, format!("Pulsar cluster {}", hex(cluster)));
    params.distinguished_name = name;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    Ok(params)
}

impl Authority {
    /// A new authority.
    ///
    /// # Errors
    /// If no key can be made.
    pub fn create(cluster: [u8; 16]) -> Result<Self, IdentityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let params = authority_params(&cluster)?;
        let certificate = params.self_signed(&key)?.der().clone();
        Ok(Authority { cluster, certificate, issuer: Issuer::new(params, key) })
    }

    /// The authority from what was kept of it.
    ///
    /// # Errors
    /// If the key is not one.
    pub fn load(cluster: [u8; 16], certificate: &[u8], key: &[u8]) -> Result<Self, IdentityError> {
        let key = KeyPair::try_from(key)?;
        let certificate = CertificateDer::from(certificate.to_vec());
        Ok(Authority { cluster, certificate, issuer: Issuer::new(authority_params(&cluster)?, key) })
    }

    /// Its certificate.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Its key, PKCS #8.
    #[must_use]
    pub fn key(&self) -> Vec<u8> {
        self.issuer.key().serialize_der()
    }

    /// A certificate for a node's public key.
    ///
    /// # Errors
    /// If the key is not of the right form.
    pub fn certify(&self, node: NodeId, public_key: &[u8]) -> Result<CertificateDer<'static>, IdentityError> {
        if public_key.len() != PUBLIC_KEY_BYTES || public_key.first() != Some(&4) {
            return Err(IdentityError::PublicKey);
        }
        let mut params = CertificateParams::new(vec![node_name(node, &self.cluster)])?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, format!("Pulsar node {}", node.0));
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok(params.signed_by(&PublicKey(public_key), &self.issuer)?.der().clone())
    }
}

struct PublicKey<'a>(&'a [u8]);

impl PublicKeyData for PublicKey<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

/// A node's own key.
pub struct NodeKey(KeyPair);

impl NodeKey {
    /// A new key.
    ///
    /// # Errors
    /// If none can be made.
    pub fn create() -> Result<Self, IdentityError> {
        Ok(NodeKey(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?))
    }

    /// The public part.
    #[must_use]
    pub fn public(&self) -> Vec<u8> {
        self.0.der_bytes().to_vec()
    }

    /// The key, PKCS #8.
    #[must_use]
    pub fn private(&self) -> Vec<u8> {
        self.0.serialize_der()
    }
}

/// All that a node keeps of who it is.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The cluster.
    pub cluster: [u8; 16],
    /// The cluster's name, when the node joined.
    pub cluster_name: String,
    /// The node.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Where the others reach it.
    pub addr: String,
    /// The cluster's times.
    pub timing: Timing,
    /// Other nodes, as known when it joined.
    pub peers: Vec<(NodeId, String)>,
    /// The authority's certificate.
    pub authority: Vec<u8>,
    /// The authority's key, PKCS #8.
    pub authority_key: Vec<u8>,
    /// The node's certificate.
    pub certificate: Vec<u8>,
    /// The node's key, PKCS #8.
    pub key: Vec<u8>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the keys.
        write!(f, "Identity({} {:?} of {:?}, cluster {})", self.node, self.name, self.cluster_name, hex(&self.cluster))
    }
}

impl Identity {
    /// For the transport.
    #[must_use]
    pub fn tls(&self) -> TlsIdentity {
        TlsIdentity {
            cluster: self.cluster,
            authority: CertificateDer::from(self.authority.clone()),
            certificate: CertificateDer::from(self.certificate.clone()),
            key: PrivateKeyDer::Pkcs8(self.key.clone().into()),
        }
    }

    /// The authority, to take in other nodes.
    ///
    /// # Errors
    /// If its key is not right.
    pub fn authority(&self) -> Result<Authority, IdentityError> {
        Authority::load(self.cluster, &self.authority, &self.authority_key)
    }
}

/// What a new node needs to join: printed as one string, to be kept secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// The cluster.
    pub cluster: [u8; 16],
    /// blake3 of the authority's certificate: how the new node knows the cluster.
    pub authority: [u8; 32],
    /// How the cluster knows the new node.
    pub secret: [u8; 32],
    /// Members that can take it in.
    pub members: Vec<(NodeId, String)>,
}

/// Most members named in a token.
pub const TOKEN_MEMBERS_MAX: usize = 3;
const TOKEN_PREFIX: &str = "pulsar-join-1-";
const TOKEN_CHECK_BYTES: usize = 4;

impl Token {
    /// A new token for a cluster.
    ///
    /// # Errors
    /// If there are no random numbers.
    pub fn create(cluster: [u8; 16], authority: &[u8], members: Vec<(NodeId, String)>) -> Result<Self, IdentityError> {
        let members = members.into_iter().take(TOKEN_MEMBERS_MAX).collect();
        Ok(Token { cluster, authority: *blake3::hash(authority).as_bytes(), secret: random()?, members })
    }

    /// What the configuration keeps of it.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        hash_secret(&self.secret)
    }

    /// The string.
    #[must_use]
    pub fn print(&self) -> String {
        let mut bytes = postcard::to_allocvec(self).unwrap_or_default();
        let check = blake3::hash(&bytes);
        bytes.extend_from_slice(&check.as_bytes()[..TOKEN_CHECK_BYTES]);
        format!("{TOKEN_PREFIX}{}", base64url(&bytes))
    }

    /// The token from its string.
    ///
    /// # Errors
    /// If it is not one, or not whole.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        let text = text.trim().strip_prefix(TOKEN_PREFIX).ok_or(IdentityError::Token("it does not begin as one"))?;
        let bytes = unbase64url(text).ok_or(IdentityError::Token("it has characters that do not belong to it"))?;
        let at = bytes.len().checked_sub(TOKEN_CHECK_BYTES).ok_or(IdentityError::Token("it is too short"))?;
        let (body, check) = bytes.split_at(at);
        if &blake3::hash(body).as_bytes()[..TOKEN_CHECK_BYTES] != check {
            return Err(IdentityError::Token("a part of it is missing or changed"));
        }
        postcard::from_bytes(body).map_err(|_| IdentityError::Token("its contents are not understood"))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(cluster {}, members {:?})", hex(&self.cluster), self.members)
    }
}

/// What is kept of a token's secret.
#[must_use]
pub fn hash_secret(secret: &[u8; 32]) -> [u8; 32] {
    *blake3::Hasher::new_derive_key("Pulsar join token 1").update(secret).finalize().as_bytes()
}

/// Bytes in hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

const BASE64URL: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

fn base64url(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().enumerate().fold(0u32, |bits, (i, b)| bits | u32::from(*b) << (16 - 8 * i));
        for i in 0..=chunk.len() {
            text.push(char::from(BASE64URL[(bits >> (18 - 6 * i)) as usize & 63]));
        }
    }
    text
}

fn unbase64url(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut have) = (0u32, 0);
    for c in text.bytes() {
        let value = BASE64URL.iter().position(|b| *b == c)? as u32;
        bits = bits << 6 | value;
        have += 6;
        if have >= 8 {
            have -= 8;
            bytes.push((bits >> have) as u8);
            bits &= (1 << have) - 1;
        }
    }
    // What is left over are zeros, so every string of bytes has one form only.
    (bits == 0).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shell::transport::is_certificate_of;

    #[test]
    fn a_token_survives_printing_and_no_change_of_it_does() {
        let token = Token::create([3; 16], b"certificate", vec![(NodeId(1), "10.0.0.1:7440".into())]).unwrap();
        let text = token.print();
        assert_eq!(Token::parse(&format!(" {text}\n")).unwrap(), token);
        for at in 0..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            assert!(Token::parse(std::str::from_utf8(&changed).unwrap()).is_err(), "changed at {at}");
            assert!(Token::parse(&text[..at]).is_err());
        }
        assert!(!format!("{token:?}").contains(&hex(&token.secret)));
    }

    #[test]
    fn base64_of_every_length() {
        for len in 0..50usize {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 37 + len) as u8).collect();
            assert_eq!(unbase64url(&base64url(&bytes)).unwrap(), bytes);
        }
    }

    #[test]
    fn an_authority_that_was_kept_certifies_as_before() {
        let made = Authority::create([5; 16]).unwrap();
        let authority = Authority::load([5; 16], made.certificate(), &made.key()).unwrap();
        let key = NodeKey::create().unwrap();
        let certificate = authority.certify(NodeId(7), &key.public()).unwrap();
        assert!(is_certificate_of(&certificate, NodeId(7), &[5; 16]));
        assert!(!is_certificate_of(&certificate, NodeId(8), &[5; 16]));
        assert!(!is_certificate_of(&certificate, NodeId(7), &[6; 16]));
        assert!(authority.certify(NodeId(7), &[4; 10]).is_err());
    }
}
