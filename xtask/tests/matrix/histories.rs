//! Services that change while they are served. Each is a list of moments: what the manifests say, and who answers.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use super::cells::{Backend, Client, Front, Over, State};
use super::judge::{Case, settle};
use super::oracle::Expected;
use super::site::{ON_N1, Site, documents, merge, objects, slice};

const HERE: Backend = Backend { name: "here", node: 0, state: State::Ready };
const THERE: Backend = Backend { name: "there", node: 1, state: State::Ready };
const BOTH: [Backend; 2] = [HERE, THERE];

/// Too early, a question may go nowhere. It is repeated.
const PATIENCE: Duration = Duration::from_millis(500);

/// The number of the Service that is changed last.
const LAST: u8 = 90;

type Names = &'static [&'static str];

/// What the manifests say of a Service at one moment, and what is asked then.
#[derive(Default)]
struct Moment {
    what: &'static str,
    objects: Vec<Value>,
    /// Nobody answers in IPv6.
    v4_only: bool,
    questions: Vec<(Front, u16, &'static [Over], Names)>,
}

const ANY: &[Over] = &[Over::Tcp, Over::Udp];

impl Moment {
    fn new(what: &'static str, objects: Vec<Value>) -> Self {
        Self { what, objects, ..Self::default() }
    }

    /// These answer at those frontends; at the others of port 80, nobody does.
    fn at(mut self, fronts: &[Front], names: Names) -> Self {
        let who = |front: &Front| if fronts.contains(front) { names } else { &[] };
        self.questions.extend(ON_N1.iter().map(|front| (*front, 80, ANY, who(front))));
        self
    }

    /// These answer everywhere.
    fn everywhere(self, names: Names) -> Self {
        self.at(&ON_N1, names)
    }

    /// These answer at that port of the ClusterIP; nobody, if there are none.
    fn port(mut self, port: u16, over: &'static [Over], names: Names) -> Self {
        self.questions.push((Front::ClusterIp, port, over, names));
        self
    }

