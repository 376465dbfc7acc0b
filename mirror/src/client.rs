//! The writing side of one node: queues groups per mirror, sends each to every copy that takes writes, and completes it
//! when all of them have it.
//!
//! Invariants:
//! - Per mirror, groups are sent to each copy in the order of `submit`, and complete in that order.
//! - A group's counter is fixed when it is first sent and grows in the order of sending; its epoch is that of the attempt.
//! - In a new epoch every group that is not complete is sent again, to the copies of that epoch.
//! - After a lost message nothing more goes to that copy until what it lacks has been sent again, in order.
//! - Bytes in flight per mirror are bounded; further groups wait here, unsent.
//!
//! Excludes: reading, transport.

use crate::api::{MirrorError, Version, WriteGroup};
use crate::format::{Digest, seal};
use crate::message::{Slot, WriteHead, WriteMode, Writer};
use bytes::Bytes;
use cluster::{BLOCK_SIZE, DiskId, Epoch, MirrorId, NodeId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Bytes of a mirror's groups that are in flight; a single group may pass it.
pub(crate) const WINDOW_BYTES: usize = 8 << 20;
/// Groups of a mirror that are in flight.
pub(crate) const WINDOW_GROUPS: usize = 128;
/// The lowest counter that clients use. Below it is room for writes that need no order among them.
pub(crate) const FIRST_COUNTER: u64 = 1 << 20;

/// A copy that takes writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub disk: DiskId,
    pub node: NodeId,
}

/// What the client must know of a view.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    pub epoch: Epoch,
    /// This node's life, if it is a member.
    pub writer: Option<Writer>,
    /// The mirrors are recovered: writes may be sent.
    pub ready: bool,
    /// Per mirror the copies that take writes; empty while it cannot be used.
    pub mirrors: BTreeMap<MirrorId, Vec<Target>>,
}

/// What the shell is to do, in order.
#[derive(Debug)]
pub(crate) enum Output {
    /// Send a group to a copy; answer with `written` or `lost`.
    Send { target: Target, epoch: Epoch, head: WriteHead, data: Vec<Bytes> },
    /// Tell a copy that groups are complete.
    Completed { target: Target, epoch: Epoch, mirror: MirrorId, writer: Writer, upto: u64 },
    /// A group is done.
    Done(u64, Result<Version, MirrorError>),
}

#[derive(Debug)]
struct Group {
    ticket: u64,
    writes: WriteGroup,
    digests: Vec<Option<Digest>>,
    wseq: u64,
    /// 0: not sent yet.
    counter: u64,
    /// Copies that have not answered in this epoch.
    waiting: BTreeSet<DiskId>,
}

impl Group {
    fn bytes(&self) -> usize {
        self.writes.writes.len() * (BLOCK_SIZE / 8) + self.writes.writes.iter().filter(|w| w.data.is_some()).count() * BLOCK_SIZE
    }

    fn head(&self, mirror: MirrorId, writer: Writer, epoch: Epoch, completed_upto: u64, clock: u64) -> WriteHead {
        let version = Version(Version::first_of(epoch).0 | self.counter);
        let slots = self.writes.writes.iter().zip(&self.digests);
        WriteHead {
            mirror,
            mode: WriteMode::Normal,
            writer,
            wseq: self.wseq,
            completed_upto,
            clock,
            fresh_data: self.writes.fresh_data,
            slots: slots
                .map(|(w, digest)| Slot {
                    index: w.block.index,
                    tag: w.tag,
                    version,
                    has_data: w.data.is_some(),
                    checksum: seal(mirror, w.block.index, version, &w.tag, digest.as_ref()),
                })
                .collect(),
        }
    }

    fn data(&self) -> Vec<Bytes> {
        self.writes.writes.iter().filter_map(|w| w.data.clone()).collect()
    }
}

