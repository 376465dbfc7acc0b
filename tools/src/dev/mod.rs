//! `pulsar dev`: a whole cluster on this machine, to try and to test. It does what a person would do on several machines,
//! by the same commands (`init`, `join`, `mkfs`, `mount`), run from the very program that was called; so nothing else has
//! to be built or installed.
//!
//! Everything is kept under one directory: mounts at `n1`, `n2` …, settings, disks, sockets, logs and process numbers
//! under `state`. `down` takes away only what `up` made, in whatever state it is.

pub mod netns;
pub mod process;

use crate::control::client::{Client, QUICK};
use crate::control::{Answer, Request};
use crate::failure::{Context, EXIT_USAGE, Failure, Outcome};
use crate::mount;
use crate::settings::{Settings, write_atomically};
use crate::size::Size;
use crate::status::{Level, Status};
use clap::{Args, Subcommand};
use netns::Network;
use nix::sys::signal::Signal;
use process::Process;
use serde::{Deserialize, Serialize};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The name of the file system of a local cluster.
pub const FS_NAME: &str = "dev";

/// `pulsar dev`.
#[derive(Clone, Debug, Args)]
pub struct DevArgs {
    /// The cluster's directory
    #[arg(long, global = true, default_value = "pulsar-dev")]
    dir: PathBuf,
    #[command(subcommand)]
    verb: DevVerb,
}

#[derive(Clone, Debug, Subcommand)]
enum DevVerb {
    /// Make a cluster, start and mount it; or start again what is down of one that is there
    Up(UpArgs),
    /// Stop the cluster and remove all of it, data included
    Down {
        /// Keep disks and settings, so that 'up' brings it back
        #[arg(long)]
        keep: bool,
    },
    /// How each node is, and the cluster's own status
    Status {
        /// The cluster's status as JSON
        #[arg(long)]
        json: bool,
    },
    /// Kill daemons at once (SIGKILL), all those named together
    Kill(Nodes),
    /// Stop daemons cleanly
    Stop(Nodes),
    /// Start daemons, and mount again [default: all that are down]
    Start {
        /// Nodes, by number
        nodes: Vec<usize>,
    },
    /// Freeze daemons (SIGSTOP)
    Pause(Nodes),
    /// Let frozen daemons go on (SIGCONT)
    Resume(Nodes),
    /// Cut nodes off the network (needs 'up --netns')
    Cut(Nodes),
    /// Connect nodes to the network again
    Heal(Nodes),
}

#[derive(Clone, Debug, Args)]
struct Nodes {
    /// Nodes, by number
    #[arg(required = true)]
    nodes: Vec<usize>,
}

/// `pulsar dev up`.
#[derive(Clone, Debug, Args)]
pub struct UpArgs {
    /// Nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=9))]
    nodes: u8,
    /// Copies of every block [default: 2, or 1 on a single node]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=8))]
    copies: Option<u8>,
    /// Size of each node's disk, a sparse file
    #[arg(long, default_value = "8G")]
    disk_size: Size,
    /// Give every node a network namespace of its own, so that it can be cut off
    #[arg(long)]
    netns: bool,
    /// Memory for each node's block cache, in MiB
    #[arg(long, default_value_t = 128, hide_short_help = true)]
    cache_mib: u32,
    /// How quickly silence is taken for death: quick, normal, patient. A dead process is noticed at once in any case
    #[arg(long, default_value = "normal", hide_short_help = true)]
    timings: String,
}

/// What is remembered about a local cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    schema_version: u32,
    nodes: usize,
    copies: u8,
    netns: bool,
    /// Whether `up` came to its end once.
    complete: bool,
}

const RECORD: &str = "dev.json";
/// How many ports are tried that are free for UDP, but not for TCP.
const PORT_TRIES_MAX: u32 = 100;

/// A local cluster.
struct Dev {
    dir: PathBuf,
    exe: PathBuf,
    record: Record,
}

