use super::*;
use crate::format::Time;
use crate::inode::Ino;
use cluster::MirrorId;
use proptest::prelude::*;
use sld::memory::MemoryDisk;
use std::collections::BTreeMap;

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

async fn new_inode(disk: &MemoryDisk, mode: u32) -> Inode {
    let block = disk.alloc(Some(BlockNo::new(MirrorId(1), 5)), 1).await.unwrap().start;
    let mut inode = Inode::new(Ino(block.pack()), 5, mode, 0, 0, Time::default());
    inode.make_tree();
    let mut tx = Transaction::new(disk);
    inode.write(&mut tx, &[]);
    tx.commit().unwrap();
    inode
}

async fn check(disk: &MemoryDisk, inode: &Inode, model: &BTreeMap<u64, Vec<u8>>) {
    let source = Source::disk(disk);
    let all = range(source, inode, 0, usize::MAX).await.unwrap();
    assert_eq!(
        all.iter().map(|(k, v)| (*k, v.to_vec())).collect::<Vec<_>>(),
        model.iter().map(|(k, v)| (*k, v.clone())).collect::<Vec<_>>()
    );
    let nodes = blocks(source, inode, usize::MAX).await.unwrap();
    assert_eq!(inode.blocks, nodes.len() as u64);
    let owned = disk.image().values().filter(|(tag, _)| tag.owner == inode.ino.0 && tag.kind != Kind::Inode).count();
    assert_eq!(owned, nodes.len(), "blocks that the tree has, and blocks that say they are its own");
}

#[derive(Clone, Debug)]
enum Step {
    Insert(u64, usize),
    Remove(u64),
    RemoveRange(u64, u64),
    Floor(u64),
    Reload,
}

fn steps(keys: u64, len: usize) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..keys, 0..len).prop_map(|(k, l)| Step::Insert(k, l)),
        4 => (0..keys).prop_map(Step::Remove),
        1 => (0..keys, 0..keys / 4 + 1).prop_map(|(k, n)| Step::RemoveRange(k, n)),
        1 => (0..keys).prop_map(Step::Floor),
        1 => Just(Step::Reload),
    ];
    proptest::collection::vec(step, 1..250)
}

