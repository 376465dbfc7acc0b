//! Who is alive: heartbeats, node leases, declaring nodes dead, and the barrier between the layers' recoveries.
//!
//! Every node sends heartbeats to the leader of the agreement (`raft`), which answers with leases. The leader alone
//! declares nodes dead; it does so by a command, so the others agree on it before anything follows from it.
//!
//! Invariants:
//! - A node that is declared dead for its silence holds no lease by then, on any clock:
//!   - A lease granted for a heartbeat ends at most `lease` after that heartbeat was *sent*; the leader declares dead at
//!     the earliest `dead` > `lease` after it last *received* one.
//!   - A lease also ends at most `lease` after the last time at which a majority of the voters supported the leader: a
//!     voter's heartbeat that carries a leader's time stamp back and a term not beyond the leader's was sent after the
//!     stamp, and before that voter supported any later leader. So a later leader is elected after the stamp; it waits for
//!     more than `lease` before it declares anybody dead.
//!   - A leader grants leases only when it has applied an entry of its own term: before that, an earlier leader's
//!     declaration may be on its way. And it grants none to a node that it has begun to declare dead.
//! - A node whose process is surely gone holds no lease; it is declared dead at once, that life of it only.
//! - A node holds a lease only for the life (incarnation) that the configuration knows as up.
//! - The layer reported as recovered is one that every node that is up in the epoch has reported in that epoch and life.
//!
//! Clocks may be apart by any amount, and differ in speed by what `dead - lease` leaves.
//!
//! Excludes: how commands get agreed on (`raft`); what the layers do to recover.

use crate::config::{Command, Config, MemberState};
use crate::ids::{Epoch, Incarnation, NodeId};
use crate::node::Layer;
use crate::raft::RaftStatus;
use crate::time::Instant;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// The cluster's times. Chosen when the cluster is made, and the same on all nodes: a lease that is longer on one than
/// `dead` on another would be used while the other takes its node for dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// Between a node's heartbeats.
    pub heartbeat: Duration,
    /// How long a lease lasts.
    pub lease: Duration,
    /// Silence after which a node is declared dead. More than `lease`.
    pub dead: Duration,
    /// How long a copy that is in sync but whose node has not come back blocks its mirror, if another node has the data:
    /// after all nodes were down, the first ones wait this long for the others.
    pub absent: Duration,
    /// Between the ticks of the agreement's core.
    pub raft_tick: Duration,
    /// Ticks without a leader after which another is elected (at random up to twice that).
    pub election_ticks: u64,
    /// How long a command that finds no leader is tried.
    pub propose: Duration,
    /// How often a command whose answer does not come is sent again.
    pub retry: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            heartbeat: Duration::from_millis(200),
            lease: Duration::from_secs(2),
            dead: Duration::from_secs(3),
            absent: Duration::from_secs(10),
            raft_tick: Duration::from_millis(100),
            election_ticks: 10,
            propose: Duration::from_secs(10),
            retry: Duration::from_millis(500),
        }
    }
}

impl Timing {
    /// For tests and clusters on one machine: silence is noticed in 1.2 s.
    #[must_use]
    pub fn quick() -> Self {
        Timing {
            heartbeat: Duration::from_millis(80),
            lease: Duration::from_millis(800),
            dead: Duration::from_millis(1200),
            absent: Duration::from_secs(4),
            raft_tick: Duration::from_millis(50),
            election_ticks: 8,
            propose: Duration::from_secs(10),
            retry: Duration::from_millis(250),
        }
    }

    /// For networks over which packets take long: silence is noticed in 10 s.
    #[must_use]
    pub fn patient() -> Self {
        Timing {
            heartbeat: Duration::from_millis(600),
            lease: Duration::from_secs(7),
            dead: Duration::from_secs(10),
            absent: Duration::from_secs(30),
            raft_tick: Duration::from_millis(300),
            election_ticks: 10,
            propose: Duration::from_secs(20),
            retry: Duration::from_millis(1000),
        }
    }

