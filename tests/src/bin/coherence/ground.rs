//! Directories in which changes are made and looked at, each by one thread at a time.
//!
//! A node's kernel believes names in a directory, unless another node had to wait for that a short time ago: then none are cached
//! there for a while, which doubles if that was too short (`fs::shell`). So a directory that is changed rests until its names are
//! cached again, or nothing in it could be stale; there are as many as it takes.

use crate::changes;
use crate::looks::View;
use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tests::cluster::clock;

/// After this time a directory is as one that was never shared (eight times the shortest time without names in it).
const REST: Duration = Duration::from_secs(17);

/// One directory, as each node sees it.
pub(crate) struct Ground {
    pub(crate) views: Vec<View>,
    /// Counts changes: no two have the same contents.
    pub(crate) turn: u32,
}

/// All of them.
pub(crate) struct Grounds {
    /// Where they are, through each node's mount.
    roots: Vec<PathBuf>,
    resting: Mutex<VecDeque<(Duration, Ground)>>,
    made: AtomicU32,
}

impl Grounds {
    /// In a new directory in one that is seen through all these.
    pub(crate) fn new(dirs: &[PathBuf]) -> io::Result<Grounds> {
        let name = format!("coherence-{}", std::process::id());
        let roots: Vec<PathBuf> = dirs.iter().map(|dir| dir.join(&name)).collect();
        fs::create_dir(&roots[0])?;
        Ok(Grounds { roots, resting: Mutex::default(), made: AtomicU32::new(0) })
    }

    pub(crate) fn made(&self) -> u32 {
        self.made.load(Ordering::SeqCst)
    }

    /// One that has rested, or a new one.
    pub(crate) fn take(&self) -> io::Result<Ground> {
        let mut resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        if resting.front().is_some_and(|(since, _)| clock() >= *since + REST)
            && let Some((_, ground)) = resting.pop_front()
        {
            return Ok(ground);
        }
        drop(resting);
        let number = self.made.fetch_add(1, Ordering::SeqCst);
        let name = number.to_string();
        changes::set_up(&self.roots[number as usize % self.roots.len()].join(&name))?;
        let views = self.roots.iter().map(|root| View::new(root.join(&name))).collect();
        Ok(Ground { views, turn: 0 })
    }

    pub(crate) fn put(&self, mut ground: Ground) {
        ground.views.iter_mut().for_each(View::close);
        self.resting.lock().unwrap_or_else(PoisonError::into_inner).push_back((clock(), ground));
    }

    pub(crate) fn remove(&self) -> io::Result<()> {
        fs::remove_dir_all(&self.roots[0])
    }
}
