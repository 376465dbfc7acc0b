//! `Sld`: one node's part in the shared logical disk; the token protocol of all its file systems.
//!
//! Lock order: `tokens` → `disks` → a disk's `state`. None is held over an await. What concerns regions is done under
//! `tokens`, so that an answer to a master and the allocator's knowledge cannot contradict each other.

use super::disk::{DiskShared, PulsarDisk};
use crate::allocator::Question;
use crate::api::{DiskError, Mode, ObjectId};
use crate::holder::{Event, WaiterId};
use crate::message::{Envelope, fs_of};
use crate::tokens::{Step, Tokens};
use cluster::{Cluster, Config, FsId, Layer, Message, NodeId, Peer, Receiver, Service, Transport, watch};
use mirror::Mirrors;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::Weak;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// How often acknowledgements and repetitions are looked after.
const TICK: Duration = Duration::from_millis(50);
/// How often a lease that has run out is looked at again.
const LEASE_POLL: Duration = Duration::from_millis(10);
/// How long a shutdown waits for tokens to be given back.
const GOODBYE: Duration = Duration::from_secs(5);

/// Bounds and times. Bytes are per file system.
#[derive(Clone, Debug)]
pub struct Options {
    /// Clean blocks kept.
    pub cache_bytes: usize,
    /// Dirty blocks, beyond which `Disk::admit` waits.
    pub dirty_bytes: usize,
    /// Unused tokens kept, of all file systems.
    pub tokens: usize,
    /// Age at which dirty blocks begin to be written.
    pub age_start: Duration,
    /// Age at which all dirty blocks are written.
    pub age_max: Duration,
    /// Blocks on their way by read-ahead.
    pub read_ahead_blocks: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            cache_bytes: 256 << 20,
            dirty_bytes: 64 << 20,
            tokens: 200_000,
            age_start: Duration::from_secs(1),
            age_max: Duration::from_millis(4500),
            read_ahead_blocks: 1024,
        }
    }
}

pub(super) struct TokenState {
    pub(super) tokens: Tokens,
    config: Arc<Config>,
    waiters: BTreeMap<WaiterId, oneshot::Sender<()>>,
}

/// What all parts of this node share.
pub(super) struct Node {
    pub(super) cluster: Arc<dyn Cluster>,
    pub(super) mirrors: Arc<dyn Mirrors>,
    pub(super) options: Options,
    transport: Arc<dyn Transport>,
    handle: Handle,
    tokens: Mutex<TokenState>,
    disks: Mutex<BTreeMap<FsId, Arc<DiskShared>>>,
    tasks: Mutex<Option<JoinSet<()>>>,
    stopped: watch::Sender<bool>,
}

/// What is left to do of a step, outside of the lock.
enum Action {
    Revoke { object: ObjectId, keep: Option<Mode>, generation: u64 },
    Load { region: ObjectId, load: u64 },
    Denied { region: ObjectId },
}

impl Node {
    /// Steps the tokens, and performs what comes of it.
    pub(super) fn step<R>(self: &Arc<Self>, f: impl FnOnce(&mut Tokens, cluster::Instant, &mut Step) -> R) -> R {
        self.step_state(|s, now, step| f(&mut s.tokens, now, step))
    }

    fn step_state<R>(self: &Arc<Self>, f: impl FnOnce(&mut TokenState, cluster::Instant, &mut Step) -> R) -> R {
        let now = self.cluster.now();
        let mut actions: Vec<(Arc<DiskShared>, Action)> = Vec::new();
        let mut lost = Vec::new();
        let (r, finished) = {
            let mut state = self.tokens.lock();
            let mut step = Step::default();
            let r = f(&mut state, now, &mut step);
            self.settle(&mut state, now, &mut step, &mut actions, &mut lost);
            // Sent under the lock, since the order counts; sending never blocks.
            for (to, mut envelope) in step.envelopes {
                envelope.clock = self.mirrors.clock();
                match postcard::to_stdvec(&envelope) {
                    Ok(head) => self.transport.send(to, Service::Token, Message::new(head)),
                    Err(error) => tracing::error!(%error, "a token message cannot be encoded"),
                }
            }
            (r, step.finished)
        };
        for (disk, objects) in lost {
            disk.tell_reset(&objects);
        }
        for (disk, action) in actions {
            match action {
                Action::Revoke { object, keep, generation } => disk.revoke(object, keep, generation),
                Action::Load { region, load } => disk.load(region, load),
                Action::Denied { region } => disk.leased(region, false),
            }
        }
        if let Some(epoch) = finished {
            self.cluster.finish(epoch, Layer::Sld);
        }
        r
    }

