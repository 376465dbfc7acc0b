//! Recovery of this layer at the start of an epoch: the copies of a mirror agree on what was in flight.
//!
//! Every member of a mirror collects the uncertain groups from all members and writes their union, in the order of each
//! writer's numbers, with versions of the new epoch. Since a writer's groups reach each copy in order, the union is the
//! longest prefix that any copy has; all copies then have it.
//!
//! Groups of living writers are among them, though those will send them again: a writer may die before it has, together
//! with the only copy that has the group. That copy would come back with a version older than the last epoch in which it
//! was in sync, which resync does not look at.
//!
//! Invariants:
//! - Once an epoch has recovered, versions of older epochs are the same on all copies in sync.
//! - A group that was acknowledged is on every copy in sync, so it is in the union (if it is still uncertain at all).
//! - Applying the union where it already is changes only the epoch of versions; a block that was written since by another
//!   writer has a higher counter and is left alone.
//! - After the exchange of clocks, every counter made in this epoch is greater than any that any disk has seen.
//!
//! - What is uncertain here stays so until all members have finished, so that all find the same union.
//!
//! Excludes: telling the writer. One that lives sends its groups again, and finds them there.

use crate::api::Version;
use crate::format::{block_checksum, digest, seal};
use crate::log::RecordKind;
use crate::message::{Reply, Request, UNCERTAIN_BYTES, WriteHead, WriteMode, Writer};
use crate::replica::{Incoming, counter};
use crate::shell::client::{Client, sources};
use crate::shell::disk::Outcome;
use crate::shell::server::Copy;
use bytes::Bytes;
use cluster::config::MemberState;
use cluster::{DiskId, Epoch, MirrorId, NodeId, View};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long to wait before a peer that could not be reached is asked again.
const RETRY: Duration = Duration::from_millis(20);

/// How long a peer may take to answer the first question before it is asked again.
const UNHEARD: Duration = Duration::from_millis(200);

type Groups = BTreeMap<(Writer, u64), Vec<(WriteHead, Vec<Option<Bytes>>)>>;

/// Recovers this node's disks for an epoch. Returns when done; is dropped when a newer epoch begins.
pub(crate) async fn recover(client: &Client, view: &Arc<View>) {
    exchange_clocks(client, view).await;
    let copies: Vec<_> = client
        .server
        .copies()
        .into_iter()
        .filter(|(_, _, c)| !matches!(c.state, MemberState::Stale { .. }) && !c.disk.is_faulted())
        .collect();
    // Disks in turn, mirrors in turn: after most changes there is nothing to exchange, and a question each.
    let work = copies
        .into_iter()
        .map(|(mirror, disk, copy)| -> cluster::BoxFuture<'_, ()> { Box::pin(reconcile(client, view, mirror, disk, copy)) });
    crate::shell::tasks::parallel(16, work.collect()).await;
}

async fn exchange_clocks(client: &Client, view: &View) {
    let peers: Vec<NodeId> = view.config.up().into_iter().filter(|n| *n != client.me).collect();
    let asks = peers.into_iter().map(|node| -> cluster::BoxFuture<'_, ()> {
        Box::pin(async move {
            loop {
                let clock = client.server.clock.load(Ordering::Acquire);
                let call = client.rpc.call(node, view.epoch(), DiskId(0), Request::Clock { clock });
                // A peer that has only just started does not listen yet: what it is sent is dropped without a word.
                if let Ok(Some((Reply::Clock(theirs), _))) = tokio::time::timeout(UNHEARD, call).await {
                    client.server.clock.fetch_max(theirs, Ordering::AcqRel);
                    return;
                }
                tokio::time::sleep(RETRY).await;
            }
        })
    });
    crate::shell::tasks::parallel(usize::MAX, asks.collect()).await;
}

