//! The simulated world below the layers: a network, clocks and a scripted cluster, all in one process, one thread and
//! virtual time, from one seed.
//!
//! Use it on a tokio `current_thread` runtime with paused time (`#[tokio::test(start_paused = true)]`). What happens is a
//! function of the seed and of the code under test alone, as long as that code takes its time from tokio and uses no
//! other source of chance (an unbiased `select!` is one). tokio's timers have a resolution of one millisecond: delays are
//! kept in nanoseconds for the order of events, and are rounded up to the next millisecond when they fire.
//!
//! Excludes: disks (`mirror::sim`), whole nodes (the `tests` crate).

use crate::time::Instant;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

mod group;
mod net;

pub use group::{FixedCluster, FixedGroup, test_config};
pub use net::{Count, NetOptions, SimEndpoint, SimNet};

/// Counts what happens to messages and disks below all layers, and makes it stop after so much of it: the instant of a power
/// loss, to the event. Clones are the same gate.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<GateState>);

#[derive(Debug)]
struct GateState {
    passed: AtomicU64,
    last: AtomicU64,
}

impl Default for GateState {
    fn default() -> Self {
        GateState { passed: AtomicU64::new(0), last: AtomicU64::new(u64::MAX) }
    }
}

impl Gate {
    /// Whether one more event may happen. If not, it must not, and whoever waits for it never hears of it.
    #[must_use]
    pub fn pass(&self) -> bool {
        if self.is_closed() {
            return false;
        }
        self.0.passed.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Events that have happened.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.0.passed.load(Ordering::Relaxed)
    }

    /// Lets `more` events happen, and then none.
    pub fn close_after(&self, more: u64) {
        self.0.last.store(self.passed().saturating_add(more), Ordering::Relaxed);
    }

    /// Lets everything happen again.
    pub fn open(&self) {
        self.0.last.store(u64::MAX, Ordering::Relaxed);
    }

    /// Whether nothing happens any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.passed() >= self.0.last.load(Ordering::Relaxed)
    }
}

/// A small generator of pseudo-random numbers (splitmix64): the same seed gives the same numbers, everywhere.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// From a seed; any number will do.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Rng(seed ^ 0x5851_f42d_4c95_7f2d)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..n` (0 if `n` is 0).
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { ((u128::from(self.next_u64()) * u128::from(n)) >> 64) as u64 }
    }

    /// A number in a range.
    pub fn range(&mut self, range: Range<u64>) -> u64 {
        range.start + self.below(range.end.saturating_sub(range.start))
    }

    /// True in `percent` of a hundred calls.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of the elements; `None` of an empty slice.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        from.get(self.below(from.len() as u64) as usize)
    }

    /// A generator of its own, so that one part's use of chance does not change another's.
    pub fn fork(&mut self) -> Rng {
        Rng::new(self.next_u64())
    }
}

/// A node's clock: virtual time, with an offset and a drift of its own. Clones share them.
#[derive(Clone, Debug)]
pub struct SimClock {
    start: tokio::time::Instant,
    offset: Arc<AtomicI64>,
    drift_ppm: Arc<AtomicI64>,
}

impl SimClock {
    /// A clock that shows `offset` now and runs faster than true time by `drift_ppm` millionths (slower if negative).
    #[must_use]
    pub fn new(offset: Duration, drift_ppm: i64) -> Self {
        SimClock {
            start: tokio::time::Instant::now(),
            offset: Arc::new(AtomicI64::new(i64::try_from(offset.as_nanos()).unwrap_or(i64::MAX))),
            drift_ppm: Arc::new(AtomicI64::new(drift_ppm)),
        }
    }

    /// What it shows.
    #[must_use]
    pub fn now(&self) -> Instant {
        let elapsed = i128::try_from(self.start.elapsed().as_nanos()).unwrap_or(i128::MAX);
        let drift = elapsed * i128::from(self.drift_ppm.load(Ordering::Relaxed)) / 1_000_000;
        let shown = i128::from(self.offset.load(Ordering::Relaxed)) + elapsed + drift;
        Instant(u64::try_from(shown.max(0)).unwrap_or(u64::MAX))
    }

    /// True time since the clock was made.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// By how much it is off, its drift not counted.
    #[must_use]
    pub fn offset(&self) -> Duration {
        Duration::from_nanos(self.offset.load(Ordering::Relaxed).max(0).unsigned_abs())
    }

