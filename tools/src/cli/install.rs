//! `pulsar install`: puts the program in place under all its names, with a systemd unit.

use crate::failure::{Context, Outcome};
use clap::Args;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// `pulsar install`.
#[derive(Clone, Debug, Args)]
pub(super) struct InstallArgs {
    /// Below this directory instead of / (for packages)
    #[arg(long, default_value = "/")]
    root: PathBuf,
    /// Only tell what would be written
    #[arg(long)]
    dry_run: bool,
}

/// The systemd unit of the daemon.
const UNIT: &str = include_str!("../../../packaging/pulsard.service");

pub(super) fn run(args: &InstallArgs) -> Outcome<u8> {
    let exe = std::env::current_exe().context(|| "cannot find this program".into())?;
    let program = args.root.join("usr/sbin/pulsar");
    let say = |path: &Path, what: &str| say!("{}{}: {what}", if args.dry_run { "would write " } else { "" }, path.display());
    let make_dir = |path: &Path| match path.parent() {
        Some(dir) => std::fs::create_dir_all(dir).context(|| format!("cannot make {}", dir.display())),
        None => Ok(()),
    };
    say(&program, "the program");
    if !args.dry_run {
        make_dir(&program)?;
        // By way of another name: the program may be running from there.
        let new = program.with_extension("new");
        std::fs::copy(&exe, &new).context(|| format!("cannot write {}", new.display()))?;
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).context(|| format!("{}", new.display()))?;
        std::fs::rename(&new, &program).context(|| format!("cannot write {}", program.display()))?;
    }
    for name in ["pulsard", "mkfs.pulsarfs", "mount.pulsarfs", "fsck.pulsarfs"] {
        let link = args.root.join("usr/sbin").join(name);
        say(&link, "a link to it");
        if !args.dry_run {
            let _ = std::fs::remove_file(&link);
            std::os::unix::fs::symlink("pulsar", &link).context(|| format!("cannot write {}", link.display()))?;
        }
    }
    let unit = args.root.join("etc/systemd/system/pulsard.service");
    say(&unit, "the systemd unit");
    if !args.dry_run {
        make_dir(&unit)?;
        std::fs::write(&unit, UNIT).context(|| format!("cannot write {}", unit.display()))?;
    }
    Ok(0)
}
