//! A node's state directory: its identity, its store, and the lock that keeps a second daemon out.
//!
//! | file | what |
//! |---|---|
//! | `identity` | who the node is, with its keys; mode 0600; written once |
//! | `raft.redb` | the replicated configuration |
//! | `state.lock` | locked while a daemon uses the directory |
//!
//! `identity` is magic `PLSRNODE`, version (u16 little-endian), blake3 of the rest (32 bytes), the rest in `postcard`. It is
//! written last: a directory without it is one whose making was interrupted, and may be used again.

use super::identity::{Authority, Identity, IdentityError, NodeKey, Token, random};
use super::redb_store::RedbStore;
use crate::config::{Applied, Command, Config};
use crate::ids::NodeId;
use crate::membership::Timing;
use crate::raft::bootstrap;
use crate::store::StoreError;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

const MAGIC: &[u8; 8] = b"PLSRNODE";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 8 + 2 + 32;
/// Longest `identity` that is read.
const IDENTITY_BYTES_MAX: u64 = 1 << 20;
/// How long a join token may be used if nothing else is said.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Why a state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Of the operating system.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// There is a node in it.
    #[error("{0} holds the state of a node already; to make a new node here, stop its daemon and remove that directory")]
    Occupied(PathBuf),
    /// There is none in it.
    #[error("{0} holds no node; make one with 'pulsar init' (first node) or 'pulsar join TOKEN'")]
    Empty(PathBuf),
    /// Another daemon has it.
    #[error("another daemon uses {0}; stop it first")]
    InUse(PathBuf),
    /// It is something else.
    #[error("{0} is not the identity of a Pulsar node")]
    Foreign(PathBuf),
    /// Of another version.
    #[error("{path} is of version {found}, this program knows version {VERSION}: use the program that made it")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u16,
    },
    /// It does not fit its checksum.
    #[error("{0} is damaged; restore it from a backup, or let the node join anew under another name")]
    Damaged(PathBuf),
    /// A name or address that cannot be.
    #[error("{0}")]
    Refused(String),
    /// Keys.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> StateError + '_ {
    move |source| StateError::Io { path: path.to_owned(), source }
}

/// An open state directory. The lock is held until it is dropped.
pub struct StateDir {
    /// Who the node is.
    pub identity: Identity,
    /// What it keeps.
    pub store: RedbStore,
    /// Keeps others out.
    pub lock: StateLock,
}

/// Keeps other daemons out of a state directory while it lives.
pub struct StateLock(#[allow(dead_code)] Flock<File>);

/// A new directory that is being filled.
pub(super) struct NewState {
    dir: PathBuf,
    _lock: StateLock,
}

impl NewState {
    /// Makes the directory, and checks that no node is in it.
    pub(super) fn prepare(dir: &Path) -> Result<Self, StateError> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io(dir))?;
        let lock = lock(dir)?;
        if dir.join("identity").exists() {
            return Err(StateError::Occupied(dir.to_owned()));
        }
        let store = dir.join("raft.redb");
        if store.exists() {
            // Left by an attempt that did not come as far as the identity.
            std::fs::remove_file(&store).map_err(io(&store))?;
        }
        Ok(NewState { dir: dir.to_owned(), _lock: lock })
    }

    /// The store, empty.
    pub(super) fn store(&self) -> Result<RedbStore, StateError> {
        Ok(RedbStore::open(&self.dir.join("raft.redb"))?)
    }

    /// Writes the identity: from now on there is a node.
    pub(super) fn finish(self, identity: &Identity) -> Result<(), StateError> {
        let path = self.dir.join("identity");
        let body = postcard::to_allocvec(identity).map_err(|e| io(&path)(std::io::Error::other(e)))?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(blake3::hash(&body).as_bytes());
        bytes.extend_from_slice(&body);
        let new = self.dir.join("identity.new");
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new).map_err(io(&new))?;
        file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(io(&new))?;
        std::fs::rename(&new, &path).map_err(io(&path))?;
        File::open(&self.dir).and_then(|d| d.sync_all()).map_err(io(&self.dir))
    }
}