fn run(steps: Vec<Step>) {
    block_on(async {
        let disk = MemoryDisk::new(&[4096, 4096]);
        let mut inode = new_inode(&disk, 0o040_755).await;
        let mut model = BTreeMap::new();
        for step in steps {
            match step {
                Step::Insert(key, len) => {
                    let value = vec![key as u8; len];
                    let mut tx = Transaction::new(&disk);
                    insert(&mut tx, &mut inode, key, &value, 0, &[]).await.unwrap();
                    tx.commit().unwrap();
                    model.insert(key, value);
                }
                Step::Remove(key) => {
                    let mut tx = Transaction::new(&disk);
                    let was = remove(&mut tx, &mut inode, key, &[]).await.unwrap().is_some();
                    inode.write(&mut tx, &[]);
                    tx.commit().unwrap();
                    assert_eq!(model.remove(&key).is_some(), was);
                }
                Step::RemoveRange(from, count) => {
                    let mut tx = Transaction::new(&disk);
                    for key in from..from + count {
                        let was = remove(&mut tx, &mut inode, key, &[]).await.unwrap().is_some();
                        assert_eq!(model.remove(&key).is_some(), was);
                    }
                    inode.write(&mut tx, &[]);
                    tx.commit().unwrap();
                }
                Step::Floor(key) => {
                    let found = floor(Source::disk(&disk), &inode, key).await.unwrap();
                    let expected = model.range(..=key).next_back();
                    assert_eq!(found.map(|(k, v)| (k, v.to_vec())), expected.map(|(k, v)| (*k, v.clone())));
                    let value = get(Source::disk(&disk), &inode, key).await.unwrap();
                    assert_eq!(value.map(|v| v.to_vec()), model.get(&key).cloned());
                }
                Step::Reload => {
                    let mut tx = Transaction::new(&disk);
                    inode.write(&mut tx, &[]);
                    tx.commit().unwrap();
                    let bytes = disk.read(inode.object(), inode.ino.block()).await.unwrap();
                    assert_eq!(Inode::decode(&bytes, inode.ino).unwrap(), inode);
                    check(&disk, &inode, &model).await;
                }
            }
        }
        check(&disk, &inode, &model).await;
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equals_a_sorted_map_with_long_values(steps in steps(120, VALUE_MAX + 1)) {
        run(steps);
    }

    #[test]
    fn equals_a_sorted_map_with_short_values(steps in steps(2000, 80)) {
        run(steps);
    }
}

#[test]
fn a_tall_tree_grows_and_goes_away() {
    block_on(async {
        let disk = MemoryDisk::new(&[65536]);
        let mut inode = new_inode(&disk, 0o100_644).await;
        let count = 40_000u64;
        let order = |i: u64| (i * 7919) % count;
        for i in 0..count {
            let mut tx = Transaction::new(&disk);
            insert(&mut tx, &mut inode, order(i), &[7; 16], 0, &[]).await.unwrap();
            tx.commit().unwrap();
        }
        assert!(inode.root().unwrap().level() >= 2);
        assert_eq!(range(Source::disk(&disk), &inode, 0, usize::MAX).await.unwrap().len(), count as usize);
        for i in 0..count {
            let mut tx = Transaction::new(&disk);
            let key = (i * 104_729) % count;
            assert!(remove(&mut tx, &mut inode, key, &[]).await.unwrap().is_some());
            inode.write(&mut tx, &[]);
            tx.commit().unwrap();
        }
        check(&disk, &inode, &BTreeMap::new()).await;
        assert_eq!(inode.blocks, 0);
    });
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// A random change: an insertion, or the removal of a key that is there (often the lowest of a range, so that leaves empty).
async fn change(
    disk: &MemoryDisk,
    inode: &mut Inode,
    rng: &mut Rng,
    model: &mut BTreeMap<u64, u8>,
    removing: bool,
    number: u8,
) -> (u64, Option<u8>, WriteId, u64) {
    let mut tx = Transaction::new(disk);
    let aux = rng.below(1 << 20);
    let from = rng.below(200);
    let (key, value, write) = match model.range(from..).next().map(|(k, _)| *k) {
        Some(key) if removing && rng.below(8) != 0 => {
            let write = remove(&mut tx, inode, key, &[]).await.unwrap().unwrap();
            model.remove(&key);
            (key, None, write)
        }
        _ => {
            let len = 250 + rng.below(100) as usize;
            let write = insert(&mut tx, inode, from, &vec![number; len], aux, &[]).await.unwrap();
            model.insert(from, number);
            (from, Some(number), write)
        }
    };
    let aux = leaf(tx.source(), inode, key).await.unwrap().node.aux().max(inode.root().unwrap().aux());
    if tx.newest(inode.ino.block()).is_none_or(|newest| newest < write) {
        inode.write(&mut tx, &[]);
    }
    tx.commit().unwrap();
    (key, value, write, aux)
}

async fn contents(disk: &MemoryDisk, inode: &Inode) -> BTreeMap<u64, u8> {
    let all = range(Source::disk(disk), inode, 0, usize::MAX).await.unwrap();
    all.iter().map(|(k, v)| (*k, v.first().copied().unwrap_or(0))).collect()
}

/// In every state that a crash can leave, a key has what the last change of it left whose write is durable; and the tree
/// goes on working: nothing that was removed, or lies outside a node's range, comes back.
#[test]
fn after_a_crash_each_key_is_as_its_last_durable_write_left_it() {
    block_on(async {
        let sizes = [4096];
        for seed in 0..24 {
            let mut rng = Rng(seed);
            let disk = MemoryDisk::new(&sizes);
            let mut inode = new_inode(&disk, 0o040_755).await;
            let mut model = BTreeMap::new();
            for _ in 0..rng.below(120) {
                change(&disk, &mut inode, &mut rng, &mut model, false, 1).await;
            }
            let (base, before) = (disk.image(), model.clone());
            disk.record();
            let removing = seed % 2 == 0;
            let mut changes = Vec::new();
            for number in 0..24 {
                let removing = if number < 16 { removing } else { !removing };
                changes.push(change(&disk, &mut inode, &mut rng, &mut model, removing, number + 2).await);
            }
            let operations = disk.recorded();
            let graph = crate::crash::Graph::new(&operations);
            for _ in 0..40 {
                let durable = graph.random_closed(rng.below(u64::MAX));
                let mut expected = before.clone();
                let mut first = 0;
                let mut counters = BTreeMap::new();
                for (operation, (key, value, write, aux)) in operations.iter().zip(&changes) {
                    if durable.contains(&(first + write.0)) {
                        match value {
                            Some(value) => expected.insert(*key, *value),
                            None => expected.remove(key),
                        };
                        counters.insert(*key, *aux);
                    }
                    first += operation.writes.len();
                }
                let crashed = MemoryDisk::from_image(&sizes, graph.image(&base, &durable));
                let bytes = crashed.read(inode.object(), inode.ino.block()).await.unwrap();
                let mut found = Inode::decode(&bytes, inode.ino).unwrap();
                assert_eq!(contents(&crashed, &found).await, expected, "seed {seed}, state {durable:?}");
                for (key, aux) in counters {
                    let leaf = leaf(Source::disk(&crashed), &found, key).await.unwrap();
                    assert!(leaf.node.aux().max(found.root().unwrap().aux()) >= aux, "the counter for {key} went back");
                }
                for number in 0..20 {
                    let removing = number < 14;
                    change(&crashed, &mut found, &mut rng, &mut expected, removing, 200).await;
                    assert_eq!(contents(&crashed, &found).await, expected, "seed {seed}, going on");
                }
            }
        }
    });
}
