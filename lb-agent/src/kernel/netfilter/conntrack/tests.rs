use super::*;
use crate::kernel::netfilter::testing::Namespace;

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// A Service's with a source of its own, one without, one that is not translated; both families, both protocols.
fn connections() -> Vec<Connection> {
    let connection = |proto, client, service, backend, source| Connection {
        original: Tuple { src: at(client), dst: at(service), proto },
        reply: Tuple { src: at(backend), dst: at(source), proto },
    };
    [TCP, UDP]
        .into_iter()
        .flat_map(|proto| {
            [
                connection(proto, "10.1.0.2:40000", "10.96.0.1:80", "10.1.0.3:8080", "10.1.0.2:40000"),
                connection(proto, "192.0.2.7:40001", "172.18.0.2:30080", "10.1.0.3:8080", "10.1.0.1:12345"),
                connection(proto, "10.1.0.2:40002", "10.1.0.3:8080", "10.1.0.3:8080", "10.1.0.2:40002"),
                connection(proto, "[fd00::2]:40000", "[fd00:96::1]:80", "[fd00::3]:8080", "[fd00::2]:40000"),
                connection(proto, "[2001:db8::7]:1", "[fd00::1]:30080", "[fd00::3]:8080", "[fd00::9]:12345"),
            ]
        })
        .collect()
}

#[test]
fn a_connection_keeps_its_port_or_is_not_entered() {
    let _alone = Namespace::new();
    let conntrack = Conntrack::open().expect("netlink");
    for wanted in connections() {
        // As a packet makes it that comes from the server at the wrong moment.
        let stray = Connection { original: wanted.reply, reply: wanted.reply.reversed() };
        conntrack.insert(&stray, 100).expect("entered");
        let result = conntrack.insert(&wanted, 100).map_err(|e| e.kind());
        assert_eq!(result, Err(io::ErrorKind::AlreadyExists), "{wanted:?}");
        let mut there = Vec::new();
        conntrack.for_each(|connection| there.push(connection)).expect("a list");
        assert_eq!(there, [stray], "{wanted:?}");
        assert!(conntrack.remove(&wanted.reply).expect("removed"));
        conntrack.insert(&wanted, 100).unwrap_or_else(|e| panic!("{wanted:?}: {e}"));
        assert!(conntrack.remove(&wanted.original).expect("removed"));
    }
}

#[test]
fn connections_are_entered_found_listed_and_removed() {
    let _alone = Namespace::new();
    let conntrack = Conntrack::open().expect("netlink");
    let all = connections();
    for connection in &all {
        conntrack.insert(connection, 100).unwrap_or_else(|e| panic!("{connection:?}: {e}"));
        let again = conntrack.insert(connection, 100).map_err(|e| e.kind());
        assert_eq!(again, Err(io::ErrorKind::AlreadyExists), "{connection:?}");
    }
    let mut listed = Vec::new();
    conntrack.for_each(|connection| listed.push(connection)).expect("a list");
    assert_eq!(listed.len(), all.len());
    for connection in &all {
        assert!(listed.contains(connection), "{connection:?} is not in {listed:?}");
        for tuple in [connection.original, connection.reply] {
            assert_eq!(conntrack.find(&tuple).expect("an answer"), Some(*connection));
        }
        assert!(conntrack.remove(&connection.reply).expect("removed"));
        assert!(!conntrack.remove(&connection.original).expect("an answer"), "it is gone");
        assert_eq!(conntrack.find(&connection.original).expect("an answer"), None);
    }
}
