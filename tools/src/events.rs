//! The event stream: what `pulsar events` shows. Events of the cluster are the differences of successive views, a pure
//! function; events of other layers (repairs, lost data) are handed in. The newest [`EventLog::KEPT`] are kept.

use crate::status::{layer_name, node_name};
use cluster::View;
use cluster::config::MemberState;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::watch;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// An epoch began.
    Epoch,
    /// A layer has recovered in the present epoch.
    Recovered,
    /// A node became a member.
    NodeJoined,
    /// A node's daemon came up.
    NodeUp,
    /// A node is down.
    NodeDown,
    /// This node was cut off.
    CutOff,
    /// This node was let back in.
    LetIn,
    /// A disk was added.
    DiskAdded,
    /// A disk failed.
    DiskFault,
    /// A copy is no longer current.
    CopyStale,
    /// A copy is being brought up to date.
    CopySyncing,
    /// A copy is current.
    CopyInSync,
    /// A file system was made.
    FsMade,
    /// A file system was mounted or unmounted here.
    Mount,
    /// A damaged block was repaired from another copy.
    Repair,
    /// Data was lost: damaged on every copy, or written behind by a node that was then cut off.
    Lost,
    /// The collector or the scrubber began, ended or found something.
    Task,
    /// The daemon started or stops.
    Daemon,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Grows by one with every event of this daemon.
    pub seq: u64,
    /// Milliseconds since 1970 by this machine's clock.
    pub time_ms: u64,
    /// The epoch in which this daemon saw it.
    pub epoch: u64,
    /// What happened.
    pub kind: Kind,
    /// Whether it is bad news.
    pub bad: bool,
    /// In words.
    pub text: String,
}

/// What happened, without when.
pub type News = (Kind, bool, String);

/// What changed from one view to the next.
#[must_use]
pub fn changes(old: Option<&View>, new: &View) -> Vec<News> {
    let mut out = Vec::new();
    let mut say = |kind, bad, text: String| out.push((kind, bad, text));
    let config = &*new.config;
    let Some(before) = old else {
        let text = match config.epoch.0 {
            0 => "this daemon has no configuration yet".into(),
            epoch => format!("epoch {epoch} at the start of this daemon: {}", who(new)),
        };
        say(Kind::Epoch, false, text);
        return out;
    };
    let was = &*before.config;
    if before.member != new.member {
        if new.member {
            say(Kind::LetIn, false, "this node is a member of the cluster".into());
        } else {
            say(Kind::CutOff, true, "this node was declared dead; all it held is dropped, and it waits to be let back in".into());
        }
    }
    for (id, node) in &config.nodes {
        match was.nodes.get(id) {
            None => say(Kind::NodeJoined, false, format!("node {} ({}) joined", node.name, node.addr)),
            Some(old) if old.up && !node.up => say(Kind::NodeDown, true, format!("node {} is down", node.name)),
            Some(old) if node.up && (!old.up || old.incarnation != node.incarnation) => {
                say(Kind::NodeUp, false, format!("node {} is up (start {})", node.name, node.incarnation.0));
            }
            Some(_) => {}
        }
        if node.up && !was.nodes.contains_key(id) {
            say(Kind::NodeUp, false, format!("node {} is up (start {})", node.name, node.incarnation.0));
        }
    }
    for (id, disk) in &config.disks {
        let place = format!("disk {id} in node {}", node_name(config, disk.node));
        match was.disks.get(id) {
            None => say(
                Kind::DiskAdded,
                false,
                format!("{place} was added, {}", crate::size::human(u64::from(disk.blocks) * cluster::BLOCK_SIZE as u64)),
            ),
            Some(old) if !old.faulted && disk.faulted => say(Kind::DiskFault, true, format!("{place} failed")),
            Some(_) => {}
        }
    }
    for (id, fs) in &config.filesystems {
        if fs.formatted && !was.filesystems.get(id).is_some_and(|f| f.formatted) {
            say(Kind::FsMade, false, format!("file system {} was made, {} copies", fs.name, fs.copies));
        }
    }
    for (id, mirror) in &config.mirrors {
        let Some(old) = was.mirrors.get(id) else { continue };
        for member in &mirror.members {
            let Some(then) = old.members.iter().find(|m| m.disk == member.disk).map(|m| m.state) else { continue };
            if then == member.state {
                continue;
            }
            let node = config.node_of(member.disk).map_or_else(|| "?".into(), |n| node_name(config, n));
            let copy = format!("copy of mirror {id} on disk {} ({node})", member.disk);
            match member.state {
                MemberState::InSync => say(Kind::CopyInSync, false, format!("{copy} is in sync")),
                MemberState::Stale { since } => {
                    say(Kind::CopyStale, true, format!("{copy} is out of date since epoch {}", since.0))
                }
                MemberState::Syncing { since } => {
                    say(Kind::CopySyncing, false, format!("{copy} is being brought up to date, from epoch {} on", since.0))
                }
            }
        }
    }
    if config.epoch != was.epoch {
        say(Kind::Epoch, false, format!("epoch {}: {}", config.epoch.0, who(new)));
    }
    if new.recovered != before.recovered && new.recovered > cluster::Layer::None {
        let name = layer_name(new.recovered);
        let all = if new.recovered == cluster::Layer::Fs { ": all layers have recovered" } else { "" };
        say(Kind::Recovered, false, format!("epoch {}: layer {name} has recovered{all}", config.epoch.0));
    }
    out
}

