//! Real clusters for tests: `pulsar dev up` in a directory of its own, with daemons, mounts and (if wished) networks that
//! can be cut. Whatever happens, a panic included, `Drop` ends what was started: by `dev down`, and after that by the
//! process numbers and mounts that are left in its directory.
//!
//! The directory is made in `$PULSAR_TEST_DIR`, or in `/var/tmp`. Needs root and /dev/fuse.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Longest time for an ordinary command.
const COMMAND_TIME: Duration = Duration::from_secs(120);

/// Time on the clock that never stops.
#[must_use]
pub fn clock() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
}

/// What a command left behind.
#[derive(Debug)]
pub struct Output {
    /// Its exit code; -1 if it was ended by a signal.
    pub code: i32,
    /// What it printed.
    pub text: String,
    /// What it complained of.
    pub errors: String,
}

/// Runs a command for at most `time`; past it, it is killed.
pub fn run(mut command: Command, time: Duration) -> io::Result<Output> {
    let shown = format!("{command:?}");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).spawn()?;
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    let drain = |pipe: Option<Box<dyn io::Read + Send>>| {
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = pipe.map(|mut p| io::Read::read_to_end(&mut p, &mut text));
            let _ = sender.send(String::from_utf8_lossy(&text).into_owned());
        });
        receiver
    };
    let out = drain(child.stdout.take().map(|p| Box::new(p) as Box<dyn io::Read + Send>));
    let err = drain(child.stderr.take().map(|p| Box::new(p) as Box<dyn io::Read + Send>));
    let end = clock() + time;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if clock() > end {
            // Its whole process group, which is its own: what it started goes with it.
            let _ = nix::sys::signal::killpg(pid, nix::sys::signal::Signal::SIGKILL);
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{shown} took longer than {time:?}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    // Daemons that it left running do not hold its pipes; if they do, what came so far is lost, not the test.
    let grace = Duration::from_secs(5);
    Ok(Output {
        code: status.code().unwrap_or(-1),
        text: out.recv_timeout(grace).unwrap_or_default(),
        errors: err.recv_timeout(grace).unwrap_or_default(),
    })
}

/// Runs a program, which must succeed; returns what it printed.
///
/// # Panics
/// If it fails or takes longer than two minutes.
#[track_caller]
pub fn sh(dir: &Path, line: &str) -> String {
    let mut command = Command::new("/bin/sh");
    command.args(["-euc", line]).current_dir(dir).env_remove("CARGO_TARGET_DIR");
    // Whatever this machine's user has set up for git stays out of it.
    command.envs([
        ("GIT_CONFIG_NOSYSTEM", "1"),
        ("GIT_CONFIG_GLOBAL", "/dev/null"),
        ("GIT_AUTHOR_NAME", "t"),
        ("GIT_AUTHOR_EMAIL", "t@t"),
        ("GIT_COMMITTER_NAME", "t"),
        ("GIT_COMMITTER_EMAIL", "t@t"),
    ]);
    match run(command, COMMAND_TIME) {
        Ok(output) if output.code == 0 => output.text,
        Ok(output) => panic!("in {}: '{line}' failed ({}):\n{}{}", dir.display(), output.code, output.text, output.errors),
        Err(error) => panic!("in {}: {error}", dir.display()),
    }
}

/// Runs a closure on a thread of its own, for at most `time`: a file system that hangs must not hang the tests.
///
/// # Panics
/// If it panics or does not end in time.
#[track_caller]
pub fn within<T: Send + 'static>(time: Duration, what: &str, body: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let _ = sender.send(body());
    });
    match receiver.recv_timeout(time) {
        Ok(value) => value,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{what} took longer than {time:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("the thread ended without a result"),
        },
    }
}

/// How a cluster is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// Nodes.
    pub nodes: usize,
    /// Size of each node's disk, as `dev up` takes it.
    pub disk_size: &'static str,
    /// Whether each node has a network namespace of its own.
    pub netns: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { nodes: 3, disk_size: "1G", netns: false }
    }
}

/// A running cluster.
pub struct RealCluster {
    dir: PathBuf,
    pulsar: PathBuf,
    nodes: usize,
}

