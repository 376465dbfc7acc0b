//! Random sequences of operations from a seed, and their reduction to short ones that still fail.

use crate::op::{Acl, Fallocate, FileKind, Op, OpenHow, RenameFlag, Special, Step, User, XattrHow};
use crate::reference::{FILE_SIZE_MAX, Oracle};
use cluster::sim::Rng;

/// What to generate.
#[derive(Clone, Copy, Debug)]
pub struct Profile {
    /// Nodes that operations are spread over.
    pub nodes: usize,
    /// Largest write in bytes.
    pub write_max: u32,
    /// Largest offset of ordinary writes.
    pub offset_max: u64,
    /// Percent of operations on data (against those on names).
    pub data_percent: u64,
    /// Whether sparse files of terabytes occur.
    pub huge: bool,
    /// Whether some of those are as large as a file may be. (Local file systems hold less.)
    pub limit: bool,
    /// Whether `fallocate`, FIFOs, extended attributes, names that change places and whiteouts occur.
    pub exotic: bool,
    /// Whether `O_DIRECT` occurs, with any offset and length.
    pub direct: bool,
    /// Whether others than root act, too (on mounts only).
    pub users: bool,
}

impl Default for Profile {
    fn default() -> Self {
        let (data_percent, huge, exotic) = (50, true, true);
        let (limit, direct, users) = (false, false, false);
        Profile { nodes: 1, write_max: 20_000, offset_max: 200_000, data_percent, huge, limit, exotic, direct, users }
    }
}

/// Slots for open files on each node.
pub const SLOTS: u8 = 4;

/// A source of sensible operations: it runs an oracle along, so that most operations hit something.
pub struct Generator {
    rng: Rng,
    profile: Profile,
    oracle: Oracle,
}

