//! Each issue is planted once, and found; leftovers are taken away by the collector.

use super::*;
use crate::format::put_u64;
use crate::gc::{GcOptions, GcReport};
use crate::ops::data::{At, Payload};
use crate::ops::tests::{ROOT, fresh};
use crate::ops::{FileSystem, NewNode};
use sld::memory::MemoryDisk;

struct Planted {
    fs: FileSystem<MemoryDisk>,
    file: Ino,
    dir: Ino,
}

/// A file of two blocks and a directory whose entries fill a tree.
async fn planted() -> Planted {
    let fs = fresh(&[4096]).await;
    let root = fs.root();
    let dir = fs.make(&ROOT, root, b"dir", NewNode::Directory, 0o755).await.unwrap().ino;
    for i in 0..60 {
        fs.make(&ROOT, dir, format!("{i:0>100}").as_bytes(), NewNode::File, 0o644).await.unwrap();
    }
    let file = fs.make(&ROOT, root, b"file", NewNode::File, 0o644).await.unwrap().ino;
    fs.write(file, At::Offset(0), Payload::new(0, &[7; 9000]), false).await.unwrap();
    assert!(issues(&fs).await.is_empty());
    Planted { fs, file, dir }
}

async fn issues(fs: &FileSystem<MemoryDisk>) -> Vec<Issue> {
    check(&DiskSource(fs.disk().clone()), &mut |_| {}).await.unwrap().issues
}

impl Planted {
    fn tag(&self, block: BlockNo) -> Tag {
        self.fs.disk().image()[&block].0
    }

    fn damage(&self, block: BlockNo, change: impl FnOnce(&mut [u8])) {
        let (tag, bytes) = self.fs.disk().image()[&block].clone();
        let mut bytes = bytes.to_vec();
        change(&mut bytes);
        self.fs.disk().overwrite(block, tag, Bytes::from(bytes));
    }

    fn rewrite(&self, ino: Ino, change: impl FnOnce(&mut Inode)) {
        let (tag, bytes) = self.fs.disk().image()[&ino.block()].clone();
        let mut inode = Inode::decode(&bytes, ino).unwrap();
        change(&mut inode);
        self.fs.disk().overwrite(ino.block(), tag, inode.encode());
    }

    async fn collect(&self, dry_run: bool) -> GcReport {
        self.fs.collect(GcOptions { dry_run, ..GcOptions::default() }, &mut |_| true).await.unwrap()
    }

    fn block_of(&self, kind: Kind, owner: Ino) -> BlockNo {
        let image = self.fs.disk().image();
        image.iter().find(|(_, (tag, _))| tag.kind == kind && tag.owner == owner.0).map(|(block, _)| *block).unwrap()
    }
}

#[tokio::test]
async fn damage_is_found() {
    let p = planted().await;
    let first = BlockNo::new(MirrorId(1), 0);
    p.damage(first, |bytes| bytes[0] ^= 1);
    assert!(matches!(issues(&p.fs).await[..], [Issue::Superblock { .. }]));

    let p = planted().await;
    p.damage(p.fs.root().block(), |bytes| bytes[4] ^= 1);
    let found = issues(&p.fs).await;
    assert!(found.iter().any(|i| matches!(i, Issue::Superblock { .. })), "{found:?}");

    let p = planted().await;
    p.damage(p.file.block(), |bytes| put_u64(bytes, 16, 12345));
    let found = issues(&p.fs).await;
    assert!(found.iter().any(|i| matches!(i, Issue::EntryWithoutInode { name, .. } if name == "file")), "{found:?}");

    let p = planted().await;
    p.damage(p.file.block(), |bytes| bytes[8] ^= 1);
    let found = issues(&p.fs).await;
    assert!(found.iter().any(|i| matches!(i, Issue::Format { owner, .. } if *owner == p.file)), "{found:?}");

    let p = planted().await;
    let node = p.block_of(Kind::Directory, p.dir);
    p.damage(node, |bytes| bytes[4] ^= 1);
    let found = issues(&p.fs).await;
    assert!(found.iter().any(|i| matches!(i, Issue::Format { block, .. } if *block == node)), "{found:?}");

    let p = planted().await;
    p.rewrite(p.file, |inode| inode.mode = inode.mode & 0o7777 | 0o120_000);
    let found = issues(&p.fs).await;
    assert!(found.iter().any(|i| matches!(i, Issue::WrongEntryKind { .. })), "{found:?}");

    let p = planted().await;
    p.rewrite(p.file, |inode| inode.links = 3);
    let found = issues(&p.fs).await;
    assert!(found.iter().any(|i| matches!(i, Issue::WrongRecordCount { stored: 3, counted: 1, .. })), "{found:?}");

    let p = planted().await;
    p.rewrite(p.fs.root(), |inode| inode.subdirs = 0);
    assert!(matches!(issues(&p.fs).await[..], [Issue::SubdirsTooFew { stored: 0, counted: 1, .. }]));

    // An extent that leads into another inode's block, and one that leads nowhere.
    for (target, far) in [(p.dir.block(), false), (BlockNo::new(MirrorId(9), 3), true)] {
        let p = planted().await;
        let record = ExtentRecord { start: target, len: 1, flags: 0 }.encode();
        p.rewrite(p.file, |inode| {
            if let Body::Tree(root) = &mut inode.body {
                root.insert(1000, &record);
            }
        });
        let found = issues(&p.fs).await;
        assert!(
            found.iter().any(|i| match i {
                Issue::UsedTwice { block, .. } => !far && *block == target,
                Issue::OutOfRange { block, .. } => far && *block == target,
                _ => false,
            }),
            "{found:?}"
        );
    }

    let p = planted().await;
    let data = p.block_of(Kind::Data, p.file);
    let bytes = p.fs.disk().image()[&data].1.clone();
    p.fs.disk().overwrite(data, Tag { owner: 99, ..p.tag(data) }, bytes);
    let found = issues(&p.fs).await;
    assert!(matches!(found[..], [Issue::WrongTag { owner: 99, .. }]), "{found:?}");
}

