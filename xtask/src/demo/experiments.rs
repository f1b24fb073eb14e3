//! What people try with iptables, tried here: switching masquerading off, taking an endpoint away.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::check::{Action, Check, Expect, Outcome, Seen};
use super::cluster::{Cluster, vip};
use super::report::Report;
use crate::probe::{Ask, Ping};

/// How long a change of the manifests may take until packets see it.
const PATIENCE: Duration = Duration::from_secs(5);

/// The agent on n1 restarted without masquerading, then with it again.
pub(super) fn masquerade(cluster: &mut Cluster, report: &mut Report) -> Result<()> {
    report.heading(
        "experiment: masquerade off and on again",
        "n1's agent is restarted with --masquerade=false. Its pods lose the outside, and nothing else.",
    );
    for on in [false, true] {
        cluster.restart_agent(0, &[if on { "--masquerade=true" } else { "--masquerade=false" }])?;
        let lab = cluster.lab();
        let (pod, label) = (lab.pod(0, 2), if on { "on" } else { "off" });
        for (to, node) in lab.inet().at(8080).into_iter().zip(lab.node(0).ips()) {
            let expect = match on {
                true => Expect::Answers(&["outside"], Seen::Node(vec![node])),
                false => Expect::Silence,
            };
            let action = Action::Ask(Ask::tcp(to).timeout(Duration::from_millis(500)));
            let check = Check { from: pod.clone(), label, action, expect };
            report.checked(&check, check.run()?);
        }
        let expect = if on { Expect::Intact } else { Expect::Silence };
        let action =
            Action::Ping(Ping { timeout: Duration::from_millis(500), ..Ping::new(lab.inet().v4().into()) });
        let check = Check { from: pod.clone(), label, action, expect };
        report.checked(&check, check.run()?);
        let [to, _] = vip("10.96.0.10", "fd00:10:96::10", 80);
        let expect = Expect::Answers(&["web-1", "web-2", "web-3"], Seen::Client(pod.v4().into()));
        let check = Check { from: pod, label, action: Action::Ask(Ask::tcp(to).count(60)), expect };
        report.checked(&check, check.run()?);
    }
    Ok(())
}

/// The web service without its endpoint on n2, without any, with all again.
pub(super) fn endpoints(cluster: &Cluster, report: &mut Report) -> Result<()> {
    report.heading(
        "experiment: endpoints taken away and given back",
        "Lines are deleted from web.yaml while everything runs. Times are from the file's change to the last answer.",
    );
    let lab = cluster.lab();
    let (on_n2, all) = (lab.pod(1, 0), [lab.pod(0, 0), lab.pod(0, 1), lab.pod(1, 0)]);
    let steps: [(&str, &[_], &[&str]); 3] = [
        ("without web-3", std::slice::from_ref(&on_n2), &["web-1", "web-2"]),
        ("without any", &all, &[]),
        ("all back", &[], &["web-1", "web-2", "web-3"]),
    ];
    for (label, gone, names) in steps {
        cluster.web_without(gone)?;
        let changed = Instant::now();
        for to in vip("10.96.0.10", "fd00:10:96::10", 80) {
            let pod = lab.pod(0, 2);
            let seen = Seen::Client(pod.ips()[usize::from(to.is_ipv6())]);
            let (expect, count) =
                if names.is_empty() { (Expect::Refused, 3) } else { (Expect::Answers(names, seen), 60) };
            let check = Check { from: pod, label, action: Action::Ask(Ask::tcp(to).count(count)), expect };
            let outcome = settle(&check, changed)?;
            let within = format!("within {:.0?}", changed.elapsed());
            let notes: Vec<_> = [outcome.sources, within].into_iter().filter(|n| !n.is_empty()).collect();
            report.checked(&check, Outcome { sources: notes.join(", "), ..outcome });
        }
    }
    Ok(())
}

/// Repeats a check until it is as expected or patience ends.
fn settle(check: &Check, changed: Instant) -> Result<Outcome> {
    loop {
        let outcome = check.run()?;
        if outcome.wrong.is_none() || changed.elapsed() > PATIENCE {
            return Ok(outcome);
        }
    }
}