/// Runs a verb.
///
/// # Errors
/// What went wrong and what to do.
pub fn run(args: &DevArgs) -> Outcome<u8> {
    let dir = std::path::absolute(&args.dir).context(|| format!("bad path {}", args.dir.display()))?;
    match &args.verb {
        DevVerb::Up(up) => Dev::up(&dir, up)?,
        DevVerb::Down { keep } => Dev::down(&dir, *keep)?,
        verb => Dev::open(&dir)?.act(verb)?,
    }
    Ok(0)
}

/// Says clearly what is missing, before anything is made.
fn preflight(netns: bool) -> Outcome<()> {
    mount::check_possible()?;
    if netns {
        netns::check_possible()?;
    }
    Ok(())
}

impl Dev {
    fn open(dir: &Path) -> Outcome<Dev> {
        let dir = dir.canonicalize().map_err(|e| {
            Failure::new(format!(
                "there is no local cluster in {}: {e}; make one with 'pulsar dev up', or name it with --dir",
                dir.display()
            ))
        })?;
        let file = dir.join(RECORD);
        let text = std::fs::read(&file).map_err(|e| {
            Failure::new(format!(
                "there is no local cluster in {} ({RECORD}: {e}); make one with 'pulsar dev up', or name it with --dir",
                dir.display()
            ))
        })?;
        let record = serde_json::from_slice(&text).context(|| format!("{} is damaged", file.display()))?;
        let exe = std::env::current_exe().context(|| "cannot find this program".into())?;
        Ok(Dev { dir, exe, record })
    }

    fn state(&self, node: usize) -> PathBuf {
        self.dir.join("state").join(format!("n{node}"))
    }

    fn config(&self, node: usize) -> PathBuf {
        self.state(node).join("pulsar.toml")
    }

    fn disk(&self, node: usize) -> PathBuf {
        self.state(node).join("disk.img")
    }

    fn mount_dir(&self, node: usize) -> PathBuf {
        self.dir.join(format!("n{node}"))
    }

    fn network(&self) -> Option<Network> {
        self.record.netns.then(|| Network::of(&self.dir))
    }

    fn netns(&self, node: usize) -> Option<PathBuf> {
        self.network().map(|n| n.path(node))
    }

    fn settings(&self, node: usize) -> Outcome<Settings> {
        Settings::load(&self.config(node))
    }

    fn client(&self, node: usize) -> Outcome<Client> {
        Ok(Client::new(self.settings(node)?.control))
    }

    fn process(&self, node: usize) -> Option<Process> {
        process::daemon_of(&self.settings(node).ok()?)
    }

    fn all(&self) -> std::ops::RangeInclusive<usize> {
        1..=self.record.nodes
    }

    fn known(&self, nodes: &[usize]) -> Outcome<()> {
        match nodes.iter().find(|n| !self.all().contains(n)) {
            Some(n) => Err(Failure::new(format!("there is no node {n}; there are 1 to {}", self.record.nodes)).code(EXIT_USAGE)),
            None => Ok(()),
        }
    }

    fn save(&self) -> Outcome<()> {
        let what = || format!("cannot write {}", self.dir.join(RECORD).display());
        let text = serde_json::to_vec_pretty(&self.record).context(what)?;
        write_atomically(&self.dir.join(RECORD), &text, 0o644).context(what)
    }

    /// Runs this program for a node as a person would on its machine; returns what it printed.
    fn command(&self, node: usize, args: &[&str]) -> Outcome<String> {
        let mut command = Command::new(&self.exe);
        command.arg("--config").arg(self.config(node));
        if let Some(netns) = self.netns(node) {
            command.arg("--in-netns").arg(netns);
        }
        let output = command.args(args).output().context(|| format!("cannot run {}", self.exe.display()))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let why = String::from_utf8_lossy(&output.stderr);
        let verb = args.first().copied().unwrap_or_default();
        Err(Failure::new(format!("n{node}: 'pulsar {verb}' failed: {}", why.trim().trim_start_matches("pulsar: "))))
    }

