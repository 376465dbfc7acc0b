//! Drivers run operations on something that should behave like a POSIX file system, and compare it with the oracle.

use crate::generate::{Generator, Profile, listing, shrink};
use crate::op::errno::ENOTEMPTY;
use crate::op::{Op, Outcome, RenameFlag, Reply, Step};
use crate::reference::{Comparer, Oracle, Traits};
use std::future::Future;

pub mod mount;
pub mod node;

/// Runs what a driver does to its end, on this thread.
///
/// # Panics
/// If there can be no runtime.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

/// Something that operations can be run on.
pub trait Driver {
    /// Runs an operation on a node.
    fn run(&mut self, node: usize, op: &Op) -> impl Future<Output = Outcome>;

    /// What is special about the file system or its machine.
    fn traits(&self) -> Traits {
        Traits::default()
    }
}

/// A driver that lies now and then: proves that the comparison finds it. Every `period`th read returns the bytes of the
/// read before it.
pub struct Stale<D> {
    inner: D,
    period: u32,
    reads: u32,
    last: Vec<u8>,
}

impl<D> Stale<D> {
    /// Over a driver.
    pub fn new(inner: D, period: u32) -> Self {
        Stale { inner, period, reads: 0, last: Vec::new() }
    }
}

impl<D: Driver> Driver for Stale<D> {
    fn traits(&self) -> Traits {
        self.inner.traits()
    }

    async fn run(&mut self, node: usize, op: &Op) -> Outcome {
        let outcome = self.inner.run(node, op).await;
        let Ok(Reply::Bytes(bytes)) = &outcome else { return outcome };
        if bytes.is_empty() || !matches!(op, Op::Read { .. }) {
            return outcome;
        }
        self.reads += 1;
        let old = std::mem::replace(&mut self.last, bytes.clone());
        if self.reads.is_multiple_of(self.period) { Ok(Reply::Bytes(old)) } else { outcome }
    }
}

impl Driver for Oracle {
    async fn run(&mut self, node: usize, op: &Op) -> Outcome {
        Oracle::run(self, node, op)
    }
}

/// Runs steps on a driver and on the oracle; an error tells the first difference. At the end the whole trees are compared,
/// as every node sees them.
pub async fn compare(driver: &mut impl Driver, nodes: usize, steps: &[Step]) -> Result<(), String> {
    let traits = driver.traits();
    let mut oracle = Oracle::with(traits);
    let mut comparer = Comparer::with(traits);
    for (at, Step { node, op }) in steps.iter().enumerate() {
        // What a generator leaves out can come about when a sequence is made shorter.
        if oracle.opens_unsuited(op) {
            continue;
        }
        let right = oracle.run(*node, op);
        let got = driver.run(*node, op).await;
        comparer.compare(op, &right, &got).map_err(|what| format!("step {at} on n{}: {what}", node + 1))?;
        if traits.shows_failed_whiteouts
            && right == Err(ENOTEMPTY)
            && let Op::Rename { from, flag: RenameFlag::Whiteout | RenameFlag::WhiteoutNoReplace, .. } = op.inner()
        {
            oracle.touch_parent(from);
        }
    }
    for node in 0..nodes {
        compare_trees(driver, node, &mut oracle, &mut comparer)
            .await
            .map_err(|what| format!("at the end, on n{}: {what}", node + 1))?;
    }
    comparer.check_identities(|ino| oracle.is_live(ino))
}

/// Compares the whole tree, contents included, as one node sees it.
pub async fn compare_trees(
    driver: &mut impl Driver,
    node: usize,
    oracle: &mut Oracle,
    comparer: &mut Comparer,
) -> Result<(), String> {
    use crate::op::{FileKind, OpenHow};
    const SLOT: u8 = 250;
    let mut ops = vec![Op::Readdir { path: String::new() }];
    for (path, kind) in oracle.tree() {
        ops.push(Op::Stat { path: path.clone() });
        match kind {
            FileKind::Dir => ops.push(Op::Readdir { path }),
            FileKind::Symlink => ops.push(Op::Readlink { path }),
            FileKind::File => {
                ops.push(Op::ListXattr { path: path.clone() });
                ops.push(Op::Open { slot: SLOT, path, how: OpenHow { read: true, ..OpenHow::default() } });
                ops.push(Op::Read { slot: SLOT, offset: 0, len: 1 << 20 });
                ops.push(Op::Close { slot: SLOT });
            }
            FileKind::Fifo | FileKind::Other => {}
        }
    }
    for op in ops {
        let right = oracle.run(node, &op);
        let got = driver.run(node, &op).await;
        comparer.compare(&op, &right, &got)?;
    }
    Ok(())
}

