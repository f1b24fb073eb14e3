//! The dimensions of the matrix.

use std::fmt;

use xtask::probe::Transport;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Client {
    /// A pod on this node that is no endpoint.
    Pod(usize),
    /// The endpoint on n1 itself.
    Backend,
    /// A process of a node.
    Process(usize),
    /// The client outside of the cluster.
    Outside,
}

impl Client {
    pub(crate) const ALL: [Self; 6] =
        [Self::Pod(0), Self::Pod(1), Self::Backend, Self::Process(0), Self::Process(1), Self::Outside];

    /// The node that it runs on.
    pub(crate) fn node(self) -> Option<usize> {
        match self {
            Self::Pod(node) | Self::Process(node) => Some(node),
            Self::Backend => Some(0),
            Self::Outside => None,
        }
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(node) => write!(f, "pod on n{}", node + 1),
            Self::Backend => f.write_str("pod here on n1"),
            Self::Process(node) => write!(f, "process on n{}", node + 1),
            Self::Outside => f.write_str("outside"),
        }
    }
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Front {
    /// Routed to n1 where the client is outside.
    ClusterIp,
    /// On the node's main address.
    NodePort(usize),
    /// Routed to n1 where the client is outside.
    LoadBalancer,
    /// Routed to n1 where the client is outside.
    ExternalIp,
    /// The NodePort on 127.0.0.1 or ::1.
    Localhost,
}

impl Front {
    pub(crate) const ALL: [Self; 6] = [
        Self::ClusterIp,
        Self::NodePort(0),
        Self::NodePort(1),
        Self::LoadBalancer,
        Self::ExternalIp,
        Self::Localhost,
    ];
}

impl fmt::Display for Front {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClusterIp => f.write_str("ClusterIP"),
            Self::NodePort(node) => write!(f, "NodePort at n{}", node + 1),
            Self::LoadBalancer => f.write_str("LoadBalancer"),
            Self::ExternalIp => f.write_str("externalIP"),
            Self::Localhost => f.write_str("localhost NodePort"),
        }
    }
}

/// An endpoint's conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    /// Terminating, and still serving.
    Draining,
    /// Terminating, and no longer serving.
    Gone,
}

/// An endpoint of a Service. Its server answers whatever its conditions are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backend {
    /// The server's name: `here` (a pod on n1), `there` (a pod on n2), `node` (a process of n1).
    pub(crate) name: &'static str,
    /// The node that it runs on.
    pub(crate) node: usize,
    pub(crate) state: State,
}

const fn backend(name: &'static str, node: usize, state: State) -> Backend {
    Backend { name, node, state }
}

/// What the Services have, and what it is called.
pub(crate) const BACKENDS: [(&str, &[Backend]); 10] = [
    ("here", &[backend("here", 0, State::Ready)]),
    ("there", &[backend("there", 1, State::Ready)]),
    ("both", &[backend("here", 0, State::Ready), backend("there", 1, State::Ready)]),
    ("none", &[]),
    ("draining here", &[backend("here", 0, State::Draining)]),
    ("gone here", &[backend("here", 0, State::Gone)]),
    ("draining here, there", &[backend("here", 0, State::Draining), backend("there", 1, State::Ready)]),
    ("draining both", &[backend("here", 0, State::Draining), backend("there", 1, State::Draining)]),
    ("gone here, draining there", &[backend("here", 0, State::Gone), backend("there", 1, State::Draining)]),
    ("process of n1", &[backend("node", 0, State::Ready)]),
];

/// A Service: its place in [`BACKENDS`], and its policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Service {
    pub(crate) backends: usize,
    /// `internalTrafficPolicy: Local`
    pub(crate) internal_local: bool,
    /// `externalTrafficPolicy: Local`
    pub(crate) external_local: bool,
}

impl Service {
    /// All of them.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..BACKENDS.len()).flat_map(|backends| {
            [(false, false), (false, true), (true, false), (true, true)]
                .map(|(internal_local, external_local)| Self { backends, internal_local, external_local })
        })
    }

    /// Its endpoints.
    pub(crate) fn endpoints(self) -> &'static [Backend] {
        BACKENDS[self.backends].1
    }

    /// Its place among all, from 1: part of its addresses and its node port.
    pub(crate) fn number(self) -> u8 {
        (self.backends * 4 + usize::from(self.internal_local) * 2 + usize::from(self.external_local) + 1)
            as u8
    }
}

/// What requests go over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Over {
    Tcp,
    Udp,
    /// UDP from an unconnected socket: only the socket hooks tell it apart.
    SendTo,
}

impl Over {
    pub(crate) fn transport(self) -> Transport {
        if self == Self::Tcp { Transport::Tcp } else { Transport::Udp }
    }
}

/// One cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Cell {
    pub(crate) client: Client,
    pub(crate) front: Front,
    pub(crate) service: Service,
    pub(crate) over: Over,
    pub(crate) v4: bool,
}

impl Cell {
    /// Every cell that there can be.
    pub(crate) fn all() -> Vec<Self> {
        let mut cells = Vec::new();
        for client in Client::ALL {
            let host = matches!(client, Client::Process(_));
            let transports: &[Over] =
                if host { &[Over::Tcp, Over::Udp, Over::SendTo] } else { &[Over::Tcp, Over::Udp] };
            for front in Front::ALL.into_iter().filter(|&front| host || front != Front::Localhost) {
                for service in Service::all() {
                    for &over in transports {
                        cells.extend([true, false].map(|v4| Self { client, front, service, over, v4 }));
                    }
                }
            }
        }
        cells
    }
}
