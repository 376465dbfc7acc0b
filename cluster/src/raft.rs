//! Agreement on the configuration: the `raft` crate's core with this project's log, machine and choice of voters.
//!
//! A core without clock or I/O. Its owner calls `tick`, `step`, `propose`, and after each of them repeats
//! [`RaftCore::poll`] until there is no more [`Work`]: it sends the messages, and puts the batch into a queue. Batches are
//! made durable one after the other, each followed by [`RaftCore::saved`] and more polling. Meanwhile the core goes on: a
//! leader with a slow disk still sends its heartbeats.
//!
//! Invariants:
//! - Nothing that promises something is sent before what it promises is durable.
//! - A change of the voters is applied only when its commit is durable: else a lone old voter could restart with the old
//!   set and elect itself beside the new majority.
//! - Elections are timed by the seed alone (the `raft` crate's own random timeouts are switched off), so runs replay.
//!
//! Excludes: who is alive (`membership`).

mod log;

use crate::config::{Applied, Config};
use crate::ids::{Incarnation, NodeId};
use crate::machine::{Machine, Request};
use crate::prng::Prng;
use crate::store::{Batch, Hard, Saved, SnapshotData, Voters};
use bytes::Bytes;
use log::{Log, from_conf_state, from_entry, from_snapshot, hard};
use protobuf::Message as _;
use raft::eraftpb::{
    ConfChange, ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType, Message,
    MessageType,
};
use raft::{RawNode, SnapshotStatus, StateRole};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, VecDeque};

/// Entries kept in the log beyond the snapshot, for followers that are a little behind.
const TRAILING_ENTRIES: u64 = 64;
/// Entries after which a new snapshot is made.
const SNAPSHOT_ENTRIES: u64 = 256;
/// Longest chain of entries in one message, in bytes.
const APPEND_BYTES_MAX: u64 = 1 << 20;
/// Most elections in a row that a node hurries after its start, or when a leader's process was seen to be gone.
const HURRIED_ELECTIONS: u32 = 8;

/// A message between the cores of two nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RaftWire {
    /// Of the `raft` crate, in its encoding.
    Raft(Bytes),
    /// To the leader: append this. Another node passes it on to the leader that it knows.
    Request(Request),
    /// As `Request`, passed on once already.
    Forwarded(Request),
}

/// What the rest of the node must know of the agreement.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RaftStatus {
    /// The newest term that this node takes part in: it has promised not to support leaders of older ones.
    pub term: u64,
    /// The leader of the term, if known.
    pub leader: Option<NodeId>,
    /// Whether this node is it.
    pub leading: bool,
    /// As leader: an entry of the own term was applied, so everything earlier leaders did is known.
    pub ready: bool,
    /// Sets of voters, of each of which a majority is needed. Empty while a change of them is on its way.
    pub quorums: Vec<BTreeSet<NodeId>>,
}

impl RaftStatus {
    /// The value that at least a majority of each set has reached; `None` if the sets are not settled, or for a majority
    /// without a value.
    pub fn majority<T: Ord + Copy>(&self, value: impl Fn(NodeId) -> Option<T>) -> Option<T> {
        let of_set = |set: &BTreeSet<NodeId>| {
            let mut values: Vec<T> = set.iter().filter_map(|n| value(*n)).collect();
            values.sort_unstable();
            let needed = set.len() / 2 + 1;
            values.len().checked_sub(needed).map(|at| values[at])
        };
        let values: Option<Vec<T>> = self.quorums.iter().map(of_set).collect();
        values?.into_iter().min()
    }
}

/// How elections are timed, in ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RaftTiming {
    /// Silence of the leader after which others may be elected (at random up to twice that), and for which a leader
    /// stays one without hearing of a majority.
    pub election_ticks: u64,
    /// Ticks between the leader's messages.
    pub heartbeat_ticks: u64,
}

