//! The commands: their arguments, and which function does each. All programs are one: what it does is decided by the name
//! it was called by, so that links to `pulsar` named `mount.pulsarfs` and so on are all that an installation needs.

mod cluster;
mod events;
mod fsck;
mod install;
mod mkfs;
mod mount;
mod status;
mod tasks;

use crate::control::TaskAction;
use crate::control::client::Client;
use crate::dev;
use crate::failure::{EXIT_USAGE, Failure, Outcome};
use crate::settings::{CONFIG_FILE, CONTROL_SOCKET, Settings};
use crate::size::Size;
use clap::{Args, CommandFactory, Parser, Subcommand};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub use fsck::{FsckArgs, exit};
pub use mkfs::MkfsArgs;
pub use mount::MountArgs;

/// Pulsar: a coherent, mirrored, POSIX cluster file system.
#[derive(Debug, Parser)]
#[command(name = "pulsar", version, max_term_width = 100, disable_help_subcommand = true)]
#[command(after_help = "Try it on this machine:  pulsar dev up\nFirst real node:        pulsar init --disk /dev/sdX --start")]
pub struct Cli {
    #[command(flatten)]
    place: Place,
    #[command(subcommand)]
    command: Command,
}

/// Which daemon is meant.
#[derive(Clone, Debug, Args)]
pub struct Place {
    /// Configuration file of the node [default: $PULSAR_CONFIG, else /etc/pulsar/pulsar.toml]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Run in this network namespace.
    #[arg(long = "in-netns", global = true, hide = true, value_name = "FILE")]
    in_netns: Option<PathBuf>,
}

impl Place {
    /// The configuration file that is meant.
    #[must_use]
    pub fn config_file(&self) -> PathBuf {
        let named = self.config.clone().or_else(|| std::env::var_os("PULSAR_CONFIG").map(PathBuf::from));
        named.unwrap_or_else(|| CONFIG_FILE.into())
    }

    /// The daemon that is meant.
    ///
    /// # Errors
    /// If a configuration file is named, or there is one, and it cannot be read.
    pub fn client(&self) -> Outcome<Client> {
        let file = self.config_file();
        if self.config.is_none() && !file.exists() {
            return Ok(Client::new(CONTROL_SOCKET));
        }
        match Settings::load(&file) {
            Ok(settings) => Ok(Client::new(settings.control)),
            Err(_) if !nix::unistd::geteuid().is_root() => {
                Err(Failure::new(format!("cannot read {}: this command needs root; try with sudo", file.display())))
            }
            Err(e) => Err(e),
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a cluster, with this machine as its first node
    Init(cluster::InitArgs),
    /// Make this machine a node of a cluster
    Join(cluster::JoinArgs),
    /// Print a token with which another machine can join
    Token,
    /// Start the daemon of this node in the background (systemd does it by itself)
    Start,
    /// Stop the daemon of this node cleanly: flush, unmount, give back what it holds
    Stop,
    /// Is the data safe? Can a node be lost now? Are writes accepted? And all the rest
    Status(status::StatusArgs),
    /// Show what happens in the cluster: members, recovery, repairs, lost data
    Events(events::EventsArgs),
    /// Members of the cluster
    #[command(subcommand)]
    Node(NodeCommand),
    /// Disks of the cluster
    #[command(subcommand)]
    Disk(DiskCommand),
    /// File systems of the cluster
    #[command(subcommand)]
    Fs(FsCommand),
    /// Make a file system (also called mkfs.pulsarfs)
    Mkfs(MkfsArgs),
    /// Mount a file system (also called mount.pulsarfs)
    Mount(MountArgs),
    /// Check a file system in use, without changing anything (offline: fsck.pulsarfs)
    Fsck(tasks::OnlineFsckArgs),
    /// The collector of blocks that a crash leaked
    Gc(tasks::GcArgs),
    /// Read all copies of all blocks and repair the damaged ones
    Scrub(tasks::ScrubArgs),
    /// Make everything durable that programs on this node have written
    Sync,
    /// A whole cluster on this machine, to try and to test
    Dev(dev::DevArgs),
    /// Put this program and its other names in place, with a systemd unit
    Install(install::InstallArgs),
    /// The daemon (also called pulsard)
    #[command(hide = true)]
    Daemon(DaemonArgs),
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// List the nodes
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
enum DiskCommand {
    /// Give a disk, or a file used as one, to the cluster. What is on it is overwritten
    Add {
        /// The device or file
        path: PathBuf,
        /// Make a sparse file of this size
        #[arg(long)]
        size: Option<Size>,
    },
    /// Put a disk in the place of a failed one of this node; it gets all copies that were there. What is on it is overwritten
    Replace {
        /// The failed disk, as 'pulsar disk list' shows it (d2)
        #[arg(value_parser = cluster::disk_number)]
        old: u32,
        /// The device or file
        path: PathBuf,
        /// Make a sparse file of this size
        #[arg(long)]
        size: Option<Size>,
    },
    /// List the disks
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
enum FsCommand {
    /// List the file systems
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// The daemon of a Pulsar node.
#[derive(Debug, Args)]
pub struct DaemonArgs {
    /// Started in the background: leave the terminal's session
    #[arg(long, hide = true)]
    detached: bool,
}

#[derive(Debug, Parser)]
#[command(name = "pulsard", version, about = "The daemon of a Pulsar node")]
struct DaemonCli {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    args: DaemonArgs,
}

#[derive(Debug, Parser)]
#[command(name = "mkfs.pulsarfs", version, about = "Make a Pulsar file system, through the daemon of this machine")]
struct MkfsCli {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    args: MkfsArgs,
}

#[derive(Debug, Parser)]
#[command(name = "mount.pulsarfs", version, about = "Mount a Pulsar file system; called by 'mount -t pulsarfs NAME DIR'")]
struct MountCli {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    args: MountArgs,
}

#[derive(Debug, Parser)]
#[command(name = "fsck.pulsarfs", version, about = "Check the disks of a stopped Pulsar cluster")]
struct FsckCli {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    args: FsckArgs,
}

/// The program, by the name that it was called by.
#[must_use]
pub fn main_by_name() -> ExitCode {
    let name = std::env::args_os().next().unwrap_or_default();
    let name = Path::new(&name).file_name().and_then(|n| n.to_str()).unwrap_or_default().to_string();
    main_as(&name)
}

/// The program, as if called by a name.
#[must_use]
pub fn main_as(name: &str) -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    match name {
        "pulsard" => run::<DaemonCli>(args, EXIT_USAGE, |c| daemon(&c.place, &c.args)),
        "mkfs.pulsarfs" => run::<MkfsCli>(args, EXIT_USAGE, |c| mkfs::run(&c.place, &c.args)),
        "mount.pulsarfs" => run::<MountCli>(args, EXIT_USAGE, |c| mount::run(&c.place, &c.args)),
        "fsck.pulsarfs" => run::<FsckCli>(args, exit::USAGE, |c| fsck::run(&c.place, &c.args)),
        _ => run::<Cli>(args, EXIT_USAGE, pulsar),
    }
}

fn run<C: Parser + CommandFactory>(args: Vec<OsString>, usage_code: u8, body: impl FnOnce(C) -> Outcome<u8>) -> ExitCode {
    let cli = match C::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { usage_code } else { 0 });
        }
    };
    match body(cli) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("{}: {}", C::command().get_name(), failure.message);
            ExitCode::from(failure.code)
        }
    }
}

