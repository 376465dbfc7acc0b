//! `init`, `join`, `token`, `start`, `stop`, `disk add`: making and growing a cluster.

use super::Place;
use crate::control::client::QUICK;
use crate::control::{Answer, Request};
use crate::daemon::setup;
use crate::dev::process;
use crate::failure::{Context, Failure, Outcome};
use crate::settings::{DiskSetting, STATE_DIR, Settings, Timings};
use crate::size::{Size, human};
use clap::Args;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// How long a change of the cluster's configuration may take.
const CHANGE: Duration = Duration::from_secs(40);

/// A disk on the command line: `PATH`, or `PATH:SIZE` for a sparse file to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DiskArg {
    /// The device or file.
    pub path: PathBuf,
    /// Size of the file to be made.
    pub size: Option<Size>,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<DiskArg, String> {
        if let Some((path, size)) = text.rsplit_once(':')
            && let Ok(size) = size.parse()
        {
            return Ok(DiskArg { path: path.into(), size: Some(size) });
        }
        Ok(DiskArg { path: text.into(), size: None })
    }
}

/// What a new node needs.
#[derive(Clone, Debug, Args)]
pub(super) struct NodeArgs {
    /// Name of this node [default: the host's name]
    #[arg(long)]
    pub name: Option<String>,
    /// Address, or address:port (UDP and TCP), at which the other nodes reach this one [default: this machine's address, port 7440]
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<String>,
    /// Where keys and the replicated configuration are kept
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// Socket on which commands reach the daemon [default: /run/pulsar/control.sock]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Give a device or file to the cluster (what is on it is overwritten); PATH:SIZE makes a sparse file. May be repeated
    #[arg(long = "disk", value_name = "PATH[:SIZE]")]
    pub disks: Vec<DiskArg>,
    /// Memory for the block cache
    #[arg(long, value_name = "MIB")]
    pub cache_mib: Option<u32>,
    /// Start the daemon at once, in the background
    #[arg(long)]
    pub start: bool,
}

fn timings(text: &str) -> Result<Timings, String> {
    match text {
        "normal" => Ok(Timings::Normal),
        "quick" => Ok(Timings::Quick),
        "patient" => Ok(Timings::Patient),
        _ => Err("it must be normal, quick or patient".into()),
    }
}

/// `pulsar init`.
#[derive(Clone, Debug, Args)]
pub(super) struct InitArgs {
    /// Name of the cluster
    #[arg(long, default_value = "pulsar")]
    pub cluster: String,
    /// How quickly silence is taken for death, in the whole cluster and for good: normal (3 s), quick (1 s), patient (10 s)
    #[arg(long, value_parser = timings, default_value = "normal", hide_short_help = true)]
    pub timings: Timings,
    #[command(flatten)]
    /// The node.
    pub node: NodeArgs,
}

/// `pulsar join`.
#[derive(Clone, Debug, Args)]
pub(super) struct JoinArgs {
    /// What 'pulsar init' or 'pulsar token' printed on a node of the cluster
    pub token: String,
    #[command(flatten)]
    /// The node.
    pub node: NodeArgs,
}

/// Checks the arguments and makes the settings of a new node; nothing is written yet.
fn settings(place: &Place, args: &NodeArgs) -> Outcome<(PathBuf, Settings)> {
    let file = place.config_file();
    let file = std::path::absolute(&file).context(|| format!("bad path {}", file.display()))?;
    if file.exists() {
        return Err(Failure::new(format!(
            "{} is there: this machine is a node already. To make a new node of it, stop pulsard and remove that file and the state directory",
            file.display()
        )));
    }
    let absolute = |path: &Path| std::path::absolute(path).context(|| format!("bad path {}", path.display()));
    let name = match &args.name {
        Some(name) => name.clone(),
        None => {
            let text = std::fs::read_to_string("/proc/sys/kernel/hostname");
            text.context(|| "cannot find the host's name; give one with --name".into())?.trim().to_string()
        }
    };
    let mut disks = Vec::new();
    for disk in &args.disks {
        disks.push(DiskSetting { path: absolute(&disk.path)? });
    }
    let settings = Settings {
        name,
        listen: setup::listen_address(args.listen.as_deref())?,
        state_dir: absolute(&args.state_dir)?,
        control: absolute(args.control.as_deref().unwrap_or(Path::new(crate::settings::CONTROL_SOCKET)))?,
        cache_mib: args.cache_mib.unwrap_or(crate::settings::CACHE_MIB),
        timings: None,
        disks,
    };
    Ok((file, settings))
}

fn check_disks(args: &NodeArgs) -> Outcome<()> {
    args.disks.iter().try_for_each(|disk| setup::check_disk(&disk.path, disk.size.map(|s| s.0)))
}

fn prepare_disks(args: &NodeArgs, settings: &Settings) -> Outcome<()> {
    let cluster = setup::cluster_of(settings)?;
    for disk in &args.disks {
        let made = setup::prepare_disk(&disk.path, disk.size.map(|s| s.0), cluster)?;
        say!("disk {} prepared, {}", disk.path.display(), human(made.bytes));
    }
    Ok(())
}

