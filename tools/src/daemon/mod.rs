//! `pulsard`: one process per node with all layers in it. This module is its life as a process: settings, log, signals,
//! and the outer parts (sockets, files, FUSE). What it is made of is [`node::Node`].

pub mod collector;
pub mod hint;
mod losses;
pub mod mounts;
pub mod node;
pub mod offline;
pub mod peers;
pub mod service;
pub mod setup;

use crate::control::server::Server;
use crate::dev::process::{Process, pid_file};
use crate::events::Kind;
use crate::failure::{Context, Failure, Outcome};
use crate::settings::Settings;
use cluster::shell::{launch, state};
use mounts::Mounts;
use node::{Node, Parts};
use service::Service;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

/// How long a device may take to appear when the daemon starts.
const DEVICE_TIME_MAX: Duration = Duration::from_secs(5);
/// How often that is looked at.
const DEVICE_POLL: Duration = Duration::from_millis(250);
/// How long a clean end may take before it is given up; what was acknowledged is safe in any case.
const END_TIME_MAX: Duration = Duration::from_secs(20);

/// Runs the daemon until it is told to end.
///
/// # Errors
/// If it cannot start, or the cluster's state on this machine can no longer be written.
pub fn run(config: &Path, netns: Option<&Path>, detached: bool) -> Outcome<()> {
    if detached {
        // Fails only if this process leads a group already; then it is apart anyway.
        let _ = nix::unistd::setsid();
    }
    if let Some(netns) = netns {
        // Before any thread is started.
        crate::dev::netns::enter(netns)?;
    }
    // A broken invariant of our own must not go on with half-changed state: this daemon ends, the others go on, and it comes
    // back with what is on its disks.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    let settings = Settings::load(config)?;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("pulsard")
        .build()
        .context(|| "cannot start".into())?;
    let ended = runtime.block_on(live(config, settings));
    // Threads that hang in a system call do not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(2));
    ended
}

/// Nanoseconds since 1970. It may jump; used for people and times of files only.
#[allow(clippy::disallowed_methods, reason = "the daemon's wall clock")]
fn wall_ns() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

async fn live(config: &Path, settings: Settings) -> Outcome<()> {
    let mut terminate = signal(SignalKind::terminate()).context(|| "cannot watch for signals".into())?;
    let mut interrupt = signal(SignalKind::interrupt()).context(|| "cannot watch for signals".into())?;
    // A terminal that closes must not end the daemon.
    let mut hangup = signal(SignalKind::hangup()).context(|| "cannot watch for signals".into())?;

    // Its lock keeps a second daemon out.
    let state = state::open(&settings.state_dir).context(|| "cannot use the state directory".into())?;
    let pid_file = pid_file(&settings);
    Process::this().write(&pid_file).context(|| format!("cannot write {}", pid_file.display()))?;
    let cluster_id = state.identity.cluster;
    let listen: SocketAddr = settings.listen.parse().context(|| format!("listen = \"{}\"", settings.listen))?;

    let mut devices = Vec::new();
    let mut unusable = Vec::new();
    for disk in &settings.disks {
        // At boot devices may come late; a disk that is missing is given up, for good.
        let mut waited = Duration::ZERO;
        while waited < DEVICE_TIME_MAX && !disk.path.exists() {
            tokio::time::sleep(DEVICE_POLL).await;
            waited += DEVICE_POLL;
        }
        match setup::open_labelled(&disk.path, cluster_id).await {
            Ok(device) => devices.push(device),
            Err(e) => unusable.push((disk.path.display().to_string(), e.message)),
        }
    }
    // After the disks: nobody waits for this node's copies before it has them.
    let running = Arc::new(launch::launch(state, listen, Some(settings.listen.clone())).await.context(|| "cannot start".into())?);
    let leader = {
        let cluster = Arc::downgrade(&running.cluster);
        Arc::new(move || cluster.upgrade()?.leader())
    };
    let node = Node::start(Parts {
        cluster: running.cluster.clone(),
        leader,
        devices,
        cache_bytes: usize::try_from(settings.cache_mib).unwrap_or(usize::MAX).saturating_mul(1 << 20),
        wall_ns: Arc::new(wall_ns),
        random: Arc::new(|| cluster::shell::identity::random().unwrap_or_default()),
    })
    .await?;
    for (path, why) in unusable {
        node.disk_failed(path, why);
    }
    let mounts = Mounts::new(node.clone(), &settings.state_dir);
    let (stop, mut stopped) = watch::channel(false);
    let tokens = {
        let running = running.clone();
        Arc::new(move || -> cluster::BoxFuture<'static, Outcome<String>> {
            let running = running.clone();
            Box::pin(async move {
                let token = running.token(state::TOKEN_LIFETIME).await;
                Ok(token.context(|| "cannot make a join token".into())?.print())
            })
        })
    };
    let service = Arc::new(Service { node: node.clone(), mounts: mounts.clone(), config: config.to_path_buf(), stop, tokens });
    let server = Server::bind(&settings.control)?;
    let mut failure = running.cluster.failure();
    node.events().add(Kind::Daemon, false, format!("pulsard runs, version {}", env!("CARGO_PKG_VERSION")));

    let restore = tokio::spawn({
        let mounts = mounts.clone();
        async move { mounts.restore().await }
    });
    let serving = server.run(service.clone());
    tokio::pin!(serving);
    let ended = loop {
        tokio::select! {
            biased;
            _ = terminate.recv() => break Ok(()),
            _ = interrupt.recv() => break Ok(()),
            _ = stopped.wait_for(|s| *s) => break Ok(()),
            _ = failure.wait_for(Option::is_some) => {
                let why = failure.borrow().clone().unwrap_or_default();
                break Err(Failure::new(format!("the cluster's state on this machine cannot be written: {why}")));
            }
            _ = hangup.recv() => {}
            () = &mut serving => break Err(Failure::new("the control socket failed")),
        }
    };
    restore.abort();
    node.events().add(Kind::Daemon, false, "pulsard ends");
    let end = async {
        mounts.stop().await;
        node.shutdown().await;
        running.shutdown().await;
    };
    if tokio::time::timeout(END_TIME_MAX, end).await.is_err() {
        tracing::warn!("the clean end took too long and is given up; what was acknowledged is safe");
    }
    let _ = std::fs::remove_file(&pid_file);
    ended
}
