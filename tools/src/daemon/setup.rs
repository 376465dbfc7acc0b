//! Making a node: keys, the first configuration, disks' labels.

use super::node::Device;
use crate::failure::{Context, Failure, Outcome};
use crate::settings::{PORT, Settings, Timings};
use cluster::membership::Timing;
use cluster::shell::identity::{self, Token};
use cluster::shell::{join as joining, state};
use mirror::{BlockDevice, FileDevice, OpenError};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// The cluster's times, by their name.
#[must_use]
pub fn timing(timings: Timings) -> Timing {
    match timings {
        Timings::Normal => Timing::default(),
        Timings::Quick => Timing::quick(),
        Timings::Patient => {
            let normal = Timing::default();
            let slower = |d: Duration| d * 4;
            Timing {
                heartbeat: slower(normal.heartbeat),
                lease: slower(normal.lease),
                dead: slower(normal.dead),
                absent: slower(normal.absent),
                raft_tick: slower(normal.raft_tick),
                propose: slower(normal.propose),
                retry: slower(normal.retry),
                ..normal
            }
        }
    }
}

/// A runtime for commands that need one.
///
/// # Errors
/// If the system has no resources left.
pub fn small_runtime() -> Outcome<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context(|| "cannot start".into())
}

/// Makes a cluster with this machine as its first node; returns a join token.
///
/// # Errors
/// If there is one already, or something cannot be written.
pub fn init(settings: &Settings, cluster: &str, timings: Timings) -> Outcome<String> {
    let token = state::init(&settings.state_dir, &settings.name, &settings.listen, cluster, timing(timings));
    Ok(token.context(|| "cannot make the cluster".into())?.print())
}

/// Makes this machine a node of the cluster that the token is for.
///
/// # Errors
/// If the cluster cannot be reached, or refuses.
pub fn join(settings: &Settings, token: &str) -> Outcome<()> {
    let token: Token = Token::parse(token).context(|| "the token is not right".into())?;
    let joined = small_runtime()?.block_on(joining::join(&settings.state_dir, &token, &settings.name, &settings.listen));
    joined.map(drop).context(|| "cannot join".into())
}

/// Which cluster this node belongs to.
///
/// # Errors
/// If it is no node.
pub fn cluster_of(settings: &Settings) -> Outcome<[u8; 16]> {
    Ok(state::identity(&settings.state_dir).context(|| "cannot read this node's identity".into())?.cluster)
}

/// A disk that is ready to be given to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreparedDisk {
    /// Random identity in its label.
    pub uuid: [u8; 16],
    /// Its size.
    pub bytes: u64,
}

/// Whether a disk could be prepared, without changing anything: what is checked before a cluster is made or joined.
///
/// # Errors
/// If it cannot.
pub fn check_disk(path: &Path, size: Option<u64>) -> Outcome<()> {
    let what = || format!("disk {}", path.display());
    if size.is_some() {
        if path.exists() {
            return Err(Failure::new(format!("{}: it exists; a file of a given size is made anew, so name another", what())));
        }
        let dir = path.parent().unwrap_or(Path::new("/"));
        return if dir.is_dir() {
            Ok(())
        } else {
            Err(Failure::new(format!("{}: {} is not a directory", what(), dir.display())))
        };
    }
    let device = FileDevice::open(path).context(what)?;
    drop(device);
    Ok(())
}

/// Writes a label onto a disk; with a size, a sparse file is made first. A disk of another cluster, or one that is in use
/// by this one, is refused; anything else on it is overwritten.
///
/// # Errors
/// If it is a disk of a cluster already, cannot be written, or is too small.
pub async fn label_disk(path: &Path, size: Option<u64>, cluster: [u8; 16]) -> Outcome<PreparedDisk> {
    let what = || format!("disk {}", path.display());
    let device = match size {
        Some(bytes) => FileDevice::create(path, bytes),
        None => FileDevice::open(path),
    }
    .context(what)?;
    match mirror::format::read_label(&device).await {
        Err(OpenError::NotPulsar | OpenError::TooSmall { .. }) => {}
        Err(e @ OpenError::Io(_)) => return Err(Failure::new(format!("{}: {e}", what()))),
        Ok(_) | Err(_) => {
            return Err(Failure::new(format!(
                "{} is, or was, a disk of a Pulsar cluster; to use it anew, erase it: 'dd if=/dev/zero of={} bs=4096 count=8'",
                what(),
                path.display()
            )));
        }
    }
    let uuid = identity::random().context(what)?;
    let label = mirror::format_disk(&device, cluster, uuid).await.context(what)?;
    Ok(PreparedDisk { uuid, bytes: label.geometry.blocks * cluster::BLOCK_SIZE as u64 })
}

/// As [`label_disk`], for commands.
///
/// # Errors
/// As there.
pub fn prepare_disk(path: &Path, size: Option<u64>, cluster: [u8; 16]) -> Outcome<PreparedDisk> {
    small_runtime()?.block_on(label_disk(path, size, cluster))
}

/// Opens a disk of a cluster and reads its label.
///
/// # Errors
/// If it is not there, in use, not prepared, or of another cluster.
pub async fn open_labelled(path: &Path, cluster: [u8; 16]) -> Outcome<Device> {
    let what = || format!("disk {}", path.display());
    let device = FileDevice::open(path).context(what)?;
    let label = mirror::format::read_label(&device).await.context(what)?;
    if label.cluster != cluster {
        return Err(Failure::new(format!("{} belongs to another cluster", what())));
    }
    let device: Arc<dyn BlockDevice> = Arc::new(device);
    Ok(Device { name: path.display().to_string(), uuid: label.uuid, blocks: label.geometry.data_blocks, device })
}

/// A disk's identity, also while it is in use.
///
/// # Errors
/// If it is not there, or has no label that can be read.
pub async fn identity_of(path: &Path) -> Outcome<[u8; 16]> {
    let what = || format!("disk {}", path.display());
    let device = FileDevice::open_read_only(path).context(what)?;
    Ok(mirror::format::read_label(&device).await.context(what)?.uuid)
}

/// `address:port` of this node, from what was given: nothing, an address, or both.
///
/// # Errors
/// If it is no address, or this machine has none.
pub fn listen_address(given: Option<&str>) -> Outcome<String> {
    if let Some(text) = given {
        if text.parse::<SocketAddr>().is_ok() {
            return Ok(text.into());
        }
        return match text.parse::<IpAddr>() {
            Ok(ip) => Ok(SocketAddr::new(ip, PORT).to_string()),
            Err(_) => Err(Failure::new(format!(
                "--listen {text}: give the numeric address of this machine, as 10.0.0.1 or 10.0.0.1:{PORT}"
            ))),
        };
    }
    // The address that this machine would use towards the world; nothing is sent.
    let what = || "cannot find this machine's address; give it with --listen".to_string();
    let socket = UdpSocket::bind("0.0.0.0:0").context(what)?;
    socket.connect("192.0.2.1:9").context(what)?;
    Ok(SocketAddr::new(socket.local_addr().context(what)?.ip(), PORT).to_string())
}
