//! The store on disk: one `redb` file in the state directory.
//!
//! Tables: `log` (index → entry, `postcard`) and `meta` (name → value, `postcard`): `version`, `incarnation`, `hard`,
//! `snapshot`. A batch is one transaction. `redb` checks the integrity of its pages itself.

use crate::BoxFuture;
use crate::ids::Incarnation;
use crate::store::{Batch, Hard, LogEntry, Saved, SnapshotData, Store, StoreError};
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Serialize, de::DeserializeOwned};
use std::path::Path;
use std::sync::Arc;

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
/// Version of the tables' contents.
const VERSION: u32 = 1;

/// The store.
pub struct RedbStore {
    database: Arc<Database>,
}

fn failed(e: impl std::fmt::Display) -> StoreError {
    StoreError(e.to_string())
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, StoreError> {
    postcard::to_allocvec(value).map_err(failed)
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StoreError> {
    postcard::from_bytes(bytes).map_err(failed)
}

impl RedbStore {
    /// Opens the file; makes it if it is not there. Blocks.
    ///
    /// # Errors
    /// If it cannot be read, is damaged, of another version, or open in another process.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Database::create(path).map_err(|e| StoreError(format!("{}: {e}", path.display())))?;
        let write = database.begin_write().map_err(failed)?;
        {
            write.open_table(LOG).map_err(failed)?;
            let mut meta = write.open_table(META).map_err(failed)?;
            let version = meta.get("version").map_err(failed)?.map(|v| decode::<u32>(v.value())).transpose()?;
            match version {
                None => {
                    meta.insert("version", encode(&VERSION)?.as_slice()).map_err(failed)?;
                }
                Some(VERSION) => {}
                Some(other) => {
                    let text = format!("{} is of version {other}, this program knows version {VERSION}", path.display());
                    return Err(StoreError(text));
                }
            }
        }
        write.commit().map_err(failed)?;
        Ok(RedbStore { database: Arc::new(database) })
    }

    /// Makes a batch durable, in the calling thread.
    ///
    /// # Errors
    /// If it may not be.
    pub fn save_blocking(&self, batch: Batch) -> Result<(), StoreError> {
        save(&self.database, batch)
    }
}

fn save(database: &Database, batch: Batch) -> Result<(), StoreError> {
    let Batch { incarnation, snapshot, reset_log, compact_to, entries, hard, lazy } = batch;
    let mut write = database.begin_write().map_err(failed)?;
    if lazy {
        write.set_durability(Durability::None).map_err(failed)?;
    }
    {
        let mut meta = write.open_table(META).map_err(failed)?;
        let mut put = |name: &str, value: Vec<u8>| meta.insert(name, value.as_slice()).map(|_| ()).map_err(failed);
        if let Some(incarnation) = incarnation {
            put("incarnation", encode(&incarnation)?)?;
        }
        if let Some(snapshot) = snapshot {
            put("snapshot", encode(&snapshot)?)?;
        }
        if let Some(hard) = hard {
            put("hard", encode(&hard)?)?;
        }
        let mut log = write.open_table(LOG).map_err(failed)?;
        if reset_log {
            log.retain(|_, _| false).map_err(failed)?;
        }
        if let Some(to) = compact_to {
            log.retain_in(..=to, |_, _| false).map_err(failed)?;
        }
        if let Some(first) = entries.first() {
            log.retain_in(first.index.., |_, _| false).map_err(failed)?;
        }
        for entry in &entries {
            log.insert(entry.index, encode(entry)?.as_slice()).map_err(failed)?;
        }
    }
    write.commit().map_err(failed)
}

impl Store for RedbStore {
    fn load(&self) -> Result<Saved, StoreError> {
        let read = self.database.begin_read().map_err(failed)?;
        let meta = read.open_table(META).map_err(failed)?;
        let get = |name: &str| meta.get(name).map_err(failed);
        let mut saved = Saved {
            incarnation: get("incarnation")?.map_or(Ok(Incarnation(0)), |v| decode(v.value()))?,
            hard: get("hard")?.map_or(Ok(Hard::default()), |v| decode(v.value()))?,
            snapshot: get("snapshot")?.map_or_else(|| Ok(SnapshotData::default()), |v| decode(v.value()))?,
            entries: Vec::new(),
        };
        for item in read.open_table(LOG).map_err(failed)?.iter().map_err(failed)? {
            let (index, entry) = item.map_err(failed)?;
            let entry: LogEntry = decode(entry.value())?;
            if entry.index != index.value() {
                return Err(StoreError(format!("entry {} of the log is in the place of {}", entry.index, index.value())));
            }
            saved.entries.push(entry);
        }
        Ok(saved)
    }

    fn save(&self, batch: Batch) -> BoxFuture<'_, Result<(), StoreError>> {
        let database = Arc::clone(&self.database);
        Box::pin(async move { tokio::task::spawn_blocking(move || save(&database, batch)).await.map_err(failed)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prng::Prng;
    use crate::store::EntryKind;

    #[test]
    fn it_keeps_what_a_store_in_memory_keeps() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raft.redb");
        let mut rng = Prng::new(1);
        let mut expected = Saved::default();
        for round in 0..6 {
            let store = RedbStore::open(&path).unwrap();
            assert_eq!(store.load().unwrap(), expected, "round {round}");
            for _ in 0..10 {
                let last = expected.entries.last().map_or(expected.snapshot.index, |e| e.index);
                let mut batch = Batch { lazy: rng.one_in(3), ..Batch::default() };
                match rng.below(4) {
                    0 => batch.incarnation = Some(Incarnation(rng.below(100))),
                    1 => batch.hard = Some(Hard { term: rng.below(9), vote: 1, commit: rng.below(9) }),
                    2 if last > expected.snapshot.index => {
                        batch.snapshot = Some(SnapshotData { index: last, machine: vec![1, 2], ..SnapshotData::default() });
                        batch.compact_to = Some(last - 1);
                    }
                    _ => {
                        let first = last + 1 - rng.below(2).min(expected.entries.len() as u64);
                        batch.entries = (first..first + 3)
                            .map(|index| LogEntry { index, term: rng.below(5), kind: EntryKind::Normal, data: vec![7; 5] })
                            .collect();
                    }
                }
                expected.apply(batch.clone());
                store.save_blocking(batch).unwrap();
            }
        }
    }
}