/// Something to be done for the core.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// To be sent now.
    pub send: Vec<(NodeId, RaftWire)>,
    /// To be made durable, after those before it; then [`RaftCore::saved`] is called. Also if it is empty.
    pub save: Option<Batch>,
    /// Requests that were applied: who asked, in which life, number, answer.
    pub answers: Vec<(NodeId, Incarnation, u64, Applied)>,
    /// Whether the configuration may have changed.
    pub changed: bool,
    /// Whether it came as a whole from the leader, so that answers may be in it that were not reported.
    pub restored: bool,
}

/// The core.
pub struct RaftCore {
    raw: RawNode<Log>,
    machine: Machine,
    timing: RaftTiming,
    rng: Prng,
    /// Ticks without a leader's message after which this node stands for election.
    patience: u64,
    hurried: u32,
    /// Batches that are on their way, the oldest first.
    saving: VecDeque<Saving>,
    /// To be sent, now that what they promise is durable.
    outbox: Vec<Message>,
    /// Committed, not yet applied.
    committed: VecDeque<Entry>,
    /// A state that came as a whole and is durable, to be taken over.
    restore: Option<SnapshotData>,
    /// The newest commit known to be durable.
    durable_commit: u64,
    /// Whether this node led when work was last given out.
    led: bool,
    snapshot_due: bool,
}

/// What follows when a batch is durable.
enum Saving {
    Ready { number: u64, messages: Vec<Message>, snapshot: Option<Box<SnapshotData>>, commit: u64 },
    Commit(u64),
    Compact(u64),
}

/// Why a core cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("the saved cluster state does not fit together: {0}")]
pub struct RaftError(String);

impl RaftCore {
    /// A core from what was saved.
    ///
    /// # Errors
    /// If the saved state contradicts itself.
    pub fn new(me: NodeId, saved: &Saved, timing: RaftTiming, seed: u64) -> Result<Self, RaftError> {
        let machine = if saved.snapshot.index == 0 { Machine::default() } else { decode_machine(&saved.snapshot.machine)? };
        let log = Log::new(saved)?;
        let election_tick = usize::try_from(timing.election_ticks).unwrap_or(usize::MAX / 4).max(2);
        let config = raft::Config {
            id: u64::from(me.0),
            election_tick,
            heartbeat_tick: usize::try_from(timing.heartbeat_ticks).unwrap_or(1).clamp(1, election_tick - 1),
            applied: saved.snapshot.index,
            max_size_per_msg: APPEND_BYTES_MAX,
            max_inflight_msgs: 64,
            check_quorum: true,
            pre_vote: true,
            // The crate draws from this range by thread_rng. Only this core starts elections, by its own seed.
            min_election_tick: usize::MAX / 2,
            max_election_tick: usize::MAX / 2 + 1,
            ..raft::Config::default()
        };
        let logger = slog::Logger::root(TracingDrain, slog::o!());
        let raw = RawNode::new(&config, log, &logger).map_err(|e| RaftError(e.to_string()))?;
        let mut core = RaftCore {
            raw,
            machine,
            timing,
            rng: Prng::new(seed ^ u64::from(me.0).wrapping_mul(0x9e37_79b9)),
            patience: 0,
            // After a start there is mostly no leader; if there is one, the others refuse their votes.
            hurried: HURRIED_ELECTIONS,
            saving: VecDeque::new(),
            outbox: Vec::new(),
            committed: VecDeque::new(),
            restore: None,
            led: false,
            durable_commit: saved.hard.commit,
            snapshot_due: false,
        };
        core.draw_patience();
        Ok(core)
    }

    /// The state after the last applied entry.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The present status.
    #[must_use]
    pub fn status(&self) -> RaftStatus {
        let raft = &self.raw.raft;
        let leading = raft.state == StateRole::Leader;
        let cs = raft.prs().conf().to_conf_state();
        let quorums = if leading && raft.has_pending_conf() {
            Vec::new()
        } else {
            [&cs.voters, &cs.voters_outgoing]
                .into_iter()
                .filter(|v| !v.is_empty())
                .map(|v| v.iter().map(|n| node(*n)).collect())
                .collect()
        };
        RaftStatus {
            term: raft.term,
            leader: (raft.leader_id != raft::INVALID_ID).then(|| node(raft.leader_id)),
            leading,
            ready: leading && raft.apply_to_current_term(),
            quorums,
        }
    }

