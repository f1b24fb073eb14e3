//! Lists of endpoints. There are more endpoints than of anything else, so how large one is decides what the agent takes:
//! 8 bytes in IPv4, where a [`SocketAddr`] alone has 32.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

/// One backend of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// Address and port that packets are sent on to.
    pub addr: SocketAddr,
    /// Whether it runs on this node: then an outside client's address is kept.
    pub local: bool,
}

/// Endpoints in the order in which they were given; copies share them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoints(List);

/// Equal lists are of the same kind: it follows from what is in them.
#[derive(Clone, Debug, PartialEq, Eq)]
enum List {
    V4(Arc<[Packed<Ipv4Addr>]>),
    Any(Arc<[Packed<IpAddr>]>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packed<A> {
    ip: A,
    port: u16,
    local: bool,
}

impl<A: Copy + Into<IpAddr>> Packed<A> {
    fn new(ip: A, endpoint: &Endpoint) -> Self {
        Self { ip, port: endpoint.addr.port(), local: endpoint.local }
    }

    fn addr(&self) -> SocketAddr {
        SocketAddr::new(self.ip.into(), self.port)
    }

    fn unpack(&self) -> Endpoint {
        Endpoint { addr: self.addr(), local: self.local }
    }
}

impl Endpoints {
    /// How many.
    pub fn len(&self) -> usize {
        match &self.0 {
            List::V4(list) => list.len(),
            List::Any(list) => list.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Endpoint> {
        let (v4, any): (&[_], &[_]) = match &self.0 {
            List::V4(list) => (list, &[]),
            List::Any(list) => (&[], list),
        };
        v4.iter().map(Packed::unpack).chain(any.iter().map(Packed::unpack))
    }

    /// Whether one has this address. They have to be sorted by it.
    pub fn contains(&self, addr: &SocketAddr) -> bool {
        match &self.0 {
            List::V4(list) => list.binary_search_by_key(addr, Packed::addr).is_ok(),
            List::Any(list) => list.binary_search_by_key(addr, Packed::addr).is_ok(),
        }
    }
}

impl FromIterator<Endpoint> for Endpoints {
    fn from_iter<I: IntoIterator<Item = Endpoint>>(all: I) -> Self {
        let all: Vec<_> = all.into_iter().collect();
        let v4 = |endpoint: &Endpoint| match endpoint.addr.ip() {
            IpAddr::V4(ip) => Some(Packed::new(ip, endpoint)),
            IpAddr::V6(_) => None,
        };
        let any = |endpoint: &Endpoint| Packed::new(endpoint.addr.ip(), endpoint);
        match all.iter().map(v4).collect() {
            Some(list) => Self(List::V4(list)),
            None => Self(List::Any(all.iter().map(any).collect())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(addrs: &[&str]) -> Vec<Endpoint> {
        let addrs = addrs.iter().map(|addr| addr.parse().expect("an address"));
        (0..).zip(addrs).map(|(i, addr)| Endpoint { addr, local: i % 2 == 0 }).collect()
    }

    #[test]
    fn what_goes_in_comes_out() {
        for addrs in [
            &[][..],
            &["10.42.0.5:8080"],
            &["10.42.0.5:8080", "10.42.0.5:8081", "10.42.1.5:80"],
            &["[fd00:42::5]:8080", "[fd00:42:1::5]:80"],
            &["10.42.0.5:8080", "[::ffff:10.42.0.5]:8080", "[fd00:42::5]:8080"],
        ] {
            let all = endpoints(addrs);
            let packed: Endpoints = all.iter().copied().collect();
            assert_eq!(packed.iter().collect::<Vec<_>>(), all);
            assert_eq!((packed.len(), packed.is_empty()), (all.len(), all.is_empty()));
            assert_eq!(packed, packed.iter().collect());
            for endpoint in &all {
                assert!(packed.contains(&endpoint.addr));
            }
            for other in
                endpoints(&["10.42.0.4:8080", "10.42.0.5:79", "[::ffff:10.42.1.5]:80", "[fd00::1]:80"])
            {
                assert!(!packed.contains(&other.addr), "{other:?}");
            }
        }
    }

    #[test]
    fn they_differ_by_where_they_run() {
        let here: Endpoints = endpoints(&["10.42.0.5:8080"]).into_iter().collect();
        let there: Endpoints = here.iter().map(|endpoint| Endpoint { local: false, ..endpoint }).collect();
        assert_ne!(here, there);
    }

    #[test]
    fn they_are_small() {
        assert_eq!(size_of::<Packed<Ipv4Addr>>(), 8);
        assert_eq!(size_of::<Packed<IpAddr>>(), 20);
    }
}