impl RealCluster {
    /// Makes and mounts a cluster.
    ///
    /// # Panics
    /// If something that it needs is missing, or it does not come up; says why.
    #[must_use]
    #[track_caller]
    pub fn up(options: &Options) -> RealCluster {
        assert!(nix::unistd::Uid::effective().is_root(), "tests of real clusters need root's rights: run them with sudo");
        assert!(Path::new("/dev/fuse").exists(), "tests of real clusters need /dev/fuse: modprobe fuse");
        let pulsar = program();
        let base = std::env::var_os("PULSAR_TEST_DIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let dir = tempfile::Builder::new().prefix("pulsar-test.").tempdir_in(base).expect("a directory for the cluster");
        let cluster = RealCluster { dir: dir.keep(), pulsar, nodes: options.nodes };
        let nodes = options.nodes.to_string();
        let mut args = vec!["up", "--nodes", &nodes, "--disk-size", options.disk_size];
        if options.netns {
            args.push("--netns");
        }
        cluster.dev(&args);
        cluster
    }

    /// A node's mount.
    #[must_use]
    pub fn mount(&self, node: usize) -> PathBuf {
        self.dir.join(format!("n{node}"))
    }

    /// All mounts.
    #[must_use]
    pub fn mounts(&self) -> Vec<PathBuf> {
        (1..=self.nodes).map(|n| self.mount(n)).collect()
    }

    /// A node's disk, a file.
    #[must_use]
    pub fn disk(&self, node: usize) -> PathBuf {
        self.dir.join(format!("state/n{node}/disk.img"))
    }

    /// The cluster's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A node's settings.
    #[must_use]
    pub fn config(&self, node: usize) -> PathBuf {
        self.dir.join(format!("state/n{node}/pulsar.toml"))
    }

    /// The program under test.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.pulsar
    }

    /// Runs `pulsar dev …`.
    ///
    /// # Panics
    /// If it fails.
    #[track_caller]
    pub fn dev(&self, args: &[&str]) -> String {
        let mut command = Command::new(&self.pulsar);
        command.arg("dev").args(args).arg("--dir").arg(&self.dir);
        match run(command, COMMAND_TIME) {
            Ok(output) if output.code == 0 => output.text,
            Ok(output) => {
                panic!("pulsar dev {}: exit {}\n{}{}\n{}", args.join(" "), output.code, output.text, output.errors, self.logs())
            }
            Err(error) => panic!("{error}\n{}", self.logs()),
        }
    }

    /// Runs `pulsar …` for a node.
    pub fn pulsar(&self, node: usize, args: &[&str]) -> io::Result<Output> {
        let mut command = Command::new(&self.pulsar);
        command.arg("--config").arg(self.config(node)).args(args);
        run(command, COMMAND_TIME)
    }

    /// The status as a node reports it; `None` if it does not answer.
    #[must_use]
    pub fn status(&self, node: usize) -> Option<serde_json::Value> {
        let output = self.pulsar(node, &["status", "--json"]).ok()?;
        serde_json::from_str(&output.text).ok()
    }

