//! The check of a stopped cluster's disks, from the disks alone: each carries the configuration (see [`super::hint`]), and
//! any one copy in sync of each mirror is enough. Of several, the newest version of a block counts, as it will when the
//! cluster starts again.
//!
//! Reads only. Excludes: what is checked (`fs::check`).

use super::hint;
use super::setup::small_runtime;
use crate::cli::FsckArgs;
use crate::cli::exit;
use crate::control::TaskReport;
use crate::failure::{Context, Failure, Outcome};
use crate::status::{SCHEMA_VERSION, node_name};
use bytes::Bytes;
use cluster::config::{Config, FsInfo, MemberState};
use cluster::{BlockNo, DiskId, MirrorId};
use fs::check::BlockSource;
use mirror::{BlockDevice, DiskReader, FileDevice, OfflineBlock, Tag, Version};
use sld::DiskError;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Mutex;

/// Most issues that are printed one by one.
const LINES_MAX: usize = 200;

/// The disks that were given, by their place in the configuration.
struct Disks {
    config: Config,
    readers: BTreeMap<DiskId, Mutex<DiskReader>>,
}

/// A file system on them.
struct Offline<'a> {
    disks: &'a Disks,
    info: &'a FsInfo,
    /// Damaged copies of blocks of which another copy is good.
    repairable: AtomicU64,
}

/// Checks; returns the exit code.
///
/// # Errors
/// If the check could not be done.
pub fn check(disks: &[PathBuf], args: &FsckArgs) -> Outcome<u8> {
    let check = check_all(disks, args);
    small_runtime()?.block_on(async {
        let mut terminated = signal(SignalKind::terminate()).context(|| "cannot start".into())?;
        tokio::select! {
            biased;
            _ = tokio::signal::ctrl_c() => Err(cancelled()),
            _ = terminated.recv() => Err(cancelled()),
            result = check => result,
        }
    })
}

fn cancelled() -> Failure {
    Failure::new("cancelled; what was checked so far says nothing about the rest").code(exit::CANCELLED)
}

async fn check_all(disks: &[PathBuf], args: &FsckArgs) -> Outcome<u8> {
    let disks = open(disks).await?;
    let mut code = exit::CLEAN;
    let mut any = false;
    for info in disks.config.filesystems.values().filter(|f| args.fs.as_ref().is_none_or(|name| *name == f.name)) {
        any = true;
        code |= check_one(&disks, info, args).await?;
    }
    match (&args.fs, any) {
        (Some(name), false) => Err(failed(format!("there is no file system {name} on these disks"))),
        _ => Ok(code),
    }
}

fn failed(message: impl Into<String>) -> Failure {
    Failure::new(message).code(exit::OPERATIONAL)
}

async fn open(paths: &[PathBuf]) -> Outcome<Disks> {
    let mut newest: Option<Config> = None;
    let mut opened = Vec::new();
    for path in paths {
        let what = || format!("disk {}", path.display());
        // Opened for writing for a moment: that fails while a daemon uses it.
        drop(FileDevice::open(path).context(what).map_err(|e| e.code(exit::OPERATIONAL))?);
        let device: Arc<dyn BlockDevice> =
            Arc::new(FileDevice::open_read_only(path).context(what).map_err(|e| e.code(exit::OPERATIONAL))?);
        let reader = DiskReader::open(device.clone(), None).await.context(what).map_err(|e| e.code(exit::OPERATIONAL))?;
        let found = hint::read(&*device).await.context(what).map_err(|e| e.code(exit::OPERATIONAL))?;
        if let Some((_, config)) = found {
            if let Some(other) = newest.as_ref().filter(|c| c.cluster != config.cluster) {
                return Err(failed(format!(
                    "{} is of cluster {}, the others are of {}: name disks of one cluster",
                    what(),
                    config.name,
                    other.name
                )));
            }
            if newest.as_ref().is_none_or(|c| (c.epoch, c.filesystems.len()) <= (config.epoch, config.filesystems.len())) {
                newest = Some(config);
            }
        }
        opened.push((path.clone(), reader));
    }
    let config = newest.ok_or_else(|| failed("none of these disks carries the cluster's configuration yet"))?;
    let mut readers = BTreeMap::new();
    for (path, reader) in opened {
        match config.disks.iter().find(|(_, d)| d.uuid == reader.label().uuid) {
            Some((id, _)) => drop(readers.insert(*id, Mutex::new(reader))),
            None => eprintln!("fsck.pulsarfs: {} is not (yet) a disk of cluster {}; passed over", path.display(), config.name),
        }
    }
    Ok(Disks { config, readers })
}

impl Disks {
    /// The given disks with a copy in sync of a mirror, with the copy's first block.
    fn good(&self, mirror: MirrorId) -> Vec<(&Mutex<DiskReader>, u32)> {
        let members = self.config.mirrors.get(&mirror).map(|m| m.members.as_slice()).unwrap_or_default();
        let good = members.iter().filter(|m| m.state == MemberState::InSync);
        good.filter_map(|m| Some((self.readers.get(&m.disk)?, m.base))).collect()
    }

    /// Nodes whose disks are missing.
    fn missing(&self, info: &FsInfo) -> BTreeSet<String> {
        let lost = info.mirrors.iter().filter(|m| self.good(**m).is_empty());
        let members = lost.filter_map(|m| self.config.mirrors.get(m)).flat_map(|m| &m.members);
        let nodes = members.filter(|m| m.state == MemberState::InSync).filter_map(|m| self.config.node_of(m.disk));
        nodes.map(|n| node_name(&self.config, n)).collect()
    }
}

