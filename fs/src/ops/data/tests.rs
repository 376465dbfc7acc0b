//! File data against a plain vector, and after crashes.

use super::*;
use crate::crash::Graph;
use crate::ops::testing::{Fixture, Random, fixture};
use sld::ObjectId;
use sld::memory::Image;
use std::collections::BTreeMap;

/// A file and what should be in it.
struct Model {
    ino: Ino,
    bytes: Vec<u8>,
}

const LIMIT: u64 = 3_000_000;

impl Model {
    async fn check(&self, f: &Fixture) {
        let attributes = f.fs.attributes(self.ino).await.unwrap();
        assert_eq!(attributes.size, self.bytes.len() as u64);
        let mut at = 0;
        while at < self.bytes.len() {
            let data = f.fs.read(self.ino, at as u64, 700_000).await.unwrap().contiguous();
            let end = (at + 700_000).min(self.bytes.len());
            assert_eq!(data.len(), end - at);
            if data != self.bytes[at..end] {
                let bad = (0..data.len()).find(|i| data[*i] != self.bytes[at + i]).unwrap();
                panic!("byte {} is {} and not {}", at + bad, data[bad], self.bytes[at + bad]);
            }
            at = end;
        }
        assert!(f.fs.read(self.ino, at as u64, 10).await.unwrap().is_empty());
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if self.bytes.len() < at + bytes.len() {
            self.bytes.resize(at + bytes.len(), 0);
        }
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    async fn step(&mut self, f: &Fixture, random: &mut Random, span: u64) {
        let fs = &f.fs;
        let at = random.below(span);
        let len = match random.below(8) {
            0 => random.below(200_000),
            1..4 => random.below(9000),
            4..6 => 4096,
            _ => random.below(300),
        } + 1;
        let at = if random.below(3) == 0 { at / BS * BS } else { at };
        let size = self.bytes.len() as u64;
        match random.below(12) {
            0..5 => {
                let bytes = random.bytes(len);
                fs.write(self.ino, At::Offset(at), Payload::new(at, &bytes), false).await.unwrap();
                self.put(at as usize, &bytes);
            }
            5 => {
                let bytes = random.bytes(len);
                // Split for another place than it goes to, as the kernel's stale offset would have it.
                let place = fs.write(self.ino, At::End, Payload::new(at, &bytes), false).await.unwrap();
                assert_eq!(place, size);
                self.put(size as usize, &bytes);
            }
            6 => {
                let bytes = random.bytes(len);
                fs.write(self.ino, At::Within(at), Payload::new(at, &bytes), false).await.unwrap();
                let end = size.min(at + len);
                if at < end {
                    self.put(at as usize, &bytes[..(end - at) as usize]);
                }
            }
            7 => {
                let to = if random.below(2) == 0 { at } else { size.saturating_sub(random.below(5000)) };
                fs.truncate(self.ino, to).await.unwrap();
                self.bytes.resize(to as usize, 0);
            }
            8 => {
                fs.allocate(self.ino, Allocate::Punch, at, len, true).await.unwrap();
                let end = (at + len).min(size).max(at) as usize;
                let at = (at as usize).min(end);
                if at < self.bytes.len() {
                    self.bytes[at..end].fill(0);
                }
            }
            9 => {
                let keep = random.below(2) == 0;
                fs.allocate(self.ino, Allocate::Zero, at, len, keep).await.unwrap();
                let end = if keep { (at + len).min(size) } else { at + len };
                if at < end {
                    self.put(at as usize, &vec![0; (end - at) as usize]);
                }
            }
            10 => {
                let keep = random.below(2) == 0;
                fs.allocate(self.ino, Allocate::Reserve, at, len, keep).await.unwrap();
                if !keep {
                    self.bytes.resize(size.max(at + len) as usize, 0);
                }
            }
            _ => {
                let to = random.below(span);
                let result = fs.copy_range(self.ino, at, self.ino, to, len).await;
                if at + len <= to || to + len <= at {
                    let end = (at + len).min(size);
                    assert_eq!(result.unwrap(), end.saturating_sub(at));
                    if at < end {
                        let bytes = self.bytes[at as usize..end as usize].to_vec();
                        self.put(to as usize, &bytes);
                    }
                } else {
                    assert!(result.is_err());
                }
            }
        }
        let at = random.below(span);
        let size = self.bytes.len() as u64;
        let data = fs.read(self.ino, at, 5000).await.unwrap().contiguous();
        assert!(data == self.bytes[at.min(size) as usize..(at + 5000).min(size) as usize], "bytes at {at} of {size}");
    }
}

/// Every block that a file's tree leads to is a data block of this file at this place, no two are the same, and the count in
/// the inode is right if `exact`.
async fn check_blocks(f: &Fixture, ino: Ino, exact: bool) {
    let image = f.disk.image();
    let source = Source::disk(&f.disk);
    let inode = f.fs.inode(ino).await.unwrap();
    let mut seen = BTreeMap::new();
    if let Body::Tree(_) = &inode.body {
        for run in extent::map(source, &inode, 0, u64::MAX).await.unwrap() {
            for at in run.at..run.end() {
                let block = run.block(at);
                assert!(seen.insert(block, at).is_none(), "{block} is used twice");
                let (tag, _) = image.get(&block).unwrap_or_else(|| panic!("{block} at {at} of {ino} is free"));
                assert_eq!((tag.kind, tag.owner, tag.offset), (Kind::Data, ino.0, at), "{block}");
            }
        }
    }
    let owned = image.iter().filter(|(block, (tag, _))| tag.owner == ino.0 && **block != ino.block()).count() as u64;
    if exact {
        assert_eq!(inode.blocks, owned, "blocks of {ino}");
        let data = image.values().filter(|(tag, _)| tag.owner == ino.0 && tag.kind == Kind::Data).count();
        assert_eq!(data, seen.len(), "data blocks that nothing leads to");
    }
}

fn run<F: Future<Output = ()>>(future: F) {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap().block_on(future);
}

#[test]
fn random_operations_do_what_a_vector_does() {
    run(async {
        for seed in 0..8 {
            let mut random = Random::new(seed);
            let f = fixture(&[20_000, 20_000]).await;
            let free = f.disk_free().await;
            let mut files = Vec::new();
            for name in [b"a", b"b"] {
                files.push(Model { ino: f.file(name).await, bytes: Vec::new() });
            }
            // Small files that stay in their inode, and fragmented ones with a tree of several levels.
            let span = [2500, 9000, 200_000, LIMIT][seed as usize % 4];
            for step in 0..if span == LIMIT { 400 } else { 250 } {
                let file = &mut files[random.below(2) as usize];
                file.step(&f, &mut random, span).await;
                if step % 50 == 49 {
                    file.check(&f).await;
                    check_blocks(&f, file.ino, true).await;
                }
            }
            for (file, name) in files.iter().zip([b"a", b"b"]) {
                file.check(&f).await;
                check_blocks(&f, file.ino, true).await;
                f.unlink(name).await;
            }
            assert_eq!(f.disk_free().await, free, "seed {seed} leaks");
        }
    });
}

#[test]
fn fragments_make_a_deep_tree_and_go_away() {
    run(async {
        let f = fixture(&[20_000]).await;
        let free = f.disk_free().await;
        let (a, b) = (f.file(b"a").await, f.file(b"b").await);
        for i in 0..3000u64 {
            // Every other block, and two files in turn: nothing can be merged.
            for ino in [a, b] {
                let bytes = [(i as u8).wrapping_add(1); 4096];
                f.fs.write(ino, At::Offset(i * 2 * BS), Payload::new(0, &bytes), false).await.unwrap();
            }
        }
        let inode = f.fs.inode(a).await.unwrap();
        assert!(inode.root().unwrap().level() >= 1);
        check_blocks(&f, a, true).await;
        assert_eq!(f.fs.seek(a, 0, Seek::Hole).await, Ok(BS));
        assert_eq!(f.fs.seek(a, BS, Seek::Data).await, Ok(2 * BS));
        assert_eq!(f.fs.seek(a, 5999 * BS, Seek::Data).await, Err(FsError::NoAddress));
        // The other halves: now all is one piece, at least in the file.
        for i in 0..3000u64 {
            f.fs.write(a, At::Offset((i * 2 + 1) * BS), Payload::new(0, &[7; 4096]), false).await.unwrap();
        }
        check_blocks(&f, a, true).await;
        for i in (0..3000u64).step_by(97) {
            let data = f.fs.read(a, i * 2 * BS, 8192).await.unwrap().contiguous();
            assert!(data[..4096].iter().all(|x| *x == (i as u8).wrapping_add(1)) && data[4096..].iter().all(|x| *x == 7));
        }
        f.fs.truncate(a, 10).await.unwrap();
        check_blocks(&f, a, true).await;
        assert!(f.fs.inode(a).await.unwrap().blocks <= 2, "a block of data, and perhaps a leaf");
        f.fs.truncate(b, 0).await.unwrap();
        assert_eq!(f.fs.inode(b).await.unwrap().blocks, 0);
        f.unlink(b"a").await;
        f.unlink(b"b").await;
        assert_eq!(f.disk_free().await, free);
    });
}

#[test]
fn sparse_files_are_as_large_as_they_say() {
    run(async {
        let f = fixture(&[5000]).await;
        let ino = f.file(b"a").await;
        let far = 16 * (1u64 << 40) - 4096;
        f.fs.write(ino, At::Offset(far), Payload::new(far, &[5; 4096]), false).await.unwrap();
        let attributes = f.fs.attributes(ino).await.unwrap();
        assert_eq!((attributes.size, attributes.blocks512), (far + 4096, 8));
        assert_eq!(f.fs.seek(ino, 0, Seek::Data).await, Ok(far));
        assert!(f.fs.read(ino, far - 4096, 4096).await.unwrap().contiguous().iter().all(|x| *x == 0));
        assert_eq!(f.fs.read(ino, far, 9000).await.unwrap().contiguous(), vec![5; 4096]);
        assert_eq!(
            f.fs.write(ino, At::Offset(FILE_SIZE_MAX), Payload::new(FILE_SIZE_MAX, &[1]), false).await,
            Err(FsError::TooLarge)
        );
        f.fs.truncate(ino, FILE_SIZE_MAX).await.unwrap();
        assert_eq!(f.fs.truncate(ino, FILE_SIZE_MAX + 1).await, Err(FsError::TooLarge));
    });
}

#[test]
fn a_full_disk_refuses_and_forgets_nothing() {
    run(async {
        let f = fixture(&[600]).await;
        let ino = f.file(b"a").await;
        let mut written = 0u64;
        let error = loop {
            match f.fs.write_if(ino, At::End, Payload::new(0, &[3; 65_536]), Terms::NONE).await {
                Ok((offset, count)) => {
                    assert_eq!(offset, written);
                    written += count;
                }
                Err(error) => break error,
            }
        };
        assert_eq!(error, FsError::NoSpace);
        assert!(written > 400 * BS);
        let attributes = f.fs.attributes(ino).await.unwrap();
        assert_eq!(attributes.size, written);
        check_blocks(&f, ino, true).await;
        let free = f.disk_free().await;
        assert_eq!(free, 0, "all that fits is written");
        assert!(f.fs.write(ino, At::End, Payload::new(0, &[3; 65_536]), false).await.is_err());
        assert_eq!(f.disk_free().await, free, "what was allocated in vain is given back");
        f.fs.truncate(ino, 0).await.unwrap();
        f.fs.write(ino, At::End, Payload::new(0, &[4; 65_536]), false).await.unwrap();
    });
}

#[test]
fn a_truncation_to_the_present_size_frees_what_is_reserved_beyond_it() {
    run(async {
        let f = fixture(&[6000]).await;
        let free = f.disk_free().await;
        let ino = f.file(b"a").await;
        for size in [0, 5000, 8192] {
            f.fs.truncate(ino, 0).await.unwrap();
            f.fs.write(ino, At::Offset(0), Payload::new(0, &vec![7; size as usize]), false).await.unwrap();
            // With gaps, so that the tree has nodes of its own in the end; and more than one operation frees.
            for (len, gaps) in [(40, 1), (1500, 1), (4, 300)] {
                for gap in 0..gaps {
                    let at = (10 + gap * 2 * len) * BS;
                    f.fs.allocate(ino, Allocate::Reserve, at, len * BS, true).await.unwrap();
                }
                let before = f.fs.attributes(ino).await.unwrap();
                assert!(f.fs.inode(ino).await.unwrap().blocks >= len * gaps + blocks_of(size));
                let after = f.fs.truncate(ino, size).await.unwrap();
                assert!(after.size == size && after.mtime > before.mtime && after.ctime > before.ctime);
                assert_eq!(f.fs.read(ino, 0, 9000).await.unwrap().contiguous(), vec![7; size as usize]);
                let blocks = f.fs.inode(ino).await.unwrap().blocks;
                // A leaf of the tree may stay.
                assert!(blocks - blocks_of(size) <= u64::from(gaps > 1), "{blocks} after {len} {gaps}");
                assert_eq!(f.disk_free().await, free - 1 - blocks);
                check_blocks(&f, ino, true).await;
            }
            f.disk.record();
            f.fs.truncate(ino, size).await.unwrap();
            assert_eq!(f.disk.recorded().iter().map(|operation| operation.writes.len()).sum::<usize>(), 1, "nothing to free");
        }
    });
}

#[test]
fn a_write_that_does_not_fit_writes_what_does_and_says_how_much() {
    run(async {
        const MIB: u64 = 1 << 20;
        let f = fixture(&[600]).await;
        let (ino, other) = (f.file(b"a").await, f.file(b"b").await);
        f.fs.allocate(other, Allocate::Reserve, 0, 100 * BS, false).await.unwrap();
        let write = |at, len: u64| f.fs.write_if(ino, at, Payload::new(0, &vec![9; len as usize]), Terms::NONE);
        // Two parts that end where a block does, of which the first fits.
        let end = f.disk_free().await * BS;
        assert!(end > MIB && end < 2 * MIB);
        assert_eq!(write(At::Offset(100), 2 * MIB).await, Ok((100, end - 100)));
        // Of a part that does not fit, nothing is left out that would, down to a block.
        for room in [1, 2, 3, 10, 100, 255] {
            let size = end - room * BS;
            for at in [At::Offset(size - 50), At::End] {
                f.fs.truncate(ino, size).await.unwrap();
                let mut begin = if at == At::End { size } else { size - 50 };
                if at == At::End {
                    // What is appended is in one piece: the rest is for the next write, wherever the end is then.
                    let first = 1 << room.ilog2();
                    assert_eq!(write(at, MIB).await, Ok((begin, first * BS)), "{room}");
                    begin += first * BS;
                    while let Ok((offset, count)) = write(at, MIB).await {
                        assert_eq!(offset, begin);
                        begin += count;
                    }
                    assert_eq!(begin, end);
                } else {
                    assert_eq!(write(at, MIB).await, Ok((begin, end - begin)), "{room} {at:?}");
                }
                assert_eq!(f.disk_free().await, 0);
            }
        }
        // What has its blocks can be overwritten; the rest of it has none.
        assert_eq!(write(At::Offset(end - BS - 7), 2 * BS).await, Ok((end - BS - 7, BS + 7)));
        assert_eq!(write(At::Offset(end), 2 * MIB).await, Err(FsError::NoSpace));
        assert_eq!(write(At::End, MIB).await, Err(FsError::NoSpace));
        let attributes = f.fs.attributes(ino).await.unwrap();
        assert_eq!(attributes.size, end);
        check_blocks(&f, ino, true).await;
        // A copy goes as far, too.
        f.fs.truncate(ino, end - 3 * BS).await.unwrap();
        assert_eq!(f.fs.copy_range(ino, 0, other, 100 * BS, 64 * BS).await, Ok(3 * BS));
        // Pages of a mapping are written once: what does not fit is an error.
        f.fs.truncate(ino, end + MIB).await.unwrap();
        f.fs.truncate(other, 100 * BS).await.unwrap();
        assert_eq!(write(At::Within(end - 3 * BS), 8 * BS).await, Err(FsError::NoSpace));
        // A file that gets too large gets as large as it may.
        f.fs.truncate(ino, 0).await.unwrap();
        let start = FILE_SIZE_MAX / BS * BS - MIB;
        assert_eq!(write(At::Offset(start), 2 * MIB).await, Ok((start, MIB)));
    });
}

#[test]
fn writing_takes_setuid_away_and_moves_the_times() {
    run(async {
        let f = fixture(&[600]).await;
        let ino = f.file(b"a").await;
        f.chmod(ino, 0o6775).await;
        let before = f.fs.attributes(ino).await.unwrap();
        f.fs.write(ino, At::End, Payload::new(0, b"x"), false).await.unwrap();
        let after = f.fs.attributes(ino).await.unwrap();
        assert_eq!(after.mode & 0o7777, 0o6775);
        assert!(after.mtime > before.mtime && after.ctime > before.ctime && after.data_version > before.data_version);
        f.fs.write(ino, At::End, Payload::new(0, b"x"), true).await.unwrap();
        let last = f.fs.attributes(ino).await.unwrap();
        assert_eq!(last.mode & 0o7777, 0o775);
        assert!(last.mtime > after.mtime);
    });
}

/// Whatever a crash leaves, each file leads only to blocks of its own that hold something that was written there.
#[test]
fn crashes_never_share_or_mix_up_blocks() {
    run(async {
        for seed in 0..6u64 {
            let mut random = Random::new(seed + 1000);
            let f = fixture(&[20_000]).await;
            let files = [f.file(b"a").await, f.file(b"b").await];
            // What was there before: enough fragments for a tree with leaves of its own.
            if seed % 2 == 1 {
                for i in 0..200u64 {
                    for ino in files {
                        f.fs.write(ino, At::Offset(i * 2 * BS), Payload::new(0, &stamp(ino, i * 2, 0)), false).await.unwrap();
                    }
                }
            }
            let base: Image = f.disk.image();
            f.disk.record();
            for round in 1..40u64 {
                let ino = files[random.below(2) as usize];
                let first = random.below(if seed % 2 == 1 { 400 } else { 40 });
                let count = 1 + random.below(if round % 5 == 0 { 60 } else { 4 });
                match random.below(6) {
                    0..3 => {
                        let bytes: Vec<u8> = (first..first + count).flat_map(|at| stamp(ino, at, round)).collect();
                        f.fs.write(ino, At::Offset(first * BS), Payload::new(0, &bytes), false).await.unwrap();
                    }
                    3 => f.fs.allocate(ino, Allocate::Punch, first * BS, count * BS, true).await.unwrap(),
                    4 => drop(f.fs.truncate(ino, first * BS).await.unwrap()),
                    _ => f.fs.allocate(ino, Allocate::Reserve, first * BS, count * BS, random.below(2) == 0).await.unwrap(),
                }
            }
            let graph = Graph::new(&f.disk.recorded());
            for case in 0..30 {
                let image = graph.image(&base, &graph.random_closed(seed * 10_000 + case));
                let after = f.reopen(&[20_000], image).await;
                for ino in files {
                    check_blocks(&after, ino, false).await;
                    let inode = after.fs.inode(ino).await.unwrap();
                    for at in 0..blocks_of(inode.size) {
                        let data = after.fs.read(ino, at * BS, 4096).await.unwrap().contiguous();
                        let is_zero = data.iter().all(|x| *x == 0);
                        assert!(is_zero || data[..16] == stamp(ino, at, 0)[..16], "seed {seed} case {case}: block {at} of {ino}");
                    }
                }
                // It can be worked with: everything goes, and nothing is freed twice.
                for ino in files {
                    after.fs.allocate(ino, Allocate::Punch, 37 * BS, 90 * BS, true).await.unwrap();
                    after.fs.write(ino, At::Offset(30 * BS), Payload::new(0, &stamp(ino, 30, 99)), false).await.unwrap();
                    check_blocks(&after, ino, false).await;
                    after.fs.truncate(ino, 5 * BS).await.unwrap();
                    after.fs.truncate(ino, 500 * BS).await.unwrap();
                    let beyond = after.fs.read(ino, 5 * BS, 495 * 4096).await.unwrap().contiguous();
                    assert!(beyond.iter().all(|x| *x == 0), "old data beyond the end came back");
                    check_blocks(&after, ino, false).await;
                }
                after.unlink(b"a").await;
                after.unlink(b"b").await;
            }
        }
    });
}

/// A block whose first 16 bytes say where it belongs.
fn stamp(ino: Ino, at: u64, round: u64) -> [u8; BLOCK_SIZE] {
    let mut block = [round as u8; BLOCK_SIZE];
    block[..8].copy_from_slice(&ino.0.to_le_bytes());
    block[8..16].copy_from_slice(&at.to_le_bytes());
    block
}

/// Nothing but a time that is too far ahead to be a clock's is taken back.
#[test]
fn a_change_is_later_than_the_one_before_whatever_the_clock_says() {
    use super::{CLOCK_SKEW_SECONDS, later};
    let at = |seconds, nanos| Time { seconds, nanos };
    assert_eq!(later(at(11, 0), at(10, 5)), at(11, 0));
    assert_eq!(later(at(10, 5), at(10, 5)), at(10, 6));
    assert_eq!(later(at(10, 0), at(10, 999_999_999)), at(11, 0));
    assert_eq!(later(at(10, 0), at(10 + CLOCK_SKEW_SECONDS, 5)), at(10 + CLOCK_SKEW_SECONDS, 6));
    assert_eq!(later(at(10, 0), at(11 + CLOCK_SKEW_SECONDS, 0)), at(10, 0));
}

#[test]
fn extended_attributes_are_kept_small_and_large() {
    use crate::ops::xattr::SetMode;
    run(async {
        let f = fixture(&[2000]).await;
        let free = f.disk_free().await;
        let ino = f.file(b"a").await;
        let fs = &f.fs;
        let mut model: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let mut random = Random::new(5);
        for _ in 0..400 {
            let name = format!("user.{}", random.below(12)).into_bytes();
            let len = [0, 3, 40, 200, 5000, 65_536][random.below(6) as usize];
            let value = random.bytes(len);
            let total: usize = model.values().map(Vec::len).sum();
            match random.below(4) {
                0 => {
                    let expected = if model.remove(&name).is_some() { Ok(()) } else { Err(FsError::NoData) };
                    assert_eq!(fs.remove_xattr(ino, &name).await, expected);
                }
                1 => {
                    let expected = if model.contains_key(&name) { Err(FsError::Exists) } else { Ok(()) };
                    if total < 150_000 {
                        assert_eq!(fs.set_xattr(ino, &name, &value, SetMode::Create).await, expected);
                        model.entry(name).or_insert(value);
                    }
                }
                _ if total < 150_000 => {
                    fs.set_xattr(ino, &name, &value, SetMode::Any).await.unwrap();
                    model.insert(name, value);
                }
                _ => {
                    let name = name.clone();
                    let expected = model.get(&name).cloned().ok_or(FsError::NoData);
                    assert_eq!(fs.get_xattr(ino, &name).await, expected);
                }
            }
        }
        let list = fs.list_xattr(ino, true).await.unwrap();
        let names: Vec<&[u8]> = list.split(|b| *b == 0).filter(|n| !n.is_empty()).collect();
        assert_eq!(names, model.keys().map(Vec::as_slice).collect::<Vec<_>>());
        for (name, value) in &model {
            assert_eq!(&fs.get_xattr(ino, name).await.unwrap(), value);
        }
        let object = ObjectId::Inode(ino.0);
        assert_eq!(fs.inode(ino).await.unwrap().object(), object);
        check_blocks(&f, ino, true).await;
        // All its blocks, to the last byte: each value costs its name and five bytes beside it.
        for name in model.keys() {
            fs.remove_xattr(ino, name).await.unwrap();
        }
        for name in [b"user.a", b"user.b", b"user.c"] {
            fs.set_xattr(ino, name, &[7; 65_536], SetMode::Any).await.unwrap();
        }
        let left = 259_072 - 3 * (65_536 + 6 + 5) - (6 + 5);
        let last = vec![8; left + 1];
        assert_eq!(fs.set_xattr(ino, b"user.d", &last, SetMode::Any).await, Err(FsError::NoSpace));
        fs.set_xattr(ino, b"user.d", &last[1..], SetMode::Any).await.unwrap();
        assert_eq!(fs.get_xattr(ino, b"user.d").await.unwrap(), &last[1..]);
        assert_eq!(fs.set_xattr(ino, b"user.x", &vec![0; 65_537], SetMode::Any).await, Err(FsError::TooBig));
        fs.set_xattr(ino, b"trusted.t", b"1", SetMode::Any).await.unwrap();
        assert!(!fs.list_xattr(ino, false).await.unwrap().starts_with(b"trusted"));
        f.unlink(b"a").await;
        assert_eq!(f.disk_free().await, free);
    });
}