    /// Silence of a node after which it may be declared dead along with others. Between `lease` and `dead`.
    fn surely_expired(&self) -> Duration {
        self.lease + (self.dead.saturating_sub(self.lease)) / 2
    }

    /// Says what is wrong with it.
    ///
    /// # Errors
    /// If the times contradict each other.
    pub fn check(&self) -> Result<(), String> {
        if self.dead <= self.lease + self.heartbeat {
            return Err(format!("`dead` ({:?}) must be longer than `lease` and `heartbeat` together", self.dead));
        }
        if self.lease < self.heartbeat * 4 {
            return Err(format!("`lease` ({:?}) must be at least four times `heartbeat` ({:?})", self.lease, self.heartbeat));
        }
        if self.heartbeat.is_zero() || self.raft_tick.is_zero() || self.election_ticks < 3 {
            return Err("`heartbeat` and `raft_tick` must not be zero, and `election_ticks` at least 3".into());
        }
        Ok(())
    }
}

/// Messages of this service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wire {
    /// A node to the leader.
    Heartbeat(Heartbeat),
    /// The leader's answer to it.
    Grant(Grant),
    /// The leader to every node: how far an epoch has recovered.
    Barrier {
        /// The epoch.
        epoch: Epoch,
        /// The layer.
        recovered: Layer,
    },
}

/// A node is alive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Its life.
    pub incarnation: Incarnation,
    /// The term of the agreement that it takes part in.
    pub term: u64,
    /// Its clock.
    pub sent: Instant,
    /// The newest time stamp that it has from the leader of that term, on the leader's clock.
    pub stamp: Option<Instant>,
    /// The epoch that it has adopted.
    pub epoch: Epoch,
    /// The layer up to which it has recovered in it.
    pub layer: Layer,
    /// Nodes whose processes it has seen to be gone, with their last lives.
    pub gone: Vec<(NodeId, Incarnation)>,
}

/// The leader's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The leader's term.
    pub term: u64,
    /// The life that it is for.
    pub incarnation: Incarnation,
    /// From the heartbeat.
    pub sent: Instant,
    /// The lease lasts that long from `sent` on. Zero: none.
    pub lease: Duration,
    /// The leader's clock, to be sent back.
    pub stamp: Instant,
    /// An epoch.
    pub epoch: Epoch,
    /// How far it has recovered on all nodes.
    pub recovered: Layer,
}

/// What happens to the core.
#[derive(Clone, Debug)]
pub enum Input {
    /// Time passes. Called several times per `heartbeat`.
    Tick,
    /// A message.
    Message {
        /// From whom.
        from: NodeId,
        /// What.
        wire: Wire,
    },
    /// A new configuration was adopted.
    Config(Arc<Config>),
    /// The agreement's status. Must be given before anything is sent in the status' term.
    Raft(RaftStatus),
    /// A process is gone for sure.
    ProcessGone {
        /// The node.
        node: NodeId,
        /// Its lives up to this one have ended.
        upto: Incarnation,
    },
    /// A layer of this node has recovered.
    Finish {
        /// In this epoch.
        epoch: Epoch,
        /// The layer.
        layer: Layer,
    },
    /// The answer to [`Output::NewIncarnation`]: it is durable.
    Incarnation(Incarnation),
}

/// What the core wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send it.
    Send(NodeId, Wire),
    /// Propose it, without waiting for an answer: it is repeated if need be.
    Propose(Command),
    /// Choose the next life, greater than this one; make it durable and tell.
    NewIncarnation(Incarnation),
    /// The lease of this node lasts until then. Zero: there is none.
    Lease(Instant),
    /// The epoch has recovered to this layer on all nodes.
    Recovered(Epoch, Layer),
    /// The leader's process is gone.
    LeaderGone(NodeId),
}

