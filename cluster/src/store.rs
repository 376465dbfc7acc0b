//! What the replication of the configuration keeps on disk, and the interface to it.
//!
//! Invariants of every store:
//! - A batch is durable, whole and after all earlier ones, when `save` resolves (a lazy one not yet); a crash before
//!   that keeps it whole or loses it whole.
//! - `load` returns what the batches saved so far make of each other.
//!
//! Excludes: the format on disk (`shell::redb_store`), what the bytes mean (`machine`).

use crate::BoxFuture;
use crate::ids::Incarnation;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Its place; the first is 1.
    pub index: u64,
    /// The term of the leader that made it.
    pub term: u64,
    /// Whether it changes the set of voters, and in which encoding.
    pub kind: EntryKind,
    /// Its contents.
    pub data: Vec<u8>,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryKind {
    /// A request to the machine, or nothing (a new leader's first entry).
    Normal,
    /// A change of the voters.
    ConfChange,
    /// A change of the voters, the newer encoding.
    ConfChangeV2,
}

/// What a node must not forget of the protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hard {
    /// The newest term seen.
    pub term: u64,
    /// Who got this node's vote in it; 0 for nobody.
    pub vote: u64,
    /// The newest entry known to be committed.
    pub commit: u64,
}

/// Who votes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Voters {
    /// The voters.
    pub voters: Vec<u64>,
    /// Those who follow without a vote.
    pub learners: Vec<u64>,
    /// The old voters, while a change is on its way.
    pub outgoing: Vec<u64>,
    /// Those who become learners when the change is complete.
    pub learners_next: Vec<u64>,
    /// Whether the change completes by itself.
    pub auto_leave: bool,
}

/// The state after some entry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotData {
    /// The entry.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// Who votes after it.
    pub voters: Voters,
    /// The machine's state after it.
    pub machine: Vec<u8>,
}

/// Changes to be made durable together, in the order of the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The number of this life of the daemon.
    pub incarnation: Option<Incarnation>,
    /// Replaces the older one.
    pub snapshot: Option<SnapshotData>,
    /// Whether the snapshot came from the leader: the whole log before this batch is void.
    pub reset_log: bool,
    /// Entries up to this one are no longer needed.
    pub compact_to: Option<u64>,
    /// New entries; those with the same or a greater index that were there before are void.
    pub entries: Vec<LogEntry>,
    /// Replaces the older one.
    pub hard: Option<Hard>,
    /// Nothing rests on this batch: it may become durable later, with the next one that is not lazy.
    pub lazy: bool,
}

impl Batch {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Batch { lazy: self.lazy, ..Batch::default() }
    }
}

/// All that is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// The last life of the daemon.
    pub incarnation: Incarnation,
    /// Protocol state.
    pub hard: Hard,
    /// The newest snapshot.
    pub snapshot: SnapshotData,
    /// Entries after the last compaction (they may reach back before the snapshot), without gaps.
    pub entries: Vec<LogEntry>,
}

/// Why the store failed. The node that gets this stops: it must not go on with a state that may not be durable.
#[derive(Debug, thiserror::Error)]
#[error("the cluster state cannot be read or written: {0}")]
pub struct StoreError(pub String);

/// Where it is kept.
pub trait Store: Send + Sync + 'static {
    /// Reads everything. Called once, when the node starts; may block.
    ///
    /// # Errors
    /// If it cannot be read or is damaged.
    fn load(&self) -> Result<Saved, StoreError>;

    /// Makes a batch durable. Calls do not overlap.
    ///
    /// # Errors
    /// If it may not be durable; the store is not used any more then.
    fn save(&self, batch: Batch) -> BoxFuture<'_, Result<(), StoreError>>;
}

impl Saved {
    /// What a batch makes of it.
    pub fn apply(&mut self, batch: Batch) {
        let Batch { incarnation, snapshot, reset_log, compact_to, entries, hard, lazy: _ } = batch;
        if let Some(incarnation) = incarnation {
            self.incarnation = incarnation;
        }
        if let Some(snapshot) = snapshot {
            self.snapshot = snapshot;
        }
        if reset_log {
            self.entries.clear();
        }
        if let Some(to) = compact_to {
            self.entries.retain(|e| e.index > to);
        }
        if let Some(first) = entries.first() {
            let first = first.index;
            self.entries.retain(|e| e.index < first);
            self.entries.extend(entries);
        }
        if let Some(hard) = hard {
            self.hard = hard;
        }
    }
}

/// A store in memory. A node that crashed in the simulator starts again from the same one.
#[derive(Default)]
pub struct MemoryStore {
    state: Mutex<MemoryState>,
}

#[derive(Default)]
struct MemoryState {
    /// What a crash leaves.
    durable: Saved,
    /// With the lazy batches since then.
    newest: Saved,
    saves: u64,
}

impl MemoryStore {
    /// An empty one, of a node that has not yet got anything.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How often something was saved.
    #[must_use]
    pub fn saves(&self) -> u64 {
        self.state.lock().saves
    }

    /// The machine loses power: what was not yet durable is gone.
    pub fn crash(&self) {
        let mut state = self.state.lock();
        state.newest = state.durable.clone();
    }
}

impl Store for MemoryStore {
    fn load(&self) -> Result<Saved, StoreError> {
        Ok(self.state.lock().newest.clone())
    }

    fn save(&self, batch: Batch) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let mut state = self.state.lock();
            state.saves += 1;
            let lazy = batch.lazy;
            state.newest.apply(batch);
            if !lazy {
                state.durable = state.newest.clone();
            }
            Ok(())
        })
    }
}
