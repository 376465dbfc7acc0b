//! Opening a disk: label, bitmap, replay of the log into memory. Reads only; used by the daemon and by `reader`.

use crate::api::BlockDevice;
use crate::format::{OpenError, hex, read_label};
use crate::log::{LogState, RECORD_BLOCKS_MAX, Record};
use crate::replica::DiskCore;
use bytes::{Bytes, BytesMut};
use cluster::BLOCK_SIZE;
use std::collections::BTreeSet;
use std::io;

/// Blocks read from the log at a time.
const CHUNK: u64 = 256;
/// How far past a bad record to look for a later one: more than the longest batch that is written at once.
const LOOK_AHEAD: u64 = crate::shell::disk::BATCH_BLOCKS_MAX + 2 * RECORD_BLOCKS_MAX;

/// Reads the log's blocks one after the other, round the end.
struct LogReader<'a> {
    device: &'a dyn BlockDevice,
    start: u64,
    blocks: u64,
    /// (position, contents) of the last chunk.
    chunk: (u64, Bytes),
}

impl LogReader<'_> {
    async fn block(&mut self, pos: u64) -> io::Result<Bytes> {
        let pos = pos % self.blocks;
        let within = |chunk: &(u64, Bytes)| {
            let at = usize::try_from(pos.checked_sub(chunk.0)?).ok()? * BLOCK_SIZE;
            (at + BLOCK_SIZE <= chunk.1.len()).then(|| chunk.1.slice(at..at + BLOCK_SIZE))
        };
        if let Some(block) = within(&self.chunk) {
            return Ok(block);
        }
        let count = CHUNK.min(self.blocks - pos);
        self.chunk = (pos, self.device.read(self.start + pos, count as usize).await?);
        within(&self.chunk).ok_or_else(|| io::Error::other("short read"))
    }

    async fn run(&mut self, pos: u64, count: usize) -> io::Result<Bytes> {
        let mut run = BytesMut::with_capacity(count * BLOCK_SIZE);
        for i in 0..count as u64 {
            run.extend_from_slice(&self.block(pos + i).await?);
        }
        Ok(run.freeze())
    }

    /// The record at a position, if a right one is there, with its chain, checksum and payload.
    async fn record(&mut self, pos: u64, room: u64, uuid: &[u8; 16]) -> io::Result<Option<(Record, [u8; 16], [u8; 16], Bytes)>> {
        let first = self.block(pos).await?;
        let Some((head, blocks)) = Record::measure(&first) else { return Ok(None) };
        if blocks as u64 > room {
            return Ok(None);
        }
        let bytes = if head == 1 { first } else { self.run(pos, head).await? };
        let Some((record, chain, sum)) = Record::decode(&bytes, uuid) else { return Ok(None) };
        let payload = self.run(pos + head as u64, blocks - head).await?;
        Ok(record.payload_is_right(&payload).then_some((record, chain, sum, payload)))
    }
}

/// What a disk is expected to be.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Expected {
    pub cluster: Option<[u8; 16]>,
    pub uuid: Option<[u8; 16]>,
}

/// Opens a disk.
pub(crate) async fn open_core(device: &dyn BlockDevice, expected: Expected, tags_max: usize) -> Result<DiskCore, OpenError> {
    let label = read_label(device).await?;
    if let Some(cluster) = expected.cluster
        && cluster != label.cluster
    {
        return Err(OpenError::OtherCluster { found: hex(&label.cluster), expected: hex(&cluster) });
    }
    if let Some(uuid) = expected.uuid
        && uuid != label.uuid
    {
        return Err(OpenError::OtherDisk { found: hex(&label.uuid), expected: hex(&uuid) });
    }
    let (g, uuid) = (label.geometry, label.uuid);
    let mut bitmap = BytesMut::new();
    let mut at = 0;
    while at < g.bitmap_blocks {
        let count = CHUNK.min(g.bitmap_blocks - at);
        bitmap.extend_from_slice(&device.read(g.bitmap_start + at, count as usize).await?);
        at += count;
    }
    let mut core = DiskCore::new(label, &bitmap, tags_max);
    drop(bitmap);
    let mut log = LogReader { device, start: g.log_start, blocks: g.log_blocks, chunk: (0, Bytes::new()) };
    loop {
        let head = core.log().head();
        let found = log.record(head.pos, core.log().free(), &uuid).await?;
        let Some((record, chain, sum, payload)) = found else { break };
        if record.sequence != head.sequence || chain != head.chain || !core.fits(&record) {
            break;
        }
        load_tags(device, &mut core, tag_blocks(&record)).await;
        core.replay(&record, sum, &payload);
    }
    check_end(&mut log, core.log(), &uuid).await?;
    Ok(core)
}

fn tag_blocks(record: &Record) -> BTreeSet<u32> {
    record.slots.iter().filter(|s| s.applied).map(|s| (record.base + s.slot.index) / crate::format::TAGS_PER_BLOCK).collect()
}

/// Loads tag blocks into a core that nobody else uses. One that cannot be read counts as damaged, as a whole.
pub(crate) async fn load_tags(device: &dyn BlockDevice, core: &mut DiskCore, blocks: BTreeSet<u32>) {
    for block in blocks {
        if !core.has_tags(block) {
            let generation = core.generation();
            match device.read(core.geometry.tags_start + u64::from(block), 1).await {
                Ok(bytes) => core.install_tags(block, &bytes, generation),
                Err(e) => core.install_lost_tags(block, generation, &e),
            };
        }
    }
}

/// A log may end in records that were being written when the power failed. If one of a later batch follows, then what is
/// bad was durable once: that is damage, and must not pass for the end.
async fn check_end(log: &mut LogReader<'_>, state: &LogState, uuid: &[u8; 16]) -> Result<(), OpenError> {
    let head = state.head();
    let look = LOOK_AHEAD.min(state.free());
    for i in 0..look {
        let pos = head.pos + i;
        let first = log.block(pos).await?;
        let Some((blocks, _)) = Record::measure(&first) else { continue };
        let bytes = log.run(pos, blocks).await?;
        if let Some((record, ..)) = Record::decode(&bytes, uuid)
            && record.sequence > head.sequence
            && record.sequence - head.sequence <= state.blocks()
            && record.durable >= head.sequence
        {
            return Err(OpenError::LogDamaged { sequence: head.sequence });
        }
    }
    Ok(())
}