    /// Time passes.
    pub fn tick(&mut self) {
        let raft = &self.raw.raft;
        let waits = raft.state != StateRole::Leader && raft.promotable() && raft.election_elapsed as u64 + 1 >= self.patience;
        if waits {
            self.campaign();
        } else {
            self.raw.tick();
        }
    }

    fn campaign(&mut self) {
        self.raw.raft.election_elapsed = 0;
        self.draw_patience();
        if let Err(e) = self.raw.campaign() {
            tracing::debug!("cannot stand for election: {e}");
        }
    }

    fn draw_patience(&mut self) {
        let ticks = self.timing.election_ticks.max(2);
        self.patience = if self.hurried > 0 {
            self.hurried -= 1;
            2 + self.rng.below(ticks / 2 + 1)
        } else {
            ticks + self.rng.below(ticks)
        };
    }

    /// The process of a node is gone for sure. If it was the leader, the others need not wait for it to be silent.
    pub fn process_gone(&mut self, gone: NodeId) {
        let raft = &mut self.raw.raft;
        if raft.leader_id != u64::from(gone.0) || raft.state == StateRole::Leader {
            return;
        }
        raft.leader_id = raft::INVALID_ID;
        self.hurried = HURRIED_ELECTIONS;
        let me = raft.id;
        let before = raft.prs().conf().voters().ids().iter().filter(|v| *v < me && *v != u64::from(gone.0)).count() as u64;
        // One after the other, so that the first one is not disturbed.
        self.patience = raft.election_elapsed as u64 + 1 + 2 * before;
    }

    /// A message came from another node's core.
    pub fn step(&mut self, from: NodeId, bytes: &[u8]) {
        let message = match Message::parse_from_bytes(bytes) {
            Ok(message) => message,
            Err(e) => return tracing::warn!("{from} sent a raft message that cannot be read: {e}"),
        };
        if message.from != u64::from(from.0) || message.to != self.raw.raft.id {
            return tracing::warn!("{from} sent a raft message from {} to {}", message.from, message.to);
        }
        let last = self.raw.raft.raft_log.last_index();
        if message.get_msg_type() == MessageType::MsgHeartbeat && message.commit > last {
            // The crate would stop the process. It means that this node has forgotten what it had acknowledged.
            return tracing::error!("the leader {from} counts on entry {}, this node's log ends at {last}", message.commit);
        }
        if let Err(e) = self.raw.step(message) {
            tracing::debug!("raft message of {from} not used: {e}");
        }
        if self.raw.raft.leader_id != raft::INVALID_ID {
            self.hurried = 0;
        }
    }

    /// Messages to a node may have been lost.
    pub fn unreachable(&mut self, peer: NodeId) {
        self.raw.report_unreachable(u64::from(peer.0));
    }

    /// Appends a request, as leader; says no otherwise.
    pub fn propose(&mut self, request: &Request) -> bool {
        if self.raw.raft.state != StateRole::Leader {
            return false;
        }
        match postcard::to_allocvec(request) {
            Ok(data) => self.raw.propose(Vec::new(), data).is_ok(),
            Err(_) => false,
        }
    }

    /// As leader: moves the set of voters towards what the configuration asks for, a step at a time.
    pub fn reconcile(&mut self) {
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader || raft.has_pending_conf() || !raft.apply_to_current_term() {
            return;
        }
        let cs = raft.prs().conf().to_conf_state();
        let Some(change) = next_change(&cs, &self.machine.config) else { return };
        if let Err(e) = self.raw.propose_conf_change(Vec::new(), change) {
            tracing::debug!("change of the voters not proposed: {e}");
        }
    }

