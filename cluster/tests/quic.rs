//! Whole nodes over real sockets and files: init, join, lose a node, come back.

use cluster::config::Command;
use cluster::membership::Timing;
use cluster::node::{Cluster, Layer, View};
use cluster::shell::identity::Token;
use cluster::shell::join::{JoinError, join};
use cluster::shell::launch::{Running, launch};
use cluster::shell::state::{init, open};
use cluster::{NodeId, Transport};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

/// Addresses that nobody else takes, also while a node of the test is down: each process has a loopback address of its own,
/// and the ports are below those of outgoing connections (which begin at 32768).
fn addrs(count: usize) -> Vec<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let ip = [127, 1 + high, middle, low];
    (0..count).map(|_| SocketAddr::from((ip, NEXT.fetch_add(1, Ordering::Relaxed)))).collect()
}

/// Forgiving on a loaded machine, yet quick.
fn timing() -> Timing {
    Timing { lease: Duration::from_millis(1500), dead: Duration::from_millis(2200), ..Timing::quick() }
}

async fn run(dir: &Path, addr: SocketAddr) -> Running {
    with_layers(launch(open(dir).unwrap(), addr, None).await.unwrap())
}

fn with_layers(running: Running) -> Running {
    let weak = Arc::downgrade(&running.cluster);
    let mut view = running.cluster.view();
    // The layers' part: all recover at once.
    tokio::spawn(async move {
        loop {
            let now = view.borrow_and_update().clone();
            let Some(node) = weak.upgrade() else { return };
            if now.member {
                for layer in [Layer::Mirror, Layer::Sld, Layer::Fs] {
                    node.finish(now.epoch(), layer);
                }
            }
            drop(node);
            if view.changed().await.is_err() {
                return;
            }
        }
    });
    running
}

fn view(node: &Running) -> Arc<View> {
    node.cluster.view().borrow().clone()
}

