//! Runs the online collector of file systems: on request, and by itself after every epoch that lost a node.
//!
//! Invariants: at most one run per file system in the whole cluster (a token says whose turn it is); a run is stopped by
//! its owner, not by the client that asked for it.
//!
//! Excludes: what is garbage (`fs::gc`).

use super::node::Node;
use super::peers::Question;
use crate::control::{Answer, TaskAction, TaskReport};
use crate::events::Kind;
use crate::failure::{Context, Failure, Outcome};
use crate::status::SCHEMA_VERSION;
use cluster::{Layer, NodeId, View};
use fs::gc::{GcOptions, GcReport};
use parking_lot::Mutex;
use sld::{Disk, Mode, ObjectId};
use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// The collector's number among the tasks of a file system.
const TASK: u32 = 1;
/// How long a run waits for its turn: another node may be at it.
const TURN_TIME_MAX: Duration = Duration::from_secs(2);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    fs: String,
    running: bool,
    dry_run: bool,
    stop: bool,
    report: GcReport,
    failed: Option<String>,
}

/// The collector of one node: one run at a time.
pub struct Collector {
    state: watch::Sender<State>,
    /// Keeps a second run from starting while one is being started.
    starting: Mutex<()>,
}

impl Default for Collector {
    fn default() -> Self {
        Collector { state: watch::Sender::new(State::default()), starting: Mutex::new(()) }
    }
}

fn report(state: &State) -> TaskReport {
    let r = &state.report;
    let verb = if state.dry_run { "to be freed" } else { "freed" };
    let mut lines = Vec::new();
    if !state.fs.is_empty() {
        lines.push(format!(
            "{}: {} leaked blocks and {} nameless inodes {verb}; {} names settled, {} records and {} counts put right; {} objects passed over for damage",
            state.fs, r.leaked, r.orphans, r.names, r.records, r.counts, r.skipped
        ));
    }
    lines.extend(state.failed.iter().cloned());
    let found = r.leaked + r.orphans + r.records + r.names + r.counts;
    TaskReport {
        schema_version: SCHEMA_VERSION,
        task: "gc".into(),
        state: match state {
            State { running: true, .. } => "running",
            State { failed: Some(_), .. } => "failed",
            State { stop: true, .. } => "stopped",
            State { fs, .. } if fs.is_empty() => "idle",
            _ => "done",
        }
        .into(),
        done: r.swept,
        total: r.blocks,
        found,
        repaired: if state.dry_run { 0 } else { found },
        lines,
    }
}

/// The collectors of all nodes in one report: that of a node which runs it, if there is one. `None`: no answer.
fn of_all(nodes: impl Iterator<Item = (String, Option<TaskReport>)>) -> TaskReport {
    let mut lines = Vec::new();
    let mut shown: Option<TaskReport> = None;
    let rank = |r: &TaskReport| ["idle", "done", "stopped", "failed", "running"].iter().position(|s| *s == r.state);
    for (name, report) in nodes {
        let Some(report) = report else {
            lines.push(format!("{name}: no answer"));
            continue;
        };
        if report.state == "idle" {
            lines.push(format!("{name}: no run since its daemon started"));
        } else {
            lines.push(format!("{name}: {}; {}", report.state, report.lines.join("; ")));
        }
        if shown.as_ref().is_none_or(|s| rank(s) < rank(&report)) {
            shown = Some(report);
        }
    }
    let idle = TaskReport { schema_version: SCHEMA_VERSION, task: "gc".into(), state: "idle".into(), ..TaskReport::default() };
    TaskReport { lines, ..shown.unwrap_or(idle) }
}

impl Collector {
    /// Ends a run after its present step.
    pub fn stop(&self) {
        self.state.send_if_modified(|s| s.running && !std::mem::replace(&mut s.stop, true));
    }

    /// How it is.
    pub(super) fn report(&self) -> TaskReport {
        report(&self.state.borrow())
    }

    /// Does what a command asks. A start is followed to its end, as long as the client stays; the run itself goes on.
    ///
    /// # Errors
    /// If there is no such file system, or a run is under way.
    pub async fn answer(
        node: &Arc<Node>,
        name: &str,
        action: TaskAction,
        dry_run: bool,
        answers: &mpsc::Sender<Answer>,
    ) -> Outcome<TaskReport> {
        let this = node.collector().clone();
        match action {
            // It may run on any node.
            TaskAction::Status | TaskAction::Stop => {
                let answers = node.ask_all(&Question::Gc(action)).await;
                return Ok(of_all(answers.into_iter().map(|(name, facts)| (name, facts.and_then(|f| f.gc)))));
            }
            TaskAction::Start => {}
        }
        let mut states = this.state.subscribe();
        this.start(node, name, dry_run).await?;
        loop {
            let state = states.borrow_and_update().clone();
            if !state.running {
                return Ok(report(&state));
            }
            let progress = Answer::Progress { text: state.fs, done: state.report.swept, total: state.report.blocks };
            // A client that does not keep up misses steps, not the end.
            let _ = answers.try_send(progress);
            states.changed().await.map_err(|_| Failure::new("the daemon ends"))?;
        }
    }