    /// The next piece of work, if there is any.
    pub fn poll(&mut self) -> Option<Work> {
        if !self.outbox.is_empty() {
            let messages = std::mem::take(&mut self.outbox);
            return Some(Work { send: self.outgoing(messages), ..Work::default() });
        }
        if let Some(snapshot) = self.restore.take() {
            return Some(self.take_over(&snapshot));
        }
        if !self.committed.is_empty() {
            if self.may_apply() {
                return Some(self.apply_committed());
            }
            if !self.saving.iter().any(|s| matches!(s, Saving::Commit(_))) {
                let commit = self.raw.raft.raft_log.committed;
                let hard = Hard { commit, ..hard(&self.raw.raft.hard_state()) };
                self.saving.push_back(Saving::Commit(commit));
                return Some(Work { save: Some(Batch { hard: Some(hard), ..Batch::default() }), ..Work::default() });
            }
        }
        if let Some(work) = self.snapshot() {
            return Some(work);
        }
        // Only a leader goes on while something is being made durable: the messages of others promise that it is.
        let leads = self.raw.raft.state == StateRole::Leader;
        let may = self.saving.is_empty() || (leads && self.led);
        if !may || !self.raw.has_ready() {
            return None;
        }
        self.led = leads;
        Some(self.take_ready())
    }

    fn take_ready(&mut self) -> Work {
        let mut ready = self.raw.ready();
        let messages = ready.take_messages();
        let send = self.outgoing(messages);
        let mut save = Batch { hard: ready.hs().map(hard), lazy: !ready.must_sync(), ..Batch::default() };
        let log = self.raw.mut_store();
        let mut snapshot = None;
        if !ready.snapshot().is_empty() {
            let data = from_snapshot(ready.snapshot());
            log.reset(data.clone());
            save.snapshot = Some(data.clone());
            save.reset_log = true;
            snapshot = Some(Box::new(data));
        }
        log.append(ready.entries());
        save.entries = ready.entries().iter().map(from_entry).collect();
        let mut commit = 0;
        if let Some(hs) = ready.hs() {
            log.hard = hs.clone();
            commit = if ready.must_sync() { hs.commit } else { 0 };
        }
        self.committed.extend(ready.take_committed_entries());
        let messages = ready.take_persisted_messages();
        self.saving.push_back(Saving::Ready { number: ready.number(), messages, snapshot, commit });
        self.raw.advance_append_async(ready);
        Work { send, save: Some(save), ..Work::default() }
    }

    /// The oldest batch that `poll` gave out is durable.
    pub fn saved(&mut self) {
        match self.saving.pop_front() {
            None => {}
            Some(Saving::Commit(commit)) => self.durable_commit = self.durable_commit.max(commit),
            Some(Saving::Compact(to)) => self.raw.mut_store().compact(to),
            Some(Saving::Ready { number, messages, snapshot, commit }) => {
                self.durable_commit = self.durable_commit.max(commit);
                self.raw.on_persist_ready(number);
                self.outbox.extend(messages);
                if let Some(snapshot) = snapshot {
                    self.restore = Some(*snapshot);
                }
            }
        }
    }

    fn take_over(&mut self, snapshot: &SnapshotData) -> Work {
        match decode_machine(&snapshot.machine) {
            Ok(machine) => self.machine = machine,
            // The leader runs another version. What is known stays; the next epoch will not be adopted.
            Err(e) => tracing::error!("the state that the leader sent cannot be used: {e}"),
        }
        // Nothing older is waiting: it would have been applied first.
        self.committed.retain(|e| e.index > snapshot.index);
        self.raw.advance_apply_to(snapshot.index);
        Work { changed: true, restored: true, ..Work::default() }
    }

    /// Whether the commit of the voters' changes that wait is durable.
    fn may_apply(&self) -> bool {
        let change = self.committed.iter().rev().find(|e| e.get_entry_type() != EntryType::EntryNormal);
        change.is_none_or(|e| e.index <= self.durable_commit)
    }