    fn cases(&self, site: &Site, number: u8) -> Vec<Case> {
        let mut all = Vec::new();
        for &(front, port, transports, names) in &self.questions {
            for client in [Client::Pod(0), Client::Process(0), Client::Outside] {
                for (over, v4) in transports.iter().flat_map(|&over| [(over, true), (over, false)]) {
                    let mut to = site.destination(front, number, v4);
                    if front == Front::ClusterIp {
                        to.set_port(port);
                    }
                    let expected = if names.is_empty() || (self.v4_only && !v4) {
                        Expected::Nobody
                    } else {
                        Expected::Names(names)
                    };
                    let words = [
                        client.to_string(),
                        format!("{front} {}", to.port()),
                        self.what.into(),
                        String::new(),
                    ];
                    all.push(Case {
                        client,
                        to,
                        over,
                        told: true,
                        least: 3,
                        patience: PATIENCE,
                        expected,
                        words,
                    });
                }
            }
        }
        all
    }
}

/// A Service and its slices, with changes to the Service's `spec`.
fn service(number: u8, backends: &[Backend], spec: Value) -> Vec<Value> {
    objects(&format!("h{number}"), number, backends, &spec)
}

/// The same, without addresses that a load balancer gave, and without external ones.
fn inner(number: u8, mut spec: Value) -> Vec<Value> {
    merge(&mut spec, &json!({"externalIPs": []}));
    let mut all = service(number, &BOTH, spec);
    all[0]["status"] = json!({});
    all
}

fn with(mut objects: Vec<Value>, change: impl FnOnce(&mut [Value])) -> Vec<Value> {
    change(&mut objects);
    objects
}

const NAMES: Names = &["here", "there"];

fn types(n: u8) -> Vec<Moment> {
    let [cluster_ip, node_port, load_balancer, _] = ON_N1;
    let ports = |list: &[(&str, u16)]| {
        list.iter().map(|(p, port)| json!({"name": p.to_lowercase(), "protocol": p, "port": port})).collect()
    };
    let no_node_ports: Value = ports(&[("TCP", 80), ("UDP", 80)]);
    let plain = inner(n, json!({"type": "ClusterIP", "ports": no_node_ports}));
    vec![
        Moment::new("ClusterIP", plain.clone()).at(&[cluster_ip], NAMES),
        Moment::new("NodePort", inner(n, json!({"type": "NodePort"}))).at(&[cluster_ip, node_port], NAMES),
        Moment::new("LoadBalancer, pending", inner(n, json!({}))).at(&[cluster_ip, node_port], NAMES),
        Moment::new(
            "LoadBalancer",
            with(service(n, &BOTH, json!({})), |all| all[0]["spec"]["externalIPs"] = json!([])),
        )
        .at(&[cluster_ip, node_port, load_balancer], NAMES),
        Moment::new("externalIPs", service(n, &BOTH, json!({}))).everywhere(NAMES),
        Moment::new(
            "ExternalName",
            service(n, &BOTH, json!({"type": "ExternalName", "externalName": "example.org"})),
        )
        .at(&[], &[]),
        Moment::new("LoadBalancer again", service(n, &BOTH, json!({}))).everywhere(NAMES),
        Moment::new(
            "headless",
            service(n, &BOTH, json!({"type": "ClusterIP", "clusterIP": "None", "clusterIPs": ["None"]})),
        )
        .at(&[], &[]),
        Moment::new("no node ports", service(n, &BOTH, json!({"ports": no_node_ports})))
            .at(&[cluster_ip, load_balancer, Front::ExternalIp], NAMES),
        Moment::new("ClusterIP again", plain).at(&[cluster_ip], NAMES),
    ]
}

fn labels(n: u8) -> Vec<Moment> {
    let plain = || Moment::new("no label", service(n, &BOTH, json!({}))).everywhere(NAMES);
    let labelled = |what, label: &str| {
        let objects =
            with(service(n, &BOTH, json!({})), |all| all[0]["metadata"]["labels"] = json!({label: "x"}));
        Moment::new(what, objects).at(&[], &[])
    };
    let slices = with(service(n, &BOTH, json!({})), |all| {
        all[1..]
            .iter_mut()
            .for_each(|s| s["metadata"]["labels"]["service.kubernetes.io/headless"] = "".into());
    });
    vec![
        plain(),
        labelled("service-proxy-name", "service.kubernetes.io/service-proxy-name"),
        plain(),
        labelled("headless", "service.kubernetes.io/headless"),
        plain(),
        Moment::new("headless slices", slices).everywhere(&[]),
        plain(),
    ]
}

/// Ports by (name, protocol, port), and the ports of the slices.
fn ports(n: u8, service_ports: &[(&str, &str, u16)], slice_ports: &[(&str, &str, u16)]) -> Vec<Value> {
    let list = |ports: &[(&str, &str, u16)]| -> Vec<Value> {
        ports.iter().map(|(name, p, port)| json!({"name": name, "protocol": p, "port": port})).collect()
    };
    with(inner(n, json!({"ports": list(service_ports)})), |all| {
        all[1..].iter_mut().for_each(|slice| slice["ports"] = list(slice_ports).into());
    })
}

fn renamed_ports(n: u8) -> Vec<Moment> {
    const TCP: &[Over] = &[Over::Tcp];
    let at = |what, service: &[_], slices: &[_]| Moment::new(what, ports(n, service, slices));
    vec![
        at("one port", &[("a", "TCP", 80)], &[("a", "TCP", 8080)]).port(80, TCP, NAMES),
        at("renamed, endpoints are not", &[("b", "TCP", 80)], &[("a", "TCP", 8080)]).port(80, TCP, &[]),
        at("renamed", &[("b", "TCP", 80)], &[("b", "TCP", 8080)]).port(80, TCP, NAMES),
        at("one more", &[("b", "TCP", 80), ("c", "TCP", 81)], &[("b", "TCP", 8080), ("c", "TCP", 8081)])
            .port(80, TCP, NAMES)
            .port(81, TCP, &["here-b", "there-b"]),
        at(
            "names exchanged",
            &[("c", "TCP", 80), ("b", "TCP", 81)],
            &[("b", "TCP", 8080), ("c", "TCP", 8081)],
        )
        .port(80, TCP, &["here-b", "there-b"])
        .port(81, TCP, NAMES),
        at("the first removed", &[("b", "TCP", 81)], &[("b", "TCP", 8080)])
            .port(80, TCP, &[])
            .port(81, TCP, NAMES),
        at("another number", &[("b", "TCP", 82)], &[("b", "TCP", 8080)])
            .port(81, TCP, &[])
            .port(82, TCP, NAMES),
        at("another target", &[("b", "TCP", 82)], &[("b", "TCP", 8081)]).port(
            82,
            TCP,
            &["here-b", "there-b"],
        ),
    ]
}

fn two_protocols(n: u8) -> Vec<Moment> {
    const TCP: &[Over] = &[Over::Tcp];
    const UDP: &[Over] = &[Over::Udp, Over::SendTo];
    let (tcp, udp) = (("t", "TCP", 80), ("u", "UDP", 80));
    // UDP leads to the other server, so that nobody can mix them up.
    let slices = [("t", "TCP", 8080), ("u", "UDP", 8081)];
    let b: Names = &["here-b", "there-b"];
    vec![
        Moment::new("TCP", ports(n, &[tcp], &slices)).port(80, TCP, NAMES).port(80, UDP, &[]),
        Moment::new("both", ports(n, &[tcp, udp], &slices)).port(80, TCP, NAMES).port(80, UDP, b),
        Moment::new("UDP", ports(n, &[udp], &slices)).port(80, TCP, &[]).port(80, UDP, b),
        Moment::new("both again", ports(n, &[udp, tcp], &slices)).port(80, TCP, NAMES).port(80, UDP, b),
    ]
}

fn recreated(n: u8) -> Vec<Moment> {
    let named = |name: &str, backends: &[Backend]| objects(name, n, backends, &json!({}));
    vec![
        Moment::new("first", named("first", &[HERE])).everywhere(&["here"]),
        Moment::new("another one of its addresses", named("second", &[THERE])).everywhere(&["there"]),
        Moment::new("none", Vec::new()).at(&[], &[]),
        Moment::new("the first again", named("first", &[THERE])).everywhere(&["there"]),
        Moment::new("with another endpoint", named("first", &[HERE])).everywhere(&["here"]),
    ]
}

fn two_slices(n: u8) -> Vec<Moment> {
    let port = |port: u16| json!([{"name": "tcp", "protocol": "TCP", "port": port}, {"name": "udp", "protocol": "UDP", "port": port}]);
    // Two slices in each family, of one endpoint each.
    let slices = |first: Option<u16>, second: Option<u16>| {
        let mut all = service(n, &[], json!({}));
        all.truncate(1);
        for (backend, at) in [(HERE, first), (THERE, second)] {
            for v4 in at.map_or(vec![], |_| vec![true, false]) {
                let mut slice = slice(&format!("h{n}"), &[backend], v4);
                slice["metadata"]["name"] = format!("h{n}-{}-{v4}", backend.name).into();
                slice["ports"] = port(at.unwrap_or_default());
                all.push(slice);
            }
        }
        all
    };
    vec![
        Moment::new("two ports", slices(Some(8080), Some(8081))).everywhere(&["here", "there-b"]),
        Moment::new("one port", slices(Some(8081), Some(8081))).everywhere(&["here-b", "there-b"]),
        Moment::new("one slice", slices(Some(8081), None)).everywhere(&["here-b"]),
        Moment::new("the other port", slices(Some(8080), None)).everywhere(&["here"]),
        Moment::new("the other slice", slices(None, Some(8080))).everywhere(&["there"]),
        Moment::new("none", slices(None, None)).everywhere(&[]),
        Moment::new("both", slices(Some(8080), Some(8080))).everywhere(NAMES),
    ]
}

fn lives_of_endpoints(n: u8) -> Vec<Moment> {
    let state = |backend: Backend, state| Backend { state, ..backend };
    let at = |what, backends: &[Backend]| Moment::new(what, service(n, backends, json!({})));
    let local = |what, policy: &str, backends: &[Backend]| {
        let spec = json!({"internalTrafficPolicy": policy, "externalTrafficPolicy": policy});
        Moment::new(what, service(n, backends, spec))
    };
    vec![
        at("both", &BOTH).everywhere(NAMES),
        at("one drains", &[state(HERE, State::Draining), THERE]).everywhere(&["there"]),
        local("one drains, Local", "Local", &[state(HERE, State::Draining), THERE]).port(80, ANY, &["here"]),
        local("one is gone, Local", "Local", &[state(HERE, State::Gone), THERE]).port(80, ANY, &[]),
        at("the other drains", &[state(HERE, State::Gone), state(THERE, State::Draining)])
            .everywhere(&["there"]),
        at("a new one", &[HERE, state(THERE, State::Draining)]).everywhere(&["here"]),
        at("all drain", &BOTH.map(|b| state(b, State::Draining))).everywhere(NAMES),
        at("all are gone", &BOTH.map(|b| state(b, State::Gone))).everywhere(&[]),
        at("both again", &BOTH).everywhere(NAMES),
    ]
}

fn addresses(n: u8) -> Vec<Moment> {
    let [cluster_ip, node_port, load_balancer, external] = ON_N1;
    let status = |mode: &str| {
        with(service(n, &BOTH, json!({})), |all| {
            for ingress in all[0]["status"]["loadBalancer"]["ingress"].as_array_mut().into_iter().flatten() {
                ingress["ipMode"] = mode.into();
            }
        })
    };
    let hostname = with(service(n, &BOTH, json!({})), |all| {
        all[0]["status"]["loadBalancer"]["ingress"] = json!([{"hostname": "lb.example.org"}]);
    });
    let v4_only = with(service(n, &BOTH, json!({})), |all| {
        let first = all[0]["spec"]["clusterIP"].clone();
        all[0]["spec"]["clusterIPs"] = json!([first]);
    });
    let rest = [cluster_ip, node_port, external];
    vec![
        Moment::new("ipMode VIP", status("VIP")).everywhere(NAMES),
        Moment::new("ipMode Proxy", status("Proxy")).at(&rest, NAMES),
        Moment::new("ipMode VIP again", status("VIP"))
            .at(&[cluster_ip, load_balancer, node_port, external], NAMES),
        Moment::new("a hostname", hostname).at(&rest, NAMES),
        Moment { v4_only: true, ..Moment::new("IPv4 only", v4_only) }.everywhere(NAMES),
        Moment::new("both families again", service(n, &BOTH, json!({}))).everywhere(NAMES),
    ]
}

#[test]
fn services_that_change() -> Result<()> {
    let site = Site::start("histories", &[])?;
    let histories = [
        (80, types(80)),
        (81, labels(81)),
        (82, renamed_ports(82)),
        (83, two_protocols(83)),
        (84, recreated(84)),
        (85, two_slices(85)),
        (86, lives_of_endpoints(86)),
        (87, addresses(87)),
    ];
    let longest = histories.iter().map(|(_, moments)| moments.len()).max().unwrap_or_default();
    for i in 0..longest {
        let mut cases = Vec::new();
        for (number, moments) in &histories {
            if let Some(moment) = moments.get(i) {
                let file = format!("h{number}.yaml");
                match moment.objects.as_slice() {
                    [] => site.remove(&file)?,
                    objects => site.write(&file, &documents(objects))?,
                }
                cases.extend(moment.cases(&site, *number));
            }
        }
        // When this one is seen, all the others have been read.
        let last: Moment = match i % 2 {
            0 => Moment::new("the last", service(LAST, &[HERE], json!({}))).port(80, &[Over::Tcp], &["here"]),
            _ => {
                Moment::new("the last", service(LAST, &[THERE], json!({}))).port(80, &[Over::Tcp], &["there"])
            }
        };
        site.write("last.yaml", &documents(&last.objects))?;
        settle(&site, &last.cases(&site, LAST))?;
        settle(&site, &cases)?;
    }
    Ok(())
}
