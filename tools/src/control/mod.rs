//! How commands talk to the daemon of their machine: a unix socket (mode 0600), a line of JSON for the request, lines of
//! JSON for the answers, the last of which is not a `Progress` or an `Event`. A mount hands over the descriptor of
//! /dev/fuse with its request (SCM_RIGHTS).
//!
//! Invariants: a request is at most [`REQUEST_BYTES_MAX`]; only root and the daemon's own user get an answer; a client
//! never waits longer than it said, whatever the daemon does.

pub mod client;
pub mod server;
mod shell;

use crate::events::Event;
use crate::status::{SCHEMA_VERSION, Status};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The longest request line.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;

/// What a command asks of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Are you there?
    Ping,
    /// The report.
    Status,
    /// Events after number `since`; with `follow`, also those to come, until the client goes.
    Events {
        /// The newest event already known; 0 for all that are kept.
        since: u64,
        /// Whether to wait for more.
        follow: bool,
    },
    /// A token with which a new node can join.
    Token,
    /// Prepare a disk or file and give it to the cluster.
    DiskAdd {
        /// The device or file.
        path: PathBuf,
        /// Size of a file to be made; `None` for a device or a file that is there.
        size_bytes: Option<u64>,
    },
    /// Put a disk in a failed one's place; it is prepared first, unless it is a disk of this node already.
    DiskReplace {
        /// The failed disk.
        old: u32,
        /// The device or file.
        path: PathBuf,
        /// Size of a file to be made; `None` for a device or a file that is there.
        size_bytes: Option<u64>,
    },
    /// Make a file system.
    Mkfs {
        /// Its name.
        name: String,
        /// Copies of every block.
        copies: u8,
        /// Usable size; `None` for all free space.
        size_bytes: Option<u64>,
    },
    /// Serve a file system on the descriptor of /dev/fuse that comes with this request.
    Mount {
        /// Name of the file system.
        fs: String,
        /// Where it is mounted.
        dir: PathBuf,
        /// The options that it was mounted with, to mount it again when the daemon starts the next time.
        options: Vec<String>,
    },
    /// The collector of leaked blocks.
    Gc {
        /// Name of the file system.
        fs: String,
        /// What to do.
        action: TaskAction,
        /// Only tell what would be freed.
        dry_run: bool,
    },
    /// Reading all copies and repairing those that are damaged.
    Scrub {
        /// What to do.
        action: TaskAction,
    },
    /// A read-only check of a file system in use.
    Fsck {
        /// Name of the file system.
        fs: String,
    },
    /// Make everything durable that programs on this node have written.
    Sync,
    /// End the daemon cleanly: flush, unmount, give back what it holds.
    Stop,
}

/// What to do with a long task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskAction {
    /// Begin, or go on.
    Start,
    /// Tell how far it is.
    Status,
    /// Stop after the present step.
    Stop,
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Done.
    Done {
        /// What was done, in words; may be empty.
        text: String,
    },
    /// The report.
    Status(Box<Status>),
    /// One event.
    Event(Event),
    /// No more events.
    EndOfEvents,
    /// A join token.
    Token {
        /// The token.
        token: String,
    },
    /// How far a long task is. More answers follow.
    Progress {
        /// In words.
        text: String,
        /// Steps done.
        done: u64,
        /// Steps in all; 0 if not known.
        total: u64,
    },
    /// State or result of a long task.
    Task(TaskReport),
    /// It did not work.
    Error {
        /// What happened, to what, and what to do.
        message: String,
    },
}

impl Answer {
    /// Done, with a text.
    pub fn done(text: impl Into<String>) -> Answer {
        Answer::Done { text: text.into() }
    }

    /// An error.
    pub fn error(message: impl Into<String>) -> Answer {
        Answer::Error { message: message.into() }
    }

    /// Whether no answer follows this one.
    #[must_use]
    pub fn is_last(&self) -> bool {
        !matches!(self, Answer::Event(_) | Answer::Progress { .. })
    }
}

/// State or result of the collector, the scrubber or a check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskReport {
    /// See [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// `gc`, `scrub`, `fsck`.
    pub task: String,
    /// `idle`, `running`, `done`, `stopped`, `failed`.
    pub state: String,
    /// Steps done.
    pub done: u64,
    /// Steps in all; 0 if not known.
    pub total: u64,
    /// Damage or garbage found.
    pub found: u64,
    /// Repaired or freed.
    pub repaired: u64,
    /// Lines for a person: what was found, each with its place.
    pub lines: Vec<String>,
}

/// A request as it goes over the socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RequestLine {
    /// See [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The request.
    pub request: Request,
}

impl RequestLine {
    /// Wraps a request.
    #[must_use]
    pub fn new(request: Request) -> Self {
        RequestLine { schema_version: SCHEMA_VERSION, request }
    }
}

/// An answer as it goes over the socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AnswerLine {
    /// See [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The answer.
    pub answer: Answer,
}
