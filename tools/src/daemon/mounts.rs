//! The mounts that this daemon serves, and what it mounted before it ended: that is mounted again when it starts.
//!
//! Invariants:
//! - The record names every mount that is served, so that after a crash the dead mounts are found and replaced.
//! - Only mounts of this daemon are ever taken away: a mount is known by its device number, not by its directory.
//! - A record from before the last boot is void: fstab mounts anew then.

use super::losses;
use super::node::Node;
use crate::events::{EventLog, Kind};
use crate::failure::{Context, Failure, Outcome};
use crate::mount;
use crate::settings::write_atomically;
use crate::status::MountInfo;
use cluster::FsId;
use fs::shell::{MountHandle, ServeOptions, Server, Unmount};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sld::PulsarDisk;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;

/// How long the kernel may take to greet.
const GREETING: Duration = Duration::from_secs(10);
/// How long an unmount may take to end the session.
const ENDING: Duration = Duration::from_secs(3);

/// One mount, as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    fs: String,
    dir: PathBuf,
    options: Vec<String>,
    /// `major:minor`, by which a dead mount is known for ours.
    device: String,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    boot: String,
    mounts: Vec<Remembered>,
}

/// The mounts of this daemon.
pub struct Mounts {
    node: Arc<Node>,
    file: PathBuf,
    state: Mutex<State>,
    servers: tokio::sync::Mutex<BTreeMap<FsId, Arc<Server<PulsarDisk>>>>,
}

#[derive(Default)]
struct State {
    next: u64,
    live: BTreeMap<u64, (Remembered, Arc<MountHandle>)>,
    stopping: bool,
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_string()
}

impl Mounts {
    /// No mounts yet; the record is kept in the state directory.
    #[must_use]
    pub fn new(node: Arc<Node>, state_dir: &Path) -> Arc<Mounts> {
        Arc::new(Mounts {
            node,
            file: state_dir.join("mounts.json"),
            state: Mutex::default(),
            servers: tokio::sync::Mutex::default(),
        })
    }

    fn events(&self) -> &EventLog {
        self.node.events()
    }

    /// What is served.
    #[must_use]
    pub fn list(&self) -> Vec<MountInfo> {
        let state = self.state.lock();
        state.live.values().map(|(m, _)| MountInfo { fs: m.fs.clone(), dir: m.dir.display().to_string() }).collect()
    }

    /// What serves the mounts of a file system: one per file system, since it is what revocations are told to.
    async fn server(&self, fs: &str) -> Outcome<Arc<Server<PulsarDisk>>> {
        let name = fs.to_owned();
        let (id, fs) = self.node.filesystem(fs).await?;
        let mut servers = self.servers.lock().await;
        if let Some(server) = servers.get(&id) {
            return Ok(server.clone());
        }
        let (node, weak, runtime) = (Arc::downgrade(&self.node), Arc::downgrade(&fs), Handle::current());
        let server = Arc::new(Server::new(fs));
        server.on_loss(Box::new(move |files| {
            // Losses are told from any thread.
            let _runtime = runtime.enter();
            losses::tell(&node, &weak, &name, files);
        }));
        servers.insert(id, server.clone());
        Ok(server)
    }

