//! Measures the transport by itself: bulk MB/s one way, and 4 KiB requests answered per second, over loopback.
//!
//! `cargo run --release -p pulsar-cluster --example transport [SECONDS]`

use bytes::Bytes;
use cluster::shell::transport::testing::Authority;
use cluster::shell::transport::{QuicOptions, QuicTransport};
use cluster::transport::PeerAddr;
use cluster::{Incarnation, Message, NodeId, Peer, Receiver, Service, Transport};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Counts bulk messages and answers requests.
struct Server(Arc<QuicTransport>);

impl Receiver for Server {
    fn receive(&self, from: Peer, message: Message) {
        let answer = if message.head == "bulk" { Message::new("ok") } else { Message { head: "page".into(), ..message } };
        self.0.send(from.node, Service::Mirror, answer);
    }
    fn session_ended(&self, node: NodeId) {
        eprintln!("session with {node} ended");
    }
}

struct Client(mpsc::UnboundedSender<usize>);

impl Receiver for Client {
    fn receive(&self, _: Peer, message: Message) {
        let _ = self.0.send(message.len());
    }
    fn session_ended(&self, node: NodeId) {
        eprintln!("session with {node} ended");
    }
}

#[allow(clippy::disallowed_methods, reason = "a benchmark reads the clock")]
async fn run(
    client: &QuicTransport,
    answers: &mut mpsc::UnboundedReceiver<usize>,
    m: &Message,
    depth: usize,
    time: Duration,
) -> f64 {
    for _ in 0..depth {
        client.send(NodeId(2), Service::Mirror, m.clone());
    }
    let start = Instant::now();
    let mut n = 0u32;
    while start.elapsed() < time {
        if answers.recv().await.is_none() {
            break;
        }
        n += 1;
        client.send(NodeId(2), Service::Mirror, m.clone());
    }
    let rate = f64::from(n) / start.elapsed().as_secs_f64();
    for _ in 0..depth {
        answers.recv().await;
    }
    rate
}

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let time = Duration::from_secs(std::env::args().nth(1).map_or(Ok(3), |a| a.parse())?);
    let authority = Authority::new([7; 16])?;
    let mut nodes = Vec::new();
    for n in [1, 2] {
        let identity = authority.identity(NodeId(n))?;
        let listen = "127.0.0.1:0".parse()?;
        nodes.push(
            QuicTransport::start(QuicOptions { me: NodeId(n), incarnation: Incarnation(1), listen, identity, join: None })
                .await?,
        );
    }
    let mut peers = BTreeMap::new();
    for n in &nodes {
        peers.insert(n.local(), PeerAddr { addr: n.local_addr()?.to_string(), incarnation: Incarnation(1) });
    }
    for n in &nodes {
        n.configure(Incarnation(1), &peers);
    }
    let (send, mut answers) = mpsc::unbounded_channel();
    nodes[0].register(Service::Mirror, Arc::new(Client(send)));
    nodes[1].register(Service::Mirror, Arc::new(Server(nodes[1].clone())));
    let page = Bytes::from(vec![1u8; 4096]);
    let small = Message { head: "page".into(), parts: vec![page.clone()] };
    let bulk = Message { head: "bulk".into(), parts: vec![page; 256] };
    run(&nodes[0], &mut answers, &small, 1, time / 4).await;
    println!("4 KiB echoed, one at a time: {:.0}/s", run(&nodes[0], &mut answers, &small, 1, time).await);
    println!("4 KiB echoed, 16 at a time:  {:.0}/s", run(&nodes[0], &mut answers, &small, 16, time).await);
    println!("1 MiB one way, 8 at a time:  {:.0} MB/s", run(&nodes[0], &mut answers, &bulk, 8, time).await * 1.048_576);
    Ok(())
}