fn who(view: &View) -> String {
    let names = |up: bool| {
        let names: Vec<&str> = view.config.nodes.values().filter(|n| n.up == up).map(|n| n.name.as_str()).collect();
        names.join(", ")
    };
    let (up, down) = (names(true), names(false));
    match (up.is_empty(), down.is_empty()) {
        (true, _) => format!("no node up; down: {down}"),
        (false, true) => format!("up: {up}"),
        (false, false) => format!("up: {up}; down: {down}"),
    }
}

/// The newest events. Readers are told of new ones.
pub struct EventLog {
    state: Mutex<State>,
    /// Nanoseconds since 1970: real time in production, virtual time in the simulator.
    wall_ns: Arc<dyn Fn() -> u64 + Send + Sync>,
    newest: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    events: VecDeque<Event>,
    next: u64,
    epoch: u64,
}

impl EventLog {
    /// How many events are kept.
    pub const KEPT: usize = 4096;

    /// An empty log; `wall_ns` tells the nanoseconds since 1970.
    #[must_use]
    pub fn new(wall_ns: Arc<dyn Fn() -> u64 + Send + Sync>) -> Self {
        EventLog { state: Mutex::new(State { next: 1, ..State::default() }), wall_ns, newest: watch::channel(0).0 }
    }

    /// Adds an event.
    pub fn add(&self, kind: Kind, bad: bool, text: impl Into<String>) {
        let text = text.into();
        let time_ms = (self.wall_ns)() / 1_000_000;
        if bad {
            tracing::warn!(?kind, "{text}");
        } else {
            tracing::info!(?kind, "{text}");
        }
        let seq = {
            let mut state = self.state.lock();
            let (seq, epoch) = (state.next, state.epoch);
            state.next += 1;
            if state.events.len() == Self::KEPT {
                state.events.pop_front();
            }
            state.events.push_back(Event { seq, time_ms, epoch, kind, bad, text });
            seq
        };
        self.newest.send_replace(seq);
    }

    /// Adds what changed from one view to the next.
    pub fn view_changed(&self, old: Option<&View>, new: &View) {
        self.state.lock().epoch = new.config.epoch.0;
        for (kind, bad, text) in changes(old, new) {
            self.add(kind, bad, text);
        }
    }

    /// Events after number `seq`.
    #[must_use]
    pub fn since(&self, seq: u64) -> Vec<Event> {
        self.state.lock().events.iter().filter(|e| e.seq > seq).cloned().collect()
    }

    /// The number of the newest event, and a signal for each new one.
    #[must_use]
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests::{three, view};
    use cluster::{Epoch, Layer, MirrorId, NodeId};

    #[test]
    fn a_node_dies_and_comes_back() {
        let all = view(three());
        let mut config = three();
        config.epoch = Epoch(8);
        config.nodes.get_mut(&NodeId(2)).unwrap().up = false;
        config.mirrors.get_mut(&MirrorId(1)).unwrap().members[1].state = MemberState::Stale { since: Epoch(7) };
        let mut without = view(config);
        without.recovered = Layer::None;
        let texts: Vec<String> = changes(Some(&all), &without).into_iter().map(|(_, _, t)| t).collect();
        assert_eq!(
            texts,
            [
                "node n2 is down",
                "copy of mirror m1 on disk d2 (n2) is out of date since epoch 7",
                "epoch 8: up: n1, n3; down: n2"
            ]
        );
        let mut recovered = without.clone();
        recovered.recovered = Layer::Fs;
        let texts: Vec<String> = changes(Some(&without), &recovered).into_iter().map(|(_, _, t)| t).collect();
        assert_eq!(texts, ["epoch 8: layer fs has recovered: all layers have recovered"]);
        assert!(changes(Some(&all), &all).is_empty());
    }

    #[test]
    fn bounded_and_numbered() {
        let log = EventLog::new(Arc::new(|| 5));
        for i in 0..EventLog::KEPT + 10 {
            log.add(Kind::Daemon, false, format!("{i}"));
        }
        assert_eq!(log.since(0).len(), EventLog::KEPT);
        assert_eq!(log.since(EventLog::KEPT as u64 + 9).len(), 1);
        assert_eq!(*log.newest().borrow(), EventLog::KEPT as u64 + 10);
    }
}
