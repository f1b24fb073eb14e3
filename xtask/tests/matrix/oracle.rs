//! What Kubernetes says should come of each cell, and what this project does differently on purpose.
//!
//! kube-proxy's rules, as far as the cells go:
//! - `Cluster`: every ready endpoint, and if there is none, every one that terminates but serves. `Local`: the same,
//!   among the endpoints on the node that the packet is at. Endpoints that do not serve get nothing.
//! - A ClusterIP goes by internalTrafficPolicy. Everything else goes by externalTrafficPolicy for clients from outside
//!   of the node, and is like a ClusterIP of policy `Cluster` for the node's own pods and processes.
//! - Nothing in scope: dropped if another scope has something (a load balancer should try another node), else refused.
//! - An outside client's address is kept by `Local`, and so is a pod's towards a ClusterIP.
//!
//! Ours: an outside client's address is also kept under `Cluster` where the backend is on the node that it came to,
//! and a pod's own address is kept towards every kind of frontend of its node. A process of the host is told at once
//! that its packets would be dropped.

use std::collections::BTreeMap;

use super::cells::{Backend, Cell, Client, Front, Over, State};

/// The source address that a server should see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source {
    /// The client's own.
    Own,
    /// Any of this node's.
    Node(usize),
}

/// What should come of a cell.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Expected {
    /// Each of these answers, and nobody else.
    Answers(BTreeMap<&'static str, Source>),
    /// Each of these answers, and nobody else, whoever the client seems to be.
    Names(&'static [&'static str]),
    /// One of these answers, always the same.
    Sticks(&'static [&'static str]),
    /// Refused at once.
    Refused,
    /// Nothing comes back.
    Dropped,
    /// A host process is told at once that nothing would come back: `connect` has timed out, sending a datagram is
    /// not permitted.
    NoWay,
    /// Not served: no answer, in whichever way.
    Nobody,
}

/// Where the frontend is resolved.
struct At {
    node: usize,
    /// The client is a pod or process of that node.
    inside: bool,
    /// The source address that comes in there.
    source: Source,
}

impl At {
    fn of(client: Client, front: Front) -> Self {
        let inside = |node| Self { node, inside: true, source: Source::Own };
        match (client.node(), front) {
            (Some(own), Front::NodePort(node)) if own != node => {
                // No service of the client's node: pods are masqueraded on their way to it.
                Self { node, inside: false, source: Source::Node(own) }
            }
            (Some(own), _) => inside(own),
            (None, Front::NodePort(node)) => Self { node, inside: false, source: Source::Own },
            (None, _) => Self { node: 0, inside: false, source: Source::Own },
        }
    }
}

/// What should come of a cell.
pub(crate) fn expected(cell: &Cell) -> Expected {
    let (client, service) = (cell.client, cell.service);
    let at = At::of(client, cell.front);
    let local = match cell.front {
        Front::ClusterIp => service.internal_local,
        _ => service.external_local && !at.inside,
    };
    let endpoints = service.endpoints();
    let usable = usable(endpoints.iter().filter(|e| !local || e.node == at.node));
    if usable.is_empty() {
        let elsewhere = endpoints.iter().any(|e| e.state != State::Gone);
        return match elsewhere {
            false => Expected::Refused,
            true if at.inside && matches!(client, Client::Process(_)) => Expected::NoWay,
            true => Expected::Dropped,
        };
    }
    Expected::Answers(usable.into_iter().map(|e| (e.name, source(client, &at, e))).collect())
}

fn usable<'a>(scope: impl Iterator<Item = &'a Backend> + Clone) -> Vec<&'a Backend> {
    let in_state = |state| scope.clone().filter(|e| e.state == state).collect::<Vec<_>>();
    let ready = in_state(State::Ready);
    if ready.is_empty() { in_state(State::Draining) } else { ready }
}

fn source(client: Client, at: &At, backend: &Backend) -> Source {
    let near = backend.node == at.node;
    match client {
        _ if !at.inside => match near {
            true => at.source,
            false => Source::Node(at.node),
        },
        Client::Process(node) => Source::Node(node),
        // To itself: by way of its gateway.
        Client::Backend if backend.name == "here" => Source::Node(at.node),
        // To an address outside of the pod network: masqueraded as everything is that leaves for such.
        _ if backend.name == "node" && !near => Source::Node(at.node),
        _ => Source::Own,
    }
}

/// Whether a request by `over` learns that it was refused, and from whom.
pub(crate) fn tells_of_refusal(cell: &Cell) -> bool {
    // Nobody tells an unconnected socket of an ICMP error; the socket hooks do tell.
    cell.over != Over::SendTo || At::of(cell.client, cell.front).inside
}

#[cfg(test)]
mod tests {
    use super::super::cells::{BACKENDS, Service};
    use super::*;

    /// Some rows of kube-proxy's own tables, by hand: so that the oracle is not only compared with what it judges.
    #[test]
    fn rows_known_by_heart() {
        let answers = |list: &[(&'static str, Source)]| Expected::Answers(list.iter().copied().collect());
        let (own, n1, n2) = (Source::Own, Source::Node(0), Source::Node(1));
        for (client, front, policies, backends, wanted) in [
            (
                Client::Pod(0),
                Front::ClusterIp,
                (false, false),
                "both",
                answers(&[("here", own), ("there", own)]),
            ),
            (Client::Pod(0), Front::ClusterIp, (true, false), "both", answers(&[("here", own)])),
            (Client::Pod(0), Front::ClusterIp, (true, false), "there", Expected::Dropped),
            (Client::Pod(0), Front::ClusterIp, (true, false), "none", Expected::Refused),
            (
                Client::Pod(0),
                Front::ClusterIp,
                (true, false),
                "draining here, there",
                answers(&[("here", own)]),
            ),
            (
                Client::Pod(0),
                Front::ClusterIp,
                (false, false),
                "draining here, there",
                answers(&[("there", own)]),
            ),
            (Client::Process(0), Front::ClusterIp, (true, false), "there", Expected::NoWay),
            (Client::Backend, Front::ClusterIp, (false, false), "here", answers(&[("here", n1)])),
            (Client::Outside, Front::NodePort(0), (false, true), "there", Expected::Dropped),
            (Client::Outside, Front::NodePort(1), (false, true), "both", answers(&[("there", own)])),
            (Client::Outside, Front::NodePort(1), (false, false), "here", answers(&[("here", n2)])),
            (Client::Outside, Front::LoadBalancer, (true, true), "gone here", Expected::Refused),
            (
                Client::Outside,
                Front::LoadBalancer,
                (true, true),
                "gone here, draining there",
                Expected::Dropped,
            ),
            // The pods and processes of a node reach every endpoint.
            (Client::Pod(0), Front::NodePort(0), (false, true), "there", answers(&[("there", own)])),
            (Client::Process(0), Front::LoadBalancer, (false, true), "there", answers(&[("there", n1)])),
            (Client::Pod(0), Front::NodePort(1), (false, true), "here", Expected::Dropped),
            (Client::Pod(1), Front::ClusterIp, (false, false), "process of n1", answers(&[("node", n2)])),
        ] {
            let backends = BACKENDS.iter().position(|(name, _)| *name == backends).unwrap();
            let service = Service { backends, internal_local: policies.0, external_local: policies.1 };
            let cell = Cell { client, front, service, over: Over::Tcp, v4: true };
            assert_eq!(expected(&cell), wanted, "{cell:?}");
        }
    }
}