/// Compares a random sequence; a failing one is made short, and is in the error as a listing. `run` makes a fresh driver
/// and calls [`compare`] for the steps it is given.
pub fn check_seed(seed: u64, profile: Profile, len: usize, run: impl FnMut(&[Step]) -> Result<(), String>) -> Result<(), String> {
    check_seed_with(seed, profile, len, 400, run)
}

/// The same; `tries` runs are made at most to find a short sequence.
pub fn check_seed_with(
    seed: u64,
    profile: Profile,
    len: usize,
    tries: usize,
    mut run: impl FnMut(&[Step]) -> Result<(), String>,
) -> Result<(), String> {
    let steps = Generator::sequence(seed, profile, len);
    let Err(first) = run(&steps) else { return Ok(()) };
    let short = shrink(steps, tries, |steps| run(steps).is_err());
    let why = run(&short).err().unwrap_or(first);
    Err(format!("seed {seed}: {why}\nshortest failing sequence found:\n{}", listing(&short)))
}

#[cfg(test)]
mod tests {
    use super::mount::MountDriver;
    use super::*;
    use crate::op::Acl;

    #[test]
    fn the_comparison_finds_a_driver_that_returns_stale_bytes() {
        let profile = Profile { data_percent: 80, ..Profile::default() };
        let found = (0..20).filter(|seed| {
            let run = |steps: &[Step]| block_on(compare(&mut Stale::new(Oracle::new(), 3), 1, steps));
            check_seed(*seed, profile, 200, run).is_err()
        });
        assert!(found.count() > 10);
    }

    /// The oracle itself is checked against the file system that the machine's temporary directory is on.
    #[test]
    fn the_oracle_agrees_with_the_local_file_system() {
        // Some local file systems lack attributes or exchange; the rest is the same everywhere.
        let root = tempfile::tempdir().unwrap();
        let exotic = block_on(async {
            let mut driver = MountDriver::new(vec![root.path().to_owned()]);
            let probe =
                Op::SetXattr { path: String::new(), name: "user.a".into(), fill: 1, len: 3, how: crate::op::XattrHow::Any };
            driver.run(0, &probe).await.is_ok()
        });
        let root_user = nix::unistd::Uid::effective().is_root();
        if !root_user {
            return;
        }
        // Of others than root only where the oracle knows what the machine forbids.
        let protected = !crate::sys::protections().is_empty();
        for seed in 0..40 {
            let profile = Profile { exotic, users: exotic && !protected && seed % 2 == 1, ..Profile::default() };
            let run = |steps: &[Step]| {
                let dir = tempfile::tempdir().unwrap();
                std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
                block_on(compare(&mut MountDriver::new(vec![dir.path().to_owned()]), 1, steps))
            };
            if let Err(why) = check_seed(seed, profile, 300, run) {
                panic!("{why}");
            }
        }
    }

    /// On ext4 what a whiteout is given, and what is left of one that could not be left, was once not as the oracle said.
    #[test]
    fn whiteouts_are_as_on_ext4() {
        let root = tempfile::tempdir().unwrap();
        let mut driver = MountDriver::new(vec![root.path().to_owned()]);
        if !driver.traits().shows_failed_whiteouts || !nix::unistd::Uid::effective().is_root() {
            return;
        }
        let path = |path: &str| path.to_owned();
        let mkdir = |name: &str| Op::Mkdir { path: path(name), mode: 0o755 };
        let whiteout = |from: &str, to: &str| Op::Rename { from: path(from), to: path(to), flag: RenameFlag::Whiteout };
        let acl = Acl { owner: 7, named: Some((2, 3)), group: 4, other: 1 };
        let ops = [
            mkdir("a"),
            Op::SetAcl { path: path("a"), acl, default: true },
            mkdir("a/b"),
            mkdir("c"),
            mkdir("c/full"),
            Op::Utimes { path: path("a"), mtime: 7 },
            Op::Stat { path: path("a") },
            whiteout("a/b", "c"),
            Op::Stat { path: path("a") },
            whiteout("a/b", "d"),
            Op::Stat { path: path("a/b") },
            Op::GetAcl { path: path("a/b"), default: false },
        ];
        let steps: Vec<Step> = ops.into_iter().map(|op| Step { node: 0, op }).collect();
        block_on(compare(&mut driver, 1, &steps)).unwrap();
        // The oracle itself: a rename that fails changes nothing, which is why ext4 is excused by name.
        let mut oracle = Oracle::new();
        let outcomes: Vec<Outcome> = steps.iter().map(|step| oracle.run(0, &step.op)).collect();
        assert_eq!(outcomes[7], Err(ENOTEMPTY));
        assert_eq!(outcomes[6], outcomes[8]);
        let Ok(Reply::Bytes(list)) = &outcomes[11] else { panic!("no list: {:?}", outcomes[11]) };
        assert_eq!(*list, Acl { owner: 0, named: Some((2, 0)), group: 4, other: 0 }.encode());
    }
}
