//! Brings copies on this node's disks up to date that missed writes while they were away.
//!
//! The copy already gets every new write. What it missed, and what it has that the others do not, are blocks whose
//! version, here or there, is of the epoch in which it was last in sync or later: only tags of the copy are read to find
//! them, and only blocks that differ travel.
//!
//! Invariants:
//! - What was written since the copy came back is never replaced by what a source had before.
//! - It is reported as in sync only after all that was found is durable here.
//! - Resumable by nature: blocks already copied no longer differ. A new epoch starts the comparison again.

use crate::api::Version;
use crate::events::{MirrorEvent, ResyncProgress};
use crate::log::RecordKind;
use crate::message::{Change, READ_BLOCKS_MAX, Reply, Request, Slot, TAGS_MAX, WriteHead, WriteMode, Writer};
use crate::replica::Incoming;
use crate::shell::client::{Client, check_found, sources};
use crate::shell::disk::Outcome;
use crate::shell::server::Copy;
use cluster::config::MemberState;
use cluster::{BlockNo, Command, DiskId, Epoch, MirrorId, View};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Pause after each piece while other reads and writes go on.
const GIVE_WAY: Duration = Duration::from_millis(5);
/// Copies that are done wait at most about so long for others to be reported with them.
const REPORT_AFTER: Duration = Duration::from_secs(5);
/// How often progress is told as an event.
const TELL_EVERY: Duration = Duration::from_secs(2);
/// Pause before something that failed is tried again.
const RETRY: Duration = Duration::from_millis(50);

/// How far the resyncs of this node are.
pub(crate) type Progress = Mutex<BTreeMap<(MirrorId, DiskId), ResyncProgress>>;

