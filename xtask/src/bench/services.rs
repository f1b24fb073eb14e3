//! The Services that are measured, and the rest of the cluster around them.

use std::fmt::Write as _;
use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, SocketAddrV4};

/// Endpoints of each Service.
pub(super) const ENDPOINTS: usize = 10;
/// How many Services of a large cluster are measured: each turn takes another, so that the figures are not those of
/// one place in a list of rules.
const MEASURED: usize = 4;
/// Port of every ClusterIP.
const PORT: u16 = 80;
/// The measured Services' endpoints are ports of the one server, from this one on.
pub(super) const FIRST_PORT: u16 = 8000;
/// How many they can be.
pub(super) const PORTS: u16 = (MEASURED * ENDPOINTS) as u16;

/// A Service with a single TCP port called `http`.
#[derive(Clone, Debug)]
pub(super) struct Service {
    pub(super) name: String,
    pub(super) vip: SocketAddrV4,
    pub(super) endpoints: Vec<SocketAddrV4>,
}

/// A cluster's Services.
#[derive(Clone, Debug)]
pub(super) struct Services {
    pub(super) all: Vec<Service>,
    /// Places in `all` of those whose endpoints answer.
    pub(super) measured: Vec<usize>,
}

impl Services {
    /// `count` Services; the measured ones are at random places, and `server` is behind them.
    pub(super) fn new(count: usize, server: Ipv4Addr) -> Self {
        let random = RandomState::new();
        let mut places: Vec<usize> = (0..count).collect();
        places.sort_by_key(|place| random.hash_one(place));
        places.truncate(MEASURED);
        let mut all: Vec<Service> = (0..count).map(background).collect();
        for (i, &place) in places.iter().enumerate() {
            let first = FIRST_PORT + (i * ENDPOINTS) as u16;
            all[place].endpoints = (first..).take(ENDPOINTS).map(|p| SocketAddrV4::new(server, p)).collect();
        }
        Self { all, measured: places }
    }

    /// The Service whose turn it is.
    pub(super) fn measured(&self, round: usize) -> &Service {
        &self.all[self.measured[round % self.measured.len()]]
    }
}

fn background(n: usize) -> Service {
    let vip = Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 1, 0).to_bits() + n as u32);
    // Pods of nodes that the lab does not have.
    let first = Ipv4Addr::new(10, 244, 128, 0).to_bits() + (n * ENDPOINTS % (1 << 15)) as u32;
    let endpoint = |i| SocketAddrV4::new(Ipv4Addr::from_bits(first + i as u32), 8080);
    Service {
        name: format!("svc-{n:05}"),
        vip: SocketAddrV4::new(vip, PORT),
        endpoints: (0..ENDPOINTS).map(endpoint).collect(),
    }
}

/// As a folder of manifests has them. An EndpointSlice has the same ports for all its addresses, so the measured
/// Services have a slice for each port, as a named `targetPort` gives.
pub(super) fn manifest(services: &Services) -> String {
    let mut out = String::new();
    for Service { name, vip, endpoints } in &services.all {
        let _ = write!(
            out,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: default }}\nspec:\n  \
             clusterIP: {ip}\n  clusterIPs: [{ip}]\n  ports:\n    - {{ name: http, protocol: TCP, port: {port} }}\n",
            ip = vip.ip(),
            port = vip.port(),
        );
        for (i, same_port) in endpoints.chunk_by(|a, b| a.port() == b.port()).enumerate() {
            let addresses: Vec<_> = same_port
                .iter()
                .map(|e| format!("  - {{ addresses: [{}], nodeName: n1 }}\n", e.ip()))
                .collect();
            let _ = write!(
                out,
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-{i}\n  \
                 namespace: default\n  labels: {{ kubernetes.io/service-name: {name} }}\naddressType: IPv4\nports:\n  \
                 - {{ name: http, protocol: TCP, port: {} }}\nendpoints:\n{}",
                same_port[0].port(),
                addresses.concat(),
            );
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_services_share_no_endpoint() {
        let services = Services::new(1000, Ipv4Addr::new(10, 244, 1, 11));
        let mut endpoints: Vec<_> =
            services.measured.iter().flat_map(|&i| services.all[i].endpoints.clone()).collect();
        assert_eq!(endpoints.len(), usize::from(PORTS));
        endpoints.sort();
        endpoints.dedup();
        assert_eq!(endpoints.len(), usize::from(PORTS));
        assert_eq!(Services::new(1, Ipv4Addr::LOCALHOST).measured, [0]);
    }
}
