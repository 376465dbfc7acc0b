//! The configuration file of a node, `/etc/pulsar/pulsar.toml`: what is this machine's own affair. What the cluster
//! shares (members, disks in use, mirrors, file systems) is in the replicated configuration, never here.

use crate::failure::{Context, Failure, Outcome};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Where the file is if nothing else is said.
pub const CONFIG_FILE: &str = "/etc/pulsar/pulsar.toml";
/// Where the daemon keeps its state if nothing else is said.
pub const STATE_DIR: &str = "/var/lib/pulsar";
/// Where the daemon listens for commands if nothing else is said.
pub const CONTROL_SOCKET: &str = "/run/pulsar/control.sock";
/// The port of a node, UDP and TCP, if nothing else is said.
pub const PORT: u16 = 7440;

/// How quickly silence is taken for death.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Timings {
    /// For real machines and networks: a silent machine is noticed in about 3 s.
    #[default]
    Normal,
    /// For tests and local clusters: noticed in about 1 s. A loaded machine may be taken for dead.
    Quick,
    /// For networks over which packets take long: noticed in about 10 s.
    Patient,
}

/// A disk (or a file used as one) that this node gives to the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSetting {
    /// The device or file. Any stable path: the disk is known by the identity in its label.
    pub path: PathBuf,
}

/// The configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The node's name, unique in the cluster.
    pub name: String,
    /// `address:port` (UDP and TCP) where the other nodes reach this one.
    pub listen: String,
    /// Keys, certificate and the replicated configuration.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Where commands reach the daemon.
    #[serde(default = "default_control")]
    pub control: PathBuf,
    /// Memory for the block cache, in MiB.
    #[serde(default = "default_cache_mib")]
    pub cache_mib: u32,
    /// Accepted for files of older versions, without effect: the times are the cluster's, fixed when it is made.
    #[serde(default, skip_serializing)]
    pub timings: Option<Timings>,
    /// Disks of this node.
    #[serde(default, rename = "disk", skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSetting>,
}

fn default_state_dir() -> PathBuf {
    STATE_DIR.into()
}

fn default_control() -> PathBuf {
    CONTROL_SOCKET.into()
}

/// The default of `cache_mib`.
pub const CACHE_MIB: u32 = 512;

fn default_cache_mib() -> u32 {
    CACHE_MIB
}

impl Settings {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// If it cannot be read or is not understood; says which line.
    pub fn load(path: &Path) -> Outcome<Settings> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            let hint = if e.kind() == std::io::ErrorKind::NotFound {
                "; make it with 'pulsar init' (first node) or 'pulsar join TOKEN'"
            } else {
                ""
            };
            Failure::new(format!("cannot read the configuration {}: {e}{hint}", path.display()))
        })?;
        toml::from_str(&text).context(|| format!("the configuration {} is not right", path.display()))
    }

    /// Writes the file anew, atomically.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&self, path: &Path) -> Outcome<()> {
        let what = || format!("cannot write the configuration {}", path.display());
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).context(what)?;
        }
        let body = toml::to_string_pretty(self).context(what)?;
        let text = format!("# Pulsar: settings of this node. Read by pulsard when it starts.\n\n{body}");
        write_atomically(path, text.as_bytes(), 0o600).context(what)
    }
}

/// Replaces a file's contents: after a crash the old or the new ones are there.
///
/// # Errors
/// Of the file system.
pub fn write_atomically(path: &Path, contents: &[u8], mode: u32) -> std::io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".new");
    let new = path.with_file_name(name);
    let mut file = std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(mode).open(&new)?;
    file.write_all(contents)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => std::fs::File::open(dir)?.sync_all(),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_and_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/pulsar.toml");
        let settings = Settings {
            name: "n1".into(),
            listen: "10.0.0.1:7440".into(),
            state_dir: "/s".into(),
            control: "/c".into(),
            cache_mib: 64,
            timings: None,
            disks: vec![DiskSetting { path: "/dev/sdb".into() }],
        };
        settings.save(&path).unwrap();
        assert_eq!(Settings::load(&path).unwrap(), settings);
    }

    #[test]
    fn mistakes_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.toml");
        std::fs::write(&path, "name = \"a\"\nlisten = \"x:1\"\ncash_mib = 3\n").unwrap();
        assert!(Settings::load(&path).unwrap_err().message.contains("cash_mib"));
        assert!(Settings::load(&dir.path().join("none")).unwrap_err().message.contains("pulsar init"));
    }
}
