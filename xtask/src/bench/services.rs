//! The cluster's Services: the measured ones, and all the others around them.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};

use super::family::IpFamily;
use super::load::Transport;

/// Endpoints of each Service.
pub(super) const ENDPOINTS: usize = 10;
/// How many Services of a kind are measured in a large cluster: each turn takes another, so that the figures are not those
/// of one place in a list of rules.
const PLACES: usize = 4;
/// Port of every ClusterIP.
const PORT: u16 = 80;
/// The measured Services' endpoints listen here and on the ports after it.
const TARGET: u16 = 8000;
const NODE_PORT: u16 = 30_080;

/// Where the endpoints of a measured Service are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Where {
    /// On the first node, like the pod that asks.
    Here,
    /// On the second node.
    There,
}

impl Where {
    /// The node, counted from 0.
    pub(super) fn node(self) -> usize {
        match self {
            Self::Here => 0,
            Self::There => 1,
        }
    }
}

/// A kind of measured Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) at: Where,
    pub(super) transport: Transport,
}

/// A Service with a single port, called `http`.
#[derive(Clone, Debug)]
pub(super) struct Service {
    pub(super) name: String,
    pub(super) transport: Transport,
    pub(super) vip: SocketAddr,
    pub(super) node_port: Option<u16>,
    pub(super) endpoints: Vec<SocketAddr>,
    node: &'static str,
}

/// A cluster's Services, all of one family.
#[derive(Clone, Debug)]
pub(super) struct Cluster {
    pub(super) family: IpFamily,
    pub(super) all: Vec<Service>,
    /// Places in `all` of those whose endpoints answer.
    measured: Vec<(Kind, usize)>,
}

/// So many Services, in words.
pub(super) fn counted(services: usize) -> String {
    format!("{services} {}", if services == 1 { "Service" } else { "Services" })
}

/// TCP ports that the servers have to listen on.
pub(super) fn tcp_ports() -> Vec<u16> {
    (TARGET..).take(PLACES).collect()
}

/// UDP addresses that the server on a node has to listen on, both families.
pub(super) fn udp_addresses(node: usize) -> Vec<SocketAddr> {
    let of =
        |family: IpFamily| (0..ENDPOINTS).map(move |n| SocketAddr::new(family.endpoint(node, n), TARGET));
    IpFamily::ALL.into_iter().flat_map(of).collect()
}

/// The address and port of a server that is no Service's.
pub(super) fn plain(ip: IpAddr) -> SocketAddr {
    SocketAddr::new(ip, TARGET)
}

/// The clusters that it takes to measure these kinds among `count` Services: where one has no room for all of them, each
/// has a cluster of its own, so that there are never more Services than it says.
pub(super) fn blocks(count: usize, kinds: &[Kind]) -> Vec<Vec<Kind>> {
    let places = |kind: &Kind| if kind.transport == Transport::Tcp { PLACES } else { 1 };
    if kinds.iter().map(places).sum::<usize>() <= count {
        return vec![kinds.iter().flat_map(|kind| vec![*kind; places(kind)]).collect()];
    }
    kinds.iter().map(|kind| vec![*kind]).collect()
}

impl Cluster {
    /// `count` Services, of which the measured ones are at random places.
    pub(super) fn new(family: IpFamily, count: usize, kinds: &[Kind]) -> Self {
        let random = RandomState::new();
        let mut places: Vec<usize> = (0..count).collect();
        places.sort_by_key(|place| random.hash_one(place));
        let mut all: Vec<Service> = (0..count).map(|n| background(family, n)).collect();
        let measured: Vec<_> = kinds.iter().copied().zip(places).collect();
        for (i, &(kind, place)) in measured.iter().enumerate() {
            let before = measured[..i].iter().filter(|(other, _)| *other == kind).count() as u16;
            let endpoint = |n| SocketAddr::new(family.endpoint(kind.at.node(), n), TARGET + before);
            let service = &mut all[place];
            service.transport = kind.transport;
            service.node_port = Some(NODE_PORT + i as u16);
            service.endpoints = (0..ENDPOINTS).map(endpoint).collect();
            service.node = ["n1", "n2"][kind.at.node()];
        }
        Self { family, all, measured }
    }

    /// The Service of a kind whose turn it is.
    pub(super) fn measured(&self, kind: Kind, round: usize) -> Option<&Service> {
        let of_kind: Vec<_> = self.measured.iter().filter(|(other, _)| *other == kind).collect();
        let (_, place) = of_kind.get(round % of_kind.len().max(1))?;
        self.all.get(*place)
    }
}