    /// Waits until a node's status is as wished.
    ///
    /// # Panics
    /// If it is not in time; shows the last one.
    #[track_caller]
    pub fn wait_status(&self, node: usize, what: &str, time: Duration, good: impl Fn(&serde_json::Value) -> bool) {
        let end = clock() + time;
        loop {
            let status = self.status(node);
            if status.as_ref().is_some_and(&good) {
                return;
            }
            if clock() > end {
                let shown = status.map(|s| format!("{s:#}")).unwrap_or_else(|| "no answer".into());
                panic!("n{node} does not say '{what}' within {time:?}; its status:\n{shown}\n{}", self.logs());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until every node is up and every copy in sync.
    #[track_caller]
    pub fn wait_healthy(&self) {
        for node in 1..=self.nodes {
            self.wait_status(node, "all is well", Duration::from_secs(90), |s| {
                s["data_safe"]["level"] == "ok"
                    && s["writes_accepted"]["level"] == "ok"
                    && s["current"] == true
                    && s["nodes"].as_array().is_some_and(|n| n.iter().all(|n| n["up"] == true))
                    && s["mirrors"]
                        .as_array()
                        .into_iter()
                        .flatten()
                        .all(|m| m["copies"].as_array().into_iter().flatten().all(|c| c["state"] == "in_sync"))
            });
        }
    }

    /// Kills daemons, all at once.
    #[track_caller]
    pub fn kill(&self, nodes: &[usize]) {
        self.verb("kill", nodes);
    }

    /// Starts daemons, and mounts again.
    #[track_caller]
    pub fn start(&self, nodes: &[usize]) {
        self.verb("start", nodes);
    }

    /// Stops daemons cleanly.
    #[track_caller]
    pub fn stop(&self, nodes: &[usize]) {
        self.verb("stop", nodes);
    }

    /// A verb of `pulsar dev` on nodes.
    #[track_caller]
    pub fn verb(&self, verb: &str, nodes: &[usize]) {
        let nodes: Vec<String> = nodes.iter().map(ToString::to_string).collect();
        let mut args = vec![verb];
        args.extend(nodes.iter().map(String::as_str));
        self.dev(&args);
    }

    /// Checks the disks of the stopped cluster.
    ///
    /// # Panics
    /// If they are not clean.
    #[track_caller]
    pub fn fsck_stopped(&self) {
        let mut command = Command::new(&self.pulsar);
        command.arg0("fsck.pulsarfs").arg("-n").args((1..=self.nodes).map(|n| self.disk(n)));
        let output = run(command, COMMAND_TIME).expect("fsck.pulsarfs runs");
        assert_eq!(output.code, 0, "fsck finds:\n{}{}", output.text, output.errors);
    }

    /// Checks the running file system.
    ///
    /// # Panics
    /// If it is not clean.
    #[track_caller]
    pub fn fsck(&self, node: usize) {
        let output = self.pulsar(node, &["fsck", "dev"]).expect("pulsar fsck runs");
        assert_eq!(output.code, 0, "fsck finds:\n{}{}", output.text, output.errors);
    }

    /// The ends of the daemons' logs.
    #[must_use]
    pub fn logs(&self) -> String {
        let mut out = String::new();
        for node in 1..=self.nodes {
            let path = self.dir.join(format!("state/n{node}/data/pulsard.log"));
            let text = fs::read(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            let last = &lines[lines.len().saturating_sub(15)..];
            out.push_str(&format!("--- n{node}:\n{}\n", last.join("\n")));
        }
        out
    }

    /// Process numbers that daemons left in the directory, if they are still those daemons.
    #[must_use]
    pub fn daemons(&self) -> Vec<i32> {
        fn pid_files(dir: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    pid_files(&entry.path(), found);
                } else if entry.path().extension().is_some_and(|e| e == "pid") {
                    found.push(entry.path());
                }
            }
        }
        let mut files = Vec::new();
        pid_files(&self.dir.join("state"), &mut files);
        let ours = self.dir.to_string_lossy().into_owned();
        files
            .iter()
            .filter_map(|f| fs::read_to_string(f).ok()?.split_whitespace().next()?.parse::<i32>().ok())
            .filter(|pid| fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|c| c.contains(&ours)))
            .collect()
    }
}

impl Drop for RealCluster {
    fn drop(&mut self) {
        let daemons = self.daemons();
        let mut command = Command::new(&self.pulsar);
        command.args(["dev", "down", "--dir"]).arg(&self.dir);
        let clean = run(command, Duration::from_secs(60)).is_ok_and(|o| o.code == 0);
        if !clean {
            for mount in self.mounts() {
                let _ = nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH);
            }
            for pid in daemons {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
            }
        }
        let mounted = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let ours = format!("{}/", self.dir.display());
        if !mounted.lines().any(|l| l.split(' ').nth(1).is_some_and(|d| d.starts_with(&ours))) {
            let _ = fs::remove_dir_all(&self.dir);
        }
        // A test that went well must also leave nothing behind.
        if !std::thread::panicking() {
            assert!(clean, "'pulsar dev down' failed");
            assert!(!mounted.contains(&ours), "'pulsar dev down' left mounts behind");
        }
    }
}

/// The `pulsar` program built beside this one.
fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("PULSAR_BIN") {
        return path.into();
    }
    let exe = std::env::current_exe().expect("this program's path");
    let dirs = exe.ancestors().skip(1).take(2);
    let found = dirs.map(|d| d.join("pulsar")).find(|p| p.exists());
    found.expect("the program 'pulsar' is not built: cargo build --release --bin pulsar")
}
