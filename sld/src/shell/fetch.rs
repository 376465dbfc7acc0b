//! Reading blocks that are not in memory.

use super::disk::{DiskShared, Fetched};
use crate::api::{Block, DiskError, ObjectId};
use crate::cache::FetchId;
use bytes::Bytes;
use cluster::{BLOCK_SIZE, BlockNo};
use mirror::MirrorError;
use std::sync::Arc;
use tokio::sync::oneshot;

/// Blocks asked for in one request.
const REQUEST_BLOCKS: usize = 256;

/// A block that was never written.
pub(super) fn zeros() -> Block {
    static ZEROS: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];
    Bytes::from_static(&ZEROS)
}

/// A mirror's error as the file system sees it.
pub(super) fn disk_error(error: MirrorError) -> DiskError {
    match error {
        MirrorError::Corrupt { block } => DiskError::Corrupt(block),
        MirrorError::NoSuchBlock { block } => DiskError::NoSuchBlock(block),
        MirrorError::Fenced => DiskError::Lost,
        MirrorError::Shutdown => DiskError::Shutdown,
    }
}

impl DiskShared {
    /// Starts a fetch of blocks in one request; each has an id from the cache.
    fn fetch(self: &Arc<Self>, object: ObjectId, wanted: Vec<(BlockNo, FetchId)>) {
        let disk = self.clone();
        self.node.spawn(async move {
            let blocks: Vec<BlockNo> = wanted.iter().map(|w| w.0).collect();
            let many = disk.node.mirrors.read(blocks).await;
            let mut results: Vec<Result<Block, DiskError>> = Vec::with_capacity(wanted.len());
            match many {
                Ok(reads) if reads.len() == wanted.len() => results.extend(reads.into_iter().map(|r| Ok(r.data))),
                Err(error) if wanted.len() == 1 => results.push(Err(disk_error(error))),
                // One bad block must not spoil the others.
                _ => {
                    for (block, _) in &wanted {
                        let one = disk.node.mirrors.read(vec![*block]).await;
                        let one = one.map_err(disk_error).and_then(|mut r| r.pop().ok_or(DiskError::NoSuchBlock(*block)));
                        results.push(one.map(|r| r.data));
                    }
                }
            }
            let mut told: Vec<(Vec<Fetched>, Result<Block, DiskError>)> = Vec::with_capacity(wanted.len());
            {
                let mut state = disk.state.lock();
                for ((block, id), result) in wanted.into_iter().zip(results) {
                    let waiters = state.cache.fetched(object, block, id, result.as_ref().ok().cloned());
                    told.push((waiters, result));
                }
            }
            for (waiters, result) in told {
                for w in waiters {
                    let _ = w.send(result.clone());
                }
            }
        });
    }

    pub(super) async fn read(self: &Arc<Self>, object: ObjectId, block: BlockNo) -> Result<Block, DiskError> {
        if let Some(data) = self.cached(object, block) {
            return Ok(data);
        }
        let mut blocks = self.read_many(object, &[block]).await?;
        blocks.pop().ok_or(DiskError::NoSuchBlock(block))
    }

    pub(super) async fn read_many(self: &Arc<Self>, object: ObjectId, blocks: &[BlockNo]) -> Result<Vec<Block>, DiskError> {
        let mut found: Vec<Option<Block>> = vec![None; blocks.len()];
        loop {
            self.node.wait_serving().await?;
            // An operation from before the node was cut off must not mix what it read then with what is there now.
            if self.node.look(|t| t.holder.zombies() && t.holder.held(object).is_none()) {
                return Err(DiskError::Lost);
            }
            let mut waits: Vec<(usize, oneshot::Receiver<Result<Block, DiskError>>)> = Vec::new();
            let mut starts: Vec<(BlockNo, FetchId)> = Vec::new();
            {
                let mut state = self.state.lock();
                for (i, block) in blocks.iter().enumerate().filter(|(i, _)| found[*i].is_none()).collect::<Vec<_>>() {
                    found[i] = state.local(object, *block);
                    if found[i].is_none() {
                        let (tx, rx) = oneshot::channel();
                        starts.extend(state.cache.join(object, *block, Some(tx)).map(|id| (*block, id)));
                        waits.push((i, rx));
                    }
                }
            }
            for part in starts.chunks(REQUEST_BLOCKS) {
                self.fetch(object, part.to_vec());
            }
            let mut again = false;
            for (i, rx) in waits {
                match rx.await {
                    Ok(result) => found[i] = Some(result?),
                    Err(_) => again = true, // broken off: the block was written, or all tokens were lost
                }
            }
            if self.node.is_stopped() {
                return Err(DiskError::Shutdown);
            }
            if !again {
                return Ok(found.into_iter().flatten().collect());
            }
        }
    }

    pub(super) fn read_ahead(self: &Arc<Self>, object: ObjectId, blocks: &[BlockNo]) {
        if !self.node.serving() || self.node.look(|t| t.holder.held(object).is_none()) {
            return;
        }
        let mut starts = Vec::new();
        {
            let mut state = self.state.lock();
            for block in blocks {
                if state.cache.fetching() >= self.node.options.read_ahead_blocks {
                    break;
                }
                if state.wb.newest(*block).is_none() && !state.cache.has(object, *block) {
                    starts.extend(state.cache.join(object, *block, None).map(|id| (*block, id)));
                }
            }
        }
        for part in starts.chunks(REQUEST_BLOCKS) {
            self.fetch(object, part.to_vec());
        }
    }
}
