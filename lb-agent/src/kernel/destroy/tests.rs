//! Real sockets on loopback, and real maps.

use super::*;
use crate::kernel::testing::Bpffs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Instant;

/// Discard: nothing is listening, and nothing is sent.
const V4: &str = "127.0.0.1:9";
const V6: &str = "[::1]:9";
const MAPPED: &str = "[::ffff:127.0.0.1]:9";

fn connected(to: &str) -> UdpSocket {
    let to: SocketAddr = to.parse().expect("an address");
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).expect("a socket");
    socket.connect(to).expect("connect");
    socket
}

fn destroyer(bpffs: &Bpffs) -> Destroyer {
    Destroyer::open(&bpffs.pins, Diag::open().expect("netlink")).expect("maps")
}

/// As the connect hook leaves it.
fn enter(destroyer: &mut Destroyer, socket: &UdpSocket, backend_id: u32, backend_epoch: u32) {
    let addr = match socket.peer_addr().expect("connected").ip() {
        IpAddr::V4(ip) => Ip6::mapped(ip.into()),
        IpAddr::V6(ip) => ip.into(),
    };
    let cookie = socket2::SockRef::from(socket).cookie().expect("a cookie");
    let key = SocketKey { cookie, addr, port: NetPort::new(9), proto: UDP, direction: TO_SERVICE, pad: 0 };
    let peer = SocketPeer { backend_id, backend_epoch, ..SocketPeer::default() };
    destroyer.sockets.insert(key, peer, 0).expect("an entry");
}

fn is_ended(socket: &UdpSocket) -> bool {
    socket.take_error().expect("its error").is_some_and(|e| e.kind() == ErrorKind::ConnectionAborted)
}

#[test]
fn sockets_end_when_the_hook_connected_them_and_the_backend_is_gone() {
    let bpffs = Bpffs::with_flows(1024);
    let mut destroyer = destroyer(&bpffs);
    probe(&destroyer.diag).expect("this kernel has CONFIG_INET_DIAG_DESTROY and CONFIG_INET_UDP_DIAG");
    let gone = [V4, V6, MAPPED].map(connected);
    let (alive, direct) = ([V4, V6, MAPPED].map(connected), [V4, V6, MAPPED].map(connected));
    for socket in &gone {
        enter(&mut destroyer, socket, 5, 7);
    }
    for (socket, id) in alive.iter().zip([6, 6, 0]) {
        enter(&mut destroyer, socket, id, 3);
    }
    destroyer.epochs.set(5, 7, 0).expect("an epoch");
    destroyer.epochs.set(6, 3, 0).expect("an epoch");
    assert_eq!(destroyer.look().expect("look"), 0);
    assert!(!gone.iter().any(is_ended), "nothing has happened yet");
    destroyer.epochs.set(5, 8, 0).expect("an epoch");
    assert_eq!(destroyer.look().expect("look"), 3);
    assert!(gone.iter().all(is_ended) && !alive.iter().chain(&direct).any(is_ended));
    assert!(gone.iter().all(|socket| socket.peer_addr().is_err()), "connected to nobody");
    assert_eq!(destroyer.look().expect("look"), 0, "there is nothing left to do");
    // The process connects it again.
    gone[0].connect(V4).expect("connect");
    assert_eq!(destroyer.sockets.keys().count(), 6);
}

#[test]
fn a_nudge_is_enough_and_so_is_a_start() {
    let bpffs = Bpffs::with_flows(1024);
    let mut destroyer = destroyer(&bpffs);
    let sockets = [connected(V4), connected(V4)];
    enter(&mut destroyer, &sockets[0], 1, 1);
    enter(&mut destroyer, &sockets[1], 2, 0);
    let ends = |socket: &UdpSocket| {
        let deadline = Instant::now() + Duration::from_secs(5);
        while socket.peer_addr().is_ok() {
            assert!(Instant::now() < deadline, "{socket:?} is still connected");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let nudge = start(&bpffs.pins).expect("maps").expect("this kernel can do it");
    ends(&sockets[0]);
    assert!(sockets[1].peer_addr().is_ok());
    destroyer.epochs.set(2, 1, 0).expect("an epoch");
    nudge.try_send(()).expect("a listener");
    ends(&sockets[1]);
}
