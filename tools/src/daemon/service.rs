//! What the daemon does for commands.

use super::collector::Collector;
use super::mounts::Mounts;
use super::node::Node;
use super::setup;
use crate::control::server::Handler;
use crate::control::{Answer, Request};
use crate::failure::{Failure, Outcome};
use crate::settings::{DiskSetting, Settings};
use cluster::{BoxFuture, DiskId};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

/// The daemon, as commands see it.
pub struct Service {
    pub(super) node: Arc<Node>,
    pub(super) mounts: Arc<Mounts>,
    /// Where the settings are, to add disks to them.
    pub(super) config: PathBuf,
    /// Set when a command wants the daemon to end.
    pub(super) stop: watch::Sender<bool>,
    /// Makes join tokens.
    pub(super) tokens: Arc<dyn Fn() -> BoxFuture<'static, Outcome<String>> + Send + Sync>,
}

impl Handler for Service {
    fn handle(self: Arc<Self>, request: Request, fd: Option<OwnedFd>, answers: mpsc::Sender<Answer>) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let answer = match self.answer(request, fd, &answers).await {
                Ok(answer) => answer,
                Err(e) => Answer::error(e.message),
            };
            let _ = answers.send(answer).await;
        })
    }
}

/// Runs what must not stop halfway when the client goes.
async fn in_full<T: Send + 'static>(work: impl Future<Output = Outcome<T>> + Send + 'static) -> Outcome<T> {
    tokio::spawn(work).await.unwrap_or_else(|_| Err(Failure::new("the daemon failed while doing this; see its log")))
}

impl Service {
    async fn answer(self: &Arc<Self>, request: Request, fd: Option<OwnedFd>, answers: &mpsc::Sender<Answer>) -> Outcome<Answer> {
        match request {
            Request::Ping => Ok(Answer::done("")),
            Request::Status => Ok(Answer::Status(Box::new(self.node.status(self.mounts.list()).await))),
            Request::Events { since, follow } => {
                self.events(since, follow, answers).await;
                Ok(Answer::EndOfEvents)
            }
            Request::Token => Ok(Answer::Token { token: (self.tokens)().await? }),
            Request::DiskAdd { path, size_bytes } => {
                let this = self.clone();
                in_full(async move { this.disk_add(&path, size_bytes).await }).await
            }
            Request::DiskReplace { old, path, size_bytes } => {
                let this = self.clone();
                in_full(async move { this.disk_replace(DiskId(old), &path, size_bytes).await }).await
            }
            Request::Mkfs { name, copies, size_bytes } => {
                let node = self.node.clone();
                in_full(async move { node.mkfs(&name, copies, size_bytes).await }).await.map(Answer::done)
            }
            Request::Mount { fs, dir, options } => {
                let fd = fd.ok_or_else(|| Failure::new("the request came without the descriptor of /dev/fuse"))?;
                let mounts = self.mounts.clone();
                in_full(async move { mounts.serve(&fs, &dir, options, fd).await }).await?;
                Ok(Answer::done(""))
            }
            Request::Gc { fs, action, dry_run } => {
                Collector::answer(&self.node, &fs, action, dry_run, answers).await.map(Answer::Task)
            }
            Request::Scrub { action } => self.node.scrub(action).await.map(Answer::Task),
            Request::Fsck { fs } => self.node.fsck(&fs, answers).await.map(Answer::Task),
            Request::Sync => {
                self.node.sync().await?;
                Ok(Answer::done(""))
            }
            Request::Stop => {
                self.stop.send_replace(true);
                Ok(Answer::done("the daemon ends"))
            }
        }
    }

    async fn events(&self, mut since: u64, follow: bool, answers: &mpsc::Sender<Answer>) {
        let log = self.node.events();
        let mut newest = log.newest();
        loop {
            newest.mark_unchanged();
            for event in log.since(since) {
                since = event.seq;
                if answers.send(Answer::Event(event)).await.is_err() {
                    return;
                }
            }
            if !follow || newest.wait_for(|n| *n > since).await.is_err() {
                return;
            }
        }
    }

    async fn disk_replace(&self, old: DiskId, path: &Path, size: Option<u64>) -> Outcome<Answer> {
        let failed = self.node.replaceable(old)?;
        if !Settings::load(&self.config)?.disks.iter().any(|d| d.path == path) {
            self.disk_add(path, size).await?;
        }
        self.node.replace_disk(old, &setup::identity_of(path).await?).await?;
        self.drop_from_settings(&failed).await?;
        let path = path.display();
        Ok(Answer::done(format!(
            "{path} takes the place of {old} and gets all its copies; 'pulsar status' tells how far that is"
        )))
    }

    /// Takes a failed disk out of the settings: the one with its identity, or else the only one whose identity cannot be read.
    async fn drop_from_settings(&self, failed: &[u8; 16]) -> Outcome<()> {
        let mut settings = Settings::load(&self.config)?;
        let (mut its, mut unknown) = (Vec::new(), Vec::new());
        for disk in &settings.disks {
            match setup::identity_of(&disk.path).await {
                Ok(uuid) if uuid == *failed => its.push(disk.path.clone()),
                Ok(_) => {}
                Err(_) => unknown.push(disk.path.clone()),
            }
        }
        if its.is_empty() && unknown.len() == 1 {
            its = unknown;
        }
        settings.disks.retain(|d| !its.contains(&d.path));
        its.iter().for_each(|path| self.node.disk_forgotten(&path.display().to_string()));
        settings.save(&self.config)
    }

    async fn disk_add(&self, path: &Path, size: Option<u64>) -> Outcome<Answer> {
        let mut settings = Settings::load(&self.config)?;
        if settings.disks.iter().any(|d| d.path == path) {
            return Err(Failure::new(format!("{} is a disk of this node already", path.display())));
        }
        let cluster = self.node.cluster().view().borrow().config.cluster;
        let made = setup::label_disk(path, size, cluster).await?;
        settings.disks.push(DiskSetting { path: path.to_path_buf() });
        settings.save(&self.config)?;
        self.node.add_device(setup::open_labelled(path, cluster).await?).await?;
        Ok(Answer::done(format!("{} is part of the cluster, {}", path.display(), crate::size::human(made.bytes))))
    }
}