#[derive(Debug, Default)]
struct Queue {
    /// Oldest first; the first `sent` are in flight.
    groups: VecDeque<Group>,
    sent: usize,
    in_flight: usize,
    last_wseq: u64,
    completed: u64,
    /// Up to where the copies have been told.
    announced: u64,
    /// Copies that lack something that was sent: nothing more goes to them before `tick`.
    broken: BTreeSet<DiskId>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct ClientCore {
    facts: Facts,
    queues: BTreeMap<MirrorId, Queue>,
    /// Highest counter made here.
    last_counter: u64,
}

impl ClientCore {
    /// Queues a group. `clock` as for `pump`.
    pub(crate) fn submit(
        &mut self,
        mirror: MirrorId,
        writes: WriteGroup,
        digests: Vec<Option<Digest>>,
        ticket: u64,
        out: &mut Vec<Output>,
    ) {
        if self.facts.writer.is_none() {
            out.push(Output::Done(ticket, Err(MirrorError::Fenced)));
            return;
        }
        let queue = self.queues.entry(mirror).or_default();
        queue.last_wseq += 1;
        let wseq = queue.last_wseq;
        queue.groups.push_back(Group { ticket, writes, digests, wseq, counter: 0, waiting: BTreeSet::new() });
    }

    /// Sends what may be sent. `clock` makes a new counter, greater than all before. `lease`: this node's lease holds.
    pub(crate) fn pump(&mut self, mirror: MirrorId, lease: bool, clock: &mut dyn FnMut() -> u64, out: &mut Vec<Output>) {
        let Some(writer) = self.facts.writer else { return };
        let Some(targets) = self.facts.mirrors.get(&mirror).filter(|t| !t.is_empty()) else { return };
        let Some(queue) = self.queues.get_mut(&mirror) else { return };
        if !self.facts.ready || !lease {
            return;
        }
        while let Some(group) = queue.groups.get_mut(queue.sent) {
            let bytes = group.bytes();
            if queue.sent > 0 && (queue.in_flight + bytes > WINDOW_BYTES || queue.sent >= WINDOW_GROUPS) {
                break;
            }
            if group.counter == 0 {
                group.counter = clock();
                self.last_counter = self.last_counter.max(group.counter);
            }
            group.waiting = targets.iter().map(|t| t.disk).collect();
            queue.sent += 1;
            queue.in_flight += bytes;
            queue.announced = queue.completed;
            let group = &queue.groups[queue.sent - 1];
            for target in targets.iter().filter(|t| !queue.broken.contains(&t.disk)) {
                let head = group.head(mirror, writer, self.facts.epoch, queue.completed, self.last_counter);
                out.push(Output::Send { target: *target, epoch: self.facts.epoch, head, data: group.data() });
            }
        }
    }

    /// The group is durable on a copy.
    pub(crate) fn written(&mut self, mirror: MirrorId, wseq: u64, disk: DiskId, epoch: Epoch, out: &mut Vec<Output>) {
        if epoch != self.facts.epoch {
            return;
        }
        let Some(queue) = self.queues.get_mut(&mirror) else { return };
        let sent = queue.sent;
        if let Some(group) = queue.groups.iter_mut().take(sent).find(|g| g.wseq == wseq) {
            group.waiting.remove(&disk);
        }
        while queue.sent > 0 && queue.groups.front().is_some_and(|g| g.waiting.is_empty()) {
            let Some(group) = queue.groups.pop_front() else { break };
            queue.sent -= 1;
            queue.in_flight -= group.bytes();
            queue.completed = group.wseq;
            out.push(Output::Done(group.ticket, Ok(Version(Version::first_of(epoch).0 | group.counter))));
        }
    }

    /// It is not known whether a copy got the group, or it was refused for now.
    pub(crate) fn lost(&mut self, mirror: MirrorId, wseq: u64, disk: DiskId, epoch: Epoch) {
        if epoch != self.facts.epoch {
            return;
        }
        if let Some(queue) = self.queues.get_mut(&mirror)
            && queue.groups.iter().take(queue.sent).any(|g| g.wseq == wseq && g.waiting.contains(&disk))
        {
            queue.broken.insert(disk);
        }
    }

