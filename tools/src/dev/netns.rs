//! A network of their own for the nodes of a local cluster: one namespace per node, each with a cable (veth) to a switch
//! (bridge) in one more namespace. Cutting a node off is taking its cable out of the switch. Nothing outside these
//! namespaces is touched; their names come from the cluster's directory, so several clusters can be up.

use crate::failure::{Context, Failure, Outcome};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The network of one local cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    prefix: String,
}

impl Network {
    /// The network of the cluster in a directory.
    #[must_use]
    pub fn of(dir: &Path) -> Network {
        // FNV-1a: the name must be the same in every run, and differ between directories.
        let hash = dir
            .as_os_str()
            .as_encoded_bytes()
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
        Network { prefix: format!("pulsar-{:08x}", (hash ^ (hash >> 32)) as u32) }
    }

    fn switch(&self) -> String {
        format!("{}-switch", self.prefix)
    }

    fn node(&self, node: usize) -> String {
        format!("{}-n{node}", self.prefix)
    }

    /// The namespace of a node, to be entered by its daemon.
    #[must_use]
    pub fn path(&self, node: usize) -> PathBuf {
        Path::new("/run/netns").join(self.node(node))
    }

    /// The address of a node.
    #[must_use]
    pub fn address(&self, node: usize) -> String {
        format!("10.77.0.{node}")
    }

    /// Whether it is there.
    #[must_use]
    pub fn exists(&self) -> bool {
        Path::new("/run/netns").join(self.switch()).exists()
    }

    /// Makes what is not there yet.
    ///
    /// # Errors
    /// If `ip` is missing, or not allowed.
    pub fn up(&self, nodes: usize) -> Outcome<()> {
        let switch = self.switch();
        if !self.exists() {
            ip(&["netns", "add", &switch])?;
            ip(&["-n", &switch, "link", "add", "switch", "type", "bridge"])?;
            ip(&["-n", &switch, "link", "set", "switch", "up"])?;
        }
        for node in 1..=nodes {
            let name = self.node(node);
            if self.path(node).exists() {
                continue;
            }
            let port = format!("n{node}");
            let address = format!("{}/24", self.address(node));
            ip(&["netns", "add", &name])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
            ip(&["-n", &name, "link", "add", "eth0", "type", "veth", "peer", "name", &port, "netns", &switch])?;
            ip(&["-n", &name, "addr", "add", &address, "dev", "eth0"])?;
            ip(&["-n", &name, "link", "set", "eth0", "up"])?;
            ip(&["-n", &switch, "link", "set", &port, "master", "switch", "up"])?;
        }
        Ok(())
    }

    /// Takes all of it away. Fine if there is nothing.
    ///
    /// # Errors
    /// If something stays.
    pub fn down(&self) -> Outcome<()> {
        let Ok(entries) = std::fs::read_dir("/run/netns") else { return Ok(()) };
        let mine = format!("{}-", self.prefix);
        for entry in entries.flatten() {
            if let Some(name) = entry.file_name().to_str().filter(|n| n.starts_with(&mine)) {
                ip(&["netns", "del", name])?;
            }
        }
        Ok(())
    }

    /// Takes a node's cable out, or puts it back in.
    ///
    /// # Errors
    /// If there is no such cable.
    pub fn set_link(&self, node: usize, connected: bool) -> Outcome<()> {
        ip(&["-n", &self.switch(), "link", "set", &format!("n{node}"), if connected { "up" } else { "down" }])
    }

    /// Whether a node's cable is in; `None` if there is none.
    #[must_use]
    pub fn linked(&self, node: usize) -> Option<bool> {
        let output = Command::new("ip").args(["-n", &self.switch(), "-o", "link", "show", &format!("n{node}")]).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let flags = text.split_once('<')?.1.split_once('>')?.0;
        Some(flags.split(',').any(|f| f == "UP"))
    }
}

/// Checks that namespaces can be made.
///
/// # Errors
/// If not.
pub fn check_possible() -> Outcome<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Failure::new("--netns needs root; try with sudo, or without --netns"));
    }
    match Command::new("ip").arg("-V").output() {
        Ok(_) => Ok(()),
        Err(e) => Err(Failure::new(format!(
            "--netns needs the program 'ip' ({e}); install the package iproute2, or go without --netns"
        ))),
    }
}

/// Enters a network namespace. To be called before any thread is started: it moves only the calling one.
///
/// # Errors
/// If there is none, or not allowed.
pub fn enter(path: &Path) -> Outcome<()> {
    let what = || format!("cannot enter the network namespace {}", path.display());
    let file = std::fs::File::open(path).context(what)?;
    nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).context(what)
}

fn ip(args: &[&str]) -> Outcome<()> {
    let output = Command::new("ip").args(args).output().context(|| "cannot run 'ip'".into())?;
    if output.status.success() {
        return Ok(());
    }
    Err(Failure::new(format!("'ip {}' failed: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs root and `ip`; without them there is nothing to test.
    #[test]
    fn cables_can_be_cut_and_nothing_stays() {
        if check_possible().is_err() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let network = Network::of(dir.path());
        let works = || -> Outcome<()> {
            network.up(2)?;
            network.up(2)?;
            assert!(network.exists() && network.path(2).exists());
            assert_eq!(network.linked(2), Some(true));
            network.set_link(2, false)?;
            assert_eq!(network.linked(2), Some(false));
            network.set_link(2, true)?;
            assert_eq!(network.linked(2), Some(true));
            Ok(())
        };
        let worked = works();
        network.down().unwrap();
        network.down().unwrap();
        assert!(!network.exists());
        worked.unwrap();
    }
}
