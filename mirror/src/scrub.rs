//! Scrub: reads all copies of the allocated blocks that this node's disks have, and repairs what is damaged.
//!
//! Excludes: copies that are being synced (resync brings them), free blocks.

use crate::api::{BlockRead, Kind, Version};
use crate::events::ScrubReport;
use crate::format::Checksum;
use crate::message::{Found, READ_BLOCKS_MAX, Reply, Request};
use crate::replica::counter;
use crate::shell::client::{Client, Source, check_found, sources};
use cluster::config::MemberState;
use cluster::{DiskId, MirrorId, View};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// A stretch is compared again so often before a difference in versions counts: writes may be under way.
const TRIES: u32 = 5;
const RETRY: Duration = Duration::from_millis(50);

/// One copy's answer for one block.
type Answer = Result<(BlockRead, Option<(Checksum, bool)>), Version>;

/// Scrubs all mirrors that have a copy in sync here.
pub(crate) async fn scrub(client: &Client, report: &Mutex<ScrubReport>) {
    let copies: Vec<_> = client.server.copies().into_iter().filter(|(_, _, c)| c.state == MemberState::InSync).collect();
    let blocks = copies.iter().map(|(_, _, c)| u64::from(c.blocks)).sum();
    *report.lock() = ScrubReport { running: true, blocks, ..ScrubReport::default() };
    for (mirror, _, copy) in copies {
        let mut first = 0;
        while first < copy.blocks {
            let count = (READ_BLOCKS_MAX as u32).min(copy.blocks - first);
            // A damaged tag counts as allocated: it is looked at.
            let Ok(tags) = copy.disk.tags(copy.base + first, count).await else { break };
            let used = tags.into_iter().zip(first..).filter(|(t, _)| t.is_none_or(|t| t.tag.kind != Kind::Free));
            let blocks: Vec<u32> = used.map(|(_, i)| i).collect();
            if !blocks.is_empty() {
                stretch(client, mirror, blocks, report).await;
            }
            first += count;
            report.lock().looked += u64::from(count);
        }
    }
    let mut report = report.lock();
    (report.running, report.finished) = (false, true);
}

/// Looks at all copies of what lies in an area of one of this node's disks, and repairs what is damaged. Copies that are
/// being synced are left to resync.
pub(crate) async fn repair_area(client: &Client, disk: DiskId, area: Range<u32>) {
    if client.ready().await.is_err() {
        return;
    }
    let report = Mutex::new(ScrubReport::default());
    let copies = client.server.copies().into_iter().filter(|(_, d, c)| *d == disk && c.state == MemberState::InSync);
    for (mirror, _, copy) in copies {
        let (first, end) = (area.start.max(copy.base), area.end.min(copy.base.saturating_add(copy.blocks)));
        if first < end {
            stretch(client, mirror, (first - copy.base..end - copy.base).collect(), &report).await;
        }
    }
    let left = report.lock().unrepaired;
    if left > 0 {
        tracing::error!("{disk}: {left} damaged blocks could not be repaired for now; reading them, or a scrub, tries again");
    }
}

async fn stretch(client: &Client, mirror: MirrorId, mut blocks: Vec<u32>, report: &Mutex<ScrubReport>) {
    report.lock().checked += blocks.len() as u64;
    for attempt in 1..=TRIES {
        let Ok(view) = client.ready().await else { return };
        let copies: Vec<Source> = sources(&view, mirror).into_iter().filter(|s| s.state == MemberState::InSync).collect();
        let mut answers: Vec<Vec<(Source, Answer)>> = blocks.iter().map(|_| Vec::new()).collect();
        let mut uncertain = vec![false; blocks.len()];
        for source in &copies {
            let request = Request::Read { mirror, blocks: blocks.clone(), uncertain: true };
            let reply = client.ask(view.epoch(), source.node, source.disk, request).await;
            let Some((Reply::Blocks(found), parts)) =
                reply.filter(|(r, _)| matches!(r, Reply::Blocks(f) if f.len() == blocks.len()))
            else {
                continue;
            };
            let mut parts = parts.into_iter();
            for (i, found) in found.into_iter().enumerate() {
                uncertain[i] |= matches!(found, Found::Block { uncertain: true, .. });
                answers[i].push((*source, check_found(mirror, blocks[i], found, &mut parts)));
            }
        }
        let mut again = Vec::new();
        for (i, answers) in answers.into_iter().enumerate() {
            if !settle(client, &view, mirror, blocks[i], answers, uncertain[i] || attempt < TRIES, report).await {
                again.push(blocks[i]);
            }
        }
        if again.is_empty() {
            return;
        }
        blocks = again;
        tokio::time::sleep(RETRY).await;
    }
}

/// Compares the copies of a block and repairs bad ones. False: look again later.
async fn settle(
    client: &Client,
    view: &Arc<View>,
    mirror: MirrorId,
    index: u32,
    answers: Vec<(Source, Answer)>,
    moving: bool,
    report: &Mutex<ScrubReport>,
) -> bool {
    let newest = answers.iter().filter_map(|(_, a)| a.as_ref().ok()).max_by_key(|(r, _)| (counter(r.version), r.version));
    let Some((read, sum)) = newest.cloned() else {
        report.lock().unrepaired += answers.len() as u64;
        return true;
    };
    let mut bad = Vec::new();
    for (source, answer) in answers {
        match answer {
            Err(version) => bad.push((source, version)),
            // A lost write. While writes may be under way it looks the same.
            Ok((theirs, _)) if theirs.version != read.version => {
                if moving {
                    return false;
                }
                bad.push((source, theirs.version));
            }
            Ok(_) => {}
        }
    }
    if !bad.is_empty() {
        let wanted = bad.len() as u64;
        let repaired = client.repair(view.epoch(), mirror, index, &read, sum, bad).await;
        let mut report = report.lock();
        report.repaired += repaired;
        report.unrepaired += wanted - repaired;
    }
    true
}
