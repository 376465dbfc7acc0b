//! The replicated state: the configuration, and the answers to recent requests, so that a request that was sent twice is
//! done once.
//!
//! Invariants:
//! - A request is applied at most once, also when it is in the log more than once.
//! - The answers kept are bounded: per node, those that it has not yet confirmed, and at most [`ANSWERS_MAX`].
//!
//! Excludes: how requests get into an agreed order (`raft`).

use crate::config::{Applied, Command, Config};
use crate::ids::{Incarnation, NodeId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Most answers kept per node.
pub const ANSWERS_MAX: usize = 256;
/// Most requests that a node may have under way.
pub const REQUESTS_MAX: usize = 64;
const _: () = assert!(REQUESTS_MAX < ANSWERS_MAX, "an answer must not be dropped before its request is done");

/// A command on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The node that asks.
    pub origin: NodeId,
    /// The start of its daemon: numbers begin anew with each. (Being let back in without a restart does not change it.)
    pub life: Incarnation,
    /// Counts its requests from 1.
    pub number: u64,
    /// All its requests up to this one have been answered or given up.
    pub done: u64,
    /// What is asked.
    pub command: Command,
}

/// The state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The configuration.
    pub config: Config,
    answers: BTreeMap<NodeId, Answers>,
}

/// A node's requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Answers {
    life: Incarnation,
    /// Requests up to this one are not applied any more.
    floor: u64,
    known: BTreeMap<u64, Applied>,
}

impl Machine {
    /// A machine with a configuration and no requests yet.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Machine { config, answers: BTreeMap::new() }
    }

    /// Applies a request unless it was applied before. `None`: too old, nobody waits for its answer.
    pub fn apply(&mut self, request: &Request) -> Option<Applied> {
        let answers = self.answers.entry(request.origin).or_default();
        if request.life > answers.life {
            *answers = Answers { life: request.life, ..Answers::default() };
        }
        if request.life < answers.life || request.number <= answers.floor {
            return None;
        }
        answers.floor = answers.floor.max(request.done.min(request.number - 1));
        let floor = answers.floor;
        answers.known.retain(|number, _| *number > floor);
        if let Some(applied) = answers.known.get(&request.number) {
            return Some(applied.clone());
        }
        let applied = self.config.apply(&request.command);
        answers.known.insert(request.number, applied.clone());
        while answers.known.len() > ANSWERS_MAX {
            if let Some((number, _)) = answers.known.pop_first() {
                answers.floor = number;
            }
        }
        Some(applied)
    }

    /// The answer to a request, if it was applied and is still kept.
    #[must_use]
    pub fn answer(&self, origin: NodeId, life: Incarnation, number: u64) -> Option<&Applied> {
        self.answers.get(&origin).filter(|a| a.life == life)?.known.get(&number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(life: u64, number: u64, done: u64, name: &str) -> Request {
        let command = Command::NodeJoin { name: name.into(), addr: format!("{name}:1") };
        Request { origin: NodeId(1), life: Incarnation(life), number, done, command }
    }

    #[test]
    fn a_request_is_applied_once() {
        let mut machine = Machine::default();
        machine.config.apply(&Command::Init { cluster: [1; 16], name: "c".into() });
        let first = machine.apply(&request(1, 1, 0, "a"));
        assert_eq!(first, Some(Applied::Node(NodeId(1))));
        machine.config.nodes.get_mut(&NodeId(1)).unwrap().incarnation = Incarnation(1);
        assert_eq!(machine.apply(&request(1, 1, 0, "a")), first, "the same answer again");
        assert_eq!(machine.apply(&request(1, 2, 1, "b")), Some(Applied::Node(NodeId(2))));
        assert_eq!(machine.apply(&request(1, 1, 0, "a")), None, "confirmed, so forgotten");
        assert_eq!(machine.apply(&request(2, 1, 0, "c")), Some(Applied::Node(NodeId(3))), "a new life");
        assert_eq!(machine.apply(&request(1, 3, 0, "d")), None, "an old life");
        assert_eq!(machine.config.nodes.len(), 3);
    }

    #[test]
    fn answers_are_bounded() {
        let mut machine = Machine::default();
        for number in 1..=1000 {
            machine.apply(&request(1, number, 0, "a"));
        }
        assert_eq!(machine.answers[&NodeId(1)].known.len(), ANSWERS_MAX);
    }
}