impl BlockSource for Offline<'_> {
    async fn read(&self, _owner: u64, block: BlockNo) -> Result<Bytes, DiskError> {
        let mut best: Option<(Version, Bytes)> = None;
        let mut damaged = 0;
        for (reader, base) in self.disks.good(block.mirror) {
            let found = reader.lock().await.read(block.mirror, base, block.index).await;
            match found {
                Ok(OfflineBlock::Good { data, version, .. }) => {
                    if best.as_ref().is_none_or(|(v, _)| *v < version) {
                        best = Some((version, data));
                    }
                }
                Ok(OfflineBlock::Damaged { .. }) | Err(_) => damaged += 1,
            }
        }
        if best.is_some() {
            self.repairable.fetch_add(damaged, Ordering::Relaxed);
        }
        best.map(|(_, data)| data).ok_or(DiskError::Corrupt(block))
    }

    async fn tags(&self, first: BlockNo, count: u32) -> Result<Vec<Tag>, DiskError> {
        let size = self.disks.config.mirrors.get(&first.mirror).map_or(0, |m| m.blocks);
        let count = count.min(size.saturating_sub(first.index));
        let mut best: Vec<Option<(Tag, Version)>> = vec![None; count as usize];
        for (reader, base) in self.disks.good(first.mirror) {
            let Ok(found) = reader.lock().await.tags(base, first.index, count).await else { continue };
            for (best, found) in best.iter_mut().zip(found) {
                if let Some((_, version)) = found
                    && best.is_none_or(|(_, v)| v < version)
                {
                    *best = found;
                }
            }
        }
        best.into_iter().map(|tag| tag.map(|(t, _)| t).ok_or(DiskError::Corrupt(first))).collect()
    }

    fn mirrors(&self) -> Vec<(MirrorId, u32)> {
        let sizes = self.info.mirrors.iter().map(|id| (*id, self.disks.config.mirrors.get(id).map_or(0, |m| m.blocks)));
        sizes.collect()
    }
}

async fn check_one(disks: &Disks, info: &FsInfo, args: &FsckArgs) -> Outcome<u8> {
    let name = &info.name;
    if !info.formatted {
        say!("{name}: its mkfs did not end; nothing to check");
        return Ok(exit::CLEAN);
    }
    let missing = disks.missing(info);
    if !missing.is_empty() {
        let nodes = missing.into_iter().collect::<Vec<_>>().join(", ");
        return Err(failed(format!("{name}: of some mirrors no current copy is on the given disks; add disks of {nodes}")));
    }
    let source = Offline { disks, info, repairable: AtomicU64::new(0) };
    let found = fs::check::check(&source, &mut |_| {}).await;
    let found = found.context(|| name.clone()).map_err(|e| e.code(exit::OPERATIONAL))?;
    let mut report = report_of(name, &found);
    let repairable = source.repairable.into_inner();
    if repairable > 0 {
        report.lines.push(format!(
            "{name}: {repairable} damaged copies of blocks that are good on another disk; 'pulsar scrub start' on the running cluster repairs them"
        ));
    }
    if args.json {
        crate::cli::print_json(&report)?;
    } else {
        report.lines.iter().for_each(|line| say!("{line}"));
    }
    if found.is_sound() {
        return Ok(exit::CLEAN);
    }
    eprintln!("fsck.pulsarfs: {}", advice(name));
    Ok(exit::UNCORRECTED)
}

/// What to do about damage. Nothing is put right here, whatever was asked for.
fn advice(name: &str) -> String {
    format!(
        "{name}: nothing was changed: this only checks, with -p and -y, too. Start the cluster; then 'pulsar scrub start' repairs \
         damaged copies from good ones, 'pulsar fsck {name}' tells what is left, and the files that it names are to be restored \
         or removed"
    )
}

/// What a check found, for people and as JSON.
#[must_use]
pub fn report_of(name: &str, found: &fs::check::Report) -> TaskReport {
    let mut lines: Vec<String> = found
        .issues
        .iter()
        .filter(|i| !i.is_leftover())
        .take(LINES_MAX)
        .map(|i| format!("{name}: damage: {}", describe(i)))
        .collect();
    if found.damage > lines.len() as u64 {
        lines.push(format!("{name}: and {} more", found.damage - lines.len() as u64));
    }
    lines.push(format!(
        "{name}: {} directories, {} files, {} names; {} of {} in use",
        found.directories,
        found.files,
        found.names,
        crate::size::human(found.blocks_used * cluster::BLOCK_SIZE as u64),
        crate::size::human(found.blocks * cluster::BLOCK_SIZE as u64)
    ));
    if found.leftovers > 0 {
        lines.push(format!(
            "{name}: {} leftovers of crashes ({} leaked blocks), which harm nobody; 'pulsar gc start {name}' takes them away",
            found.leftovers, found.blocks_leaked
        ));
    }
    lines.push(format!("{name}: {}", if found.is_sound() { "clean" } else { "DAMAGED" }));
    TaskReport {
        schema_version: SCHEMA_VERSION,
        task: "fsck".into(),
        state: "done".into(),
        done: found.blocks,
        total: found.blocks,
        found: found.damage,
        repaired: 0,
        lines,
    }
}

/// An issue as its JSON without braces: every field has its name.
fn describe(issue: &fs::check::Issue) -> String {
    serde_json::to_string(issue).unwrap_or_else(|_| format!("{issue:?}"))
}