fn background(family: IpFamily, n: usize) -> Service {
    let endpoint = |i| SocketAddr::new(family.elsewhere(n * ENDPOINTS + i), 8080);
    Service {
        name: format!("svc-{n:05}"),
        transport: Transport::Tcp,
        vip: SocketAddr::new(family.cluster_ip(n), PORT),
        node_port: None,
        endpoints: (0..ENDPOINTS).map(endpoint).collect(),
        node: "n3",
    }
}

impl Service {
    /// The same with other endpoints.
    pub(super) fn with_endpoints(&self, endpoints: Vec<SocketAddr>) -> Self {
        Self { endpoints, ..self.clone() }
    }

    /// Its port, as kube-proxy calls it.
    pub(super) fn port_name(&self) -> String {
        format!("default/{}:http", self.name)
    }

    fn protocol(&self) -> &'static str {
        match self.transport {
            Transport::Tcp => "TCP",
            Transport::Udp => "UDP",
        }
    }

    fn family(&self) -> IpFamily {
        IpFamily::of(self.vip.ip())
    }

    /// As the API has it.
    pub(super) fn object(&self) -> Value {
        let ip = self.vip.ip();
        let mut port = json!({"name": "http", "protocol": self.protocol(), "port": self.vip.port()});
        port["targetPort"] = self.endpoints[0].port().into();
        let mut spec = json!({
            "type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip], "sessionAffinity": "None",
            "ipFamilies": [self.family().name()], "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster",
        });
        if let Some(node_port) = self.node_port {
            port["nodePort"] = node_port.into();
            spec["type"] = "NodePort".into();
            spec["externalTrafficPolicy"] = "Cluster".into();
        }
        spec["ports"] = json!([port]);
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": self.name, "namespace": "default"},
            "spec": spec, "status": {"loadBalancer": {}},
        })
    }

    /// Its only EndpointSlice.
    pub(super) fn slice(&self) -> Value {
        let endpoints = self
            .endpoints
            .iter()
            .map(|e| json!({"addresses": [e.ip()], "conditions": {"ready": true}, "nodeName": self.node}));
        let endpoints: Vec<_> = endpoints.collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-1", self.name), "namespace": "default",
                "labels": {"kubernetes.io/service-name": self.name},
            },
            "addressType": self.family().name(), "endpoints": endpoints,
            "ports": [{"name": "http", "protocol": self.protocol(), "port": self.endpoints[0].port()}],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 3] = [
        Kind { at: Where::Here, transport: Transport::Tcp },
        Kind { at: Where::There, transport: Transport::Tcp },
        Kind { at: Where::Here, transport: Transport::Udp },
    ];

    #[test]
    fn one_service_is_one_service() {
        assert_eq!(blocks(1, &KINDS), KINDS.map(|kind| vec![kind]));
        assert_eq!(blocks(100, &KINDS).len(), 1);
        assert_eq!(blocks(100, &KINDS)[0].len(), 4 + 4 + 1);
        let cluster = Cluster::new(IpFamily::V4, 1, &blocks(1, &KINDS)[1]);
        assert_eq!(cluster.all.len(), 1);
        assert!(cluster.measured(KINDS[0], 0).is_none());
        assert_eq!(cluster.measured(KINDS[1], 7).unwrap().name, "svc-00000");
    }

    #[test]
    fn measured_services_share_no_endpoint_and_no_node_port() {
        for family in IpFamily::ALL {
            let cluster = Cluster::new(family, 1000, &blocks(1000, &KINDS)[0]);
            let services: Vec<_> = cluster.measured.iter().map(|&(_, place)| &cluster.all[place]).collect();
            let mut endpoints: Vec<_> =
                services.iter().flat_map(|s| s.endpoints.iter().map(|e| (s.transport, *e))).collect();
            let mut ports: Vec<_> = services.iter().filter_map(|s| s.node_port).collect();
            let counts = (endpoints.len(), ports.len());
            endpoints.sort();
            endpoints.dedup();
            ports.dedup();
            assert_eq!((endpoints.len(), ports.len()), counts);
            assert_eq!(counts, (90, 9));
            assert!(udp_addresses(0).contains(&cluster.measured(KINDS[2], 0).unwrap().endpoints[9]));
        }
    }

    #[test]
    fn objects_are_of_the_cluster_s_family() {
        let cluster = Cluster::new(IpFamily::V6, 1, &[KINDS[2]]);
        let (object, slice) = (cluster.all[0].object(), cluster.all[0].slice());
        assert_eq!(object["spec"]["ipFamilies"], json!(["IPv6"]));
        assert_eq!(object["spec"]["ports"][0]["nodePort"], 30_080);
        assert_eq!(slice["addressType"], "IPv6");
        assert_eq!(slice["endpoints"][9]["addresses"], json!(["fd00:10:244:1::109"]));
        assert_eq!(slice["ports"][0]["protocol"], "UDP");
    }
}