    fn apply_committed(&mut self) -> Work {
        let mut work = Work::default();
        while let Some(entry) = self.committed.pop_front() {
            self.apply(&entry, &mut work);
            self.raw.advance_apply_to(entry.index);
        }
        work
    }

    fn snapshot(&mut self) -> Option<Work> {
        let applied = self.raw.raft.raft_log.applied;
        let last = self.raw.store().snapshot.index;
        let due = applied > last && (self.snapshot_due || applied - last >= SNAPSHOT_ENTRIES);
        if !due || !self.saving.is_empty() || !self.committed.is_empty() {
            return None;
        }
        let machine = encode_machine(&self.machine)?;
        let log = self.raw.store();
        let term = raft::Storage::term(log, applied).ok()?;
        let voters = from_conf_state(&self.raw.raft.prs().conf().to_conf_state());
        let snapshot = SnapshotData { index: applied, term, voters, machine };
        let compact_to = applied.saturating_sub(TRAILING_ENTRIES).max(log.compacted.0);
        self.saving.push_back(Saving::Compact(compact_to));
        self.raw.mut_store().snapshot = snapshot.clone();
        self.snapshot_due = false;
        let save = Batch { snapshot: Some(snapshot), compact_to: Some(compact_to), ..Batch::default() };
        Some(Work { save: Some(save), ..Work::default() })
    }

    fn apply(&mut self, entry: &Entry, work: &mut Work) {
        match entry.get_entry_type() {
            EntryType::EntryNormal if entry.data.is_empty() => {}
            EntryType::EntryNormal => match postcard::from_bytes::<Request>(&entry.data) {
                Ok(request) => {
                    if let Some(applied) = self.machine.apply(&request) {
                        tracing::debug!(index = entry.index, command = ?request.command, answer = ?applied, "applied");
                        work.answers.push((request.origin, request.life, request.number, applied));
                    }
                    work.changed = true;
                }
                Err(e) => tracing::error!("entry {} of the cluster log cannot be read ({e}); it is skipped", entry.index),
            },
            EntryType::EntryConfChange | EntryType::EntryConfChangeV2 => {
                let change = if entry.get_entry_type() == EntryType::EntryConfChangeV2 {
                    ConfChangeV2::parse_from_bytes(&entry.data)
                } else {
                    ConfChange::parse_from_bytes(&entry.data).map(|c| raft_change(&c))
                };
                match change.map_err(|e| e.to_string()).and_then(|c| self.raw.apply_conf_change(&c).map_err(|e| e.to_string())) {
                    Ok(cs) => {
                        tracing::info!(voters = ?cs.voters, learners = ?cs.learners, outgoing = ?cs.voters_outgoing, "voters changed");
                        // New nodes start from a snapshot that names them.
                        self.snapshot_due = true;
                    }
                    Err(e) => tracing::error!("a change of the voters was not applied: {e}"),
                }
            }
        }
    }

    /// Encodes messages. A snapshot counts as arrived when it is sent: if it was lost, the next append is refused by the
    /// follower, and another one is sent.
    fn outgoing(&mut self, messages: Vec<Message>) -> Vec<(NodeId, RaftWire)> {
        let mut out = Vec::with_capacity(messages.len());
        for message in messages {
            let to = message.to;
            match message.write_to_bytes() {
                Ok(bytes) => out.push((node(to), RaftWire::Raft(bytes.into()))),
                Err(e) => tracing::error!("raft message not encoded: {e}"),
            }
            if message.get_msg_type() == MessageType::MsgSnapshot {
                self.raw.report_snapshot(to, SnapshotStatus::Finish);
            }
        }
        out
    }

    /// Panics if an invariant is broken.
    pub fn check_invariants(&self) {
        self.machine.config.check_invariants();
        let log = self.raw.store();
        let gap = log.entries.iter().zip(log.compacted.0 + 1..).find(|(entry, next)| entry.index != *next);
        assert!(gap.is_none(), "the log has a gap at {gap:?}");
        assert!(log.snapshot.index >= log.compacted.0 && self.raw.raft.raft_log.applied <= self.raw.raft.raft_log.committed);
    }
}