/// The core.
#[derive(Clone, Debug)]
pub struct Membership {
    me: NodeId,
    /// Where this node listens.
    addr: Option<String>,
    timing: Timing,
    incarnation: Incarnation,
    config: Arc<Config>,
    raft: RaftStatus,
    lease_until: Instant,
    finished: (Epoch, u8),
    recovered: (Epoch, Layer),
    gone: BTreeMap<NodeId, Incarnation>,
    stamp: Option<(u64, Instant)>,
    next_heartbeat: Instant,
    next_up: Instant,
    last_tick: Instant,
    lead: Option<Lead>,
}

/// What a leader knows.
#[derive(Clone, Debug)]
struct Lead {
    /// When it was elected, or woke up from standing still.
    since: Instant,
    peers: BTreeMap<NodeId, Followed>,
    /// Nodes that a declaration is under way for, and when it was last proposed.
    declaring: BTreeMap<NodeId, (Incarnation, Instant)>,
    absent: BTreeMap<NodeId, Instant>,
    /// Voters that are down, and since when this leader knows.
    voters_down: BTreeMap<NodeId, Instant>,
    /// The last time at which a majority supported this leader.
    quorum: Option<Instant>,
    next_duty: Instant,
    announced: (Epoch, Layer),
}

/// What a leader knows of another node.
#[derive(Clone, Debug)]
struct Followed {
    /// The newest life heard of.
    incarnation: Incarnation,
    /// When it was first heard of.
    first_heard: Instant,
    /// When it came up, if that was under this leader.
    up_since: Instant,
    heard: Option<Instant>,
    /// The newest own time stamp that came back.
    stamp: Option<Instant>,
    report: (Epoch, Layer),
}

impl Followed {
    fn new(up_since: Instant) -> Self {
        let first_heard = Instant(0);
        Followed { incarnation: Incarnation(0), first_heard, up_since, heard: None, stamp: None, report: (Epoch(0), Layer::None) }
    }
}

/// A voter that is down for this many times `absent` is replaced by a node that is up, if there is one.
const VOTER_ABSENT_FACTOR: u32 = 6;
const LAYERS: [Layer; 4] = [Layer::Cluster, Layer::Mirror, Layer::Sld, Layer::Fs];

impl Membership {
    /// A core in a node's new life. `addr`: where it listens, if that is not where the configuration says.
    #[must_use]
    pub fn new(me: NodeId, incarnation: Incarnation, addr: Option<String>, config: Arc<Config>, timing: Timing) -> Self {
        Membership {
            me,
            addr,
            timing,
            incarnation,
            config,
            raft: RaftStatus::default(),
            lease_until: Instant(0),
            finished: (Epoch(0), 0),
            recovered: (Epoch(0), Layer::None),
            gone: BTreeMap::new(),
            stamp: None,
            next_heartbeat: Instant(0),
            next_up: Instant(0),
            last_tick: Instant(0),
            lead: None,
        }
    }

    /// Whether this node, in this life, is up in the configuration.
    #[must_use]
    pub fn member(&self) -> bool {
        self.config.nodes.get(&self.me).is_some_and(|n| n.up && n.incarnation == self.incarnation)
    }

    /// This node's life.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// The agreement's status that was last given.
    #[must_use]
    pub fn raft(&self) -> &RaftStatus {
        &self.raft
    }

    /// How far the present epoch has recovered on all nodes.
    #[must_use]
    pub fn recovered(&self) -> Layer {
        if self.recovered.0 == self.config.epoch { self.recovered.1 } else { Layer::None }
    }

    /// Until when the lease lasts.
    #[must_use]
    pub fn lease_until(&self) -> Instant {
        self.lease_until
    }

