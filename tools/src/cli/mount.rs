//! `mount.pulsarfs NAME DIR`: mounts in the caller's namespace and hands the descriptor of /dev/fuse to the daemon. It
//! returns when the root is served, or takes the mount away again.

use super::Place;
use super::cluster::unexpected;
use crate::control::client::QUICK;
use crate::control::{Answer, Request};
use crate::failure::{Context, EXIT_MOUNT, EXIT_USAGE, Failure, Outcome};
use crate::mount::{MountOptions, check_possible, mount_kernel, mount_point, unmount_lazily};
use clap::Args;
use std::path::PathBuf;
use std::time::Duration;

/// `mount.pulsarfs`.
#[derive(Clone, Debug, Args)]
pub struct MountArgs {
    /// Name of the file system, as given to mkfs.pulsarfs
    pub name: String,
    /// Where to mount it
    pub dir: PathBuf,
    /// Mount options; those for others (_netdev, x-*, nofail …) are passed over
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Pass over unknown mount options
    #[arg(short = 's')]
    pub sloppy: bool,
    /// Do everything but mount
    #[arg(short = 'f')]
    pub fake: bool,
    /// No entry in mtab (there never is one)
    #[arg(short = 'n')]
    pub no_mtab: bool,
    /// Say what is done
    #[arg(short = 'v')]
    pub verbose: bool,
    /// Type of the file system, as mount(8) gives it
    #[arg(short = 't', hide = true)]
    pub fs_type: Option<String>,
}

/// How long it may take until the root is served: the cluster may be in the midst of a change.
const SERVED: Duration = Duration::from_secs(60);

pub(super) fn run(place: &Place, args: &MountArgs) -> Outcome<u8> {
    let options = MountOptions::parse(&args.options, args.sloppy)?;
    mount(place, args, &options).map_err(|e| if e.code == EXIT_USAGE { e.code(EXIT_MOUNT) } else { e })?;
    Ok(0)
}

fn mount(place: &Place, args: &MountArgs, options: &MountOptions) -> Outcome<()> {
    let say = |text: String| {
        if args.verbose {
            say!("mount.pulsarfs: {text}");
        }
    };
    if options.parsed.is_remount() && !args.fake {
        return fs::shell::remount(&args.dir, &options.parsed).context(|| format!("cannot mount {} again", args.dir.display()));
    }
    let client = place.client()?;
    client.call(Request::Ping, QUICK)?;
    check_possible()?;
    let dir = mount_point(&args.dir)?;
    if args.fake {
        say(format!("would mount {} on {}", args.name, dir.display()));
        return Ok(());
    }
    let fd = mount_kernel(&args.name, &dir, options)?;
    say(format!("mounted on {}, waiting until it is served", dir.display()));
    let request = Request::Mount { fs: args.name.clone(), dir: dir.clone(), options: options.kept.clone() };
    let served = client.call_with(request, Some(fd), SERVED, |_| {}).and_then(|answer| match answer {
        Answer::Done { .. } => Ok(()),
        other => Err(unexpected(&other)),
    });
    // The daemon answers once it has the root, but the last word has the kernel.
    let served = served.and_then(|()| {
        std::fs::metadata(&dir).map(drop).map_err(|e| Failure::new(format!("the root of {} cannot be read: {e}", args.name)))
    });
    if let Err(e) = served {
        let _ = unmount_lazily(&dir);
        return Err(e);
    }
    say("served".into());
    Ok(())
}