    fn up(dir: &Path, args: &UpArgs) -> Outcome<()> {
        preflight(args.netns)?;
        std::fs::create_dir_all(dir).context(|| format!("cannot make {}", dir.display()))?;
        if dir.join(RECORD).exists() {
            let dev = Dev::open(dir)?;
            if dev.record.complete {
                preflight(dev.record.netns)?;
                return dev.up_again();
            }
            say!("removing what an interrupted 'dev up' left");
            Dev::down(dir, false)?;
            std::fs::create_dir_all(dir).context(|| format!("cannot make {}", dir.display()))?;
        }
        let dir = dir.canonicalize().context(|| format!("cannot find {}", dir.display()))?;
        if std::fs::read_dir(&dir).context(|| format!("cannot read {}", dir.display()))?.next().is_some() {
            return Err(Failure::new(format!("{} is not empty; name another directory with --dir", dir.display())));
        }
        let nodes = usize::from(args.nodes);
        let copies = args.copies.unwrap_or_else(|| 2.min(args.nodes));
        if usize::from(copies) > nodes {
            return Err(Failure::new(format!("{copies} copies need {copies} nodes; there are {nodes}")).code(EXIT_USAGE));
        }
        let exe = std::env::current_exe().context(|| "cannot find this program".into())?;
        let mut dev = Dev { dir, exe, record: Record { schema_version: 1, nodes, copies, netns: args.netns, complete: false } };
        dev.save()?;
        if let Err(e) = dev.make(args) {
            return Err(Failure::new(format!(
                "{}\nwhat is there stays for you to look at (logs: {}); 'pulsar dev down --dir {}' removes it",
                e.message,
                dev.dir.join("state/n*/data/pulsard.log").display(),
                dev.dir.display()
            )));
        }
        Ok(())
    }

    fn make(&mut self, args: &UpArgs) -> Outcome<()> {
        if let Some(network) = self.network() {
            network.up(self.record.nodes)?;
        }
        let addresses = self.addresses()?;
        let mut token = String::new();
        for (node, address) in self.all().zip(&addresses) {
            let state = self.state(node);
            std::fs::create_dir_all(&state).context(|| format!("cannot make {}", state.display()))?;
            let name = format!("n{node}");
            let disk = format!("{}:{}", self.disk(node).display(), args.disk_size.0);
            let (data, control) = (state.join("data").display().to_string(), state.join("control.sock").display().to_string());
            let cache = args.cache_mib.to_string();
            let mut words = match node {
                1 => vec!["init", "--cluster", "dev", "--timings", &args.timings],
                _ => vec!["join", &token],
            };
            words.extend(["--name", &name, "--listen", address, "--state-dir", &data, "--control", &control]);
            words.extend(["--disk", &disk, "--cache-mib", &cache, "--start"]);
            self.command(node, &words)?;
            if node == 1 {
                token = self.command(1, &["token"])?.trim().to_string();
            }
            say!("n{node} runs at {address}");
        }
        self.wait_for("all nodes and disks are there", Duration::from_secs(60), |s| {
            let up = s.nodes.iter().filter(|n| n.up).count();
            up == self.record.nodes && s.disks.len() == self.record.nodes && s.recovered == "fs" && s.current
        })?;
        let copies = self.record.copies.to_string();
        self.command(1, &["mkfs", FS_NAME, "--copies", &copies])?;
        say!("file system '{FS_NAME}' made, {copies} copies of every block");
        for node in self.all() {
            self.mount(node)?;
        }
        self.record.complete = true;
        self.save()?;
        self.hints();
        Ok(())
    }

    /// Addresses that are free now.
    fn addresses(&self) -> Outcome<Vec<String>> {
        if let Some(network) = self.network() {
            return Ok(self.all().map(|n| format!("{}:{}", network.address(n), crate::settings::PORT)).collect());
        }
        // All are held at once, so that they differ.
        let ports: Vec<FreePort> = self.all().map(|_| FreePort::find()).collect::<Outcome<_>>()?;
        Ok(ports.iter().map(|p| p.addr.to_string()).collect())
    }

    fn up_again(&self) -> Outcome<()> {
        if let Some(network) = self.network() {
            network.up(self.record.nodes)?;
        }
        let down: Vec<usize> = self.all().filter(|n| self.process(*n).is_none()).collect();
        if down.is_empty() {
            say!("the cluster is up already");
        }
        self.start(&down)?;
        self.hints();
        Ok(())
    }

