//! How messages lie on a stream.
//!
//! A stream carries one service's messages from one life of one node. It opens with a hello:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | magic `PLSR` |
//! | 2 | version of the framing |
//! | 1 | service |
//! | 1 | version of the service's messages |
//! | 4 | the sender's node id |
//! | 8 | its incarnation |
//!
//! and goes on with messages: length of the head (4 bytes), number of parts (2 bytes), the parts' lengths (4 bytes each), the
//! head, the parts. All numbers little-endian. Lengths are checked against [`MESSAGE_BYTES_MAX`] before anything is allocated.

use crate::ids::{Incarnation, NodeId};
use crate::transport::{MESSAGE_BYTES_MAX, Message, Service};
use bytes::{BufMut, Bytes, BytesMut};
use std::io;

/// Version of the framing; a peer of another one is refused. (1 had no version of the service's messages.)
pub(super) const VERSION: u16 = 2;
const MAGIC: [u8; 4] = *b"PLSR";
const HELLO_BYTES: usize = 20;
/// The most parts of a message: one per block of the largest group, and room.
const PARTS_MAX: usize = 4096;

/// What a stream says of itself first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    /// Whose messages these are.
    pub(super) service: Service,
    /// The sender.
    pub(super) node: NodeId,
    /// Its life.
    pub(super) incarnation: Incarnation,
}

impl Hello {
    /// The hello's bytes.
    #[must_use]
    pub(super) fn encode(self) -> Bytes {
        let mut b = BytesMut::with_capacity(HELLO_BYTES);
        b.put_slice(&MAGIC);
        b.put_u16_le(VERSION);
        b.put_u8(self.service as u8);
        b.put_u8(self.service.version());
        b.put_u32_le(self.node.0);
        b.put_u64_le(self.incarnation.0);
        b.freeze()
    }

    /// Reads the hello from the start of a stream.
    ///
    /// # Errors
    /// `InvalidData` if it is not one of this version.
    pub(super) async fn read(stream: &mut quinn::RecvStream) -> io::Result<Hello> {
        let mut b = [0u8; HELLO_BYTES];
        stream.read_exact(&mut b).await.map_err(io::Error::other)?;
        Hello::decode(&b)
    }

    fn decode(b: &[u8; HELLO_BYTES]) -> io::Result<Hello> {
        let (magic, rest) = b.split_at(4);
        if magic != MAGIC {
            return Err(invalid("this is not a stream of Pulsar"));
        }
        let version = u16::from_le_bytes([rest[0], rest[1]]);
        if version != VERSION {
            return Err(invalid(&format!("the peer speaks version {version} of the framing, this node version {VERSION}")));
        }
        let service = Service::ALL.into_iter().find(|s| *s as u8 == rest[2]).ok_or_else(|| invalid("unknown service"))?;
        let (theirs, ours) = (rest[3], service.version());
        if theirs != ours {
            let what = format!("the peer speaks version {theirs} of the {service:?} messages, this node version {ours}");
            return Err(invalid(&what));
        }
        let node = NodeId(u32::from_le_bytes([rest[4], rest[5], rest[6], rest[7]]));
        let mut life = [0u8; 8];
        life.copy_from_slice(&rest[8..16]);
        Ok(Hello { service, node, incarnation: Incarnation(u64::from_le_bytes(life)) })
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// A message's chunks, in the order in which they go on the stream. The parts are not copied.
///
/// # Errors
/// `InvalidInput` if it is larger than a message may be.
pub(super) fn encode(message: Message) -> io::Result<Vec<Bytes>> {
    if message.len() > MESSAGE_BYTES_MAX || message.parts.len() > PARTS_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the message is too large"));
    }
    let too_large = |_| io::Error::new(io::ErrorKind::InvalidInput, "the message is too large");
    let mut b = BytesMut::with_capacity(6 + 4 * message.parts.len() + message.head.len());
    b.put_u32_le(u32::try_from(message.head.len()).map_err(too_large)?);
    b.put_u16_le(u16::try_from(message.parts.len()).map_err(too_large)?);
    for part in &message.parts {
        b.put_u32_le(u32::try_from(part.len()).map_err(too_large)?);
    }
    b.put_slice(&message.head);
    let mut chunks = Vec::with_capacity(1 + message.parts.len());
    chunks.push(b.freeze());
    chunks.extend(message.parts.into_iter().filter(|p| !p.is_empty()));
    Ok(chunks)
}

/// Reads the next message; `None` at the end of the stream.
///
/// # Errors
/// If the stream breaks, or what comes is not a message (`InvalidData`).
pub(super) async fn read(stream: &mut quinn::RecvStream) -> io::Result<Option<Message>> {
    let mut start = [0u8; 6];
    match stream.read_exact(&mut start).await {
        Ok(()) => {}
        Err(quinn::ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(e) => return Err(io::Error::other(e)),
    }
    let head_len = u32::from_le_bytes([start[0], start[1], start[2], start[3]]) as usize;
    let parts_len = usize::from(u16::from_le_bytes([start[4], start[5]]));
    if head_len > MESSAGE_BYTES_MAX || parts_len > PARTS_MAX {
        return Err(invalid("a message's head is too large"));
    }
    let mut lens = vec![0u8; 4 * parts_len];
    stream.read_exact(&mut lens).await.map_err(io::Error::other)?;
    let lens: Vec<usize> = lens.chunks_exact(4).map(|l| u32::from_le_bytes([l[0], l[1], l[2], l[3]]) as usize).collect();
    let total = lens.iter().try_fold(head_len, |sum, l| sum.checked_add(*l)).unwrap_or(usize::MAX);
    if total > MESSAGE_BYTES_MAX {
        return Err(invalid("a message is too large"));
    }
    let mut body = BytesMut::zeroed(total);
    stream.read_exact(&mut body).await.map_err(io::Error::other)?;
    let mut body = body.freeze();
    let head = body.split_to(head_len);
    let parts = lens.into_iter().map(|l| body.split_to(l)).collect();
    Ok(Some(Message { head, parts }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_of_another_version_is_refused_by_name() {
        for service in Service::ALL {
            let hello = Hello { service, node: NodeId(7), incarnation: Incarnation(8) };
            let bytes: [u8; HELLO_BYTES] = hello.encode()[..].try_into().unwrap();
            assert_eq!(Hello::decode(&bytes).unwrap(), hello);
            let refused = |place: usize, value: u8| {
                let mut other = bytes;
                other[place] = value;
                Hello::decode(&other).unwrap_err().to_string()
            };
            assert_eq!(refused(4, 1), "the peer speaks version 1 of the framing, this node version 2");
            let (old, ours) = (service.version() - 1, service.version());
            let expected = format!("the peer speaks version {old} of the {service:?} messages, this node version {ours}");
            assert_eq!(refused(7, old), expected);
            assert!(refused(0, 0).contains("not a stream of Pulsar"));
        }
    }
}
