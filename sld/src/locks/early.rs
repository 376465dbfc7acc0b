//! Messages that come to a lock master before it can act on them: of an epoch that its node has not adopted, or before
//! everybody has re-asserted. Pure.
//!
//! Invariants:
//! - They are brought to the master again in the order in which they came, before any later one.
//! - What there is no room for is not lost for good: its sender is asked to repeat everything, once the master can act on it,
//!   and nothing else of that sender is listened to until it begins to.
//! - Re-assertions always have room: without them no epoch recovers.

use super::master::{Early, LockMaster, LockSends};
use super::message::LockMessage;
use cluster::{Epoch, NodeId};
use std::collections::BTreeMap;

/// The messages that wait.
#[derive(Debug)]
pub struct Waiting {
    messages: Vec<Early>,
    /// The most requests among them.
    max: usize,
    /// Whose requests were dropped, of which epoch at most, and whether they know.
    dropped: BTreeMap<NodeId, (Epoch, bool)>,
}

impl Waiting {
    /// Room for so many requests.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Waiting { messages: Vec::new(), max, dropped: BTreeMap::new() }
    }

    /// Brings messages to the master, behind those that came too early before them. Returns whether some had to be dropped.
    pub fn bring(&mut self, master: &mut LockMaster, message: Option<Early>, sends: &mut LockSends) -> bool {
        let mut waiting = std::mem::take(&mut self.messages);
        waiting.extend(message.filter(|(from, message)| self.listens(*from, message)));
        loop {
            let recovered = master.recovered();
            let before = waiting.len();
            let mut still = Vec::new();
            for (from, message) in waiting {
                still.extend(master.receive(from, message, sends));
            }
            waiting = still;
            // The last re-assertion lets in what came before it.
            if waiting.is_empty() || (waiting.len() == before && recovered == master.recovered()) {
                break;
            }
        }
        let before = waiting.len();
        if before > self.max {
            let mut room = self.max;
            waiting.retain(|(from, message)| {
                let Some(epoch) = repeated(message) else { return true };
                let keeps = room > 0 && !self.dropped.contains_key(from);
                room -= usize::from(keeps);
                if !keeps {
                    self.drop_of(*from, epoch);
                }
                keeps
            });
        }
        let dropped = waiting.len() < before;
        self.messages = waiting;
        let epoch = master.epoch();
        for (node, (last, told)) in &mut self.dropped {
            if master.recovered() && *last <= epoch && !*told {
                *told = true;
                sends.push((*node, LockMessage::Again { epoch }));
            }
        }
        dropped
    }

    /// A re-assertion goes before everything that its sender wants: from then on nothing is missing.
    fn listens(&mut self, from: NodeId, message: &LockMessage) -> bool {
        match (self.dropped.get(&from), message) {
            (Some((last, _)), LockMessage::Reassert { epoch, .. }) if epoch >= last => {
                self.dropped.remove(&from);
            }
            (Some(_), message) => {
                if let Some(epoch) = repeated(message) {
                    self.drop_of(from, epoch);
                    return false;
                }
            }
            _ => {}
        }
        true
    }

    fn drop_of(&mut self, from: NodeId, epoch: Epoch) {
        let last = &mut self.dropped.entry(from).or_insert((epoch, false)).0;
        *last = epoch.max(*last);
    }
}

/// The epoch of a message that its sender repeats if it is asked to.
fn repeated(message: &LockMessage) -> Option<Epoch> {
    match message {
        LockMessage::Request { epoch, .. } | LockMessage::Waits { epoch, .. } => Some(*epoch),
        _ => None,
    }
}