    /// Mounts, if it is not mounted.
    fn mount(&self, node: usize) -> Outcome<()> {
        let dir = self.mount_dir(node);
        if mount::mounted_at(&dir)?.is_some() {
            return Ok(());
        }
        std::fs::create_dir_all(&dir).context(|| format!("cannot make {}", dir.display()))?;
        self.command(node, &["mount", FS_NAME, &dir.display().to_string()])?;
        say!("n{node} mounted at {}", dir.display());
        Ok(())
    }

    /// The report of a node, if it gives one.
    fn status_of(&self, node: usize) -> Option<Status> {
        match self.client(node).ok()?.try_call(Request::Status, QUICK) {
            Ok(Answer::Status(status)) => Some(*status),
            _ => None,
        }
    }

    fn wait_for(&self, what: &str, limit: Duration, enough: impl Fn(&Status) -> bool) -> Outcome<()> {
        let step = Duration::from_millis(50);
        let mut waited = Duration::ZERO;
        loop {
            let status = self.all().find_map(|n| self.status_of(n).filter(|s| s.current)).or_else(|| self.status_of(1));
            if status.as_ref().is_some_and(&enough) {
                return Ok(());
            }
            if waited >= limit {
                let last = status.map_or_else(|| "no daemon answers".into(), |s| crate::cli::render_status(&s));
                return Err(Failure::new(format!("waited {} s until {what}, in vain:\n{last}", limit.as_secs())));
            }
            std::thread::sleep(step);
            waited += step;
        }
    }

    fn hints(&self) {
        let dir = self.dir.display();
        let exe = self.exe.display();
        say!(
            "\nThe cluster is up: {} nodes, {} copies, mounted at {dir}/n1 … n{}. To try:",
            self.record.nodes,
            self.record.copies,
            self.record.nodes
        );
        let pulsar = format!("{exe} dev --dir {dir}");
        say!("  echo hello > {dir}/n1/hello; cat {dir}/n{}/hello", self.record.nodes.min(2));
        say!("  {pulsar} status");
        if self.record.nodes > 2 {
            say!("  {pulsar} kill 2; echo still here > {dir}/n1/a; cat {dir}/n3/a; {pulsar} start 2");
        }
        if self.record.netns {
            say!("  {pulsar} cut 3; {pulsar} status; {pulsar} heal 3");
        }
        say!("  {exe} --config {}/state/n1/pulsar.toml events --follow", self.dir.display());
        say!("  {pulsar} down");
    }

