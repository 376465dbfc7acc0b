//! The configuration, as each disk carries a copy of it: so that the disks of a stopped cluster can be checked, or data be
//! taken off them, with nothing but the disks.
//!
//! ```text
//! blocks 2..5, 5..8 of the disk, written in turn; the valid one with the higher number counts
//!   magic "PULSARCF" | format u32 | length u32 | number u64 | blake3 of the rest (32) | configuration (postcard)
//! ```
//!
//! Invariants: it is a hint for people and checks of stopped clusters, never read by a running one; a torn write is seen by
//! its checksum and leaves the other copy.
//!
//! Excludes: everything else on the disk (`mirror::format`).

use bytes::Bytes;
use cluster::BLOCK_SIZE;
use cluster::config::Config;
use mirror::BlockDevice;

const MAGIC: &[u8; 8] = b"PULSARCF";
const FORMAT: u32 = 1;
const HEADER_BYTES: usize = 56;
/// Blocks of one copy.
const BLOCKS: usize = 3;
/// First blocks of the copies.
const PLACES: [u64; 2] = [2, 5];
const _: () = assert!(PLACES[1] + BLOCKS as u64 <= mirror::format::LOG_START, "the log begins behind the copies");

fn encode(config: &Config, number: u64) -> Option<Bytes> {
    let body = postcard::to_allocvec(config).ok()?;
    if body.len() > BLOCKS * BLOCK_SIZE - HEADER_BYTES {
        return None;
    }
    let mut bytes = Vec::with_capacity(BLOCKS * BLOCK_SIZE);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&FORMAT.to_le_bytes());
    bytes.extend_from_slice(&u32::try_from(body.len()).ok()?.to_le_bytes());
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(blake3::hash(&body).as_bytes());
    bytes.extend_from_slice(&body);
    bytes.resize(BLOCKS * BLOCK_SIZE, 0);
    Some(Bytes::from(bytes))
}

fn decode(bytes: &[u8]) -> Option<(u64, Config)> {
    let (header, rest) = bytes.split_at_checked(HEADER_BYTES)?;
    let number = |at: usize| Some(u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?));
    if header.get(..8)? != MAGIC || number(8)? != FORMAT {
        return None;
    }
    let body = rest.get(..number(12)? as usize)?;
    if header.get(24..56)? != blake3::hash(body).as_bytes() {
        return None;
    }
    Some((u64::from_le_bytes(header.get(16..24)?.try_into().ok()?), postcard::from_bytes(body).ok()?))
}

/// Reads the newest configuration that a disk carries, with its number.
///
/// # Errors
/// If the disk cannot be read. `None` if it carries none.
pub async fn read(device: &dyn BlockDevice) -> std::io::Result<Option<(u64, Config)>> {
    let mut newest = None;
    for place in PLACES {
        let found = decode(&device.read(place, BLOCKS).await?);
        if found.as_ref().map(|(n, _)| *n) > newest.as_ref().map(|(n, _): &(u64, Config)| *n) {
            newest = found;
        }
    }
    Ok(newest)
}

/// Writes a configuration; one that is too large is left out.
///
/// # Errors
/// Of the disk.
pub async fn write(device: &dyn BlockDevice, config: &Config) -> std::io::Result<()> {
    let number = read(device).await?.map_or(0, |(n, _)| n) + 1;
    let Some(bytes) = encode(config, number) else {
        tracing::warn!(
            "the configuration is too large to be kept on the disks, too; offline checks will need the state directory"
        );
        return Ok(());
    };
    device.write(PLACES[(number % 2) as usize], vec![bytes]).await?;
    device.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests::three;
    use mirror::FileDevice;

    #[tokio::test]
    async fn the_newest_whole_copy_counts() {
        let dir = tempfile::tempdir().unwrap();
        let device = FileDevice::create(dir.path().join("d"), 1 << 20).unwrap();
        assert!(read(&device).await.unwrap().is_none());
        let mut config = three();
        for epoch in 1..=4 {
            config.epoch = cluster::Epoch(epoch);
            write(&device, &config).await.unwrap();
            assert_eq!(read(&device).await.unwrap(), Some((epoch, config.clone())));
        }
        // A torn write of the fifth.
        device.write(PLACES[1], vec![Bytes::from(vec![7; BLOCK_SIZE])]).await.unwrap();
        let (number, found) = read(&device).await.unwrap().unwrap();
        assert_eq!((number, found.epoch), (4, cluster::Epoch(4)));
    }

    #[test]
    fn rubbish_is_refused() {
        assert!(decode(b"").is_none());
        assert!(decode(&[0xff; 4096]).is_none());
        let mut bytes = encode(&three(), 1).unwrap().to_vec();
        bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(decode(&bytes).is_none());
    }
}