    /// Moves it forward at once, as when a machine was suspended.
    pub fn jump(&self, forward: Duration) {
        self.offset.fetch_add(i64::try_from(forward.as_nanos()).unwrap_or(i64::MAX), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Applied, Command, MemberState};
    use crate::ids::{DiskId, Epoch, Incarnation, MirrorId, NodeId};
    use crate::node::{Cluster, Layer};
    use crate::transport::{Message, Peer, Receiver, Service, Transport};
    use parking_lot::Mutex;

    #[derive(Default)]
    struct Log {
        got: Mutex<Vec<(NodeId, u64, u8)>>,
        ended: Mutex<Vec<NodeId>>,
    }

    impl Receiver for Log {
        fn receive(&self, from: Peer, message: Message) {
            self.got.lock().push((from.node, from.session, message.head[0]));
        }
        fn session_ended(&self, node: NodeId) {
            self.ended.lock().push(node);
        }
    }

    fn message(byte: u8) -> Message {
        Message::new(vec![byte])
    }

    #[tokio::test(start_paused = true)]
    async fn messages_arrive_in_order_and_a_cut_ends_the_session() {
        let net = SimNet::new(1);
        let (a, b) = (net.endpoint(NodeId(1), Incarnation(1)), net.endpoint(NodeId(2), Incarnation(1)));
        let (log_a, log_b) = (Arc::new(Log::default()), Arc::new(Log::default()));
        a.register(Service::Token, log_a.clone());
        b.register(Service::Token, log_b.clone());
        (0..100).for_each(|i| a.send(NodeId(2), Service::Token, message(i)));
        tokio::time::sleep(Duration::from_secs(1)).await;
        let got: Vec<u8> = log_b.got.lock().iter().map(|g| g.2).collect();
        assert_eq!(got, (0..100).collect::<Vec<u8>>());
        assert_eq!(net.count(Service::Token).messages, 100);

        net.cut(NodeId(1), NodeId(2));
        a.send(NodeId(2), Service::Token, message(200));
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(log_b.got.lock().len(), 100);
        assert_eq!(log_a.ended.lock().as_slice(), [NodeId(2)]);
        assert_eq!(log_b.ended.lock().as_slice(), [NodeId(1)]);
        net.heal(NodeId(1), NodeId(2));
        b.send(NodeId(1), Service::Token, message(7));
        a.send(NodeId(1), Service::Token, message(8));
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut bytes: Vec<u8> = log_a.got.lock().iter().map(|g| g.2).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, [7, 8]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_dead_peer_is_noticed_and_its_next_life_is_another_session() {
        let net = SimNet::new(2);
        let (a, b) = (net.endpoint(NodeId(1), Incarnation(1)), net.endpoint(NodeId(2), Incarnation(1)));
        let (log_a, log_b) = (Arc::new(Log::default()), Arc::new(Log::default()));
        a.register(Service::Raft, log_a.clone());
        b.register(Service::Raft, log_b.clone());
        b.send(NodeId(1), Service::Raft, message(1));
        tokio::time::sleep(Duration::from_millis(100)).await;
        net.kill(NodeId(2));
        b.send(NodeId(1), Service::Raft, message(2));
        a.send(NodeId(2), Service::Raft, message(3));
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(log_a.ended.lock().as_slice(), [NodeId(2)]);
        let b = net.endpoint(NodeId(2), Incarnation(2));
        b.register(Service::Raft, log_b.clone());
        b.send(NodeId(1), Service::Raft, message(4));
        tokio::time::sleep(Duration::from_millis(100)).await;
        let got = log_a.got.lock().clone();
        assert_eq!(got.iter().map(|g| g.2).collect::<Vec<_>>(), [1, 4]);
        assert!(got[0].1 < got[1].1);
        assert!(log_b.got.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_seed_gives_the_same_run() {
        let mut traces = Vec::new();
        for _ in 0..2 {
            let net = SimNet::with_options(3, NetOptions { break_one_in: 50, ..NetOptions::default() });
            let ends: Vec<_> = (1..=3).map(|n| net.endpoint(NodeId(n), Incarnation(1))).collect();
            for end in &ends {
                end.register(Service::Mirror, Arc::new(Log::default()));
            }
            for i in 0..200u8 {
                ends[usize::from(i) % 3].send(NodeId(u32::from(i / 3) % 3 + 1), Service::Mirror, message(i));
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            tokio::time::sleep(Duration::from_secs(2)).await;
            traces.push(net.trace());
        }
        assert_eq!(traces[0], traces[1]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_scripted_cluster_recovers_layer_by_layer() {
        let net = SimNet::new(4);
        let group = FixedGroup::new(&net, test_config(3, 2, 1024));
        let nodes: Vec<_> = (1..=3).map(|n| group.node(NodeId(n))).collect();
        assert_eq!(group.recovered(), Layer::Cluster);
        nodes.iter().for_each(|n| n.finish(Epoch(1), Layer::Mirror));
        assert_eq!(group.recovered(), Layer::Mirror);
        group.down(NodeId(2));
        assert_eq!(group.recovered(), Layer::Cluster);
        let view = nodes[0].view().borrow().clone();
        assert_eq!(view.epoch(), Epoch(2));
        let stale = view.config.mirrors.values().flat_map(|m| &m.members).filter(|m| m.state != MemberState::InSync).count();
        assert_eq!(stale, 2);
        nodes[0].finish(Epoch(2), Layer::Fs);
        nodes[2].finish(Epoch(2), Layer::Sld);
        assert_eq!(group.recovered(), Layer::Sld);
        let two = group.up(NodeId(2));
        assert_eq!(two.view().borrow().epoch(), Epoch(3));
        assert!(two.view().borrow().member);
        let synced = Command::MembersSynced { copies: vec![(MirrorId(2), DiskId(2))], epoch: Epoch(3) };
        assert_eq!(two.propose(synced).await, Ok(Applied::Ok));
        assert_eq!(group.config().epoch, Epoch(4));
    }
}
