//! What of an `iptables-save` is kube-proxy's, as its own `--cleanup` has it, and the script that takes it away.
//!
//! The kubelet has chains with such names, too: KUBE-KUBELET-CANARY, KUBE-IPTABLES-HINT, KUBE-FIREWALL (filter) and
//! KUBE-MARK-DROP. They stay, and so does whatever a rule needs that stays.

use std::collections::BTreeSet;
use std::fmt::Write as _;

/// By table: chains that kube-proxy makes in any of its iptables and ipvs modes.
const CHAINS: [(&str, &[&str]); 3] = [
    (
        "nat",
        &[
            "KUBE-SERVICES",
            "KUBE-NODEPORTS",
            "KUBE-POSTROUTING",
            "KUBE-MARK-MASQ",
            "KUBE-PROXY-CANARY",
            "KUBE-LOAD-BALANCER",
            "KUBE-NODE-PORT",
            "KUBE-FIREWALL",
        ],
    ),
    (
        "filter",
        &[
            "KUBE-SERVICES",
            "KUBE-EXTERNAL-SERVICES",
            "KUBE-NODEPORTS",
            "KUBE-FORWARD",
            "KUBE-PROXY-FIREWALL",
            "KUBE-PROXY-CANARY",
            "KUBE-SOURCE-RANGES-FIREWALL",
            "KUBE-NODE-PORT",
            "KUBE-IPVS-FILTER",
            "KUBE-IPVS-OUT-FILTER",
        ],
    ),
    ("mangle", &["KUBE-PROXY-CANARY"]),
];

/// What the chains of Services, endpoints and so on begin with, in `nat`.
const PREFIXES: [&str; 6] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-"];

/// Without these, marks that somebody else sets have no effect.
const MARKS: (&str, &str) = ("KUBE-MARK-MASQ", "KUBE-POSTROUTING");

/// One table of a save.
#[derive(Default)]
struct Table<'a> {
    name: &'a str,
    chains: BTreeSet<&'a str>,
    /// Chains of the kernel's: those with a policy.
    built_in: BTreeSet<&'a str>,
    /// Chain and what follows it.
    rules: Vec<(&'a str, &'a str)>,
}

/// The input for `iptables-restore --noflush` that takes kube-proxy's chains away, and the rules that jump to them. Nothing
/// if there are none.
pub(super) fn without_kube_proxy(saved: &str) -> Option<String> {
    let mut script = String::new();
    for table in parse(saved) {
        let ours = table.kube_proxys();
        if ours.is_empty() {
            continue;
        }
        let _ = writeln!(script, "*{}", table.name);
        // Named like this, a chain is emptied.
        for chain in &ours {
            let _ = writeln!(script, ":{chain} - [0:0]");
        }
        for (chain, rest) in table.rules.iter().filter(|(chain, _)| !ours.contains(chain)) {
            if target(rest).is_some_and(|target| ours.contains(target)) {
                let _ = writeln!(script, "-D {chain} {rest}");
            }
        }
        for chain in &ours {
            let _ = writeln!(script, "-X {chain}");
        }
        script.push_str("COMMIT\n");
    }
    (!script.is_empty()).then_some(script)
}

impl<'a> Table<'a> {
    /// Its chains that can go: not those that others' rules jump to.
    fn kube_proxys(&self) -> BTreeSet<&'a str> {
        let known =
            CHAINS.iter().find(|(table, _)| *table == self.name).map_or(&[][..], |(_, chains)| chains);
        let is = |chain: &&&str| {
            known.contains(*chain)
                || self.name == "nat" && PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
        };
        let mut ours: BTreeSet<&str> = self.chains.iter().filter(is).copied().collect();
        loop {
            let needed: Vec<_> = self
                .rules
                .iter()
                // A jump from one of the kernel's chains is kube-proxy's own.
                .filter(|(chain, _)| !ours.contains(chain) && !self.built_in.contains(chain))
                .filter_map(|(_, rest)| target(rest))
                .collect();
            let before = ours.len();
            for chain in needed {
                ours.remove(chain);
                if chain == MARKS.0 {
                    ours.remove(MARKS.1);
                }
            }
            if ours.len() == before {
                return ours;
            }
        }
    }
}

fn parse(saved: &str) -> Vec<Table<'_>> {
    let mut tables: Vec<Table<'_>> = Vec::new();
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            tables.push(Table { name: name.trim(), ..Table::default() });
            continue;
        }
        let Some(table) = tables.last_mut() else { continue };
        if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split_ascii_whitespace();
            let Some(name) = words.next() else { continue };
            table.chains.insert(name);
            if words.next().is_some_and(|policy| policy != "-") {
                table.built_in.insert(name);
            }
        } else if let Some(rule) = line.strip_prefix("-A ") {
            table.rules.extend(rule.split_once(' '));
        }
    }
    tables
}

/// Where a rule jumps to. What is quoted is no word of the rule's.
fn target(rule: &str) -> Option<&str> {
    let mut jump = false;
    for word in words(rule) {
        if jump {
            return Some(word);
        }
        jump = matches!(word, "-j" | "-g" | "--jump" | "--goto");
    }
    None
}