#[tokio::test]
async fn leftovers_are_found_and_collected() {
    let p = planted().await;
    // A data block of the file that it does not point to, one of an inode that is not there, a node, an inode without a name
    // with a block of its own, a record without an entry, and counts that are too high.
    let block = |index| BlockNo::new(MirrorId(1), index);
    let zeros = Bytes::from(vec![0; BLOCK_SIZE]);
    let tag = |kind, owner| Tag { kind, owner, offset: 5, birth: 1 };
    p.fs.disk().overwrite(block(2000), tag(Kind::Data, p.file.0), zeros.clone());
    p.fs.disk().overwrite(block(2001), tag(Kind::Data, 777), zeros.clone());
    p.fs.disk().overwrite(block(2002), tag(Kind::Directory, p.dir.0), zeros.clone());
    let orphan = Ino(block(2003).pack());
    let mut inode = Inode::new(orphan, 1, 0o100_644, 0, 0, crate::format::Time::default());
    inode.parents.push(Parent { dir: p.dir.0, hash: 64, seq: 9 });
    inode.links = 1;
    inode.blocks = 1;
    inode.make_tree();
    if let Body::Tree(root) = &mut inode.body {
        root.insert(0, &ExtentRecord { start: block(2004), len: 1, flags: 0 }.encode());
    }
    p.fs.disk().overwrite(block(2003), inode.tag(1), inode.encode());
    p.fs.disk().overwrite(block(2004), Tag { offset: 0, ..tag(Kind::Data, orphan.0) }, zeros);
    p.rewrite(p.file, |inode| {
        inode.parents.push(Parent { dir: p.dir.0, hash: 64, seq: 10 });
        inode.links += 1;
        inode.blocks += 4;
    });
    p.rewrite(p.dir, |inode| inode.subdirs = 4);
    let report = check(&DiskSource(p.fs.disk().clone()), &mut |_| {}).await.unwrap();
    assert!(report.is_sound() && !report.is_clean());
    assert_eq!((report.leftovers, report.blocks_leaked), (7, 5), "{:?}", report.issues);

    let dry = p.collect(true).await;
    assert_eq!((dry.leaked, dry.orphans, dry.records, dry.counts), (3, 1, 2, 2), "{dry:?}");
    assert_eq!(check(&DiskSource(p.fs.disk().clone()), &mut |_| {}).await.unwrap(), report);
    let done = p.collect(false).await;
    assert_eq!(GcReport { ..done }, dry);
    assert!(issues(&p.fs).await.is_empty());
    let again = p.collect(false).await;
    assert_eq!((again.leaked, again.orphans, again.records, again.counts, again.names), (0, 0, 0, 0, 0));
}

#[tokio::test]
async fn a_collector_that_stops_goes_on_where_it_was() {
    let p = planted().await;
    let zeros = Bytes::from(vec![0; BLOCK_SIZE]);
    p.fs.disk().overwrite(BlockNo::new(MirrorId(1), 4095), Tag { kind: Kind::Data, owner: 5, offset: 0, birth: 1 }, zeros);
    let whole = p.collect(true).await;
    assert_eq!((whole.leaked, whole.next), (1, None));
    let stopped = p.fs.collect(GcOptions::default(), &mut |_| false).await.unwrap();
    assert!(stopped.next.is_some() || stopped.leaked == 1);
    let rest = p.fs.collect(GcOptions { from: stopped.next, ..GcOptions::default() }, &mut |_| true).await.unwrap();
    assert_eq!(stopped.leaked + rest.leaked, 1);
}

#[tokio::test]
async fn open_orphans_are_left_alone() {
    let p = planted().await;
    p.fs.open(p.file, crate::ops::OpenFlags::default()).await.unwrap();
    p.fs.unlink(&ROOT, p.fs.root(), b"file").await.unwrap();
    assert_eq!(p.collect(false).await.orphans, 0);
    assert_eq!(p.fs.attributes(p.file).await.unwrap().nlink, 0);
    p.fs.close(p.file).await.unwrap();
    assert!(issues(&p.fs).await.is_empty());
}