    /// One step.
    pub fn step(&mut self, now: Instant, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::Tick => self.tick(now, out),
            Input::Message { from, wire } => match wire {
                Wire::Heartbeat(heartbeat) => self.on_heartbeat(now, from, heartbeat, out),
                Wire::Grant(grant) => self.on_grant(now, from, grant, out),
                Wire::Barrier { epoch, recovered } => self.on_recovered(epoch, recovered, out),
            },
            Input::Config(config) => self.on_config(now, config, out),
            Input::Raft(status) => self.on_raft(now, status, out),
            Input::ProcessGone { node, upto } => {
                if node != self.me && self.config.nodes.get(&node).is_some_and(|n| n.up && n.incarnation <= upto) {
                    tracing::info!("the process of {node} is gone (life {upto})");
                    self.gone.insert(node, upto);
                    self.next_heartbeat = now;
                }
                if self.raft.leader == Some(node) {
                    out.push(Output::LeaderGone(node));
                }
                self.beat(now, out);
            }
            Input::Finish { epoch, layer } => self.finish(now, epoch, layer, out),
            Input::Incarnation(incarnation) => {
                self.incarnation = self.incarnation.max(incarnation);
                self.set_lease(Instant(0), out);
                self.next_up = now;
            }
        }
        self.lead_step(now, out);
    }

    fn set_lease(&mut self, until: Instant, out: &mut Vec<Output>) {
        if until != self.lease_until {
            self.lease_until = until;
            out.push(Output::Lease(until));
        }
    }

    /// The layer up to which, without a gap, this node has finished.
    fn report(&self) -> (Epoch, Layer) {
        let (epoch, done) = self.finished;
        let layer = LAYERS.iter().take_while(|l| done & (1 << **l as u8) != 0).last().copied().unwrap_or(Layer::None);
        (epoch, layer)
    }

    fn finish(&mut self, now: Instant, epoch: Epoch, layer: Layer, out: &mut Vec<Output>) {
        if epoch != self.config.epoch || !self.member() {
            return;
        }
        if self.finished.0 != epoch {
            self.finished = (epoch, 0);
        }
        let before = self.report();
        self.finished.1 |= 1 << layer as u8;
        if self.report() != before {
            self.next_heartbeat = now;
            self.beat(now, out);
        }
    }

    fn on_recovered(&mut self, epoch: Epoch, layer: Layer, out: &mut Vec<Output>) {
        // A new leader begins to count anew: what all nodes have reached stays reached.
        if epoch == self.config.epoch && layer > self.recovered() {
            self.recovered = (epoch, layer);
            out.push(Output::Recovered(epoch, layer));
        }
    }

    fn on_config(&mut self, now: Instant, config: Arc<Config>, out: &mut Vec<Output>) {
        let was = self.member();
        let old = std::mem::replace(&mut self.config, config);
        let config = Arc::clone(&self.config);
        let up_as = |node: &NodeId, incarnation| config.nodes.get(node).is_some_and(|n| n.up && n.incarnation == incarnation);
        self.gone.retain(|node, upto| config.nodes.get(node).is_some_and(|n| n.up && n.incarnation <= *upto));
        if was && !self.member() {
            tracing::warn!("this node was declared dead (epoch {}); it will ask to be let in again", config.epoch);
            self.set_lease(Instant(0), out);
            self.next_up = now;
        }
        if let Some(lead) = &mut self.lead {
            lead.declaring.retain(|node, (incarnation, _)| up_as(node, *incarnation));
            for (id, info) in config.nodes.iter().filter(|(_, n)| n.up) {
                if !old.nodes.get(id).is_some_and(|o| o.up && o.incarnation == info.incarnation) {
                    lead.peers.entry(*id).or_insert_with(|| Followed::new(now)).up_since = now;
                }
            }
        }
        // The configuration is adopted: older epochs' requests are rejected from now on.
        let epoch = self.config.epoch;
        self.finish(now, epoch, Layer::Cluster, out);
        self.come_up(now, out);
    }

    fn on_raft(&mut self, now: Instant, status: RaftStatus, out: &mut Vec<Output>) {
        if status == self.raft {
            return;
        }
        let elected = status.leading && !(self.raft.leading && self.raft.term == status.term);
        let other_leader = status.leader != self.raft.leader;
        self.raft = status;
        if !self.raft.leading {
            self.lead = None;
        } else if elected {
            tracing::info!("this node leads in term {}", self.raft.term);
            self.lead = Some(Lead {
                since: now,
                peers: BTreeMap::new(),
                declaring: BTreeMap::new(),
                absent: BTreeMap::new(),
                voters_down: BTreeMap::new(),
                quorum: None,
                next_duty: now,
                announced: (Epoch(0), Layer::None),
            });
        }
        if other_leader {
            self.next_heartbeat = now;
            self.next_up = now;
            self.beat(now, out);
        }
    }

    fn tick(&mut self, now: Instant, out: &mut Vec<Output>) {
        let still = now.since(self.last_tick) > self.timing.lease / 2;
        self.last_tick = now;
        if still && let Some(lead) = &mut self.lead {
            // This process stood still, or the whole machine: it cannot know who was silent.
            lead.since = now;
        }
        self.beat(now, out);
        self.come_up(now, out);
    }

    /// Sends a heartbeat if it is time.
    fn beat(&mut self, now: Instant, out: &mut Vec<Output>) {
        let Some(leader) = self.raft.leader.filter(|l| *l != self.me) else { return };
        if now < self.next_heartbeat {
            return;
        }
        self.next_heartbeat = now + self.timing.heartbeat;
        let (epoch, layer) = self.report();
        let heartbeat = Heartbeat {
            incarnation: self.incarnation,
            term: self.raft.term,
            sent: now,
            stamp: self.stamp.filter(|(term, _)| *term == self.raft.term).map(|(_, stamp)| stamp),
            epoch,
            layer,
            gone: self.gone.iter().map(|(n, i)| (*n, *i)).collect(),
        };
        out.push(Output::Send(leader, Wire::Heartbeat(heartbeat)));
    }

    /// Asks to be let in if this node is not a member.
    fn come_up(&mut self, now: Instant, out: &mut Vec<Output>) {
        let Some(info) = self.config.nodes.get(&self.me) else { return };
        if self.member() || now < self.next_up {
            return;
        }
        self.next_up = now + self.timing.retry;
        if info.incarnation >= self.incarnation {
            out.push(Output::NewIncarnation(info.incarnation));
            return;
        }
        let addr = self.addr.clone().unwrap_or_else(|| info.addr.clone());
        out.push(Output::Propose(Command::NodeUp { node: self.me, incarnation: self.incarnation, addr }));
    }

    fn on_grant(&mut self, now: Instant, from: NodeId, grant: Grant, out: &mut Vec<Output>) {
        if grant.term == self.raft.term && self.raft.leader == Some(from) && !self.raft.leading {
            let known = self.stamp.filter(|(term, _)| *term == grant.term);
            if known.is_none_or(|(_, stamp)| stamp < grant.stamp) {
                self.stamp = Some((grant.term, grant.stamp));
            }
            if known.is_none() {
                // A new leader can grant nothing before this comes back to it.
                self.next_heartbeat = now;
                self.beat(now, out);
            }
        }
        // A time stamp that this node has not sent yet is not its own.
        let lease = grant.lease.min(self.timing.lease);
        if grant.incarnation == self.incarnation && self.member() && grant.sent <= now && !lease.is_zero() {
            let until = self.lease_until.max(grant.sent + lease);
            self.set_lease(until, out);
        }
        self.on_recovered(grant.epoch, grant.recovered, out);
    }

    fn on_heartbeat(&mut self, now: Instant, from: NodeId, heartbeat: Heartbeat, out: &mut Vec<Output>) {
        let (term, timing) = (self.raft.term, self.timing);
        let Some(info) = self.config.nodes.get(&from) else { return };
        let gone: Vec<_> = heartbeat.gone.iter().filter(|(node, _)| *node != self.me).copied().collect();
        let Some(lead) = &mut self.lead else { return };
        let peer = lead.peers.entry(from).or_insert_with(|| Followed::new(Instant(0)));
        if heartbeat.term <= term
            && let Some(stamp) = heartbeat.stamp
            && heartbeat.term == term
            && stamp <= now
        {
            peer.stamp = peer.stamp.max(Some(stamp));
        }
        if heartbeat.incarnation > peer.incarnation {
            peer.first_heard = now;
        }
        if heartbeat.incarnation >= peer.incarnation {
            peer.incarnation = heartbeat.incarnation;
            peer.heard = Some(now);
            peer.report = (heartbeat.epoch, heartbeat.layer);
        }
        let alive = info.up && info.incarnation == heartbeat.incarnation;
        for (node, upto) in gone {
            if self.config.nodes.get(&node).is_some_and(|n| n.up && n.incarnation <= upto) {
                self.gone.insert(node, upto);
            }
        }
        self.count_quorum(now);
        let Some(lead) = &self.lead else { return };
        let may = alive && self.raft.ready && !lead.declaring.contains_key(&from) && !self.gone.contains_key(&from);
        let lease = match lead.quorum {
            // Counted from when the heartbeat was sent, which is before now.
            Some(quorum) if may => timing.lease.saturating_sub(now.since(quorum)),
            _ => Duration::ZERO,
        };
        let grant = Grant {
            term,
            incarnation: heartbeat.incarnation,
            sent: heartbeat.sent,
            lease,
            stamp: now,
            epoch: self.config.epoch,
            recovered: self.recovered(),
        };
        out.push(Output::Send(from, Wire::Grant(grant)));
    }

    /// Brings up to date when a majority last supported this leader.
    fn count_quorum(&mut self, now: Instant) {
        let me = self.me;
        let Some(lead) = &mut self.lead else { return };
        let peers = &lead.peers;
        let quorum = if self.raft.quorums.is_empty() {
            None
        } else {
            self.raft.majority(|node| if node == me { Some(now) } else { peers.get(&node).and_then(|p| p.stamp) })
        };
        lead.quorum = lead.quorum.max(quorum);
    }

    /// What a leader does after every step.
    fn lead_step(&mut self, now: Instant, out: &mut Vec<Output>) {
        if self.lead.is_none() {
            return;
        }
        self.count_quorum(now);
        self.own_lease(out);
        self.barrier(out);
        self.declare(now, out);
        let timing = self.timing;
        let Some(lead) = &mut self.lead else { return };
        if self.raft.ready && now >= lead.next_duty {
            lead.next_duty = now + timing.retry;
            self.duties(now, out);
        }
    }

    fn own_lease(&mut self, out: &mut Vec<Output>) {
        let Some(lead) = &self.lead else { return };
        if let Some(quorum) = lead.quorum
            && self.raft.ready
            && self.member()
        {
            let until = self.lease_until.max(quorum + self.timing.lease);
            self.set_lease(until, out);
        }
    }

    /// How far all nodes that are up have recovered.
    fn barrier(&mut self, out: &mut Vec<Output>) {
        let epoch = self.config.epoch;
        let own = self.report();
        let Some(lead) = &self.lead else { return };
        if !self.raft.ready {
            return;
        }
        let mut layer = Layer::Fs;
        let mut any = false;
        for (id, info) in self.config.nodes.iter().filter(|(_, n)| n.up) {
            any = true;
            let unknown = (Incarnation(0), (Epoch(0), Layer::None));
            let (incarnation, report) = if *id == self.me {
                (self.incarnation, own)
            } else {
                lead.peers.get(id).map_or(unknown, |p| (p.incarnation, p.report))
            };
            let reached = if report.0 == epoch && incarnation == info.incarnation { report.1 } else { Layer::None };
            layer = layer.min(reached);
        }
        if !any || layer == Layer::None {
            return;
        }
        self.on_recovered(epoch, layer, out);
        let recovered = self.recovered();
        let me = self.me;
        let Some(lead) = &mut self.lead else { return };
        if lead.announced != (epoch, recovered) {
            lead.announced = (epoch, recovered);
            let others = self.config.nodes.iter().filter(|(id, n)| n.up && **id != me);
            out.extend(others.map(|(id, _)| Output::Send(*id, Wire::Barrier { epoch, recovered })));
            lead.next_duty = Instant(0);
        }
    }

    /// Declares nodes dead whose lease has surely run out or whose process surely is gone, all in one command.
    fn declare(&mut self, now: Instant, out: &mut Vec<Output>) {
        let timing = self.timing;
        let Some(lead) = &mut self.lead else { return };
        // Without a majority nothing would come of it now, and later it would be out of date.
        let supported = lead.quorum.is_some_and(|q| now.since(q) < timing.lease);
        if !self.raft.ready || !supported {
            return;
        }
        // How long a node has been silent, and whether that is too long. One that this leader never heard of in this life
        // had no lease of this leader: it is dead when leases of an earlier one have run out.
        let silence = |id: &NodeId, incarnation: Incarnation| {
            let peer = lead.peers.get(id);
            if let Some(peer) = peer.filter(|p| p.incarnation > incarnation) {
                // A later life speaks, so this one is over. Wait a moment for that one to come up: that is one epoch instead
                // of two, and its copies stay in sync.
                return (now.since(peer.first_heard), timing.retry * 2);
            }
            let base = peer.map_or(lead.since, |p| p.up_since.max(lead.since));
            match peer.filter(|p| p.incarnation == incarnation).and_then(|p| p.heard) {
                Some(heard) if heard >= base => (now.since(heard), timing.dead),
                _ => (now.since(base), timing.surely_expired()),
            }
        };
        let too_long = |id: &NodeId, incarnation: Incarnation| {
            let (silent, limit) = silence(id, incarnation);
            silent >= limit
        };
        let up = || self.config.nodes.iter().filter(|(id, n)| n.up && **id != self.me);
        let is_gone = |id: &NodeId, incarnation: Incarnation| {
            let later = lead.peers.get(id).is_some_and(|p| p.incarnation > incarnation);
            !later && self.gone.get(id).is_some_and(|upto| incarnation <= *upto)
        };
        let due = up().any(|(id, n)| {
            let proposed = lead.declaring.get(id).map(|(_, at)| *at);
            let dead = is_gone(id, n.incarnation) || too_long(id, n.incarnation) || proposed.is_some();
            dead && proposed.is_none_or(|at| now.since(at) >= timing.retry)
        });
        if !due {
            return;
        }
        // Those who fell silent together go together: one epoch, not one for each. (Silence is counted from the last
        // heartbeat, and those of different nodes are up to an interval apart.)
        let nodes: Vec<(NodeId, Incarnation)> = up()
            .filter(|(id, n)| {
                let (silent, limit) = silence(id, n.incarnation);
                let expired = silent >= limit.min(timing.surely_expired());
                lead.declaring.contains_key(id) || is_gone(id, n.incarnation) || expired
            })
            .map(|(id, n)| (*id, n.incarnation))
            .collect();
        for (id, incarnation) in &nodes {
            let gone = is_gone(id, *incarnation);
            if lead.declaring.insert(*id, (*incarnation, now)).is_none() {
                let why = if gone { "its process is gone" } else { "it is silent" };
                tracing::warn!("declaring {id} dead ({incarnation}): {why}");
            }
        }
        out.push(Output::Propose(Command::NodesDown { nodes }));
    }

    /// What a leader looks after now and then.
    fn duties(&mut self, now: Instant, out: &mut Vec<Output>) {
        let epoch = self.config.epoch;
        if self.recovered() >= Layer::Mirror && self.config.nodes.values().any(|n| n.up && n.recovered != epoch) {
            out.push(Output::Propose(Command::Recovered { epoch }));
        }
        out.extend(voters_wanted(&self.config).map(Output::Propose));
        let blocking = blocking(&self.config);
        let timing = self.timing;
        let Some(lead) = &mut self.lead else { return };
        lead.absent.retain(|node, _| blocking.contains_key(node));
        for node in blocking.keys() {
            lead.absent.entry(*node).or_insert(now);
        }
        let given_up: Vec<_> = blocking
            .into_iter()
            .filter(|(node, _)| lead.absent.get(node).is_some_and(|since| now.since(*since) >= timing.absent))
            .collect();
        if !given_up.is_empty() {
            tracing::warn!("going on without {given_up:?}, which did not come back");
            out.push(Output::Propose(Command::NodesDown { nodes: given_up }));
        }
        let config = &self.config;
        lead.voters_down.retain(|node, _| config.nodes.get(node).is_some_and(|n| n.voter && !n.up));
        for (node, _) in config.nodes.iter().filter(|(_, n)| n.voter && !n.up) {
            lead.voters_down.entry(*node).or_insert(now);
        }
        let lost = lead.voters_down.iter().find(|(_, since)| now.since(**since) >= timing.absent * VOTER_ABSENT_FACTOR);
        let spare = config.nodes.iter().find(|(_, n)| n.up && !n.voter);
        if let (Some((lost, _)), Some((spare, _))) = (lost, spare) {
            tracing::warn!("{spare} votes instead of {lost}, which did not come back");
            out.push(Output::Propose(Command::SetVoter { node: *spare, voter: true }));
            out.push(Output::Propose(Command::SetVoter { node: *lost, voter: false }));
        }
    }

    /// Panics if an invariant is broken.
    pub fn check_invariants(&self, now: Instant) {
        assert!(self.lease_until <= now + self.timing.lease, "a lease beyond its length");
        assert!(self.member() || self.lease_until == Instant(0), "a lease without membership");
        assert_eq!(self.lead.is_some(), self.raft.leading);
    }
}

