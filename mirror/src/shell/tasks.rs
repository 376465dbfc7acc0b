//! Small helpers: tasks that end with their owner, and futures run side by side.

use cluster::BoxFuture;
use parking_lot::Mutex;
use std::future::Future;
use std::task::Poll;
use tokio::task::JoinSet;

/// Tasks that are stopped when this is dropped.
#[derive(Default)]
pub(crate) struct Tasks(Mutex<JoinSet<()>>);

impl Tasks {
    /// Starts a task.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut set = self.0.lock();
        // Reap what has ended, so that the set stays small.
        while set.try_join_next().is_some() {}
        set.spawn(task);
    }

    /// Stops all tasks.
    pub(crate) fn abort(&self) {
        self.0.lock().abort_all();
    }
}

/// Runs futures side by side, at most `limit` at a time; results in order.
pub(crate) async fn parallel<'a, T>(limit: usize, futures: Vec<BoxFuture<'a, T>>) -> Vec<T> {
    let mut results: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    let mut waiting = futures.into_iter().enumerate();
    let mut running: Vec<(usize, BoxFuture<'a, T>)> = waiting.by_ref().take(limit.max(1)).collect();
    std::future::poll_fn(|cx| {
        let mut i = 0;
        while i < running.len() {
            match running[i].1.as_mut().poll(cx) {
                Poll::Ready(value) => {
                    results[running[i].0] = Some(value);
                    match waiting.next() {
                        Some(next) => running[i] = next,
                        None => {
                            drop(running.swap_remove(i));
                        }
                    }
                }
                Poll::Pending => i += 1,
            }
        }
        if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    results.into_iter().flatten().collect()
}
