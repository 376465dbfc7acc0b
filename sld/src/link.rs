//! Reliable, ordered messages to one other node, on top of sessions that may break.
//!
//! Invariants:
//! - A message is delivered once, in the order of sending, as long as both lives last; sender's and receiver's epochs are
//!   equal at delivery.
//! - What has not been acknowledged is sent again: after a session ended, in a new epoch, and when the answer is late.
//!
//! Bounds: the queue of unacknowledged messages is bounded by what a holder and a master can have outstanding (a few
//! messages per object that is in motion).
//!
//! Excludes: what messages mean (`master`, `holder`); which epoch it is (`tokens`).

use crate::message::{Envelope, Msg};
use cluster::{Epoch, Incarnation, Instant};
use std::collections::VecDeque;
use std::time::Duration;

/// Encoded bytes after which an envelope is closed.
const ENVELOPE_BYTES: usize = 1 << 20;
/// Messages received without an answer after which one is sent at once.
const ACK_EVERY: u64 = 64;
/// When an acknowledgement is late.
const RESEND_AFTER: Duration = Duration::from_secs(1);

/// One direction pair to another node.
#[derive(Clone, Debug)]
pub struct Link {
    /// The other node's life.
    pub incarnation: Incarnation,
    next: u64,
    unacked: VecDeque<(u64, Msg)>,
    /// Messages below this number have been sent in the present session, as far as is known.
    sent: u64,
    received: u64,
    acked_to_peer: u64,
    last_sent: Instant,
}

impl Link {
    /// A link to a life of a node, to which nothing has been sent yet.
    #[must_use]
    pub fn new(incarnation: Incarnation) -> Self {
        Link {
            incarnation,
            next: 1,
            unacked: VecDeque::new(),
            sent: 1,
            received: 0,
            acked_to_peer: 0,
            last_sent: Instant::default(),
        }
    }

    /// Queues a message.
    pub fn push(&mut self, msg: Msg) {
        self.unacked.push_back((self.next, msg));
        self.next += 1;
    }

    /// Everything unacknowledged is to be sent again.
    pub fn resend(&mut self) {
        self.sent = self.unacked.front().map_or(self.next, |(n, _)| *n);
    }

    /// Blanks unacknowledged messages that mean nothing any more; the numbering stays.
    pub fn blank(&mut self, meaningless: impl Fn(&Msg) -> bool) {
        for (_, msg) in &mut self.unacked {
            if meaningless(msg) {
                *msg = Msg::Nothing;
            }
        }
    }

    /// Time passes: sends again what is late. Returns whether an envelope should be made even if it is empty.
    pub fn tick(&mut self, now: Instant) -> bool {
        if !self.unacked.is_empty() && now.since(self.last_sent) >= RESEND_AFTER {
            self.resend();
        }
        self.acked_to_peer < self.received
    }

    /// Envelopes with what has not been sent yet; an empty one if an acknowledgement is due (or `ack`).
    pub fn envelopes(&mut self, now: Instant, epoch: Epoch, from: Incarnation, ack: bool, out: &mut Vec<Envelope>) {
        let start = self.unacked.partition_point(|(n, _)| *n < self.sent);
        let mut envelope = |first: u64, messages: Vec<Msg>, received: u64| {
            out.push(Envelope { epoch, clock: 0, from, to: self.incarnation, ack: received, first, messages });
        };
        let (mut batch, mut bytes, mut first) = (Vec::new(), 0, 0);
        for (n, msg) in self.unacked.iter().skip(start) {
            if batch.is_empty() {
                first = *n;
            }
            bytes += msg.weight();
            batch.push(msg.clone());
            if bytes >= ENVELOPE_BYTES {
                envelope(first, std::mem::take(&mut batch), self.received);
                bytes = 0;
            }
        }
        let due = self.received - self.acked_to_peer >= ACK_EVERY || (ack && self.acked_to_peer < self.received);
        let sent_any = start < self.unacked.len();
        if !batch.is_empty() || (due && !sent_any) {
            envelope(first, batch, self.received);
        }
        if sent_any || due {
            self.acked_to_peer = self.received;
        }
        if sent_any {
            self.sent = self.next;
            self.last_sent = now;
        }
    }

    /// Takes in an envelope of the right epoch and lives; returns the messages that are new, in order.
    pub fn receive(&mut self, envelope: Envelope) -> Vec<Msg> {
        while self.unacked.front().is_some_and(|(n, _)| *n <= envelope.ack) {
            self.unacked.pop_front();
        }
        let mut fresh = Vec::new();
        for (n, msg) in (envelope.first..).zip(envelope.messages) {
            if n == self.received + 1 {
                self.received = n;
                fresh.push(msg);
            } else if n <= self.received {
                self.acked_to_peer = self.acked_to_peer.min(self.received.saturating_sub(1)); // say it again
            }
            // A gap means that a session broke in between: the sender will send it all again.
        }
        fresh
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ObjectId;

    fn msg(n: u32) -> Msg {
        Msg::Denied { object: ObjectId::Rename(n) }
    }

    #[test]
    fn lost_and_repeated_envelopes_deliver_each_message_once_in_order() {
        let (mut a, mut b) = (Link::new(Incarnation(1)), Link::new(Incarnation(1)));
        let mut rng = 12345u64;
        let (mut got, mut sent) = (Vec::new(), 0u32);
        for step in 0..2000u64 {
            rng = rng.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let pick = (rng >> 33) % 10;
            let now = Instant(step * 100_000_000);
            if pick < 4 && step < 1500 {
                sent += 1;
                a.push(msg(sent));
            }
            if pick == 4 {
                a.resend();
            }
            let ack = a.tick(now);
            let mut out = Vec::new();
            a.envelopes(now, Epoch(1), Incarnation(1), ack, &mut out);
            for e in out {
                if pick != 5 || step > 1500 {
                    got.extend(b.receive(e));
                }
            }
            let ack = b.tick(now);
            let mut out = Vec::new();
            b.envelopes(now, Epoch(1), Incarnation(1), ack, &mut out);
            for e in out {
                if pick != 6 {
                    a.receive(e);
                }
            }
        }
        assert_eq!(got, (1..=sent).map(msg).collect::<Vec<_>>());
        assert!(a.unacked.is_empty());
    }
}
