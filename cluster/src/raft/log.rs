//! The log as the `raft` crate reads it, and the conversions between its types and those that are kept.
//!
//! Excludes: making it durable (`store`).

use super::RaftError;
use crate::store::{EntryKind, Hard, LogEntry, Saved, SnapshotData, Voters};
use raft::eraftpb::{ConfState, Entry, EntryType, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, StorageError as RaftStorageError};
use std::collections::VecDeque;

pub(super) fn hard(hs: &HardState) -> Hard {
    Hard { term: hs.term, vote: hs.vote, commit: hs.commit }
}

pub(super) fn from_conf_state(cs: &ConfState) -> Voters {
    Voters {
        voters: cs.voters.clone(),
        learners: cs.learners.clone(),
        outgoing: cs.voters_outgoing.clone(),
        learners_next: cs.learners_next.clone(),
        auto_leave: cs.auto_leave,
    }
}

fn to_conf_state(voters: &Voters) -> ConfState {
    let mut cs = ConfState::default();
    cs.voters.clone_from(&voters.voters);
    cs.learners.clone_from(&voters.learners);
    cs.voters_outgoing.clone_from(&voters.outgoing);
    cs.learners_next.clone_from(&voters.learners_next);
    cs.auto_leave = voters.auto_leave;
    cs
}

pub(super) fn from_snapshot(snapshot: &Snapshot) -> SnapshotData {
    let meta = snapshot.get_metadata();
    let voters = from_conf_state(meta.get_conf_state());
    SnapshotData { index: meta.index, term: meta.term, voters, machine: snapshot.data.to_vec() }
}

fn to_snapshot(data: &SnapshotData) -> Snapshot {
    let mut snapshot = Snapshot { data: data.machine.clone().into(), ..Snapshot::default() };
    let meta = snapshot.mut_metadata();
    meta.index = data.index;
    meta.term = data.term;
    meta.set_conf_state(to_conf_state(&data.voters));
    snapshot
}

pub(super) fn from_entry(entry: &Entry) -> LogEntry {
    let kind = match entry.get_entry_type() {
        EntryType::EntryNormal => EntryKind::Normal,
        EntryType::EntryConfChange => EntryKind::ConfChange,
        EntryType::EntryConfChangeV2 => EntryKind::ConfChangeV2,
    };
    LogEntry { index: entry.index, term: entry.term, kind, data: entry.data.to_vec() }
}

fn to_entry(entry: &LogEntry) -> Entry {
    let mut out = Entry::default();
    out.set_entry_type(match entry.kind {
        EntryKind::Normal => EntryType::EntryNormal,
        EntryKind::ConfChange => EntryType::EntryConfChange,
        EntryKind::ConfChangeV2 => EntryType::EntryConfChangeV2,
    });
    out.index = entry.index;
    out.term = entry.term;
    out.data = entry.data.clone().into();
    out
}

/// The log as the `raft` crate reads it: all in memory, for it is short.
pub(super) struct Log {
    pub(super) hard: HardState,
    pub(super) snapshot: SnapshotData,
    /// Index and term of the last entry that is no longer here.
    pub(super) compacted: (u64, u64),
    pub(super) entries: VecDeque<Entry>,
}

impl Log {
    pub(super) fn new(saved: &Saved) -> Result<Self, RaftError> {
        let snapshot = saved.snapshot.clone();
        // Entries of before the snapshot serve followers that are behind, if the term before them is known; simpler
        // without them after a restart.
        let entries: VecDeque<Entry> = saved.entries.iter().filter(|e| e.index > snapshot.index).map(to_entry).collect();
        for (at, entry) in entries.iter().enumerate() {
            if entry.index != snapshot.index + 1 + at as u64 {
                return Err(RaftError(format!("entry {} of the log is missing", snapshot.index + 1 + at as u64)));
            }
        }
        let last = snapshot.index + entries.len() as u64;
        if saved.hard.commit > last {
            return Err(RaftError(format!("entry {} is committed, but the log ends at {last}", saved.hard.commit)));
        }
        let mut hard = HardState::default();
        (hard.term, hard.vote) = (saved.hard.term, saved.hard.vote);
        hard.commit = saved.hard.commit.max(snapshot.index);
        let compacted = (snapshot.index, snapshot.term);
        Ok(Log { hard, snapshot, compacted, entries })
    }

    fn last(&self) -> u64 {
        self.compacted.0 + self.entries.len() as u64
    }

    pub(super) fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        let keep = first.index.saturating_sub(self.compacted.0 + 1) as usize;
        self.entries.truncate(keep);
        assert_eq!(first.index, self.last() + 1, "the log would have a gap");
        self.entries.extend(entries.iter().cloned());
    }

    pub(super) fn compact(&mut self, to: u64) {
        while self.compacted.0 < to
            && let Some(entry) = self.entries.pop_front()
        {
            self.compacted = (entry.index, entry.term);
        }
    }

    pub(super) fn reset(&mut self, snapshot: SnapshotData) {
        self.entries.clear();
        self.compacted = (snapshot.index, snapshot.term);
        self.hard.commit = self.hard.commit.max(snapshot.index);
        self.hard.term = self.hard.term.max(snapshot.term);
        self.snapshot = snapshot;
    }
}

impl raft::Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState { hard_state: self.hard.clone(), conf_state: to_conf_state(&self.snapshot.voters) })
    }

    fn entries(&self, low: u64, high: u64, max: impl Into<Option<u64>>, _: GetEntriesContext) -> raft::Result<Vec<Entry>> {
        if low <= self.compacted.0 {
            return Err(raft::Error::Store(RaftStorageError::Compacted));
        }
        if high > self.last() + 1 {
            return Err(raft::Error::Store(RaftStorageError::Unavailable));
        }
        let at = |index: u64| (index - self.compacted.0 - 1) as usize;
        let mut entries: Vec<Entry> = self.entries.range(at(low)..at(high.max(low))).cloned().collect();
        raft::util::limit_size(&mut entries, max.into());
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.compacted.0 {
            return Ok(self.compacted.1);
        }
        if index == self.snapshot.index {
            return Ok(self.snapshot.term);
        }
        let at = index.checked_sub(self.compacted.0 + 1).ok_or(raft::Error::Store(RaftStorageError::Compacted))?;
        let entry = usize::try_from(at).ok().and_then(|at| self.entries.get(at));
        entry.map(|e| e.term).ok_or(raft::Error::Store(RaftStorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.compacted.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        if self.snapshot.index < request_index || self.snapshot.index == 0 {
            return Err(raft::Error::Store(RaftStorageError::SnapshotTemporarilyUnavailable));
        }
        Ok(to_snapshot(&self.snapshot))
    }
}
