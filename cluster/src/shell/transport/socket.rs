//! A UDP socket that can be taken away from QUIC.
//!
//! `quinn` keeps its socket until every handle is gone *and* every connection has drained. A closed connection drains for
//! three times its probe timeout, which follows the measured round trip: seconds, on a machine that was busy. A transport
//! that has shut down must have given its address back, whatever the state of its connections.
//!
//! Invariants:
//! - After [`Socket::release`] the operating system's socket is closed, whoever still holds this one.
//! - What is sent afterwards is lost, as datagrams may be; nothing is received any more; nobody waits to send.
//!
//! Excludes: binding and buffers (the parent module), the system calls (`quinn`'s own socket).

use parking_lot::{Mutex, RwLock};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// Those that wait until they can send, each with what registers it. They hold the inner socket, so they are kept here.
#[derive(Debug, Default)]
struct Pollers {
    last: u64,
    pollers: BTreeMap<u64, Pin<Box<dyn UdpPoller>>>,
}

/// The socket.
#[derive(Debug)]
pub(super) struct Socket {
    /// `None` once it is released.
    inner: RwLock<Option<Arc<dyn AsyncUdpSocket>>>,
    pollers: Mutex<Pollers>,
    addr: SocketAddr,
}

impl Socket {
    pub(super) fn new(inner: Arc<dyn AsyncUdpSocket>) -> io::Result<Self> {
        let addr = inner.local_addr()?;
        Ok(Socket { inner: RwLock::new(Some(inner)), pollers: Mutex::default(), addr })
    }

    /// Closes the operating system's socket, now.
    pub(super) fn release(&self) {
        let inner = self.inner.write().take();
        // No new one can come: they are made under the lock of `inner`.
        let pollers = std::mem::take(&mut self.pollers.lock().pollers);
        drop((inner, pollers));
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        let number = {
            let inner = self.inner.read();
            let mut pollers = self.pollers.lock();
            pollers.last += 1;
            let number = pollers.last;
            if let Some(inner) = inner.as_ref() {
                pollers.pollers.insert(number, Arc::clone(inner).create_io_poller());
            }
            number
        };
        Box::pin(Poller { socket: self, number })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.read().as_ref().map_or(Ok(()), |inner| inner.try_send(transmit))
    }

    fn poll_recv(&self, cx: &mut Context<'_>, bufs: &mut [io::IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        self.inner.read().as_ref().map_or(Poll::Pending, |inner| inner.poll_recv(cx, bufs, meta))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.addr)
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.read().as_ref().map_or(1, |inner| inner.max_transmit_segments())
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.read().as_ref().map_or(1, |inner| inner.max_receive_segments())
    }

    fn may_fragment(&self) -> bool {
        self.inner.read().as_ref().is_none_or(|inner| inner.may_fragment())
    }
}

/// Waits for one task until the socket can send.
#[derive(Debug)]
struct Poller {
    socket: Arc<Socket>,
    number: u64,
}

impl UdpPoller for Poller {
    fn poll_writable(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut pollers = self.socket.pollers.lock();
        pollers.pollers.get_mut(&self.number).map_or(Poll::Ready(Ok(())), |p| p.as_mut().poll_writable(cx))
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        let poller = self.socket.pollers.lock().pollers.remove(&self.number);
        drop(poller);
    }
}