    /// Starts a run.
    ///
    /// # Errors
    /// If there is no such file system, or a run is under way.
    pub async fn start(self: &Arc<Self>, node: &Arc<Node>, name: &str, dry_run: bool) -> Outcome<()> {
        let name = match name {
            "" => {
                let config = node.cluster().view().borrow().config.clone();
                let mut names = config.filesystems.values().map(|f| f.name.clone());
                match (names.next(), names.next()) {
                    (Some(only), None) => only,
                    (None, _) => return Err(Failure::new("there is no file system")),
                    _ => return Err(Failure::new("there are several file systems; name one")),
                }
            }
            name => name.to_string(),
        };
        let (id, fs) = node.filesystem(&name).await?;
        let busy = || Failure::new(format!("a run of the collector is under way on {name}; see 'pulsar gc status'"));
        {
            let _one = self.starting.lock();
            if self.state.borrow().running {
                return Err(busy());
            }
            self.state.send_replace(State { fs: name.clone(), running: true, dry_run, ..State::default() });
        }
        let turn = [(ObjectId::Task(id.0, TASK), Mode::Exclusive)];
        let tokens = match tokio::time::timeout(TURN_TIME_MAX, fs.disk().acquire(&turn)).await {
            Ok(Ok(tokens)) => tokens,
            other => {
                self.state.send_modify(|s| s.running = false);
                return Err(match other {
                    Ok(Err(e)) => Failure::new(e.to_string()),
                    _ => busy(),
                });
            }
        };
        let (this, weak) = (self.clone(), Arc::downgrade(node));
        node.spawn(async move {
            let _tokens = tokens;
            let options = GcOptions { dry_run, ..GcOptions::default() };
            let mut progress = |r: &GcReport| {
                this.state.send_modify(|s| s.report = *r);
                !this.state.borrow().stop
            };
            let done = fs.collect(options, &mut progress).await;
            this.state.send_modify(|s| {
                s.running = false;
                match &done {
                    Ok(r) => s.report = *r,
                    Err(e) => s.failed = Some(format!("{name}: {e}")),
                }
            });
            if let Some(node) = weak.upgrade() {
                let report = report(&this.state.borrow());
                let text = format!("collector: {}; {}", report.state, report.lines.join("; "));
                node.events().add(Kind::Task, done.is_err(), text);
            }
        });
        Ok(())
    }

    /// Runs the collector after every epoch that lost a node, once its recovery is complete: on the lowest node that is up.
    pub(super) async fn after_losses(node: Weak<Node>, mut views: cluster::watch::Receiver<Arc<View>>) {
        let mut up: BTreeSet<NodeId> = BTreeSet::new();
        let mut due = false;
        loop {
            let view = views.borrow_and_update().clone();
            let now = view.config.up();
            due |= up.iter().any(|n| !now.contains(n));
            up = now;
            if due && view.recovered == Layer::Fs && view.member && up.first() == Some(&view.me) {
                due = false;
                let Some(node) = node.upgrade() else { return };
                for name in view.config.filesystems.values().filter(|f| f.formatted).map(|f| f.name.clone()) {
                    if let Err(e) = Self::run_quietly(&node, &name).await {
                        tracing::info!("the collector was not started on {name}: {e}");
                    }
                }
            } else if view.recovered == Layer::Fs {
                due = false;
            }
            if views.changed().await.is_err() {
                return;
            }
        }
    }

    async fn run_quietly(node: &Arc<Node>, name: &str) -> Outcome<()> {
        let this = node.collector().clone();
        let mut states = this.state.subscribe();
        this.start(node, name, false).await?;
        states.wait_for(|s| !s.running).await.context(|| "the daemon ends".into())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(running: bool, failed: Option<&str>, swept: u64) -> TaskReport {
        let report_of = GcReport { swept, ..GcReport::default() };
        let failed = failed.map(String::from);
        report(&State { fs: "data".into(), running, report: report_of, failed, ..State::default() })
    }

    #[test]
    fn the_node_that_runs_it_is_shown_and_the_others_named() {
        let idle = report(&State::default());
        let names = || ["n1", "n2", "n3"].map(String::from).into_iter();
        let all = of_all(names().zip([Some(idle.clone()), Some(ran(true, None, 7)), None]));
        assert_eq!((&*all.state, all.done), ("running", 7));
        assert_eq!((&*all.lines[0], &*all.lines[2]), ("n1: no run since its daemon started", "n3: no answer"));
        assert!(all.lines[1].starts_with("n2: running; data: "));
        let all = of_all(names().zip([Some(ran(false, None, 5)), Some(ran(false, Some("no"), 1)), Some(idle.clone())]));
        assert_eq!(all.state, "failed");
        assert_eq!(of_all(names().zip([Some(idle.clone()), None, Some(idle)])).state, "idle");
    }

    #[test]
    fn only_what_runs_is_stopped() {
        let collector = Collector::default();
        collector.stop();
        assert_eq!(collector.report().state, "idle");
    }
}
