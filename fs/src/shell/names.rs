//! Names in one directory that the kernel was told, and may believe.
//!
//! Names are not taken back (the kernel can be made to forget them all, but then drops directories that are in use until they are
//! looked up again, so that `getcwd()` fails there): they run out, and who changes the directory on another node waits for that.
//!
//! Excludes: on the strength of what they are told (`known`).

use std::hash::{DefaultHasher, Hasher};
use std::time::Duration;
use tokio::time::Instant;

/// How long the kernel may believe a name.
pub(crate) const LIFETIME: Duration = Duration::from_millis(60);
/// When a name that was told has run out: the kernel counts in ticks of up to 10 ms, from when it takes the answer in. That may be
/// 230 ms later, on a machine that has more to do than it can.
pub(super) const RUN_OUT: Duration = Duration::from_millis(300);
/// After another node had to wait for names to run out, those of this directory are not cached for this long: it is probably
/// being written by both. The time doubles whenever that was too short.
pub(super) const SHARED: Duration = Duration::from_secs(1);
/// The longest such time.
pub(super) const SHARED_MAX: Duration = Duration::from_secs(60);

/// A name in a directory, as numbers: the same for the same name, and seldom for another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    directory: u32,
    pub(super) name: u32,
}

impl Found {
    pub(super) fn new(directory: u64, name: &[u8]) -> Self {
        let number = |bytes: &[u8]| {
            let mut hasher = DefaultHasher::new();
            hasher.write(bytes);
            hasher.finish() as u32
        };
        Found { directory: number(&directory.to_ne_bytes()), name: number(name) }
    }
}

/// Names told in a directory.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// When they were last told, since they were last revoked.
    told_at: Option<Instant>,
    /// When another node last had to wait for them, and how long none are to be cached from then on.
    shared: Option<(Instant, Duration)>,
}

impl Names {
    /// A name is about to be told.
    pub(super) fn tell(&mut self) {
        self.told_at = Some(Instant::now());
    }

    /// When the last one was told that may not have run out yet.
    pub(super) fn told_at(&self) -> Option<Instant> {
        self.told_at.filter(|at| at.elapsed() < RUN_OUT)
    }

    /// A name comes from another directory, where it was told not later than this.
    pub(super) fn take_over(&mut self, told_at: Instant) {
        self.told_at = self.told_at.max(Some(told_at));
    }

    /// Whether they had to be waited for not long ago.
    pub(super) fn are_shared(&self) -> bool {
        self.shared.is_some_and(|(since, time)| since.elapsed() < time)
    }

    /// Another node is about to change the directory.
    pub(super) fn contend(&mut self) {
        if self.told_at().is_some() {
            let time = match self.shared {
                Some((since, time)) if since.elapsed() < time * 8 => (time * 2).min(SHARED_MAX),
                _ => SHARED * 2,
            };
            self.shared = Some((Instant::now(), time));
        }
    }

    /// None is to be believed any more. Returns after what time none is.
    pub(super) fn revoke(&mut self) -> Duration {
        self.told_at.take().map_or(Duration::ZERO, |at| RUN_OUT.saturating_sub(at.elapsed()))
    }
}
