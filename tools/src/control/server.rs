//! The daemon's end of the control socket.

use super::{Answer, AnswerLine, REQUEST_BYTES_MAX, Request, RequestLine, shell};
use crate::failure::{Context, Failure, Outcome};
use crate::status::SCHEMA_VERSION;
use cluster::BoxFuture;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};

/// Connections served at a time; more wait.
const CONNECTIONS_MAX: usize = 64;
/// How long a client may take to send its request.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(10);
/// Answers that wait for a slow client.
const ANSWERS_QUEUED_MAX: usize = 64;

/// What does the work.
pub trait Handler: Send + Sync + 'static {
    /// Answers a request; the last answer sent must be one for which [`Answer::is_last`] holds. Dropped when the client
    /// goes: what must not be stopped halfway belongs into a task of its own.
    fn handle(self: Arc<Self>, request: Request, fd: Option<OwnedFd>, answers: mpsc::Sender<Answer>) -> BoxFuture<'static, ()>;
}

/// A listening control socket. It is removed when this is dropped.
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Server {
    /// Listens. A socket that a dead daemon left is replaced; the caller makes sure (by the lock on the state
    /// directory) that no other daemon lives there.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn bind(path: &Path) -> Outcome<Server> {
        let what = || format!("cannot listen on the control socket {}", path.display());
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).context(what)?;
        }
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Failure::new(format!("{}: {e}", what()))),
            _ => {}
        }
        let (short, _dir) = shell::short_path(path).context(what)?;
        let listener = UnixListener::bind(short).context(what)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).context(what)?;
        Ok(Server { listener, path: path.to_path_buf() })
    }

    /// Serves for ever (until the future is dropped).
    pub async fn run(&self, handler: Arc<impl Handler>) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut tasks = tokio::task::JoinSet::new();
        loop {
            while tasks.try_join_next().is_some() {}
            let Ok(place) = places.clone().acquire_owned().await else { return };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let handler = handler.clone();
                    tasks.spawn(async move {
                        serve(stream, handler).await;
                        drop(place);
                    });
                }
                Err(e) => {
                    tracing::warn!("control socket: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

async fn serve(mut stream: UnixStream, handler: Arc<impl Handler>) {
    let owner = nix::unistd::geteuid().as_raw();
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == 0 || peer.uid() == owner => {}
        _ => return,
    }
    let (request, fd) = match tokio::time::timeout(REQUEST_TIME_MAX, read_request(&stream)).await {
        Ok(Ok(request)) => request,
        Ok(Err(e)) => {
            let _ = write(&mut stream, Answer::error(format!("the request was not understood: {e}"))).await;
            return;
        }
        Err(_) => return,
    };
    let (sender, mut receiver) = mpsc::channel(ANSWERS_QUEUED_MAX);
    let mut work = handler.handle(request, fd, sender);
    let mut working = true;
    loop {
        tokio::select! {
            biased;
            answer = receiver.recv() => {
                let Some(answer) = answer else { return };
                let last = answer.is_last();
                if write(&mut stream, answer).await.is_err() || last {
                    return;
                }
            }
            () = &mut work, if working => working = false,
            () = gone(&stream) => return,
        }
    }
}

/// Resolves when the client has closed its end.
async fn gone(stream: &UnixStream) {
    loop {
        match stream.ready(Interest::READABLE).await {
            Ok(ready) if ready.is_read_closed() => return,
            Ok(_) => {
                // Bytes after the request mean nothing; reading them keeps this from spinning.
                let mut waste = [0; 512];
                match stream.try_read(&mut waste) {
                    Ok(0) => return,
                    Err(e) if e.kind() != std::io::ErrorKind::WouldBlock => return,
                    _ => {}
                }
            }
            Err(_) => return,
        }
    }
}

async fn write(stream: &mut UnixStream, answer: Answer) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(&AnswerLine { schema_version: SCHEMA_VERSION, answer })?;
    line.push(b'\n');
    stream.write_all(&line).await
}

async fn read_request(stream: &UnixStream) -> Result<(Request, Option<OwnedFd>), String> {
    let mut line = Vec::new();
    let mut fds = Vec::new();
    let mut buffer = [0; 4096];
    while line.last() != Some(&b'\n') {
        let n = stream
            .async_io(Interest::READABLE, || shell::receive(stream.as_fd(), &mut buffer, &mut fds))
            .await
            .map_err(|e| e.to_string())?;
        if n == 0 {
            return Err("it ended too soon".into());
        }
        line.extend_from_slice(buffer.get(..n).unwrap_or_default());
        if line.len() > REQUEST_BYTES_MAX {
            return Err("it is too long".into());
        }
    }
    let line: RequestLine = serde_json::from_slice(&line).map_err(|e| e.to_string())?;
    if line.schema_version != SCHEMA_VERSION {
        return Err(format!(
            "it is of version {}, this daemon speaks version {SCHEMA_VERSION}; use the pulsar command that came with it",
            line.schema_version
        ));
    }
    Ok((line.request, fds.into_iter().next()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::client::{Client, NoAnswer, QUICK};
    use std::io::Read;

    struct Echo;

    impl Handler for Echo {
        fn handle(
            self: Arc<Self>,
            request: Request,
            fd: Option<OwnedFd>,
            answers: mpsc::Sender<Answer>,
        ) -> BoxFuture<'static, ()> {
            Box::pin(async move {
                match request {
                    Request::Sync => std::future::pending().await,
                    _ => {
                        let progress = Answer::Progress { text: "half".into(), done: 1, total: 2 };
                        let _ = answers.send(progress).await;
                        let mut text = String::new();
                        if let Some(fd) = fd {
                            std::fs::File::from(fd).read_to_string(&mut text).unwrap();
                        }
                        let _ = answers.send(Answer::done(text)).await;
                    }
                }
            })
        }
    }

    #[test]
    fn calls_pass_descriptors_and_never_hang() {
        let dir = tempfile::tempdir().unwrap();
        // Longer than a socket address may be.
        let deep = dir.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let path = deep.join("control.sock");
        let client = Client::new(&path);
        assert!(matches!(client.try_call(Request::Ping, QUICK), Err(NoAnswer::NotRunning(..))));

        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let server = {
            let _inside = runtime.enter();
            Server::bind(&path).unwrap()
        };
        let task = runtime.spawn(async move { server.run(Arc::new(Echo)).await });
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

        let file = dir.path().join("f");
        std::fs::write(&file, "hello").unwrap();
        let mut steps = 0;
        let fd = OwnedFd::from(std::fs::File::open(&file).unwrap());
        let answer = client.call_with(Request::Ping, Some(fd), QUICK, |_| steps += 1);
        assert_eq!((answer, steps), (Ok(Answer::done("hello")), 1));
        let frozen = client.try_call(Request::Sync, Duration::from_millis(50));
        assert!(matches!(frozen, Err(NoAnswer::TimedOut(_))));
        task.abort();
        let _ = runtime.block_on(task);
        assert!(!path.exists());
    }
}
