use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::bench::load::Transport;
use crate::bench::services::{Kind, Where};
use crate::system::output;

#[test]
fn endpoints_are_chosen_evenly_and_chains_are_declared() {
    let kind = Kind { at: Where::Here, transport: Transport::Udp };
    for family in IpFamily::ALL {
        let text = rules(&Cluster::new(family, 2, &[kind]), 0);
        // 1/10, then 1/9 of the rest, … : 0.1 each; the last takes what is left.
        assert_eq!(text.matches("--probability 0.1000000000 ").count(), 2);
        assert_eq!(text.matches("--probability 0.5000000000 ").count(), 2);
        assert_eq!(text.matches("-j DNAT").count(), 20);
        assert_eq!(text.matches("-p udp -j DNAT").count(), 10);
        assert_eq!(text.matches("-A KUBE-NODEPORTS").count(), 1);
        for line in text.lines().filter(|l| l.starts_with("-A KUBE-") || l.starts_with("-A FLANNEL")) {
            let chain = line.split(' ').nth(1).unwrap();
            assert!(text.contains(&format!("\n:{chain} - ")), "{chain} is not declared");
        }
    }
}

/// The rules of a table, by chain, without comments.
type Chains = BTreeMap<String, Vec<String>>;

/// Reads what `iptables-save` says of a table. Chains whose names are hashes are called by what they are for.
fn chains(saved: &str, table: &str) -> Chains {
    let start = saved.find(&format!("*{table}\n")).unwrap();
    let lines: Vec<_> =
        saved[start..].lines().take_while(|line| *line != "COMMIT").map(without_comment).collect();
    let after = |line: &str, word: &str| -> Option<String> {
        Some(line.split_once(word)?.1.split(' ').next()?.to_owned())
    };
    let mut names = BTreeMap::new();
    for line in &lines {
        let to = after(line, "-j ").unwrap_or_default();
        if let Some(endpoint) = after(line, "--to-destination ") {
            names.insert(line.split(' ').nth(1).unwrap().to_owned(), format!("ENDPOINT-{endpoint}"));
        } else if to.starts_with("KUBE-SVC-") && line.starts_with("-A KUBE-SERVICES ") {
            names.insert(to, format!("SERVICE-{}", after(line, "--dport ").unwrap()));
        } else if to.starts_with("KUBE-EXT-") {
            names.insert(to, "EXTERNAL".to_owned());
        }
    }
    let mut chains = Chains::new();
    for line in lines {
        let words = line.split(' ').map(|word| names.get(word).map_or(word, String::as_str));
        match words.collect::<Vec<_>>()[..] {
            [chain, _, _] if chain.starts_with(':') => {
                let chain = chain.trim_start_matches(':');
                chains.entry(names.get(chain).map_or(chain, String::as_str).to_owned()).or_default();
            }
            ["-A", chain, ref rule @ ..] => chains.entry(chain.to_owned()).or_default().push(rule.join(" ")),
            _ => {}
        }
    }
    chains
}

fn without_comment(line: &str) -> String {
    let Some((before, after)) = line.split_once("-m comment --comment ") else { return line.to_owned() };
    let rest = match after.strip_prefix('"') {
        Some(quoted) => quoted.split_once("\" ").map(|(_, rest)| rest),
        None => after.split_once(' ').map(|(_, rest)| rest),
    };
    format!("{before}{}", rest.unwrap_or_default())
}

/// What kube-proxy does otherwise since the version of the recording. Each difference makes a packet's way shorter.
fn as_of_today(nat: &mut Chains) {
    // Whether to masquerade is asked in the Service's own chain.
    let services = nat.remove("KUBE-SERVICES").unwrap();
    let (masquerade, rest): (Vec<_>, Vec<_>) =
        services.into_iter().partition(|rule| rule.ends_with("-j KUBE-MARK-MASQ"));
    nat.insert("KUBE-SERVICES".into(), rest);
    nat.get_mut("SERVICE-80").unwrap().splice(0..0, masquerade);
    // What is external has a chain of its own.
    let [mark, go] = <[String; 2]>::try_from(nat.remove("KUBE-NODEPORTS").unwrap()).unwrap();
    assert!(mark.ends_with(" -j KUBE-MARK-MASQ") && go.ends_with(" -j SERVICE-80"), "{mark}, {go}");
    nat.insert("KUBE-NODEPORTS".into(), vec![go.replace("SERVICE-80", "EXTERNAL")]);
    nat.insert("EXTERNAL".into(), vec!["-j KUBE-MARK-MASQ".into(), "-j SERVICE-80".into()]);
    // No packet meets these.
    for unused in ["KUBE-MARK-DROP", "KUBE-PROXY-CANARY"] {
        assert_eq!(nat.remove(unused), Some(vec![]), "{unused}");
    }
}

/// As the kernel shows what the generator has written.
fn loaded(rules: &str) -> Result<String> {
    prepare()?;
    let lock = tempfile::NamedTempFile::new()?;
    let command = |name: &str| -> Result<Command> {
        let mut command = Command::new(find_program(name).with_context(|| format!("no {name}"))?);
        command.env("XTABLES_LOCKFILE", lock.path());
        Ok(command)
    };
    let load = || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        let mut restore = command("iptables-legacy-restore")?.stdin(Stdio::piped()).spawn()?;
        restore.stdin.take().context("no pipe")?.write_all(rules.as_bytes())?;
        ensure!(restore.wait()?.success(), "refused");
        output(&mut command("iptables-legacy-save")?)
    };
    std::thread::scope(|s| s.spawn(load).join().unwrap())
}

#[test]
fn the_rules_are_those_of_a_real_kube_proxy() -> Result<()> {
    let cluster = Cluster::new(IpFamily::V4, 1, &[Kind { at: Where::Here, transport: Transport::Tcp }]);
    let (real, ours) = (include_str!("kube-proxy-1.20.2.rules"), loaded(&rules(&cluster, 0))?);

    let (mut expected, mut nat) = (chains(real, "nat"), chains(&ours, "nat"));
    as_of_today(&mut expected);
    ensure!(nat.remove("FLANNEL-POSTRTG").is_some_and(|rules| rules.len() == 6));
    nat.values_mut().for_each(|rules| rules.retain(|rule| rule != "-j FLANNEL-POSTRTG"));
    assert_eq!(nat.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (chain, rules) in &expected {
        assert_eq!(&nat[chain], rules, "chain {chain}");
    }

    // Since then, this table has got more chains for packets to pass; none that was there has gone.
    let (expected, filter) = (chains(real, "filter"), chains(&ours, "filter"));
    for (chain, mut rules) in expected.into_iter().filter(|(chain, _)| chain != "KUBE-PROXY-CANARY") {
        // Two that differed in their comments only are one.
        rules.dedup();
        let kept: Vec<_> = filter[&chain].iter().filter(|rule| rules.contains(rule)).collect();
        assert_eq!(kept, rules.iter().collect::<Vec<_>>(), "chain {chain}");
    }
    Ok(())
}
