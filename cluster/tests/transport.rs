//! The QUIC transport on real sockets of the loopback interface.

use bytes::Bytes;
use cluster::shell::transport::testing::Authority;
use cluster::shell::transport::{QuicOptions, QuicTransport, TlsIdentity};
use cluster::transport::{PeerAddr, PeerWatcher};
use cluster::{Incarnation, Message, NodeId, Peer, Receiver, Service, Transport};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Passes on what it is told.
struct Listener(mpsc::UnboundedSender<Event>);

#[derive(Debug, PartialEq)]
enum Event {
    Message(NodeId, Incarnation, Message),
    Ended(NodeId),
    Gone(NodeId, Incarnation),
}

impl Receiver for Listener {
    fn receive(&self, from: Peer, message: Message) {
        let _ = self.0.send(Event::Message(from.node, from.incarnation, message));
    }
    fn session_ended(&self, node: NodeId) {
        let _ = self.0.send(Event::Ended(node));
    }
}

impl PeerWatcher for Listener {
    fn process_gone(&self, node: NodeId, upto: Incarnation) {
        let _ = self.0.send(Event::Gone(node, upto));
    }
}

struct Node {
    transport: Arc<QuicTransport>,
    events: mpsc::UnboundedReceiver<Event>,
    addr: PeerAddr,
}

async fn start(node: u32, identity: TlsIdentity) -> Node {
    let transport = QuicTransport::start(QuicOptions {
        me: NodeId(node),
        incarnation: Incarnation(1),
        listen: "127.0.0.1:0".parse().unwrap(),
        identity,
        join: None,
    })
    .await
    .unwrap();
    let (send, events) = mpsc::unbounded_channel();
    for service in Service::ALL {
        transport.register(service, Arc::new(Listener(send.clone())));
    }
    transport.watch(Arc::new(Listener(send)));
    let addr = PeerAddr { addr: transport.local_addr().unwrap().to_string(), incarnation: Incarnation(1) };
    Node { transport, events, addr }
}

/// Nothing here waits on a clock but to fail.
async fn next(node: &mut Node) -> Event {
    tokio::time::timeout(Duration::from_secs(20), node.events.recv()).await.expect("nothing came").unwrap()
}