async fn settled(nodes: &[&Running], up: usize) {
    let all = || {
        nodes.iter().all(|n| {
            let v = view(n);
            v.member && v.recovered == Layer::Fs && v.config.up().len() == up && v.epoch() == view(nodes[0]).epoch()
        }) && nodes.iter().all(|n| n.cluster.lease_valid())
    };
    for _ in 0..2000 {
        if all() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let views: Vec<_> = nodes.iter().map(|n| (view(n).epoch(), view(n).member, view(n).recovered, view(n).config.up())).collect();
    panic!("{up} nodes do not settle: {views:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_machines_join_lose_one_and_get_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let at = addrs(3);
    let dirs: Vec<_> = (1..=3).map(|n| dir.path().join(format!("n{n}"))).collect();
    let token = init(&dirs[0], "n1", &at[0].to_string(), "test", timing()).unwrap().print();
    let token = Token::parse(&token).unwrap();
    let one = run(&dirs[0], at[0]).await;
    settled(&[&one], 1).await;

    assert_eq!(join(&dirs[1], &token, "n2", &at[1].to_string()).await.unwrap(), NodeId(2));
    let two = run(&dirs[1], at[1]).await;
    settled(&[&one, &two], 2).await;
    // A token made later, by a node that joined.
    let token = two.token(Duration::from_secs(60)).await.unwrap();
    let taken = join(&dirs[2], &token, "n2", &at[2].to_string()).await;
    assert!(matches!(&taken, Err(JoinError::Refused(why)) if why.contains("n2")), "{taken:?}");
    assert_eq!(join(&dirs[2], &token, "n3", &at[2].to_string()).await.unwrap(), NodeId(3));
    let three = run(&dirs[2], at[2]).await;
    settled(&[&one, &two, &three], 3).await;
    assert!(join(&dirs[2], &token, "n4", "127.0.0.1:1").await.is_err(), "the directory is taken");

    // The voters are three by and by; then the first node, which led, may go.
    for _ in 0..1000 {
        if view(&one).config.nodes.values().all(|n| n.voter) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let epoch = view(&two).epoch();
    let gone = tokio::time::Instant::now();
    one.shutdown().await;
    drop(one);
    settled(&[&two, &three], 2).await;
    assert!(view(&two).epoch() > epoch);
    // How soon is the machine's matter; that it happens is checked above.
    println!("a dead leader's cluster was whole again after {:?}", gone.elapsed());

    let again = tokio::time::Instant::now();
    let one = run(&dirs[0], at[0]).await;
    settled(&[&one, &two, &three], 3).await;
    println!("a restarted node was back after {:?}", again.elapsed());
    one.cluster.propose(Command::SetVoter { node: NodeId(1), voter: true }).await.unwrap();
    // One moves to another address.
    one.shutdown().await;
    drop(one);
    let moved = addrs(1)[0];
    let one = launch(open(&dirs[0]).unwrap(), moved, Some(moved.to_string())).await.unwrap();
    let one = with_layers(one);
    settled(&[&one, &two, &three], 3).await;
    assert_eq!(view(&three).config.nodes[&NodeId(1)].addr, moved.to_string());
    // All stop, and start with what they had.
    for node in [&one, &two, &three] {
        node.shutdown().await;
    }
    drop((one, two, three));
    let again = tokio::time::Instant::now();
    let mut nodes = Vec::new();
    for n in 0..3 {
        nodes.push(run(&dirs[n], at[n]).await);
    }
    settled(&nodes.iter().collect::<Vec<_>>(), 3).await;
    println!("a restarted cluster was whole after {:?}", again.elapsed());
    for node in &nodes {
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_get_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = addrs(3);
    let token = init(&dir.path().join("n1"), "n1", &at[0].to_string(), "test", timing()).unwrap();
    let one = run(&dir.path().join("n1"), at[0]).await;
    settled(&[&one], 1).await;

    let mut guessed = token.clone();
    guessed.secret[31] ^= 1;
    let refused = join(&dir.path().join("a"), &guessed, "a", &at[1].to_string()).await;
    assert!(matches!(&refused, Err(JoinError::Refused(why)) if why.contains("token")), "{refused:?}");

    // Another cluster that answers in the first one's place is not told the secret.
    let other = init(&dir.path().join("o1"), "o1", &at[2].to_string(), "other", timing()).unwrap();
    let running = run(&dir.path().join("o1"), at[2]).await;
    let mut misled = token.clone();
    misled.members = other.members.clone();
    let refused = join(&dir.path().join("b"), &misled, "b", &at[1].to_string()).await;
    assert!(matches!(refused, Err(JoinError::Unreachable(_))), "{refused:?}");

    let mut nobody = token;
    nobody.members = vec![(NodeId(1), at[1].to_string())];
    let start = tokio::time::Instant::now();
    let refused = join(&dir.path().join("c"), &nobody, "c", &at[1].to_string()).await;
    assert!(matches!(refused, Err(JoinError::Unreachable(_))), "{refused:?}");
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(view(&one).config.nodes.len(), 1);

    // A client without a certificate: its handshake may succeed, its streams are never read.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(one.identity.tls().authority).unwrap();
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![cluster::shell::transport::ALPN_MEMBER.to_vec()];
    let config = quinn::ClientConfig::new(Arc::new(quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap()));
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let name = cluster::shell::transport::node_name(NodeId(1), &one.identity.cluster);
    let ended = match endpoint.connect_with(config, at[0], &name).unwrap().await {
        Ok(connection) => {
            if let Ok(mut stream) = connection.open_uni().await {
                let _ = stream.write_all(b"PLSR\x01\x00\x01\x00\x02\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00").await;
            }
            connection.closed().await
        }
        Err(e) => e,
    };
    assert!(matches!(ended, quinn::ConnectionError::ApplicationClosed(_)), "{ended:?}");
    assert_eq!(one.transport.local(), NodeId(1));
    one.shutdown().await;
    running.shutdown().await;
}