    /// The part of performing a step that happens under the lock.
    fn settle(
        &self,
        state: &mut TokenState,
        now: cluster::Instant,
        step: &mut Step,
        actions: &mut Vec<(Arc<DiskShared>, Action)>,
        lost: &mut Vec<(Arc<DiskShared>, Vec<ObjectId>)>,
    ) {
        if step.reset {
            state.waiters.clear();
            let generation = state.tokens.holder.generation();
            for disk in self.disks.lock().values() {
                lost.push((disk.clone(), disk.reset(generation)));
            }
        }
        while !step.events.is_empty() {
            for event in std::mem::take(&mut step.events) {
                let object = match &event {
                    Event::Admitted(waiter) => {
                        if let Some(tx) = state.waiters.remove(waiter) {
                            let _ = tx.send(());
                        }
                        continue;
                    }
                    Event::Revoke { object, .. }
                    | Event::Unknown { object, .. }
                    | Event::Known { object }
                    | Event::Forgotten { object }
                    | Event::Asking { object } => *object,
                    Event::Leased { region, .. } | Event::Denied { region } => *region,
                };
                let disk = fs_of(&state.config, object).and_then(|fs| self.disks.lock().get(&fs).cloned());
                match (event, disk) {
                    (Event::Revoke { object, keep, generation }, Some(disk)) => {
                        actions.push((disk, Action::Revoke { object, keep, generation }));
                    }
                    (Event::Revoke { object, generation, .. }, None) => {
                        state.tokens.with(now, step, |h, out| h.flushed(generation, object, Vec::new(), out));
                    }
                    (Event::Unknown { object, seq, keep }, disk)
                        if disk.as_ref().is_none_or(|d| d.asked(object, Question::Revoke { seq, keep })) =>
                    {
                        state.tokens.with(now, step, |h, out| h.answer(object, seq, keep, out));
                    }
                    (Event::Asking { object }, disk) if disk.as_ref().is_none_or(|d| d.asked(object, Question::Local)) => {
                        state.tokens.with(now, step, |h, out| h.consent(object, out));
                    }
                    (Event::Known { object }, Some(disk)) => disk.known(object),
                    (Event::Forgotten { object }, Some(disk)) => disk.forgotten(object),
                    (Event::Leased { region, busy }, Some(disk)) => {
                        let load = disk.lease_begins(region, &busy);
                        actions.push((disk, Action::Load { region, load }));
                    }
                    (Event::Denied { region }, Some(disk)) => actions.push((disk, Action::Denied { region })),
                    _ => {}
                }
            }
        }
    }

    /// Looks at the tokens.
    pub(super) fn look<R>(&self, f: impl FnOnce(&mut Tokens) -> R) -> R {
        f(&mut self.tokens.lock().tokens)
    }

    /// Whether a node is an object's token master. Must not be called under a disk's lock.
    pub(super) fn is_master(&self, node: NodeId, object: ObjectId) -> bool {
        self.tokens.lock().tokens.master_of(object) == Some(node)
    }

    /// Waits for a token; `None` if all tokens were lost meanwhile.
    pub(super) async fn wait_token(self: &Arc<Self>, object: ObjectId, mode: Mode, generation: u64) -> Option<()> {
        struct Waiting<'a> {
            node: &'a Arc<Node>,
            object: ObjectId,
            mode: Mode,
            generation: u64,
            waiter: WaiterId,
            admitted: oneshot::Receiver<()>,
            over: bool,
        }
        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                if self.over {
                    return;
                }
                self.node.step_state(|s, now, step| {
                    if s.waiters.remove(&self.waiter).is_some() {
                        s.tokens.with(now, step, |h, out| h.cancel(self.object, self.waiter, out));
                    } else if self.admitted.try_recv().is_ok() {
                        s.tokens.with(now, step, |h, out| h.done(self.generation, self.object, self.mode, out));
                    }
                });
            }
        }
        let (tx, admitted) = oneshot::channel();
        let waiter = self.step_state(|s, now, step| {
            if s.tokens.holder.generation() != generation {
                return None;
            }
            let waiter = s.tokens.with(now, step, |h, out| h.wait(object, mode, out));
            s.waiters.insert(waiter, tx);
            Some(waiter)
        })?;
        let mut waiting = Waiting { node: self, object, mode, generation, waiter, admitted, over: false };
        let admitted = (&mut waiting.admitted).await.is_ok();
        waiting.over = true;
        admitted.then_some(())
    }

    /// Runs a task until the node stops.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(tasks) = self.tasks.lock().as_mut() {
            while tasks.try_join_next().is_some() {}
            tasks.spawn_on(task, &self.handle);
        }
    }

    pub(super) fn is_stopped(&self) -> bool {
        *self.stopped.borrow()
    }

    /// What a wait that was broken off means.
    pub(super) fn broken(&self) -> DiskError {
        if self.is_stopped() { DiskError::Shutdown } else { DiskError::Lost }
    }

    /// Whether tokens that are held may be used now.
    pub(super) fn serving(&self) -> bool {
        self.cluster.lease_valid() && !self.is_stopped()
    }

    /// Waits until tokens may be used that are granted from now on. Returns their generation.
    pub(super) async fn wait_serving(&self) -> Result<u64, DiskError> {
        loop {
            if self.is_stopped() {
                return Err(DiskError::Shutdown);
            }
            let serving = || self.look(|t| t.serving().then(|| t.holder.generation()));
            if self.cluster.lease_valid()
                && let Some(generation) = serving()
            {
                return Ok(generation);
            }
            tokio::time::sleep(LEASE_POLL).await;
        }
    }

    fn stop(&self) {
        self.stopped.send_replace(true);
        let tasks = self.tasks.lock().take();
        drop(tasks); // aborts them
        let disks = std::mem::take(&mut *self.disks.lock());
        for disk in disks.values() {
            disk.stop();
        }
        self.tokens.lock().waiters.clear();
    }

    async fn run(self: Arc<Self>) {
        let mut view = self.cluster.view();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut changed = true;
        loop {
            if changed {
                let v = view.borrow_and_update().clone();
                self.tokens.lock().config = v.config.clone();
                self.step(|t, now, step| t.view(now, &v, step));
            }
            tokio::select! {
                biased;
                r = view.changed() => {
                    if r.is_err() {
                        return;
                    }
                    changed = true;
                }
                _ = tick.tick() => {
                    changed = false;
                    self.step(|t, now, step| t.tick(now, step));
                }
            }
        }
    }
}