async fn reconcile(client: &Client, view: &View, mirror: MirrorId, disk: DiskId, copy: Copy) {
    let mut groups = Groups::new();
    if !own(mirror, &copy, &mut groups).await {
        return;
    }
    for source in sources(view, mirror) {
        if source.disk != disk && !matches!(source.state, MemberState::Stale { .. }) {
            let in_sync = source.state == MemberState::InSync;
            theirs(client, view, mirror, source.node, source.disk, in_sync, &mut groups).await;
        }
    }
    if !groups.is_empty() {
        tracing::info!("{mirror} on {disk}: {} groups may not be on all copies", groups.len());
    }
    for ((_, _), versions) in groups {
        for (head, data) in distinct(versions) {
            let incoming = renew(view.epoch(), head, data, &copy);
            if copy.disk.write_wait(incoming).await != Outcome::Written {
                // Failed (a new epoch will say so), or a new epoch has begun.
                return;
            }
        }
    }
}

async fn own(mirror: MirrorId, copy: &Copy, groups: &mut Groups) -> bool {
    if !copy.disk.barrier().await {
        return false;
    }
    let mut after = None;
    loop {
        let Ok((some, more)) = copy.disk.uncertain(mirror, after, UNCERTAIN_BYTES).await else { return false };
        after = some.last().map(|(h, _)| (h.writer, h.wseq));
        for (head, data) in some {
            groups.entry((head.writer, head.wseq)).or_default().push((head, data));
        }
        if !more {
            return true;
        }
    }
}

/// Collects a peer's uncertain groups. One in sync must answer; one that is itself being synced need not.
async fn theirs(client: &Client, view: &View, mirror: MirrorId, node: NodeId, disk: DiskId, in_sync: bool, groups: &mut Groups) {
    let mut after = None;
    loop {
        match client.ask(view.epoch(), node, disk, Request::Uncertain { mirror, after }).await {
            Some((Reply::Uncertain { groups: some, more }, parts)) => {
                let mut parts = parts.into_iter();
                let last = some.last().map(|h| (h.writer, h.wseq));
                for head in some {
                    let data: Vec<_> = head.slots.iter().map(|s| if s.has_data { parts.next() } else { None }).collect();
                    groups.entry((head.writer, head.wseq)).or_default().push((head, data));
                }
                if !more || last.is_none() {
                    return;
                }
                after = last;
            }
            // A failed disk leaves in another epoch.
            Some((Reply::Faulted, _)) if !in_sync => return,
            _ => tokio::time::sleep(RETRY).await,
        }
    }
}

/// Copies of one group, without those that say the same.
fn distinct(mut versions: Vec<(WriteHead, Vec<Option<Bytes>>)>) -> Vec<(WriteHead, Vec<Option<Bytes>>)> {
    let mut seen = BTreeSet::new();
    versions.retain(|(head, _)| seen.insert(head.slots.iter().map(|s| (s.index, counter(s.version))).collect::<Vec<_>>()));
    versions
}

/// The group as a write of this epoch. Contents that do not have their checksum are left out.
fn renew(epoch: Epoch, mut head: WriteHead, data: Vec<Option<Bytes>>, copy: &Copy) -> Incoming {
    let mirror = head.mirror;
    let mut kept = Vec::new();
    let mut contents = Vec::new();
    for (mut slot, data) in std::mem::take(&mut head.slots).into_iter().zip(data) {
        let right = slot.has_data == data.is_some()
            && slot.index < copy.blocks
            && block_checksum(mirror, slot.index, slot.version, &slot.tag, data.as_deref()) == slot.checksum;
        if right {
            slot.version = Version(Version::first_of(epoch).0 | counter(slot.version));
            slot.checksum = seal(mirror, slot.index, slot.version, &slot.tag, data.as_deref().map(digest).as_ref());
            kept.push(slot);
            contents.push(data);
        }
    }
    head.slots = kept;
    head.mode = WriteMode::Recover;
    head.fresh_data = false;
    // Nothing is certain before all members are done: a peer that has not asked yet must find what this one found.
    head.completed_upto = 0;
    let (base, syncing_from) = (copy.base, copy.syncing_from);
    Incoming { kind: RecordKind::Write, head, data: contents, base, epoch, syncing_from }
}