impl Generator {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64, profile: Profile) -> Self {
        Generator { rng: Rng::new(seed), profile, oracle: Oracle::new() }
    }

    /// A whole sequence.
    #[must_use]
    pub fn sequence(seed: u64, profile: Profile, len: usize) -> Vec<Step> {
        let mut generator = Self::new(seed, profile);
        let mut steps = Vec::with_capacity(len);
        if profile.users {
            // The first directory is everybody's, or others than root could do nothing.
            let op = Op::Chmod { path: String::new(), mode: 0o1777 - 0o1000 * (seed % 2) as u32 };
            let _ = generator.oracle.run(0, &op);
            steps.push(Step { node: 0, op });
        }
        steps.extend((0..len).map(|_| generator.next_step()));
        steps
    }

    /// The next step, which is taken to happen.
    pub fn next_step(&mut self) -> Step {
        let all: Vec<usize> = (0..self.profile.nodes).collect();
        self.next_step_on(&all)
    }

    /// The next step, on one of the given nodes.
    pub fn next_step_on(&mut self, nodes: &[usize]) -> Step {
        loop {
            let node = self.rng.pick(nodes).copied().unwrap_or(0);
            let op = if self.profile.users { self.op_of_somebody() } else { self.op() };
            if self.oracle.opens_unsuited(&op) {
                continue;
            }
            let _ = self.oracle.run(node, &op);
            return Step { node, op };
        }
    }

    /// A node's process died.
    pub fn node_died(&mut self, node: usize) {
        self.oracle.close_all(node);
    }

    fn name(&mut self) -> String {
        match self.rng.below(60) {
            0 => "x".repeat(255),
            1 => "y".repeat(256),
            2 => "häßlich".into(),
            n => ["a", "b", "c", "d", "e", "f"][(n % 6) as usize].into(),
        }
    }

    fn existing(&mut self, wanted: impl Fn(FileKind) -> bool) -> Option<String> {
        let tree: Vec<_> = self.oracle.tree().into_iter().filter(|(_, kind)| wanted(*kind)).collect();
        self.rng.pick(&tree).map(|(path, _)| path.clone())
    }

    fn dir(&mut self) -> String {
        let dir = if self.rng.percent(40) { None } else { self.existing(|k| k == FileKind::Dir) };
        // Deep trees make long paths and little else.
        dir.filter(|d| d.split('/').count() < 4).unwrap_or_default()
    }

    /// A path, mostly of something that exists if `old`.
    fn path(&mut self, old: bool) -> String {
        if old
            && self.rng.percent(85)
            && let Some(path) = self.existing(|_| true)
        {
            return path;
        }
        let dir = if self.rng.percent(4) { self.existing(|_| true).unwrap_or_default() } else { self.dir() };
        let name = self.name();
        if dir.is_empty() { name } else { format!("{dir}/{name}") }
    }

    fn file(&mut self) -> String {
        if self.rng.percent(80)
            && let Some(path) = self.existing(|k| k == FileKind::File)
        {
            return path;
        }
        self.path(true)
    }

    fn slot(&mut self) -> u8 {
        self.rng.below(u64::from(SLOTS)) as u8
    }

    fn offset(&mut self) -> u64 {
        if self.profile.huge && self.rng.percent(2) {
            return (self.rng.below(15) << 40) + self.rng.below(10_000);
        }
        let offset = self.rng.below(self.profile.offset_max);
        match self.rng.below(4) {
            0 => 0,
            1 => offset / 4096 * 4096,
            _ => offset,
        }
    }

    /// What a file is made as long as.
    fn size(&mut self) -> u64 {
        let size = self.offset();
        if self.profile.limit && size >= 4 << 40 { FILE_SIZE_MAX } else { size }
    }

    fn len(&mut self) -> u32 {
        let max = u64::from(self.profile.write_max);
        match self.rng.below(8) {
            0 => self.rng.below(20) as u32,
            1 => 4096,
            2 => self.rng.below(max) as u32 / 4096 * 4096,
            3 | 4 => self.rng.below(200) as u32,
            _ => self.rng.below(max) as u32,
        }
    }

    /// Mostly not root's; and more of what rights depend on than by itself.
    fn op_of_somebody(&mut self) -> Op {
        let op = if self.rng.percent(12) { self.rights_op() } else { self.op() };
        match self.rng.below(10) {
            0..2 => op,
            2..7 => Op::As { user: User { uid: 1000, gid: 1000 }, op: Box::new(op) },
            _ => Op::As { user: User { uid: 2000, gid: 1000 }, op: Box::new(op) },
        }
    }

    fn rights_op(&mut self) -> Op {
        const DIRS: [u32; 8] = [0o777, 0o1777, 0o2777, 0o3775, 0o2770, 0o755, 0o711, 0o1770];
        const FILES: [u32; 8] = [0o4755, 0o2755, 0o6777, 0o2745, 0o4644, 0o666, 0o640, 0o6711];
        let is_dir = self.rng.percent(50);
        let wanted = if is_dir { FileKind::Dir } else { FileKind::File };
        let path = self.existing(|kind| kind == wanted).unwrap_or_else(|| "a".into());
        let number = self.rng.below(8) as usize;
        match self.rng.below(10) {
            0..6 => Op::Chmod { path, mode: if is_dir { DIRS[number] } else { FILES[number] } },
            6..9 => Op::Chown { path, uid: self.rng.below(3) as u32 * 1000, gid: self.rng.below(3) as u32 * 1000 },
            _ => Op::Utimes { path, mtime: self.rng.next_u64() as u32 >> 1 },
        }
    }

    fn op(&mut self) -> Op {
        if self.rng.percent(self.profile.data_percent) { self.data_op() } else { self.name_op() }
    }

    fn data_op(&mut self) -> Op {
        let slot = self.slot();
        match self.rng.below(100) {
            0..20 => {
                let how = OpenHow {
                    read: self.rng.percent(80),
                    write: self.rng.percent(80),
                    append: self.rng.percent(15),
                    create: self.rng.percent(60),
                    exclusive: self.rng.percent(10),
                    truncate: self.rng.percent(10),
                    direct: self.profile.direct && self.rng.percent(25),
                };
                // Neither reading nor writing is O_RDONLY; truncating needs the right to write.
                let read = how.read || !how.write;
                let how = OpenHow { read, truncate: how.truncate && how.write, append: how.append && how.write, ..how };
                let how = OpenHow { exclusive: how.exclusive && how.create, ..how };
                Op::Open { slot, path: self.file(), how }
            }
            20..27 => Op::Close { slot },
            27..52 => Op::Write { slot, offset: self.offset(), len: self.len(), fill: self.rng.next_u64() as u32 },
            52..76 => Op::Read { slot, offset: self.offset(), len: self.len() * 2 },
            76..82 => Op::Truncate { slot, size: self.size() },
            82 => Op::Seek { slot, offset: self.offset(), data: self.rng.percent(50) },
            83 => {
                let (to, from_offset, to_offset) = (self.slot(), self.offset(), self.offset());
                Op::Copy { from: slot, from_offset, to, to_offset, len: self.len() }
            }
            84..88 if self.profile.exotic => {
                let what = [Fallocate::Allocate, Fallocate::KeepSize, Fallocate::PunchHole, Fallocate::ZeroRange];
                let what = what[self.rng.below(4) as usize];
                Op::Fallocate { slot, what, offset: self.rng.below(self.profile.offset_max), len: u64::from(self.len()) + 1 }
            }
            84..93 => Op::Fsync { slot },
            _ => Op::Fstat { slot },
        }
    }

    fn name_op(&mut self) -> Op {
        let exotic = self.profile.exotic;
        match self.rng.below(100) {
            0..12 => Op::Mkdir { path: self.path(false), mode: 0o700 + self.rng.below(0o100) as u32 },
            12 if exotic && self.rng.percent(50) => {
                let what = [Special::CharDevice, Special::BlockDevice, Special::Socket][self.rng.below(3) as usize];
                Op::MknodSpecial { path: self.path(false), what, mode: 0o600 + self.rng.below(0o100) as u32 }
            }
            12..17 => Op::Mknod {
                path: self.path(false),
                fifo: exotic && self.rng.percent(30),
                mode: 0o600 + self.rng.below(0o100) as u32,
            },
            17..21 => {
                let target = self.path(true);
                Op::Symlink { target, path: self.path(false) }
            }
            21..28 => Op::Link { from: self.file(), to: self.path(false) },
            28..37 => Op::Unlink { path: self.file() },
            37..42 => {
                let path = self.existing(|k| k == FileKind::Dir).unwrap_or_else(|| "a".into());
                Op::Rmdir { path: if self.rng.percent(10) { self.path(true) } else { path } }
            }
            42..57 => {
                let flag = match self.rng.below(10) {
                    0 => RenameFlag::NoReplace,
                    1 | 2 if exotic => RenameFlag::Exchange,
                    3 if exotic && self.rng.percent(20) => RenameFlag::WhiteoutNoReplace,
                    3 if exotic => RenameFlag::Whiteout,
                    _ => RenameFlag::Replace,
                };
                let old = self.rng.percent(40);
                Op::Rename { from: self.path(true), to: self.path(old), flag }
            }
            57..70 => Op::Stat { path: self.path(true) },
            70..78 => {
                let dir = self.dir();
                Op::Readdir { path: if self.rng.percent(5) { self.path(true) } else { dir } }
            }
            78..81 => Op::Readlink { path: self.existing(|k| k == FileKind::Symlink).unwrap_or_else(|| "a".into()) },
            81..84 => Op::FsyncDir { path: self.dir() },
            84 => {
                let size = self.size();
                Op::TruncatePath { path: self.path(true), size }
            }
            85 | 86 => {
                let bits = if self.rng.percent(30) { 0o10000 } else { 0o1000 };
                Op::Chmod { path: self.path(true), mode: self.rng.below(bits) as u32 }
            }
            87..89 => {
                Op::Chown { path: self.path(true), uid: self.rng.below(4) as u32 * 1000, gid: self.rng.below(4) as u32 * 1000 }
            }
            89..91 => Op::Utimes { path: self.path(true), mtime: self.rng.next_u64() as u32 >> 1 },
            _ if !exotic => Op::Stat { path: self.path(true) },
            91..95 => {
                let how = [XattrHow::Any, XattrHow::Any, XattrHow::Create, XattrHow::Replace][self.rng.below(4) as usize];
                let len = if self.rng.percent(20) { self.rng.below(900) } else { self.rng.below(60) } as u32;
                Op::SetXattr { path: self.path(true), name: self.attribute(), fill: self.rng.next_u64() as u32, len, how }
            }
            95 => Op::GetXattr { path: self.path(true), name: self.attribute() },
            96 => Op::ListXattr { path: self.path(true) },
            97..99 => {
                let path = self.existing(|k| matches!(k, FileKind::File | FileKind::Dir)).unwrap_or_else(|| "a".into());
                let default = self.rng.percent(40);
                if self.rng.percent(50) {
                    return Op::GetAcl { path, default };
                }
                let mut perm = || self.rng.below(8) as u16;
                let (owner, group, other, named) = (perm(), perm(), perm(), (perm(), perm()));
                let named = self.rng.percent(70).then_some(named);
                Op::SetAcl { path, acl: Acl { owner, named, group, other }, default }
            }
            _ => Op::RemoveXattr { path: self.path(true), name: self.attribute() },
        }
    }

    fn attribute(&mut self) -> String {
        ["user.a", "user.b", "user.long-name-of-an-attribute", "trusted.t"][self.rng.below(4) as usize].into()
    }
}