/// The first state of a new cluster, with one node: what its store is filled with before its first start.
#[must_use]
pub fn bootstrap(config: Config, first: NodeId) -> Batch {
    let machine = encode_machine(&Machine::new(config)).unwrap_or_default();
    let voters = Voters { voters: vec![u64::from(first.0)], ..Voters::default() };
    // It begins with a snapshot, not with an empty log: so every other node begins with a snapshot, too.
    let snapshot = SnapshotData { index: 1, term: 1, voters, machine };
    let hard = Hard { term: 1, vote: 0, commit: 1 };
    Batch { snapshot: Some(snapshot), reset_log: true, compact_to: Some(1), hard: Some(hard), ..Batch::default() }
}

/// The next step from the present voters to the wanted ones.
fn next_change(cs: &ConfState, config: &Config) -> Option<ConfChangeV2> {
    let mut change = ConfChangeV2::default();
    if !cs.voters_outgoing.is_empty() {
        // Complete the last change: an empty one leaves the joint state.
        return Some(change);
    }
    let mut steps = Vec::new();
    let mut step = |kind, node: u64| {
        let mut single = ConfChangeSingle::default();
        single.set_change_type(kind);
        single.node_id = node;
        steps.push(single);
    };
    if !config.nodes.values().any(|n| n.voter) {
        return None;
    }
    for (id, info) in &config.nodes {
        let id = u64::from(id.0);
        match (info.voter, cs.voters.contains(&id), cs.learners.contains(&id)) {
            (true, false, _) => step(ConfChangeType::AddNode, id),
            (false, true, _) | (false, false, false) => step(ConfChangeType::AddLearnerNode, id),
            _ => {}
        }
    }
    for id in cs.voters.iter().chain(&cs.learners) {
        if !config.nodes.contains_key(&node(*id)) {
            step(ConfChangeType::RemoveNode, *id);
        }
    }
    if steps.is_empty() {
        return None;
    }
    if steps.len() > 1 {
        // Not left automatically: the crate forgets to when the leader changes meanwhile.
        change.set_transition(ConfChangeTransition::Explicit);
    }
    change.set_changes(steps.into());
    Some(change)
}

fn raft_change(change: &ConfChange) -> ConfChangeV2 {
    let mut single = ConfChangeSingle::default();
    single.set_change_type(change.get_change_type());
    single.node_id = change.node_id;
    let mut v2 = ConfChangeV2::default();
    v2.set_changes(vec![single].into());
    v2
}

fn node(id: u64) -> NodeId {
    NodeId(u32::try_from(id).unwrap_or(u32::MAX))
}

/// First byte of a machine's encoding: its version.
const MACHINE_VERSION: u8 = 1;

fn encode_machine(machine: &Machine) -> Option<Vec<u8>> {
    postcard::to_extend(machine, vec![MACHINE_VERSION]).map_err(|e| tracing::error!("state not encoded: {e}")).ok()
}

fn decode_machine(bytes: &[u8]) -> Result<Machine, RaftError> {
    match bytes.split_first() {
        Some((&MACHINE_VERSION, rest)) => postcard::from_bytes(rest).map_err(|e| RaftError(e.to_string())),
        Some((version, _)) => Err(RaftError(format!("its version is {version}, this program knows {MACHINE_VERSION}"))),
        None => Err(RaftError("it is empty".into())),
    }
}

/// Hands the `raft` crate's log lines to `tracing`.
struct TracingDrain;

impl slog::Drain for TracingDrain {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &slog::Record<'_>, _: &slog::OwnedKVList) -> Result<(), slog::Never> {
        match record.level() {
            slog::Level::Critical => tracing::error!(target: "raft", "{}", record.msg()),
            slog::Level::Error | slog::Level::Warning => tracing::debug!(target: "raft", "{}", record.msg()),
            _ => tracing::trace!(target: "raft", "{}", record.msg()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
