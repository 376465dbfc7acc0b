//! The command's end of the control socket. It never waits longer than it was told to, even for a frozen daemon.

use super::{Answer, AnswerLine, Request, RequestLine, shell};
use crate::failure::{Failure, Outcome};
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

/// How long a question that needs no work may take.
pub const QUICK: Duration = Duration::from_secs(2);

/// Why there was no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// No daemon.
    #[error(
        "pulsard does not run on this machine (nothing listens on {0}: {1}); start it with 'systemctl start pulsard' or 'pulsar start'"
    )]
    NotRunning(String, String),
    /// Not allowed.
    #[error("{0} may be used by root only; try with sudo")]
    NotAllowed(String),
    /// No answer in time.
    #[error("pulsard did not answer within {0} s: it is frozen or the machine is overloaded; see its log")]
    TimedOut(u64),
    /// The connection broke.
    #[error("pulsard ended the connection before it had answered: {0}; see its log")]
    Broken(String),
}

impl From<NoAnswer> for Failure {
    fn from(e: NoAnswer) -> Failure {
        Failure::new(e.to_string())
    }
}

/// The daemon of this machine, by its socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// For a control socket.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Client { socket: socket.into() }
    }

    /// The socket's path.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks, and returns the last answer; those before it go to `progress`. `idle` bounds the time to each answer.
    ///
    /// # Errors
    /// If there is no answer in time. An [`Answer::Error`] is turned into a `Failure`.
    pub fn call_with(
        &self,
        request: Request,
        fd: Option<OwnedFd>,
        idle: Duration,
        mut progress: impl FnMut(Answer),
    ) -> Outcome<Answer> {
        let answers = self.open(request, fd);
        loop {
            match next(&answers, idle)? {
                Answer::Error { message } => return Err(Failure::new(message)),
                answer if answer.is_last() => return Ok(answer),
                answer => progress(answer),
            }
        }
    }

    /// Asks, and returns the answer.
    ///
    /// # Errors
    /// As [`Client::call_with`].
    pub fn call(&self, request: Request, idle: Duration) -> Outcome<Answer> {
        self.call_with(request, None, idle, |_| {})
    }

    /// Whether the daemon answers within two seconds; says why not.
    ///
    /// # Errors
    /// The reason.
    pub fn try_call(&self, request: Request, idle: Duration) -> Result<Answer, NoAnswer> {
        next(&self.open(request, None), idle)
    }

    /// Asks in a thread of its own, since neither connecting nor reading has a bound by itself.
    fn open(&self, request: Request, fd: Option<OwnedFd>) -> mpsc::Receiver<Result<Answer, NoAnswer>> {
        let (sender, receiver) = mpsc::sync_channel(64);
        let socket = self.socket.clone();
        std::thread::spawn(move || {
            if let Err(e) = converse(&socket, request, fd, &sender) {
                let _ = sender.send(Err(e));
            }
        });
        receiver
    }
}

fn next(answers: &mpsc::Receiver<Result<Answer, NoAnswer>>, idle: Duration) -> Result<Answer, NoAnswer> {
    match answers.recv_timeout(idle) {
        Ok(answer) => answer,
        Err(mpsc::RecvTimeoutError::Timeout) => Err(NoAnswer::TimedOut(idle.as_secs())),
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(NoAnswer::Broken("no answer".into())),
    }
}

fn converse(
    socket: &Path,
    request: Request,
    fd: Option<OwnedFd>,
    answers: &mpsc::SyncSender<Result<Answer, NoAnswer>>,
) -> Result<(), NoAnswer> {
    let name = socket.display().to_string();
    let no_daemon = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::PermissionDenied => NoAnswer::NotAllowed(name.clone()),
        _ => NoAnswer::NotRunning(name.clone(), e.to_string()),
    };
    let broken = |e: std::io::Error| NoAnswer::Broken(e.to_string());
    let (short, _dir) = shell::short_path(socket).map_err(no_daemon)?;
    let stream = UnixStream::connect(short).map_err(no_daemon)?;
    let mut line = serde_json::to_vec(&RequestLine::new(request)).map_err(|e| NoAnswer::Broken(e.to_string()))?;
    line.push(b'\n');
    let mut sent = 0;
    let mut fd = fd;
    while let Some(rest) = line.get(sent..).filter(|r| !r.is_empty()) {
        sent += shell::send(stream.as_fd(), rest, fd.as_ref().map(AsFd::as_fd)).map_err(broken)?;
        fd = None;
    }
    for line in BufReader::new(stream).lines() {
        let line: AnswerLine =
            serde_json::from_str(&line.map_err(broken)?).map_err(|e| NoAnswer::Broken(format!("not understood: {e}")))?;
        let last = line.answer.is_last();
        if answers.send(Ok(line.answer)).is_err() || last {
            return Ok(());
        }
    }
    Err(NoAnswer::Broken("end of file".into()))
}
