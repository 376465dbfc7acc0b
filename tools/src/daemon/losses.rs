//! Tells of files that lost written-behind data: by path where they have one, so that somebody can look after them.
//!
//! Programs are told by `EIO` (`sld` keeps account of that); this is for people. Bounded: of many files some are named, and
//! all are counted.

use super::node::{Node, PulsarFs};
use crate::events::{EventLog, Kind};
use fs::Ino;
use std::fmt::Write;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// The most files of one loss that are named.
const NAMED_MAX: usize = 100;
/// How long finding a path may take: the node has to be let back in first.
const PATH_TIME_MAX: Duration = Duration::from_secs(30);

/// Tells of a loss; the names follow as they are found. Returns at once.
pub(super) fn tell(node: &Weak<Node>, fs: &Weak<PulsarFs>, name: &str, files: Vec<Ino>) {
    let (Some(node), Some(fs)) = (node.upgrade(), fs.upgrade()) else { return };
    if files.is_empty() {
        return;
    }
    let events = node.events().clone();
    events.add(Kind::Lost, true, summary(name, files.len()));
    let name = name.to_owned();
    node.spawn(async move { tell_names(&events, &fs, &name, &files).await });
}

async fn tell_names(events: &EventLog, fs: &Arc<PulsarFs>, name: &str, files: &[Ino]) {
    let mut patience = PATH_TIME_MAX;
    for ino in files.iter().take(NAMED_MAX) {
        let path = match tokio::time::timeout(patience, fs.path_of(*ino)).await {
            Ok(Ok(path)) => path,
            Ok(Err(_)) => None,
            Err(_) => {
                // Whatever it waits for, the next one would, too.
                patience = Duration::ZERO;
                None
            }
        };
        events.add(Kind::Lost, true, named(name, *ino, path.as_deref()));
    }
    if let Some(more) = files.len().checked_sub(NAMED_MAX).filter(|more| *more > 0) {
        events.add(Kind::Lost, true, format!("{name}: {more} more files lost data; they are not named one by one"));
    }
}

fn summary(name: &str, count: usize) -> String {
    format!(
        "{name}: what was written here to {count} file(s) and not yet fsync'd is lost; each gives EIO once, at fsync or close"
    )
}

/// A path may hold any byte: what is not printable is shown as a number, so that no name can look like another event.
fn named(name: &str, ino: Ino, path: Option<&[u8]>) -> String {
    let Some(path) = path else { return format!("{name}: data of inode {} is lost (no path is known)", ino.0) };
    let mut shown = String::from("/");
    for chunk in path.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() || c == '\\' {
                let _ = write!(shown, "{}", c.escape_default());
            } else {
                shown.push(c);
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(shown, "\\x{byte:02x}");
        }
    }
    format!("{name}: data of {shown} (inode {}) is lost", ino.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_in_a_way_that_cannot_mislead() {
        assert_eq!(named("data", Ino(7), Some(b"a/\xc3\xa4")), "data: data of /a/ä (inode 7) is lost");
        assert_eq!(named("data", Ino(7), Some(b"a\nb\\\xff")), "data: data of /a\\nb\\\\\\xff (inode 7) is lost");
        assert_eq!(named("data", Ino(7), None), "data: data of inode 7 is lost (no path is known)");
        assert!(summary("data", 12).starts_with("data: what was written here to 12 file(s)"));
    }
}