fn lock(dir: &Path) -> Result<StateLock, StateError> {
    let path = dir.join("state.lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path).map_err(io(&path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map(StateLock).map_err(|_| StateError::InUse(dir.to_owned()))
}

/// Opens a node's state directory.
///
/// # Errors
/// If there is none, it is in use, or of another version.
pub fn open(dir: &Path) -> Result<StateDir, StateError> {
    let path = dir.join("identity");
    if !path.exists() {
        return Err(StateError::Empty(dir.to_owned()));
    }
    let lock = lock(dir)?;
    let identity = read_identity(&path)?;
    let store = RedbStore::open(&dir.join("raft.redb"))?;
    Ok(StateDir { identity, store, lock })
}

/// Who the node of a state directory is, without opening it.
///
/// # Errors
/// If there is none, or of another version.
pub fn identity(dir: &Path) -> Result<Identity, StateError> {
    let path = dir.join("identity");
    if !path.exists() {
        return Err(StateError::Empty(dir.to_owned()));
    }
    read_identity(&path)
}

fn read_identity(path: &Path) -> Result<Identity, StateError> {
    let length = std::fs::metadata(path).map_err(io(path))?.len();
    if length > IDENTITY_BYTES_MAX {
        return Err(StateError::Foreign(path.to_owned()));
    }
    let bytes = std::fs::read(path).map_err(io(path))?;
    let Some((header, body)) = bytes.split_at_checked(HEADER_BYTES) else {
        return Err(StateError::Foreign(path.to_owned()));
    };
    let (magic, rest) = header.split_at(MAGIC.len());
    let (version, check) = rest.split_at(2);
    if magic != MAGIC {
        return Err(StateError::Foreign(path.to_owned()));
    }
    let found = u16::from_le_bytes([version[0], version[1]]);
    if found != VERSION {
        return Err(StateError::Version { path: path.to_owned(), found });
    }
    if blake3::hash(body).as_bytes() != check {
        return Err(StateError::Damaged(path.to_owned()));
    }
    postcard::from_bytes(body).map_err(|_| StateError::Damaged(path.to_owned()))
}

/// Makes a cluster with this machine as its first node: its authority, its first configuration and a join token that may be
/// used for [`TOKEN_LIFETIME`]. `addr` is `host:port`, where other nodes reach this one. The times hold for the whole
/// cluster, for good: nodes that join get them from it. Blocks.
///
/// # Errors
/// If there is a node in the directory already, a name is not possible, or it cannot be written.
pub fn init(dir: &Path, name: &str, addr: &str, cluster_name: &str, timing: Timing) -> Result<Token, StateError> {
    timing.check().map_err(StateError::Refused)?;
    let cluster: [u8; 16] = random()?;
    let authority = Authority::create(cluster)?;
    let key = NodeKey::create()?;
    let mut config = Config::default();
    let me = NodeId(1);
    let token = Token::create(cluster, authority.certificate(), vec![(me, addr.to_owned())])?;
    let expires_unix = super::clock::unix_seconds() + TOKEN_LIFETIME.as_secs();
    let commands = [
        Command::Init { cluster, name: cluster_name.to_owned() },
        Command::NodeJoin { name: name.to_owned(), addr: addr.to_owned() },
        Command::SetVoter { node: me, voter: true },
        Command::TokenAdd { hash: token.hash(), expires_unix },
    ];
    for command in &commands {
        if let Applied::Refused(why) = config.apply(command) {
            return Err(StateError::Refused(why));
        }
    }
    let new = NewState::prepare(dir)?;
    new.store()?.save_blocking(bootstrap(config, me))?;
    new.finish(&Identity {
        cluster,
        cluster_name: cluster_name.to_owned(),
        node: me,
        name: name.to_owned(),
        addr: addr.to_owned(),
        timing,
        peers: Vec::new(),
        authority: authority.certificate().to_vec(),
        authority_key: authority.key(),
        certificate: authority.certify(me, &key.public())?.to_vec(),
        key: key.private(),
    })?;
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_directory_is_made_once_used_once_and_known_again() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("state");
        assert!(matches!(open(&dir), Err(StateError::Empty(_))));
        let token = init(&dir, "n1", "127.0.0.1:7440", "test", Timing::default()).unwrap();
        assert!(matches!(init(&dir, "n1", "127.0.0.1:7440", "test", Timing::default()), Err(StateError::Occupied(_))));
        let state = open(&dir).unwrap();
        assert!(matches!(open(&dir), Err(StateError::InUse(_))));
        assert_eq!((state.identity.node, state.identity.cluster), (NodeId(1), token.cluster));
        assert_eq!(state.store.load().unwrap().snapshot.index, 1);
        assert_eq!(std::fs::metadata(dir.join("identity")).unwrap().permissions().mode() & 0o777, 0o600);
        drop(state);
        assert!(open(&dir).is_ok());
    }

    #[test]
    fn what_is_not_a_nodes_state_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity");
        init(dir.path(), "n1", "127.0.0.1:7440", "test", Timing::default()).unwrap();
        let good = std::fs::read(&path).unwrap();
        std::fs::write(&path, b"hello").unwrap();
        assert!(matches!(open(dir.path()), Err(StateError::Foreign(_))));
        let mut other = good.clone();
        other[8] = 9;
        std::fs::write(&path, &other).unwrap();
        assert!(matches!(open(dir.path()), Err(StateError::Version { found: 9, .. })));
        let mut damaged = good.clone();
        damaged[60] ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        assert!(matches!(open(dir.path()), Err(StateError::Damaged(_))));
        assert!(init(&dir.path().join("x"), "bad name", "127.0.0.1:1", "test", Timing::default()).is_err());
        assert!(!dir.path().join("x").exists(), "a refusal leaves nothing");
    }
}
