//! A value that many look at, and a signal for each change of it: as `tokio::sync::watch`, but who waits is woken in the
//! order in which they began to wait.
//!
//! tokio's own spreads those who wait over several lists *by chance*, from a generator that no seed decides; in a simulated
//! cluster the layers would then hear of a new epoch in an order of its own in every run, and no seed would replay.
//!
//! Invariants: a receiver sees a newest value, never each of them; after `changed` what it sees is newer than what it saw;
//! none that waits misses a change.
//!
//! Excludes: backpressure, and a history of values.

use parking_lot::{MappedRwLockReadGuard, RwLock, RwLockReadGuard};
use std::sync::Arc;
use tokio::sync::Notify;

struct Shared<T> {
    state: RwLock<State<T>>,
    wake: Notify,
}

struct State<T> {
    value: T,
    /// Grows with each change.
    version: u64,
    /// The sender is gone.
    closed: bool,
}

/// Changes the value. When it is dropped the receivers are told that nothing comes any more.
pub struct Sender<T> {
    shared: Arc<Shared<T>>,
}

/// Looks at the value. A clone has seen what the original has.
pub struct Receiver<T> {
    shared: Arc<Shared<T>>,
    seen: u64,
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        Receiver { shared: Arc::clone(&self.shared), seen: self.seen }
    }
}

/// The sender is gone: no change can come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nothing changes any more")]
pub struct Closed;

/// The value, which cannot change while this lives: hold it for a moment only, never over an `await`.
pub type Ref<'a, T> = MappedRwLockReadGuard<'a, T>;

/// Both ends.
pub fn channel<T>(value: T) -> (Sender<T>, Receiver<T>) {
    let sender = Sender::new(value);
    let receiver = sender.subscribe();
    (sender, receiver)
}

impl<T> Sender<T> {
    /// With a first value.
    pub fn new(value: T) -> Self {
        let state = RwLock::new(State { value, version: 0, closed: false });
        Sender { shared: Arc::new(Shared { state, wake: Notify::new() }) }
    }

    /// A receiver that has seen the present value.
    pub fn subscribe(&self) -> Receiver<T> {
        let seen = self.shared.state.read().version;
        Receiver { shared: Arc::clone(&self.shared), seen }
    }

    /// The present value.
    pub fn borrow(&self) -> Ref<'_, T> {
        RwLockReadGuard::map(self.shared.state.read(), |s| &s.value)
    }

    /// Sets the value, and wakes all. Returns what it was.
    pub fn send_replace(&self, value: T) -> T {
        let mut old = value;
        self.send_if_modified(|v| {
            std::mem::swap(v, &mut old);
            true
        });
        old
    }

    /// Changes the value, and wakes all.
    pub fn send_modify(&self, modify: impl FnOnce(&mut T)) {
        self.send_if_modified(|v| {
            modify(v);
            true
        });
    }

    /// Lets `modify` change the value; if it says that it did, all are woken.
    pub fn send_if_modified(&self, modify: impl FnOnce(&mut T) -> bool) -> bool {
        {
            let mut state = self.shared.state.write();
            if !modify(&mut state.value) {
                return false;
            }
            state.version += 1;
        }
        self.shared.wake.notify_waiters();
        true
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.shared.state.write().closed = true;
        self.shared.wake.notify_waiters();
    }
}

impl<T> Receiver<T> {
    /// The present value, which counts as seen only if it was.
    pub fn borrow(&self) -> Ref<'_, T> {
        RwLockReadGuard::map(self.shared.state.read(), |s| &s.value)
    }

    /// The present value, which counts as seen.
    pub fn borrow_and_update(&mut self) -> Ref<'_, T> {
        let state = self.shared.state.read();
        self.seen = state.version;
        RwLockReadGuard::map(state, |s| &s.value)
    }

    /// Waits for a value that was not seen; then it counts as seen. Can be cancelled.
    ///
    /// # Errors
    /// If none can come.
    pub async fn changed(&mut self) -> Result<(), Closed> {
        loop {
            // Made before looking, so that a change in between wakes it.
            let wake = self.shared.wake.notified();
            {
                let state = self.shared.state.read();
                if state.version != self.seen {
                    self.seen = state.version;
                    return Ok(());
                }
                if state.closed {
                    return Err(Closed);
                }
            }
            wake.await;
        }
    }

    /// Waits until the value is as wanted, which it may be now; what was looked at counts as seen. Can be cancelled.
    ///
    /// # Errors
    /// If it is not, and cannot become so.
    pub async fn wait_for(&mut self, mut wanted: impl FnMut(&T) -> bool) -> Result<(), Closed> {
        loop {
            let wake = self.shared.wake.notified();
            {
                let state = self.shared.state.read();
                self.seen = state.version;
                if wanted(&state.value) {
                    return Ok(());
                }
                if state.closed {
                    return Err(Closed);
                }
            }
            wake.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    #[tokio::test]
    async fn who_waits_is_woken_in_order() {
        // With chance in it, twenty would come in order once in 10^12 runs.
        let (sender, receiver) = channel(0);
        let order = Arc::new(Mutex::new(Vec::new()));
        let tasks: Vec<_> = (0..20)
            .map(|i| {
                let (mut receiver, order) = (receiver.clone(), Arc::clone(&order));
                tokio::spawn(async move {
                    while receiver.changed().await.is_ok() {
                        order.lock().push(i);
                    }
                })
            })
            .collect();
        tokio::task::yield_now().await;
        for round in 1..4 {
            sender.send_replace(round);
            tokio::task::yield_now().await;
            assert_eq!(*order.lock(), (0..20).collect::<Vec<_>>());
            order.lock().clear();
        }
        drop(sender);
        for task in tasks {
            task.await.unwrap();
        }
        assert!(order.lock().is_empty());
    }

    #[tokio::test]
    async fn a_change_is_seen_once_and_the_newest_counts() {
        let (sender, mut receiver) = channel(1);
        assert_eq!(*receiver.borrow_and_update(), 1);
        sender.send_modify(|v| *v += 1);
        assert!(!sender.send_if_modified(|_| false));
        assert_eq!(sender.send_replace(3), 2);
        assert_eq!(receiver.changed().await, Ok(()));
        assert_eq!((*receiver.borrow(), *sender.borrow()), (3, 3));
        let mut late = sender.subscribe();
        drop(sender);
        assert_eq!(receiver.changed().await, Err(Closed));
        assert_eq!(receiver.wait_for(|v| *v == 3).await, Ok(()));
        assert_eq!(receiver.wait_for(|v| *v == 4).await, Err(Closed));
        assert_eq!(late.changed().await, Err(Closed), "it has seen what was there when it was made");
    }

    #[tokio::test]
    async fn a_change_before_closing_is_still_seen() {
        let (sender, mut receiver) = channel(1);
        sender.send_replace(2);
        drop(sender);
        assert_eq!(receiver.changed().await, Ok(()));
        assert_eq!(receiver.changed().await, Err(Closed));
    }
}