    /// Serves a mount; returns when its root can be reached.
    ///
    /// # Errors
    /// If there is no such file system, or it cannot be opened.
    pub async fn serve(self: &Arc<Self>, fs: &str, dir: &Path, options: Vec<String>, fuse: OwnedFd) -> Outcome<()> {
        let server = self.server(fs).await?;
        let serve = ServeOptions {
            directory: Some(dir.to_path_buf()),
            access_times: mount::MountOptions::parse(&options, true)?.parsed.access_times(),
            lifetime: self.node.lifetime(),
            locks: Some(self.node.locks()),
            notices: Some(self.node.notices()),
            ..ServeOptions::default()
        };
        let handle = Arc::new(server.serve(fuse, serve).context(|| format!("cannot serve {fs}"))?);
        let greeted = tokio::time::timeout(GREETING, handle.ready()).await;
        greeted
            .map_err(|_| Failure::new(format!("the kernel did not greet the file system within {} s", GREETING.as_secs())))?
            .context(|| format!("cannot serve {fs}"))?;
        let device = mount::mounted_at(dir)?.map(|m| m.device).unwrap_or_default();
        let mounted = Remembered { fs: fs.into(), dir: dir.to_path_buf(), options, device };
        let id = {
            let mut state = self.state.lock();
            let id = state.next;
            state.next += 1;
            state.live.insert(id, (mounted, handle.clone()));
            id
        };
        self.remember();
        self.events().add(Kind::Mount, false, format!("{fs} is mounted on {}", dir.display()));
        let this = Arc::downgrade(self);
        tokio::spawn(async move {
            let failure = handle.ended().await;
            let Some(this) = this.upgrade() else { return };
            let gone = {
                let mut state = this.state.lock();
                if state.stopping { None } else { state.live.remove(&id) }
            };
            if let Some((mounted, _)) = gone {
                this.remember();
                let (fs, dir) = (&mounted.fs, mounted.dir.display());
                let text = match &failure {
                    None => format!("{fs} is unmounted from {dir}"),
                    Some(why) => format!("{fs} could not be served any more on {dir} and is unmounted: {why}; mount it again"),
                };
                this.events().add(Kind::Mount, failure.is_some(), text);
            }
        });
        Ok(())
    }

    fn remember(&self) {
        let record = {
            let state = self.state.lock();
            Record { boot: boot_id(), mounts: state.live.values().map(|(m, _)| m.clone()).collect() }
        };
        let text = serde_json::to_vec_pretty(&record).unwrap_or_default();
        if let Err(e) = write_atomically(&self.file, &text, 0o600) {
            tracing::warn!("cannot write {}: {e}; after a restart the mounts have to be made by hand", self.file.display());
        }
    }

    /// Mounts again what this daemon had mounted when it ended.
    pub async fn restore(self: &Arc<Self>) {
        let Ok(text) = std::fs::read(&self.file) else { return };
        let record: Record = match serde_json::from_slice(&text) {
            Ok(record) => record,
            Err(e) => return tracing::warn!("{} is damaged ({e}): mounts are not restored", self.file.display()),
        };
        if record.boot != boot_id() {
            return;
        }
        for mounted in record.mounts {
            if let Err(e) = self.restore_one(&mounted).await {
                self.events().add(
                    Kind::Mount,
                    true,
                    format!("{} could not be mounted again on {}: {e}", mounted.fs, mounted.dir.display()),
                );
            }
        }
    }

    async fn restore_one(self: &Arc<Self>, mounted: &Remembered) -> Outcome<()> {
        match mount::mounted_at(&mounted.dir)? {
            Some(dead) if dead.device == mounted.device => mount::unmount_lazily(&mounted.dir)?,
            Some(_) => return Ok(()),
            None => {}
        }
        // The file system first: until it is open, whoever touches the mount would wait for it without end.
        self.server(&mounted.fs).await?;
        let options = mount::MountOptions::parse(&mounted.options, true)?;
        let fuse = mount::mount_kernel(&mounted.fs, &mounted.dir, &options)?;
        let served = self.serve(&mounted.fs, &mounted.dir, mounted.options.clone(), fuse).await;
        if served.is_err() {
            let _ = mount::unmount_lazily(&mounted.dir);
        }
        served
    }

    /// Takes all mounts away, remembering them for the next start.
    pub async fn stop(&self) {
        let live: Vec<_> = {
            let mut state = self.state.lock();
            state.stopping = true;
            state.live.values().cloned().collect()
        };
        for (mounted, handle) in live {
            if handle.unmount(Unmount::Idle).is_err() {
                tracing::warn!("{} is in use on {}: it is cut off", mounted.fs, mounted.dir.display());
                if let Err(e) = handle.unmount(Unmount::Abort) {
                    tracing::warn!("cannot unmount {}: {e}", mounted.dir.display());
                }
            }
            let _ = tokio::time::timeout(ENDING, handle.ended()).await;
        }
    }
}