/// Words between spaces; one that begins with a quote ends with one, and a backslash takes a quote's meaning.
fn words(rule: &str) -> impl Iterator<Item = &str> {
    let mut rest = rule.trim();
    std::iter::from_fn(move || {
        rest = rest.trim_start();
        if rest.is_empty() {
            return None;
        }
        let mut escaped = false;
        let end = if let Some(quoted) = rest.strip_prefix('"') {
            let closes = |(_, c): &(usize, char)| {
                let closes = *c == '"' && !escaped;
                escaped = *c == '\\' && !escaped;
                closes
            };
            quoted.char_indices().find(closes).map_or(rest.len(), |(at, _)| at + 2)
        } else {
            rest.find(' ').unwrap_or(rest.len())
        };
        let (word, after) = rest.split_at(end);
        rest = after;
        Some(word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As kube-proxy 1.20 and a kubelet of that age leave it, with flannel and somebody's own.
    const SAVED: &str = r#"# Generated by iptables-save v1.8.9
*mangle
:PREROUTING ACCEPT [0:0]
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*nat
:PREROUTING ACCEPT [1:60]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-MARK-DROP - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SEP-AAAA - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-BBBB - [0:0]
:KUBELIKE - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -j KUBELIKE
-A OUTPUT -m comment --comment "kubernetes \"service\" -j portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A POSTROUTING -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq -j KUBE-SERVICES" -j MASQUERADE --random-fully
-A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-SEP-AAAA -p tcp -m tcp -j DNAT --to-destination 10.244.1.10:8080
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-BBBB
-A KUBE-SVC-BBBB -j KUBE-SEP-AAAA
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-SERVICES - [0:0]
:MINE - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -j MINE
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
"#;

    #[test]
    fn only_kube_proxys_go() {
        let script = without_kube_proxy(SAVED).expect("there is something to remove");
        let expected = r#"*mangle
:KUBE-PROXY-CANARY - [0:0]
-X KUBE-PROXY-CANARY
COMMIT
*nat
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SEP-AAAA - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-BBBB - [0:0]
-D PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-D OUTPUT -m comment --comment "kubernetes \"service\" -j portals" -j KUBE-SERVICES
-D POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-X KUBE-MARK-MASQ
-X KUBE-NODEPORTS
-X KUBE-POSTROUTING
-X KUBE-PROXY-CANARY
-X KUBE-SEP-AAAA
-X KUBE-SERVICES
-X KUBE-SVC-BBBB
COMMIT
*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-SERVICES - [0:0]
-D INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-D FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-X KUBE-EXTERNAL-SERVICES
-X KUBE-FORWARD
-X KUBE-SERVICES
COMMIT
"#;
        assert_eq!(script, expected);
    }

    #[test]
    fn what_others_need_stays() {
        // Docker's host ports, as the kubelet wrote them once, and a chain of somebody's that jumps into kube-proxy's.
        let saved = "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-HOSTPORTS - [0:0]\n:KUBE-HP-CCCC - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n\
                     :KUBE-POSTROUTING - [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-BBBB - [0:0]\n:KUBE-SEP-AAAA - [0:0]\n\
                     :MINE - [0:0]\n-A PREROUTING -j KUBE-SERVICES\n-A PREROUTING -j KUBE-HOSTPORTS\n\
                     -A KUBE-HP-CCCC -s 10.244.1.9/32 -j KUBE-MARK-MASQ\n-A KUBE-SERVICES -j KUBE-SVC-BBBB\n\
                     -A KUBE-SVC-BBBB -j KUBE-SEP-AAAA\n-A MINE -g KUBE-SVC-BBBB\nCOMMIT\n";
        let script = without_kube_proxy(saved).expect("there is something to remove");
        let expected =
            "*nat\n:KUBE-SERVICES - [0:0]\n-D PREROUTING -j KUBE-SERVICES\n-X KUBE-SERVICES\nCOMMIT\n";
        assert_eq!(script, expected);
    }

    #[test]
    fn where_there_is_nothing_nothing_is_done() {
        for saved in
            ["", "*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n", "*filter\n:KUBE-FIREWALL - [0:0]\nCOMMIT\n"]
        {
            assert_eq!(without_kube_proxy(saved), None, "{saved}");
        }
        // The same name in another table is somebody else's.
        assert_eq!(without_kube_proxy("*raw\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-X - [0:0]\nCOMMIT\n"), None);
    }

    #[test]
    fn quotes() {
        let rule = r#"-m comment --comment "a \" -j NOT" -s 10.0.0.1/32 -j THERE --to 1"#;
        assert_eq!(target(rule), Some("THERE"));
        assert_eq!(target(r#"--comment "-j NOWHERE""#), None);
        assert_eq!(words(r#"a  "b c" d"#).collect::<Vec<_>>(), ["a", "\"b c\"", "d"]);
        assert_eq!(words(r#"a "open"#).collect::<Vec<_>>(), ["a", "\"open"]);
    }
}