    /// A new view. Follow it with `pump` for all mirrors.
    pub(crate) fn view(&mut self, facts: Facts, out: &mut Vec<Output>) {
        if facts.writer.is_none() || facts.writer != self.facts.writer {
            for queue in std::mem::take(&mut self.queues).into_values() {
                out.extend(queue.groups.into_iter().map(|g| Output::Done(g.ticket, Err(MirrorError::Fenced))));
            }
        }
        if facts.epoch != self.facts.epoch {
            for queue in self.queues.values_mut() {
                queue.sent = 0;
                queue.in_flight = 0;
                queue.broken.clear();
                queue.groups.iter_mut().for_each(|g| g.waiting.clear());
            }
        }
        self.facts = facts;
    }

    /// Mirrors with something queued.
    pub(crate) fn busy(&self) -> Vec<MirrorId> {
        self.queues.iter().filter(|(_, q)| !q.groups.is_empty()).map(|(m, _)| *m).collect()
    }

    /// Whether `tick` has something to do.
    pub(crate) fn needs_tick(&self) -> bool {
        self.queues.values().any(|q| !q.broken.is_empty() || q.sent < q.groups.len() || q.announced < q.completed)
    }

    /// A while has passed: repeats what was lost; tells the copies what is complete if nothing else did.
    pub(crate) fn tick(&mut self, lease: bool, out: &mut Vec<Output>) {
        let (Some(writer), true, true) = (self.facts.writer, self.facts.ready, lease) else { return };
        let epoch = self.facts.epoch;
        for (mirror, queue) in &mut self.queues {
            let Some(targets) = self.facts.mirrors.get(mirror) else { continue };
            for disk in std::mem::take(&mut queue.broken) {
                let Some(target) = targets.iter().find(|t| t.disk == disk) else { continue };
                for group in queue.groups.iter().take(queue.sent).filter(|g| g.waiting.contains(&disk)) {
                    let head = group.head(*mirror, writer, epoch, queue.completed, self.last_counter);
                    out.push(Output::Send { target: *target, epoch, head, data: group.data() });
                }
            }
            if queue.sent == 0 && queue.announced < queue.completed {
                queue.announced = queue.completed;
                let upto = queue.completed;
                out.extend(targets.iter().map(|t| Output::Completed { target: *t, epoch, mirror: *mirror, writer, upto }));
            }
        }
    }

    /// Ends everything with an error.
    pub(crate) fn close(&mut self, out: &mut Vec<Output>) {
        for queue in std::mem::take(&mut self.queues).into_values() {
            out.extend(queue.groups.into_iter().map(|g| Output::Done(g.ticket, Err(MirrorError::Shutdown))));
        }
        self.facts.writer = None;
    }

    /// Groups that are not complete.
    pub(crate) fn waiting(&self) -> usize {
        self.queues.values().map(|q| q.groups.len()).sum()
    }

    #[cfg(test)]
    pub(crate) fn show(&self) -> String {
        let queue = |q: &Queue| {
            let groups: Vec<_> = q.groups.iter().map(|g| (g.wseq, g.counter, &g.waiting)).collect();
            format!("sent {} completed {} broken {:?} groups {groups:?}", q.sent, q.completed, q.broken)
        };
        let queues: Vec<_> = self.queues.iter().map(|(m, q)| (m, queue(q))).collect();
        format!("{:?}\n{queues:#?}", self.facts)
    }

    /// Asserts what must hold between steps.
    pub(crate) fn check_invariants(&self) {
        for queue in self.queues.values() {
            assert!(queue.sent <= queue.groups.len());
            assert_eq!(queue.in_flight, queue.groups.iter().take(queue.sent).map(Group::bytes).sum::<usize>());
            let mut last = (queue.completed, 0);
            for (i, group) in queue.groups.iter().enumerate() {
                assert_eq!(group.wseq, last.0 + 1, "groups are queued in order");
                assert!(group.counter == 0 || group.counter > last.1, "counters grow in the order of sending");
                assert!(i >= queue.sent || group.counter != 0);
                last = (group.wseq, last.1.max(group.counter));
            }
        }
    }
}
