//! The only readers of the machine's clocks.

use crate::sim::SimClock;
use crate::time::Instant;

/// A clock that never goes back and runs on while the machine is suspended.
pub trait Clock: Send + Sync + 'static {
    /// What it shows.
    fn now(&self) -> Instant;
}

/// CLOCK_BOOTTIME: unlike CLOCK_MONOTONIC it counts the time in which the machine was suspended, in which the others
/// went on without this node.
#[derive(Clone, Copy, Debug, Default)]
pub struct BootClock;

impl Clock for BootClock {
    fn now(&self) -> Instant {
        // It exists on every Linux that this runs on; a clock that stands still would keep a lease for ever.
        let Ok(time) = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME) else {
            panic!("this system has no CLOCK_BOOTTIME");
        };
        let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
        Instant(seconds * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0))
    }
}

impl Clock for SimClock {
    fn now(&self) -> Instant {
        SimClock::now(self)
    }
}

/// Seconds since 1970, for expiry of join tokens and certificates. It may jump.
#[must_use]
#[allow(clippy::disallowed_methods)]
pub fn unix_seconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