fn introduce(nodes: &[&Node]) {
    let peers: BTreeMap<NodeId, PeerAddr> = nodes.iter().map(|n| (n.transport.local(), n.addr.clone())).collect();
    for n in nodes {
        n.transport.configure(Incarnation(1), &peers);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_arrive_in_order_with_their_parts() {
    let authority = Authority::new([7; 16]).unwrap();
    let a = start(1, authority.identity(NodeId(1)).unwrap()).await;
    let mut b = start(2, authority.identity(NodeId(2)).unwrap()).await;
    introduce(&[&a, &b]);
    for i in 0..2000u32 {
        let parts = vec![Bytes::from(vec![i as u8; 4096]); (i % 4) as usize];
        a.transport.send(NodeId(2), Service::Mirror, Message { head: Bytes::from(i.to_le_bytes().to_vec()), parts });
    }
    for i in 0..2000u32 {
        let Event::Message(from, life, m) = next(&mut b).await else { panic!("a session ended") };
        assert_eq!((from, life), (NodeId(1), Incarnation(1)));
        assert_eq!(&m.head[..], &i.to_le_bytes());
        assert_eq!(m.parts.len(), (i % 4) as usize);
        assert!(m.parts.iter().all(|p| p.len() == 4096 && p.iter().all(|x| *x == i as u8)));
    }
    a.transport.send(NodeId(1), Service::Token, Message::new("to myself"));
    let mut a = a;
    assert_eq!(next(&mut a).await, Event::Message(NodeId(1), Incarnation(1), Message::new("to myself")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_ends_is_noticed_and_the_session_with_it() {
    let authority = Authority::new([7; 16]).unwrap();
    let mut a = start(1, authority.identity(NodeId(1)).unwrap()).await;
    let mut b = start(2, authority.identity(NodeId(2)).unwrap()).await;
    introduce(&[&a, &b]);
    b.transport.send(NodeId(1), Service::Token, Message::new("x"));
    assert!(matches!(next(&mut a).await, Event::Message(..)));
    a.transport.send(NodeId(2), Service::Token, Message::new("y"));
    assert!(matches!(next(&mut b).await, Event::Message(..)));
    b.transport.shutdown().await;
    drop(b);
    let mut seen = (false, false);
    while seen != (true, true) {
        match next(&mut a).await {
            Event::Gone(NodeId(2), Incarnation(1)) => seen.0 = true,
            Event::Ended(NodeId(2)) => seen.1 = true,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_authority_or_under_another_name_is_not_heard() {
    let authority = Authority::new([7; 16]).unwrap();
    let other = Authority::new([7; 16]).unwrap();
    let mut a = start(1, authority.identity(NodeId(1)).unwrap()).await;
    // A certificate of somebody else's authority, and one that is right but for another node.
    let mut stranger = start(2, other.identity(NodeId(2)).unwrap()).await;
    let mut pretender = start(3, authority.identity(NodeId(4)).unwrap()).await;
    let mut honest = start(5, authority.identity(NodeId(5)).unwrap()).await;
    introduce(&[&a, &stranger, &pretender, &honest]);
    stranger.transport.send(NodeId(1), Service::Token, Message::new("stranger"));
    pretender.transport.send(NodeId(1), Service::Token, Message::new("pretender"));
    assert_eq!(next(&mut stranger).await, Event::Ended(NodeId(1)));
    assert_eq!(next(&mut pretender).await, Event::Ended(NodeId(1)));
    honest.transport.send(NodeId(1), Service::Token, Message::new("honest"));
    assert_eq!(next(&mut a).await, Event::Message(NodeId(5), Incarnation(1), Message::new("honest")));
    drop(honest.events.try_recv());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_life_ends_the_sessions_of_the_old_one() {
    let authority = Authority::new([7; 16]).unwrap();
    let mut a = start(1, authority.identity(NodeId(1)).unwrap()).await;
    let mut b = start(2, authority.identity(NodeId(2)).unwrap()).await;
    introduce(&[&a, &b]);
    a.transport.send(NodeId(2), Service::Token, Message::new("first life"));
    assert!(matches!(next(&mut b).await, Event::Message(NodeId(1), Incarnation(1), _)));
    a.transport.configure(Incarnation(2), &BTreeMap::new());
    assert_eq!(next(&mut a).await, Event::Ended(NodeId(2)));
    a.transport.send(NodeId(2), Service::Token, Message::new("second life"));
    let mut seen = Vec::new();
    while seen.len() < 3 {
        seen.push(next(&mut b).await);
    }
    assert!(seen.contains(&Event::Ended(NodeId(1))));
    assert!(seen.contains(&Event::Gone(NodeId(1), Incarnation(1))));
    assert!(seen.contains(&Event::Message(NodeId(1), Incarnation(2), Message::new("second life"))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_is_free_when_shutdown_returns() {
    let authority = Authority::new([7; 16]).unwrap();
    let mut a = start(1, authority.identity(NodeId(1)).unwrap()).await;
    let mut b = start(2, authority.identity(NodeId(2)).unwrap()).await;
    introduce(&[&a, &b]);
    a.transport.send(NodeId(2), Service::Token, Message::new("x"));
    assert!(matches!(next(&mut b).await, Event::Message(..)));
    b.transport.send(NodeId(1), Service::Token, Message::new("y"));
    assert!(matches!(next(&mut a).await, Event::Message(..)));
    let addr = a.transport.local_addr().unwrap();
    a.transport.shutdown().await;
    // The transport is still held, and told things: neither keeps the address.
    a.transport.configure(Incarnation(2), &BTreeMap::from([(NodeId(3), b.addr.clone())]));
    a.transport.send(NodeId(2), Service::Token, Message::new("late"));
    std::net::UdpSocket::bind(addr).expect("UDP");
    // As a daemon binds it: connections that have ended do not count.
    tokio::net::TcpListener::bind(addr).await.expect("TCP");
}

/// Does not return from `receive` while the gate is closed.
struct Gated {
    gate: Arc<std::sync::Mutex<()>>,
    listener: Listener,
}

impl Receiver for Gated {
    fn receive(&self, from: Peer, message: Message) {
        drop(self.gate.lock());
        self.listener.receive(from, message);
    }
    fn session_ended(&self, node: NodeId) {
        self.listener.session_ended(node);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_sends_to_itself_is_bounded_like_everything() {
    let authority = Authority::new([7; 16]).unwrap();
    let mut a = start(1, authority.identity(NodeId(1)).unwrap()).await;
    let (send, events) = mpsc::unbounded_channel();
    a.events = events;
    let gate = Arc::new(std::sync::Mutex::new(()));
    a.transport.register(Service::Token, Arc::new(Gated { gate: gate.clone(), listener: Listener(send) }));
    {
        let _closed = gate.lock().unwrap();
        for _ in 0..200_000 {
            a.transport.send(NodeId(1), Service::Token, Message::new("too many"));
        }
    }
    let mut delivered = 0;
    while next(&mut a).await != Event::Ended(NodeId(1)) {
        delivered += 1;
    }
    assert!(delivered < 200_000);
    // The others were not held up, and the next session works.
    a.transport.send(NodeId(1), Service::Token, Message::new("again"));
    assert_eq!(next(&mut a).await, Event::Message(NodeId(1), Incarnation(1), Message::new("again")));
}
