use super::*;
use crate::kernel::sweep::Timeouts;
use clap::Parser;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: RunArgs,
}

fn parse(flags: &[&str]) -> Result<RunArgs, String> {
    let flags = std::iter::once("lb-agent").chain(flags.iter().copied());
    Cli::try_parse_from(flags).map(|cli| cli.args).map_err(|error| error.to_string())
}

#[test]
fn defaults_are_the_documented_ones() {
    let args = parse(&[]).unwrap();
    assert_eq!(args.nodeport_addresses, NodePortAddresses::All);
    assert_eq!(args.masquerade_ports, PortRange { low: 10000, high: 29999 });
    assert_eq!(args.healthz_bind_address.0, Some("0.0.0.0:10256".parse().unwrap()));
    assert_eq!(args.metrics_bind_address.0, Some("127.0.0.1:10249".parse().unwrap()));
    assert_eq!(args.socket_lb, SocketLb::Host);
    assert_eq!(args.flow_table_max, 262_144);
    assert!(args.masquerade && args.external_ips && !args.masquerade_all && !args.log_packets);
    assert!(args.devices.is_empty() && args.cluster_cidr.0.is_empty());
}

#[test]
fn switches_work_with_and_without_a_value() {
    for (flag, all, masquerade) in [
        ("--masquerade-all", true, true),
        ("--masquerade-all=true", true, true),
        ("--masquerade=false", false, false),
    ] {
        let args = parse(&[flag]).unwrap();
        assert_eq!((args.masquerade_all, args.masquerade), (all, masquerade), "{flag}");
    }
}

#[test]
fn lists_take_both_families_and_blanks() {
    let args =
        parse(&["--cluster-cidr", "10.42.0.0/16, fd00:42::/48", "--devices", "eth*,flannel.?"]).unwrap();
    assert_eq!(args.cluster_cidr.0.len(), 2);
    assert!(
        args.devices.matches("eth0") && args.devices.matches("flannel.1") && !args.devices.matches("veth0")
    );
    let args = parse(&["--nodeport-addresses", "primary"]).unwrap();
    assert_eq!(args.nodeport_addresses, NodePortAddresses::Primary);
    let args = parse(&["--healthz-bind-address", "", "--metrics-bind-address", "::1"]).unwrap();
    assert_eq!(args.healthz_bind_address.0, None);
    assert_eq!(args.metrics_bind_address.0, Some("[::1]:10249".parse().unwrap()));
}

#[test]
fn mistakes_are_explained() {
    for (flags, expected) in [
        (["--cluster-cidr", "10.42.0.0"], "\"10.42.0.0\" is not a CIDR like"),
        (["--nodeport-addresses", "primary,10.0.0.0/8"], "`primary` cannot be combined with anything else"),
        (["--nodeport-addresses", "10.0.0.0/8,all"], "`all` cannot be combined with anything else"),
        (["--nodeport-addresses", "eth0"], "\"eth0\" is not a CIDR"),
        (["--devices", "eth[0"], "\"eth[0\" is not a glob pattern: "),
        (["--masquerade-ports", "20000-30000"], "overlaps the NodePorts"),
        (["--masquerade-ports", "20000"], "not a range of ports"),
        (["--masquerade-ports", "2000-1500"], "the first port is larger"),
        (["--masquerade-ports", "80-9000"], "ports below 1024"),
        (["--healthz-bind-address", "localhost:80"], "not IP:PORT, like 0.0.0.0:10256"),
        (["--socket-lb", "pods"], "possible values: host, all, off"),
        (["--flow-table-max", "0"], "0 is not in 1024..=16777216"),
        (["--conntrack-udp-timeout", "30"], "\"30\" is not a duration like 24h, 90s or 1h30m0s"),
        (["--conntrack-udp-timeout", "1h-5m"], "\"1h-5m\" is not a duration"),
        (["--conntrack-udp-timeout", "99999999999999999h"], "is not a duration"),
        (["--conntrack-tcp-timeout-close", "2000000h"], "is longer than"),
    ] {
        let message = parse(&flags).unwrap_err();
        assert!(message.contains(expected), "{flags:?}: {message}");
        assert!(message.contains(flags[0]), "the flag is not named: {message}");
    }
    assert!(parse(&["--manifests", "a", "--kubeconfig", "b"]).unwrap_err().contains("cannot be used with"));
}

#[test]
fn source_is_found_or_asked_for() {
    let source = |flags: &[&str], in_cluster| parse(flags).unwrap().source_with(in_cluster);
    assert_eq!(source(&["--manifests", "d"], true), Ok(SourceArgs::Manifests("d".into())));
    assert_eq!(source(&["--kubeconfig", "k"], true), Ok(SourceArgs::Kubeconfig("k".into(), None)));
    assert_eq!(source(&[], true), Ok(SourceArgs::InCluster(None)));
    assert_eq!(source(&["--master", "http://m"], false), Ok(SourceArgs::Master("http://m".into())));
    let advice = source(&[], false).unwrap_err();
    assert!(advice.contains("--manifests DIR") && advice.contains("--kubeconfig FILE"), "{advice}");
}

#[test]
fn node_names_are_lower_case() {
    assert_eq!(parse(&["--hostname-override", " Node-A "]).unwrap().node_name().unwrap(), "node-a");
    assert!(
        parse(&["--hostname-override", " "])
            .unwrap()
            .node_name()
            .unwrap_err()
            .contains("--hostname-override")
    );
}

#[test]
fn timeouts_are_durations_as_go_writes_them() {
    assert_eq!(parse(&[]).unwrap().conntrack.timeouts(), Timeouts::default());
    for (flag, value, seconds) in [
        ("--conntrack-tcp-timeout-established", "1h0m0s", 3600),
        ("--conntrack-tcp-timeout-established", "0", 86_400),
        ("--conntrack-tcp-timeout-established", "0s", 86_400),
        ("--conntrack-tcp-timeout-established", "1.5h", 5400),
        ("--conntrack-tcp-timeout-established", "1ms", 1),
    ] {
        let timeouts = parse(&[flag, value]).unwrap().conntrack.timeouts();
        assert_eq!(timeouts.tcp_established, seconds, "{flag} {value}");
    }
    let flags = ["syn-sent", "syn-recv", "established", "close-wait", "time-wait", "close"]
        .map(|state| format!("--conntrack-tcp-timeout-{state}"))
        .into_iter()
        .chain(
            ["udp-timeout", "udp-timeout-stream", "icmp-timeout", "icmpv6-timeout"]
                .map(|f| format!("--conntrack-{f}")),
        )
        .zip(1..)
        .map(|(flag, seconds)| format!("{flag}={seconds}s"))
        .collect::<Vec<_>>();
    let timeouts = parse(&flags.iter().map(String::as_str).collect::<Vec<_>>()).unwrap().conntrack.timeouts();
    assert_eq!(
        timeouts,
        Timeouts {
            tcp_syn_sent: 1,
            tcp_syn_recv: 2,
            tcp_established: 3,
            tcp_close_wait: 4,
            tcp_time_wait: 5,
            tcp_close: 6,
            udp: 7,
            udp_stream: 8,
            icmp: 9,
            icmpv6: 10,
        }
    );
}