fn pulsar(cli: Cli) -> Outcome<u8> {
    let place = &cli.place;
    if !matches!(cli.command, Command::Daemon(_) | Command::Dev(_) | Command::Start)
        && let Some(netns) = &place.in_netns
    {
        dev::netns::enter(netns)?;
    }
    match cli.command {
        Command::Init(args) => cluster::init(place, &args),
        Command::Join(args) => cluster::join(place, &args),
        Command::Token => cluster::token(place),
        Command::Start => cluster::start(place),
        Command::Stop => cluster::stop(place),
        Command::Status(args) => status::run(place, &args),
        Command::Events(args) => events::run(place, &args),
        Command::Node(NodeCommand::List { json }) => status::nodes(place, json),
        Command::Disk(DiskCommand::Add { path, size }) => cluster::disk_add(place, &path, size),
        Command::Disk(DiskCommand::Replace { old, path, size }) => cluster::disk_replace(place, old, &path, size),
        Command::Disk(DiskCommand::List { json }) => status::disks(place, json),
        Command::Fs(FsCommand::List { json }) => status::filesystems(place, json),
        Command::Mkfs(args) => mkfs::run(place, &args),
        Command::Mount(args) => mount::run(place, &args),
        Command::Fsck(args) => tasks::fsck(place, &args),
        Command::Gc(args) => tasks::gc(place, &args),
        Command::Scrub(args) => tasks::scrub(place, &args),
        Command::Sync => tasks::sync(place),
        Command::Dev(args) => dev::run(&args),
        Command::Install(args) => install::run(&args),
        Command::Daemon(args) => daemon(place, &args),
    }
}

fn daemon(place: &Place, args: &DaemonArgs) -> Outcome<u8> {
    crate::daemon::run(&place.config_file(), place.in_netns.as_deref(), args.detached)?;
    Ok(0)
}

/// The report of `pulsar status`, in words.
#[must_use]
pub fn render_status(report: &crate::status::Status) -> String {
    status::render(report, false)
}

/// Prints a table with as wide columns as needed.
fn table(rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width + 2 - cell.chars().count()));
        }
        say!("{}", line.trim_end());
    }
}

/// Prints a value as JSON.
///
/// # Errors
/// If it cannot be written so.
pub fn print_json(value: &impl serde::Serialize) -> Outcome<()> {
    json(value)
}

fn json(value: &impl serde::Serialize) -> Outcome<()> {
    use crate::failure::Context;
    say!("{}", serde_json::to_string_pretty(value).context(|| "cannot make JSON".into())?);
    Ok(())
}

/// The verbs of tasks, on the command line.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Verb {
    /// Begin, or go on
    Start,
    /// Tell how far it is
    Status,
    /// Stop after the present step
    Stop,
}

impl From<Verb> for TaskAction {
    fn from(verb: Verb) -> TaskAction {
        match verb {
            Verb::Start => TaskAction::Start,
            Verb::Status => TaskAction::Status,
            Verb::Stop => TaskAction::Stop,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
        MkfsCli::command().debug_assert();
        MountCli::command().debug_assert();
        FsckCli::command().debug_assert();
        DaemonCli::command().debug_assert();
    }

    #[test]
    fn dev_up_is_understood() {
        let cli = Cli::try_parse_from(["pulsar", "dev", "up", "--netns", "--dir", "d"]);
        assert!(cli.is_ok(), "{cli:?}");
    }

    #[test]
    fn mount_as_mount8_calls_it() {
        let cli = MountCli::try_parse_from(["mount.pulsarfs", "data", "/mnt", "-sfnv", "-o", "rw,_netdev", "-t", "pulsarfs"]);
        assert!(cli.is_ok(), "{cli:?}");
    }
}