/// Nodes that are down but have copies in sync which a mirror waits for, although another node has them, too.
fn blocking(config: &Config) -> BTreeMap<NodeId, Incarnation> {
    let mut nodes = BTreeMap::new();
    for mirror in config.mirrors.values() {
        let in_sync = mirror.members.iter().filter(|m| m.state == MemberState::InSync);
        let of = |m: &crate::config::Member| {
            let disk = config.disks.get(&m.disk)?;
            config.nodes.get(&disk.node).map(|n| (disk.node, n.up && !disk.faulted, n.up, n.incarnation))
        };
        let found: Vec<_> = in_sync.filter_map(of).collect();
        if found.iter().any(|(_, serves, _, _)| *serves) {
            nodes.extend(found.iter().filter(|(_, _, up, _)| !up).map(|(id, _, _, incarnation)| (*id, *incarnation)));
        }
    }
    nodes
}

/// The next voter to be made: one node votes alone until there are three, then three do, from five nodes on five. Nodes
/// that are up are chosen.
fn voters_wanted(config: &Config) -> impl Iterator<Item = Command> + use<> {
    let up = config.nodes.values().filter(|n| n.up).count();
    let voters = config.nodes.values().filter(|n| n.voter).count();
    let wanted = match up.max(voters) {
        0..=2 => 1,
        3..=4 => 3,
        _ => 5,
    };
    let missing = wanted - voters.min(wanted);
    let new: Vec<NodeId> = config.nodes.iter().filter(|(_, n)| n.up && !n.voter).map(|(id, _)| *id).take(missing).collect();
    // All of them, or none: two voters are worse than one.
    let enough = new.len() == missing;
    new.into_iter().filter(move |_| enough).map(|node| Command::SetVoter { node, voter: true })
}

#[cfg(test)]
mod tests;