fn start_or_tell(place: &Place, args: &NodeArgs, file: &Path) -> Outcome<()> {
    if args.start {
        let exe = std::env::current_exe().context(|| "cannot find this program".into())?;
        process::start_daemon(&exe, file, place.in_netns.as_deref())?;
        say!("pulsard runs");
    } else {
        say!("start it:  systemctl enable --now pulsard   (or: pulsar start)");
    }
    Ok(())
}

pub(super) fn init(place: &Place, args: &InitArgs) -> Outcome<u8> {
    let (file, settings) = settings(place, &args.node)?;
    check_disks(&args.node)?;
    let token = setup::init(&settings, &args.cluster, args.timings)?;
    prepare_disks(&args.node, &settings)?;
    settings.save(&file)?;
    say!(
        "cluster {} made; this node is {} at {}; its settings are in {}",
        args.cluster,
        settings.name,
        settings.listen,
        file.display()
    );
    start_or_tell(place, &args.node, &file)?;
    say!("\nOn each other machine (keep the token secret; 'pulsar token' prints a new one):\n");
    say!("  pulsar join {token} --disk PATH --start");
    Ok(0)
}

pub(super) fn join(place: &Place, args: &JoinArgs) -> Outcome<u8> {
    let (file, settings) = settings(place, &args.node)?;
    check_disks(&args.node)?;
    setup::join(&settings, &args.token)?;
    prepare_disks(&args.node, &settings)?;
    settings.save(&file)?;
    say!("this node is {} at {}; its settings are in {}", settings.name, settings.listen, file.display());
    start_or_tell(place, &args.node, &file)?;
    Ok(0)
}

pub(super) fn token(place: &Place) -> Outcome<u8> {
    match place.client()?.call(Request::Token, CHANGE)? {
        Answer::Token { token } => say!("{token}"),
        other => return Err(unexpected(&other)),
    }
    Ok(0)
}

pub(super) fn start(place: &Place) -> Outcome<u8> {
    let exe = std::env::current_exe().context(|| "cannot find this program".into())?;
    let started = process::start_daemon(&exe, &place.config_file(), place.in_netns.as_deref())?;
    say!("{}", if started { "pulsard runs" } else { "pulsard ran already" });
    Ok(0)
}

pub(super) fn stop(place: &Place) -> Outcome<u8> {
    let settings = Settings::load(&place.config_file())?;
    let stopped = process::stop_daemon(&settings, Duration::from_secs(30))?;
    say!("{}", if stopped { "pulsard has ended" } else { "pulsard did not run" });
    Ok(0)
}

pub(super) fn disk_add(place: &Place, path: &Path, size: Option<Size>) -> Outcome<u8> {
    let path = std::path::absolute(path).context(|| format!("bad path {}", path.display()))?;
    let client = place.client()?;
    client.call(Request::Ping, QUICK)?;
    match client.call(Request::DiskAdd { path, size_bytes: size.map(|s| s.0) }, CHANGE)? {
        Answer::Done { text } => say!("{text}"),
        other => return Err(unexpected(&other)),
    }
    Ok(0)
}

pub(super) fn disk_replace(place: &Place, old: u32, path: &Path, size: Option<Size>) -> Outcome<u8> {
    let path = std::path::absolute(path).context(|| format!("bad path {}", path.display()))?;
    let client = place.client()?;
    client.call(Request::Ping, QUICK)?;
    match client.call(Request::DiskReplace { old, path, size_bytes: size.map(|s| s.0) }, CHANGE)? {
        Answer::Done { text } => say!("{text}"),
        other => return Err(unexpected(&other)),
    }
    Ok(0)
}

/// A disk's number, with or without the d before it.
pub(super) fn disk_number(text: &str) -> Result<u32, String> {
    text.strip_prefix('d')
        .unwrap_or(text)
        .parse()
        .map_err(|_| format!("{text} is no disk; 'pulsar disk list' shows them as d1, d2"))
}

/// An answer that does not fit the question: another version of the daemon.
pub(super) fn unexpected(answer: &Answer) -> Failure {
    Failure::new(format!("pulsard gave an answer that does not fit ({answer:?}); is it of the same version?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_by_their_numbers() {
        assert_eq!((disk_number("d2"), disk_number("17")), (Ok(2), Ok(17)));
        assert!(disk_number("dd").is_err() && disk_number("/dev/sdb").is_err());
    }

    #[test]
    fn disks_on_the_command_line() {
        assert_eq!("/d/a.img:8G".parse(), Ok(DiskArg { path: "/d/a.img".into(), size: Some(Size(8 << 30)) }));
        assert_eq!(
            "/dev/disk/by-path/pci-0000:00:1f".parse(),
            Ok(DiskArg { path: "/dev/disk/by-path/pci-0000:00:1f".into(), size: None })
        );
    }
}