    fn act(&self, verb: &DevVerb) -> Outcome<()> {
        match verb {
            DevVerb::Status { json } => return self.status(*json),
            DevVerb::Start { nodes } => {
                self.known(nodes)?;
                let down: Vec<usize> = self.all().filter(|n| self.process(*n).is_none()).collect();
                return self.start(if nodes.is_empty() { &down } else { nodes });
            }
            _ => {}
        }
        let (DevVerb::Kill(Nodes { nodes })
        | DevVerb::Stop(Nodes { nodes })
        | DevVerb::Pause(Nodes { nodes })
        | DevVerb::Resume(Nodes { nodes })
        | DevVerb::Cut(Nodes { nodes })
        | DevVerb::Heal(Nodes { nodes })) = verb
        else {
            return Ok(());
        };
        self.known(nodes)?;
        match verb {
            DevVerb::Kill(_) => {
                self.signal(nodes, Signal::SIGKILL)?;
                for node in nodes {
                    if let Ok(settings) = self.settings(*node)
                        && let Some(process) = Process::read(&process::pid_file(&settings))
                        && !process.wait_gone(Duration::from_secs(10))
                    {
                        return Err(Failure::new(format!("n{node}: process {} does not end; see 'dmesg'", process.pid)));
                    }
                    say!("n{node} killed");
                }
            }
            DevVerb::Stop(_) => {
                for node in nodes {
                    let stopped = process::stop_daemon(&self.settings(*node)?, Duration::from_secs(30))?;
                    say!("n{node} {}", if stopped { "stopped" } else { "did not run" });
                }
            }
            DevVerb::Pause(_) | DevVerb::Resume(_) => {
                let pause = matches!(verb, DevVerb::Pause(_));
                self.signal(nodes, if pause { Signal::SIGSTOP } else { Signal::SIGCONT })?;
                for node in nodes {
                    say!("n{node} {}", if pause { "frozen" } else { "goes on" });
                }
            }
            DevVerb::Cut(_) | DevVerb::Heal(_) => {
                let network = self.network().ok_or_else(|| {
                    Failure::new("this cluster has no network of its own; make it with 'pulsar dev up --netns'").code(EXIT_USAGE)
                })?;
                let heal = matches!(verb, DevVerb::Heal(_));
                for node in nodes {
                    network.set_link(*node, heal)?;
                    say!("n{node} {}", if heal { "connected" } else { "cut off" });
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn signal(&self, nodes: &[usize], signal: Signal) -> Outcome<()> {
        let mut processes = Vec::new();
        for node in nodes {
            processes.push(self.process(*node).ok_or_else(|| Failure::new(format!("n{node} does not run")))?);
        }
        processes.into_iter().try_for_each(|p| p.signal(signal))
    }

    /// Starts daemons; each mounts again what it had mounted. A node alone cannot serve, so this waits only if there is
    /// a majority.
    fn start(&self, nodes: &[usize]) -> Outcome<()> {
        for node in nodes {
            let started = process::start_daemon(&self.exe, &self.config(*node), self.netns(*node).as_deref())?;
            say!("n{node} {}", if started { "runs" } else { "ran already" });
        }
        let running = self.all().filter(|n| self.process(*n).is_some()).count();
        if running * 2 <= self.record.nodes {
            say!("only {running} of {} nodes run; nothing is served until a majority does", self.record.nodes);
            return Ok(());
        }
        self.wait_for("the cluster serves again", Duration::from_secs(60), |s| {
            s.current && s.recovered == "fs" && nodes.iter().all(|n| s.nodes.iter().any(|x| x.name == format!("n{n}") && x.up))
        })?;
        for node in nodes {
            let mut waited = Duration::ZERO;
            let dir = self.mount_dir(*node);
            let served = |s: &Status| s.mounts.iter().any(|m| Path::new(&m.dir) == dir);
            while !self.status_of(*node).is_some_and(|s| served(&s)) {
                let step = Duration::from_millis(50);
                std::thread::sleep(step);
                waited += step;
                if waited > Duration::from_secs(5) {
                    // It had not been mounted when the daemon ended.
                    self.mount(*node)?;
                    break;
                }
            }
            say!("n{node} mounted at {}", dir.display());
        }
        Ok(())
    }

    fn status(&self, json: bool) -> Outcome<()> {
        let reports: Vec<Option<Status>> = self.all().map(|n| self.status_of(n)).collect();
        let best = reports.iter().flatten().find(|s| s.current).or_else(|| reports.iter().flatten().next());
        if json {
            let text = serde_json::to_string_pretty(&best).context(|| "cannot make JSON".into())?;
            say!("{text}");
            return Ok(());
        }
        let network = self.network();
        for (node, report) in self.all().zip(&reports) {
            let process = match self.process(node) {
                None => "not running".into(),
                Some(p) if p.paused() => format!("frozen, process {}", p.pid),
                Some(p) => format!("running, process {}", p.pid),
            };
            let member = match report {
                Some(s) if s.current => "member",
                Some(_) => "cut off",
                None => "no answer",
            };
            let link = match network.as_ref().and_then(|n| n.linked(node)) {
                Some(false) => ", cable out",
                _ => "",
            };
            let mounted = match mount::mounted_at(&self.mount_dir(node))? {
                Some(_) if report.is_some() => "mounted",
                Some(_) => "mount without daemon",
                None => "not mounted",
            };
            say!("n{node}  {process}, {member}{link}, {mounted} at {}", self.mount_dir(node).display());
        }
        say!();
        match best {
            Some(status) => say!("{}", crate::cli::render_status(status)),
            None => say!("no daemon answers; logs are in {}", self.dir.join("state/n*/data/pulsard.log").display()),
        }
        if best.is_none_or(|s| s.worst() >= Level::Bad) {
            say!("\nstart what is down with '{} dev --dir {} start'", self.exe.display(), self.dir.display());
        }
        Ok(())
    }

    /// Stops and removes. Works from any state, and again.
    fn down(dir: &Path, keep: bool) -> Outcome<()> {
        if !dir.join(RECORD).exists() {
            say!("there is no local cluster in {}", dir.display());
            return Ok(());
        }
        let dev = Dev::open(dir)?;
        let mut failures = Vec::new();
        // All are told at once: those that end last would otherwise wait for a majority that has gone.
        for process in dev.all().filter_map(|n| dev.process(n)) {
            let signal = if keep { Signal::SIGTERM } else { Signal::SIGKILL };
            let _ = process.signal(signal);
            let _ = process.signal(Signal::SIGCONT);
        }
        for node in dev.all() {
            if let Ok(settings) = dev.settings(node)
                && let Err(e) = process::stop_daemon(&settings, Duration::from_secs(if keep { 20 } else { 5 }))
            {
                failures.push(e.message);
            }
        }
        for mounted in mount::mounted()?.iter().rev().filter(|m| m.dir.starts_with(&dev.dir)) {
            if let Err(e) = mount::unmount_lazily(&mounted.dir) {
                failures.push(e.message);
            }
        }
        if let Some(network) = dev.network()
            && let Err(e) = network.down()
        {
            failures.push(e.message);
        }
        if !failures.is_empty() {
            return Err(Failure::new(failures.join("\n")));
        }
        if keep {
            say!("stopped; 'pulsar dev up --dir {}' brings it back", dev.dir.display());
            return Ok(());
        }
        let remove = |result: std::io::Result<()>, path: &Path| match result {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Failure::new(format!("cannot remove {}: {e}", path.display())))
            }
            _ => Ok(()),
        };
        for node in dev.all() {
            let path = dev.mount_dir(node);
            remove(std::fs::remove_dir(&path), &path)?;
        }
        let state = dev.dir.join("state");
        remove(std::fs::remove_dir_all(&state), &state)?;
        remove(std::fs::remove_file(dev.dir.join(RECORD)), &dev.dir.join(RECORD))?;
        // Kept if a person has put something there.
        let _ = std::fs::remove_dir(&dev.dir);
        say!("{} is gone, with all its processes, mounts and disks", dev.dir.display());
        Ok(())
    }
}

/// A port that is free for UDP and TCP, as a daemon needs it. Held while this lives.
struct FreePort {
    addr: SocketAddr,
    _udp: UdpSocket,
    _tcp: TcpListener,
}

impl FreePort {
    fn find() -> Outcome<FreePort> {
        let what = || "cannot find a port on 127.0.0.1 that is free for UDP and TCP".to_string();
        // A port that is free for one may be taken for the other: then another one is tried.
        let mut tries = 0;
        loop {
            tries += 1;
            let udp = UdpSocket::bind("127.0.0.1:0").context(what)?;
            let addr = udp.local_addr().context(what)?;
            match TcpListener::bind(addr) {
                Ok(tcp) => return Ok(FreePort { addr, _udp: udp, _tcp: tcp }),
                Err(_) if tries < PORT_TRIES_MAX => {}
                Err(e) => return Err(e).context(what),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_not_ours_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("precious"), "x").unwrap();
        Dev::down(dir.path(), false).unwrap();
        assert!(dir.path().join("precious").exists());
        assert!(Dev::open(dir.path()).is_err_and(|e| e.message.contains("dev up")));
    }

    #[test]
    fn down_takes_away_what_is_left_of_an_interrupted_up() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("c");
        std::fs::create_dir_all(base.join("state/n1")).unwrap();
        std::fs::create_dir_all(base.join("n1")).unwrap();
        let record = Record { schema_version: 1, nodes: 3, copies: 2, netns: false, complete: false };
        std::fs::write(base.join(RECORD), serde_json::to_vec(&record).unwrap()).unwrap();
        Dev::down(&base, false).unwrap();
        assert!(!base.exists());
        Dev::down(&base, false).unwrap();
    }
}