/// Resyncs all copies here that need it, one after the other. Is dropped when a newer epoch begins.
pub(crate) async fn resync(client: &Client, view: &Arc<View>, progress: &Progress) {
    let copies = client.server.copies();
    progress.lock().clear();
    let mut left: Vec<_> =
        copies.into_iter().filter(|(_, _, c)| matches!(c.state, MemberState::Syncing { .. }) && !c.disk.is_faulted()).collect();
    for (mirror, disk, copy) in &left {
        let (blocks, MemberState::Syncing { since }) = (u64::from(copy.blocks), copy.state) else { continue };
        progress.lock().insert((*mirror, *disk), ResyncProgress { blocks, ..ResyncProgress::default() });
        let _ = client.events.send(MirrorEvent::ResyncStarted { mirror: *mirror, disk: *disk, since });
    }
    // Each report makes a new epoch, in which all this begins again: so copies that are done are reported together.
    let mut done: Vec<(MirrorId, DiskId)> = Vec::new();
    while !left.is_empty() || !done.is_empty() {
        let mut again = Vec::new();
        for (mirror, disk, copy) in left {
            let work = one(client, view, mirror, disk, &copy, progress);
            let result = tokio::select! {
                biased;
                result = work => result,
                // A long one does not keep those that are done waiting. It goes on from where it was: what was copied is.
                () = tokio::time::sleep(REPORT_AFTER), if !done.is_empty() => {
                    report(client, view, &mut done).await;
                    None
                }
            };
            match result {
                Some(copied) => {
                    tracing::info!("{mirror} on {disk} is up to date: {copied} blocks copied");
                    let _ = client.events.send(MirrorEvent::ResyncFinished { mirror, disk, copied });
                    progress.lock().remove(&(mirror, disk));
                    done.push((mirror, disk));
                }
                None if copy.disk.is_faulted() => {}
                None => again.push((mirror, disk, copy)),
            }
        }
        left = again;
        report(client, view, &mut done).await;
        if !left.is_empty() || !done.is_empty() {
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Reports copies as in sync; those that could not be recorded stay in the list.
async fn report(client: &Client, view: &View, done: &mut Vec<(MirrorId, DiskId)>) {
    if done.is_empty() {
        return;
    }
    match client.cluster.propose(Command::MembersSynced { copies: done.clone(), epoch: view.epoch() }).await {
        Ok(_) => done.clear(),
        Err(e) => tracing::warn!("{} copies are up to date, but that could not be recorded yet: {e}", done.len()),
    }
}

/// One copy. `None` if it has to be tried again.
async fn one(client: &Client, view: &View, mirror: MirrorId, disk: DiskId, copy: &Copy, progress: &Progress) -> Option<u64> {
    let MemberState::Syncing { since } = copy.state else { return None };
    let (started, mut found, mut copied, mut first) = (client.cluster.now(), 0u64, 0u64, 0u32);
    let mut told = started;
    while first < copy.blocks {
        let count = TAGS_MAX.min(copy.blocks - first);
        let differ = compare(client, view, mirror, copy, first, count, since).await?;
        found += differ.len() as u64;
        for piece in differ.chunks(READ_BLOCKS_MAX) {
            let before = client.server.activity.load(Ordering::Relaxed);
            copied += fetch(client, view, mirror, copy, piece).await?;
            if client.server.activity.load(Ordering::Relaxed) > before {
                tokio::time::sleep(GIVE_WAY).await;
            }
            note(client, progress, (mirror, disk), (started, &mut told), (u64::from(first), found, copied));
        }
        first += count;
        note(client, progress, (mirror, disk), (started, &mut told), (u64::from(first), found, copied));
    }
    copy.disk.barrier().await.then_some(copied)
}

fn note(
    client: &Client,
    progress: &Progress,
    key: (MirrorId, DiskId),
    (started, told): (cluster::Instant, &mut cluster::Instant),
    (scanned, found, copied): (u64, u64, u64),
) {
    let now = client.cluster.now();
    let ms = now.since(started).as_millis().max(1) as u64;
    let noted = progress.lock().get_mut(&key).map(|p| {
        (p.scanned, p.found, p.copied, p.rate) = (scanned, found, copied, copied.saturating_mul(1000) / ms);
        *p
    });
    if let Some(progress) = noted
        && now.since(*told) >= TELL_EVERY
    {
        *told = now;
        let (mirror, disk) = key;
        let _ = client.events.send(MirrorEvent::ResyncProgress { mirror, disk, progress });
    }
}

/// Blocks of a stretch that may differ from a source's.
async fn compare(
    client: &Client,
    view: &View,
    mirror: MirrorId,
    copy: &Copy,
    first: u32,
    count: u32,
    since: Epoch,
) -> Option<Vec<u32>> {
    let mut theirs: Option<Vec<Change>> = None;
    for source in sources(view, mirror).into_iter().filter(|s| s.state == MemberState::InSync) {
        let request = Request::Changed { mirror, first, count, since };
        if let Some((Reply::Changed(changes), _)) = client.ask(view.epoch(), source.node, source.disk, request).await {
            theirs = Some(changes);
            break;
        }
    }
    let mut theirs: BTreeMap<u32, Change> = theirs?.into_iter().map(|c| (c.index, c)).collect();
    let ours = copy.disk.tags(copy.base + first, count).await.ok()?;
    let mut differ = Vec::new();
    for (ours, index) in ours.into_iter().zip(first..) {
        let theirs = theirs.remove(&index);
        let differs = match (ours, theirs) {
            (None, _) => true,
            (Some(o), Some(t)) => o.version != t.version || o.checksum != t.checksum,
            (Some(o), None) => o.version > Version(0) && o.version.epoch() >= since,
        };
        if differs {
            differ.push(index);
        }
    }
    Some(differ)
}

/// Copies blocks from a source. `None` if none could be reached.
async fn fetch(client: &Client, view: &View, mirror: MirrorId, copy: &Copy, blocks: &[u32]) -> Option<u64> {
    let mut wanted = blocks.to_vec();
    let mut copied = 0;
    let mut all_answered = true;
    for source in sources(view, mirror).into_iter().filter(|s| s.state == MemberState::InSync) {
        if wanted.is_empty() {
            break;
        }
        let request = Request::Read { mirror, blocks: wanted.clone(), uncertain: false };
        let answer = client.ask(view.epoch(), source.node, source.disk, request).await;
        let Some((Reply::Blocks(found), parts)) =
            answer.filter(|(r, _)| matches!(r, Reply::Blocks(f) if f.len() == wanted.len()))
        else {
            all_answered = false;
            continue;
        };
        let mut parts = parts.into_iter();
        let (mut slots, mut data, mut rest) = (Vec::new(), Vec::new(), Vec::new());
        for (index, found) in std::mem::take(&mut wanted).into_iter().zip(found) {
            match check_found(mirror, index, found, &mut parts) {
                Ok((read, sum)) => {
                    let (checksum, has_data) = sum.unwrap_or_default();
                    slots.push(Slot { index, tag: read.tag, version: read.version, has_data, checksum });
                    data.push(has_data.then_some(read.data));
                }
                Err(_) => rest.push(index),
            }
        }
        wanted = rest;
        copied += slots.len() as u64;
        let head = WriteHead {
            mirror,
            mode: WriteMode::Copy,
            writer: Writer::default(),
            wseq: 0,
            completed_upto: 0,
            clock: 0,
            fresh_data: false,
            slots,
        };
        let (base, syncing_from) = (copy.base, copy.syncing_from);
        let incoming = Incoming { kind: RecordKind::Write, head, data, base, epoch: view.epoch(), syncing_from };
        if copy.disk.write_wait(incoming).await != Outcome::Written {
            return None;
        }
    }
    // Damaged on every source: nothing better can be had; reads of it say so.
    for index in wanted {
        if !all_answered {
            return None;
        }
        let _ = client.events.send(MirrorEvent::Corrupt { block: BlockNo::new(mirror, index) });
    }
    Some(copied)
}