struct Inbox(Weak<Node>);

impl Receiver for Inbox {
    fn receive(&self, from: Peer, message: Message) {
        let Some(node) = self.0.upgrade().filter(|n| !n.is_stopped()) else { return };
        let envelope: Envelope = match postcard::from_bytes(&message.head) {
            Ok(e) => e,
            Err(error) => {
                tracing::warn!(node = %from.node, %error, "a token message cannot be decoded; ignored");
                return;
            }
        };
        node.mirrors.witness(envelope.clock);
        node.step(|t, now, step| t.receive(now, from.node, envelope, step));
    }

    fn session_ended(&self, node: NodeId) {
        if let Some(me) = self.0.upgrade() {
            me.tokens.lock().tokens.session_ended(node);
        }
    }
}

/// One node's part in the shared logical disk: token master, message receiver, and the disks of its file systems.
/// Everything stops when it is dropped.
pub struct Sld {
    node: Arc<Node>,
}

impl Sld {
    /// Starts it, on the current tokio runtime. It recovers in every epoch after the mirrors have, and reports
    /// `Layer::Sld`.
    #[must_use]
    pub fn start(cluster: Arc<dyn Cluster>, mirrors: Arc<dyn Mirrors>, options: Options) -> Arc<Sld> {
        let view = cluster.view();
        let config = view.borrow().config.clone();
        let node = Arc::new(Node {
            tokens: Mutex::new(TokenState {
                tokens: Tokens::new(cluster.local(), options.tokens),
                config,
                waiters: BTreeMap::new(),
            }),
            transport: cluster.transport(),
            cluster,
            mirrors,
            options,
            handle: Handle::current(),
            disks: Mutex::new(BTreeMap::new()),
            tasks: Mutex::new(Some(JoinSet::new())),
            stopped: watch::Sender::new(false),
        });
        node.transport.register(Service::Token, Arc::new(Inbox(Arc::downgrade(&node))));
        node.spawn(node.clone().run());
        Arc::new(Sld { node })
    }

    /// The disk of a file system; the same one for every call with the same id.
    #[must_use]
    pub fn disk(&self, fs: FsId) -> PulsarDisk {
        // Under the lock of the tokens, so that it begins with what they are now, and is told of every reset after that.
        let shared = self.node.look(|t| {
            let generation = t.holder.generation();
            let mut disks = self.node.disks.lock();
            disks.entry(fs).or_insert_with(|| DiskShared::start(&self.node, fs, generation)).clone()
        });
        PulsarDisk::new(shared)
    }

    /// Makes everything durable and gives all tokens back, then stops. Waits for the mirrors as long as they take, and for
    /// the masters at most five seconds.
    ///
    /// # Errors
    /// `Lost` if something dirty was lost before.
    pub async fn shutdown(&self) -> Result<(), DiskError> {
        let disks: Vec<Arc<DiskShared>> = self.node.disks.lock().values().cloned().collect();
        let mut result = Ok(());
        for disk in disks {
            result = result.and(disk.flush(&[crate::api::FlushTarget::All]).await);
        }
        let give_up = async {
            loop {
                let left = self.node.step(|t, now, step| {
                    t.with(now, step, |h, out| {
                        for object in h.all_held() {
                            h.give_up(object, out);
                        }
                        h.held_count()
                    })
                });
                if left == 0 {
                    return;
                }
                tokio::time::sleep(LEASE_POLL).await;
            }
        };
        let _ = tokio::time::timeout(GOODBYE, give_up).await;
        self.node.stop();
        result
    }

    /// Objects that this node's token master knows of.
    #[must_use]
    pub fn objects_mastered(&self) -> usize {
        self.node.look(|t| t.mastered())
    }

    /// All that is known of tokens, for reports of failures.
    #[must_use]
    pub fn dump(&self) -> String {
        self.node.look(|tokens| format!("{tokens:?}"))
    }

    /// Panics if an invariant of the token cores is broken.
    pub fn check_invariants(&self) {
        self.node.look(|t| t.check_invariants());
    }
}

impl Drop for Sld {
    fn drop(&mut self) {
        self.node.stop();
    }
}
