//! What not every Service has: source ranges, session affinity, ports that are none.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::cells::{BACKENDS, Backend, Client, Front, Over};
use super::judge::{Case, PATIENCE, judge, settle};
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
    // A process has the address of its way out: the bridge's, which lies within, does not help it.
    (
        &["10.244.0.0/16", "192.0.2.10/32", "2001:db8:1::10/128", "fd00:10:244::/48"],
        [true, true, false, true],
    ),
    (&["0.0.0.0/0", "::/0"], [true, true, true, true]),
];

const fn with_ranges(i: usize) -> u8 {
    60 + i as u8
}

/// The Service whose ranges are all of one family.
const V4_RANGES: u8 = with_ranges(RANGES.len());

fn ranges_objects() -> Result<Vec<Value>> {
    let here = backends("here")?;
    let mut all = Vec::new();
    for (i, (ranges, _)) in RANGES.iter().enumerate() {
        let spec = json!({"loadBalancerSourceRanges": ranges});
        all.extend(objects(&format!("r{i}"), with_ranges(i), here, &spec));
    }
    all.extend(objects("v4", V4_RANGES, here, &json!({"loadBalancerSourceRanges": ["203.0.113.0/24"]})));
    Ok(all)
}

fn ranges_cases(site: &Site) -> Vec<Case> {
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
            asked.extend(cases(site, &what, (client, Front::LoadBalancer), with_ranges(i), admitted));
            for front in ON_N1.into_iter().filter(|&front| front != Front::LoadBalancer) {
                // From n2 this is a way from outside; the matrix has it.
                if front != Front::NodePort(0) || client.node() != Some(1) {
                    asked.extend(cases(site, &what, (client, front), with_ranges(i), |_| answer(source)));
                }
            }
        }
        // A family without ranges is not restricted.
        let admitted = |v4| if v4 { refused() } else { answer(source) };
        asked.extend(cases(site, "203.0.113.0/24", (client, Front::LoadBalancer), V4_RANGES, admitted));
    }
    asked
}

#[test]
fn source_ranges_count_for_load_balancer_addresses_only() -> Result<()> {
    let site = Site::start("ranges", &[("services.yaml", documents(&ranges_objects()?))])?;
    judge(&site, &ranges_cases(&site)).map(drop)
}

fn ports_objects() -> Result<Vec<Value>> {
    let mut all = objects("ports", 70, backends("both")?, &json!({}));
    all.extend(objects("empty", 71, &[], &json!({"internalTrafficPolicy": "Local"})));
    Ok(all)
}

fn ports_cases(site: &Site) -> Vec<Case> {
    let mut asked = Vec::new();
    for client in Client::ALL {
        for number in [70, 71] {
            let mut more = cases(site, "port 81", (client, Front::ClusterIp), number, |_| Expected::Refused);
            more.iter_mut().for_each(|case| case.to = SocketAddr::new(case.to.ip(), 81));
            asked.extend(more);
        }
    }
    asked
}

#[test]
fn another_port_of_a_cluster_ip_is_refused() -> Result<()> {
    let site = Site::start("ports", &[("services.yaml", documents(&ports_objects()?))])?;
    judge(&site, &ports_cases(&site)).map(drop)
}

/// Enough that chance does not give all of them to one endpoint.
const STICKY: std::ops::Range<u8> = 72..78;

fn affinity_objects() -> Result<Vec<Value>> {
    let spec = json!({"sessionAffinity": "ClientIP",
                      "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}});
    let both = backends("both")?;
    Ok(STICKY.flat_map(|number| objects(&format!("a{number}"), number, both, &spec)).collect())
}

fn affinity_cases(site: &Site) -> Vec<Case> {
    let mut asked = Vec::new();
    for client in Client::ALL {
        let process = matches!(client, Client::Process(_));
        for front in Front::ALL.into_iter().filter(|&front| process || front != Front::Localhost) {
            for number in STICKY {
                let sticks = |_| Expected::Sticks(&["here", "there"]);
                asked.extend(cases(site, "ClientIP", (client, front), number, sticks));
            }
        }
    }
    asked
}

#[test]
fn a_client_stays_with_its_endpoint_whichever_way_it_comes() -> Result<()> {
    let site = Site::start("affinity", &[("services.yaml", documents(&affinity_objects()?))])?;
    let asked = affinity_cases(&site);
    let tallies = judge(&site, &asked)?;

    // Not one for all: each client and Service has a choice of its own. But all frontends of a Service port, on one
    // node, share it.
    let mut chosen = BTreeSet::new();
    for client in [Client::Pod(0), Client::Outside] {
        for number in STICKY {
            for (over, v4) in [(Over::Tcp, true), (Over::Tcp, false), (Over::Udp, true), (Over::Udp, false)] {
                let to = ON_N1.map(|front| site.destination(front, number, v4));
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

#[test]
fn a_client_moves_when_its_endpoint_goes_and_stays_where_it_moved() -> Result<()> {
    const NUMBER: u8 = 79;
    let spec = json!({"sessionAffinity": "ClientIP"});
    let manifest =
        |what| Ok::<_, anyhow::Error>(documents(&objects("moves", NUMBER, backends(what)?, &spec)));
    let site = Site::start("moves", &[("moves.yaml", manifest("both")?)])?;
    let asked = |what: &str, names: &'static [&'static str]| {
        let mut all = Vec::new();
        for client in [Client::Pod(0), Client::Process(0), Client::Outside] {
            for front in ON_N1 {
                all.extend(cases(&site, what, (client, front), NUMBER, |_| Expected::Sticks(names)));
            }
        }
        all
    };
    judge(&site, &asked("both", &["here", "there"]))?;
    for (left, names) in [("there", &["there"] as &[_]), ("here", &["here"]), ("there", &["there"])] {
        site.write("moves.yaml", &manifest(left)?)?;
        settle(&site, &asked(left, names))?;
        // What comes back is for others.
        site.write("moves.yaml", &manifest("both")?)?;
        site.write("moved.yaml", &documents(&objects("moved", NUMBER + 1, backends(left)?, &json!({}))))?;
        let seen =
            cases(&site, "read", (Client::Pod(0), Front::ClusterIp), NUMBER + 1, |_| Expected::Names(names));
        settle(&site, &seen)?;
        judge(&site, &asked(left, names))?;
    }
    Ok(())
}
