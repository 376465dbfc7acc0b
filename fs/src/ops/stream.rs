//! Who reads from front to back: how far ahead of a reader blocks are fetched.

use lru::LruCache;
use parking_lot::Mutex;
use std::num::NonZeroUsize;

/// Files watched at a time.
const FILES_MAX: usize = 1024;
/// The first and the greatest distance to be ahead, in bytes.
const AHEAD_MIN: u64 = 512 * 1024;
const AHEAD_MAX: u64 = 8 * 1024 * 1024;
/// The kernel sends the requests of one stream out of order; by no more than this.
const DISORDER: u64 = 2 * 1024 * 1024;

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// Where the next read is expected.
    next: u64,
    /// What lies before this was asked for.
    ahead: u64,
    window: u64,
}

/// The readers of all files.
#[derive(Debug)]
pub(crate) struct Streams(Mutex<LruCache<u64, Stream>>);

impl Default for Streams {
    fn default() -> Self {
        Streams(Mutex::new(LruCache::new(NonZeroUsize::new(FILES_MAX).unwrap_or(NonZeroUsize::MIN))))
    }
}

impl Streams {
    /// `from..to` of a file of this size is being read. Returns what to fetch ahead, if anything.
    pub(crate) fn advance(&self, file: u64, from: u64, to: u64, size: u64) -> Option<(u64, u64)> {
        if size <= AHEAD_MIN / 4 {
            return None;
        }
        let mut streams = self.0.lock();
        let Some(stream) = streams.get_mut(&file) else {
            // A file that is read from its beginning will probably be read to its end.
            let window = if from == 0 { AHEAD_MIN } else { 0 };
            let ahead = (to + window).min(size);
            streams.put(file, Stream { next: to, ahead, window });
            return (ahead > to).then_some((to, ahead));
        };
        if from.abs_diff(stream.next) > DISORDER || (from < stream.next && to + DISORDER < stream.next) {
            *stream = Stream { next: to, ahead: to, window: 0 };
            return None;
        }
        stream.next = stream.next.max(to);
        stream.ahead = stream.ahead.max(stream.next);
        if stream.ahead >= size || stream.ahead - stream.next > stream.window / 2 {
            return None;
        }
        stream.window = (stream.window * 2).clamp(AHEAD_MIN, AHEAD_MAX);
        let begin = stream.ahead;
        stream.ahead = (stream.next + stream.window).min(size);
        (begin < stream.ahead).then_some((begin, stream.ahead))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequential_reader_is_run_ahead_of_and_a_random_one_is_not() {
        let streams = Streams::default();
        let size = 1 << 30;
        let (mut ahead, mut at) = (0, 0);
        for _ in 0..200 {
            if let Some((from, to)) = streams.advance(1, at, at + 131_072, size) {
                assert!(from == ahead.max(at + 131_072) || ahead == 0, "nothing is fetched twice, nothing left out");
                ahead = to;
            }
            at += 131_072;
            assert!(ahead >= at && ahead <= at + AHEAD_MAX + 131_072);
        }
        assert!(streams.advance(1, 1 << 29, (1 << 29) + 4096, size).is_none());
        assert!(streams.advance(1, 1 << 20, (1 << 20) + 4096, size).is_none());
        assert!(streams.advance(2, 0, 4096, 4096).is_none());
    }
}