/// Makes a failing sequence shorter: drops ever smaller runs of items while it still fails, at most `tries` times.
pub fn shrink<T: Clone>(items: Vec<T>, tries: usize, mut fails: impl FnMut(&[T]) -> bool) -> Vec<T> {
    let mut best = items;
    let mut left = tries;
    let mut run = (best.len() / 2).max(1);
    loop {
        let mut at = 0;
        let mut shrunk = false;
        while at < best.len() && left > 0 {
            let end = (at + run).min(best.len());
            let candidate: Vec<T> = best[..at].iter().chain(&best[end..]).cloned().collect();
            left -= 1;
            if fails(&candidate) {
                best = candidate;
                shrunk = true;
            } else {
                at = end;
            }
        }
        if left == 0 || (run == 1 && !shrunk) {
            return best;
        }
        if !shrunk || run > best.len() {
            run = (run / 2).max(1);
        }
    }
}

/// A sequence as lines, to be put into a test.
#[must_use]
pub fn listing(steps: &[Step]) -> String {
    steps.iter().map(|s| format!("  n{}: {:?}\n", s.node + 1, s.op)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_depend_on_the_seed_alone_and_mostly_succeed() {
        let steps = Generator::sequence(1, Profile { nodes: 3, ..Profile::default() }, 2000);
        assert_eq!(steps, Generator::sequence(1, Profile { nodes: 3, ..Profile::default() }, 2000));
        let mut oracle = Oracle::new();
        let good = steps.iter().filter(|s| oracle.run(s.node, &s.op).is_ok()).count();
        assert!(good > 800, "only {good} of 2000 operations succeed");
    }

    #[test]
    fn shrinking_finds_the_two_items_that_matter() {
        let items: Vec<u32> = (0..100).collect();
        let short = shrink(items, 1000, |c| c.contains(&13) && c.contains(&77));
        assert_eq!(short, [13, 77]);
    }
}
