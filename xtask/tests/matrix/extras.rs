//! What not every Service has: source ranges, session affinity, ports that are none.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::cells::{BACKENDS, Backend, Client, Front, Over};
use super::judge::{Case, PATIENCE, judge};
use super::oracle::{Expected, Source};
use super::site::{ON_N1, Site, documents, objects};

fn backends(what: &str) -> Result<&'static [Backend]> {
    BACKENDS.iter().find(|(name, _)| *name == what).map(|(_, list)| *list).context("no such backends")
}

/// Service `number` is asked, over TCP and UDP, in both families.
fn cases(
    site: &Site,
    what: &str,
    (client, front): (Client, Front),
    number: u8,
    expected: impl Fn(bool) -> Expected,
) -> Vec<Case> {
    let ways = [(Over::Tcp, true), (Over::Tcp, false), (Over::Udp, true), (Over::Udp, false)];
    let case = |(over, v4)| Case {
        client,
        to: site.destination(front, number, v4),
        over,
        told: true,
        least: 20,
        patience: PATIENCE,
        expected: expected(v4),
        words: [client.to_string(), front.to_string(), what.to_owned(), String::new()],
    };
    ways.map(case).into()
}

/// loadBalancerSourceRanges, and who is in them: pods of n1, pods of n2, processes of nodes, the outside client.
const RANGES: [(&[&str], [bool; 4]); 5] = [
    (&["192.0.2.0/24 ", " 2001:db8:1::/64"], [false, false, false, true]),
    (&["10.244.1.11/32", "fd00:10:244:1::11/128"], [true, false, false, false]),
    (&["172.18.0.0/24", "fd00:172:18::/64"], [false, false, true, false]),
    (
        &["10.244.0.0/16", "192.0.2.10/32", "2001:db8:1::10/128", "fd00:10:244::/48"],
        [true, true, false, true],
    ),
    (&["0.0.0.0/0", "::/0"], [true, true, true, true]),
];

#[test]
#[ignore = "source ranges are not served yet"]
fn source_ranges_count_for_load_balancer_addresses_only() -> Result<()> {
    let here = backends("here")?;
    let number = |i: usize| 60 + i as u8;
    let mut all = Vec::new();
    for (i, (ranges, _)) in RANGES.iter().enumerate() {
        all.extend(objects(&format!("r{i}"), number(i), here, &json!({"loadBalancerSourceRanges": ranges})));
    }
    // A family without ranges is not restricted.
    let v4_only = number(RANGES.len());
    all.extend(objects("v4", v4_only, here, &json!({"loadBalancerSourceRanges": ["203.0.113.0/24"]})));
    let site = Site::start("ranges", &[("services.yaml", documents(&all))])?;

    let answer = |source| Expected::Answers([("here", source)].into());
    let clients = [
        (Client::Pod(0), 0, Source::Own),
        (Client::Pod(1), 1, Source::Own),
        (Client::Process(0), 2, Source::Node(0)),
        (Client::Process(1), 2, Source::Node(1)),
        (Client::Outside, 3, Source::Own),
    ];
    let mut asked = Vec::new();
    for (client, column, source) in clients {
        let refused = || match client {
            Client::Process(_) => Expected::NoWay,
            _ => Expected::Dropped,
        };
        for (i, (ranges, within)) in RANGES.iter().enumerate() {
            let what = ranges.join(",");
            let admitted = |_| if within[column] { answer(source) } else { refused() };
            asked.extend(cases(&site, &what, (client, Front::LoadBalancer), number(i), admitted));
            for front in ON_N1.into_iter().filter(|&front| front != Front::LoadBalancer) {
                // From n2 this is a way from outside; the matrix has it.
                if front != Front::NodePort(0) || client.node() != Some(1) {
                    asked.extend(cases(&site, &what, (client, front), number(i), |_| answer(source)));
                }
            }
        }
        let admitted = |v4| if v4 { refused() } else { answer(source) };
        asked.extend(cases(&site, "203.0.113.0/24", (client, Front::LoadBalancer), v4_only, admitted));
    }
    judge(&site, &asked).map(drop)
}

#[test]
#[ignore = "ports that are none are not refused yet"]
fn another_port_of_a_cluster_ip_is_refused() -> Result<()> {
    let (with, without) = (70, 71);
    let mut all = objects("ports", with, backends("both")?, &json!({}));
    all.extend(objects("empty", without, &[], &json!({"internalTrafficPolicy": "Local"})));
    let site = Site::start("ports", &[("services.yaml", documents(&all))])?;
    let mut asked = Vec::new();
    for client in Client::ALL {
        for number in [with, without] {
            let mut more = cases(&site, "port 81", (client, Front::ClusterIp), number, |_| Expected::Refused);
            more.iter_mut().for_each(|case| case.to = SocketAddr::new(case.to.ip(), 81));
            asked.extend(more);
        }
    }
    judge(&site, &asked).map(drop)
}

#[test]
#[ignore = "session affinity is not served yet"]
fn a_client_stays_with_its_endpoint_whichever_way_it_comes() -> Result<()> {
    let services: Vec<u8> = (72..78).collect();
    let spec = json!({"sessionAffinity": "ClientIP",
                      "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}});
    let both = backends("both")?;
    let all: Vec<_> =
        services.iter().flat_map(|&number| objects(&format!("a{number}"), number, both, &spec)).collect();
    let site = Site::start("affinity", &[("services.yaml", documents(&all))])?;
    let mut asked = Vec::new();
    for client in Client::ALL {
        for front in Front::ALL {
            if front == Front::Localhost && !matches!(client, Client::Process(_)) {
                continue;
            }
            for &number in &services {
                asked.extend(cases(&site, "ClientIP", (client, front), number, |_| {
                    Expected::Sticks(&["here", "there"])
                }));
            }
        }
    }
    let tallies = judge(&site, &asked)?;

    // Not one for all: each client and Service has a choice of its own. But all frontends of a Service port, on one
    // node, share it.
    let mut chosen = BTreeSet::new();
    for client in [Client::Pod(0), Client::Outside] {
        for number in &services {
            for (over, v4) in [(Over::Tcp, true), (Over::Tcp, false), (Over::Udp, true), (Over::Udp, false)] {
                let to = ON_N1.map(|front| site.destination(front, *number, v4));
                let mine = asked
                    .iter()
                    .zip(&tallies)
                    .filter(|(case, _)| case.client == client && case.over == over && to.contains(&case.to));
                let names: BTreeSet<_> =
                    mine.flat_map(|(_, t)| t.answers.iter().map(|(name, ..)| name)).collect();
                ensure!(names.len() == 1, "{client} has {names:?} of Service {number}, {over:?}, IPv4: {v4}");
                chosen.extend(names);
            }
        }
    }
    ensure!(chosen.len() == 2, "everybody has {chosen:?}");
    Ok(())
}
