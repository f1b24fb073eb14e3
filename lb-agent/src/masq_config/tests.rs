use super::*;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use tokio::sync::mpsc;
use tokio::time::timeout;

fn nets(list: &[&str]) -> Vec<IpNet> {
    list.iter().map(|net| net.parse().unwrap()).collect()
}

/// What the file exempts, without link-local ranges.
fn parsed(text: &str) -> Result<Vec<IpNet>, String> {
    let mut ranges = MasqConfig::parse(text.as_bytes())?.ranges(&[]);
    ranges.retain(|net| !nets(&["169.254.0.0/16", "fe80::/10"]).contains(net));
    Ok(ranges)
}

const RFC1918: &[&str] = &["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"];

#[test]
fn files_mean_what_they_mean_to_ip_masq_agent() {
    for (text, expected) in [
        (
            "nonMasqueradeCIDRs:\n  - 172.16.0.0/12\n  - fd00::/8\nresyncInterval: 5s\n",
            &["172.16.0.0/12", "fd00::/8"][..],
        ),
        (
            r#"{"NonMasqueradeCIDRs":["10.244.0.0/16"],"MasqLinkLocal":true,"ResyncInterval":"1m0s"}"#,
            &["10.244.0.0/16"],
        ),
        ("nonMasqueradeCIDRs: []\n", &[]),
        ("nonMasqueradeCIDRs:\n", &[]),
        ("masqLinkLocal: true\n", RFC1918),
        ("cidrLimit: 1\nmasqLinkLocal: null\n", RFC1918),
        ("", RFC1918),
        ("# nothing\n", RFC1918),
        ("{}", RFC1918),
        ("other: 1\n", RFC1918),
    ] {
        assert_eq!(parsed(text), Ok(nets(expected)), "{text}");
    }
    let config = MasqConfig::parse(b"resyncInterval: 1h5m\nother: 1\n").unwrap();
    assert_eq!(
        (config.resync_interval, config.unknown),
        (Duration::from_secs(3900), vec!["other".to_owned()])
    );
    let eager = MasqConfig::parse(b"resyncInterval: 0s").unwrap();
    assert_eq!(eager.resync_interval, LEAST_INTERVAL);
}

#[test]
fn link_local_ranges_are_exempt_unless_asked_for_and_flags_add_to_them() {
    for (text, expected) in [
        ("nonMasqueradeCIDRs: []", &["169.254.0.0/16", "fe80::/10"][..]),
        ("{nonMasqueradeCIDRs: [], masqLinkLocal: true}", &["fe80::/10"]),
        ("{nonMasqueradeCIDRs: [], masqLinkLocalIPv6: true}", &["169.254.0.0/16"]),
        ("{nonMasqueradeCIDRs: [], masqLinkLocal: true, masqLinkLocalIPv6: true}", &[]),
    ] {
        assert_eq!(MasqConfig::parse(text.as_bytes()).unwrap().ranges(&[]), nets(expected), "{text}");
    }
    let flags = nets(&["100.64.0.0/10"]);
    assert_eq!(MasqConfig::without_file().ranges(&flags), nets(&["100.64.0.0/10", "fe80::/10"]));
    // A file that is named and absent is another matter.
    let absent = [RFC1918, &["169.254.0.0/16", "fe80::/10"]].concat();
    assert_eq!(BTreeSet::from_iter(MasqConfig::default().ranges(&[])), BTreeSet::from_iter(nets(&absent)));
}

#[test]
fn bad_files_are_refused_with_the_reason() {
    for (text, reason) in [
        (
            "nonMasqueradeCIDRs: [10.0.0.1/8]",
            "has 10.0.0.1/8 in nonMasqueradeCIDRs: the network is 10.0.0.0/8",
        ),
        ("nonMasqueradeCIDRs: [10.0.0.0]", "has \"10.0.0.0\" in nonMasqueradeCIDRs, which is not a CIDR"),
        ("nonMasqueradeCIDRs: 10.0.0.0/8", "but a list is needed"),
        ("masqLinkLocal: perhaps", "says masqLinkLocal: \"perhaps\", but true or false is needed"),
        ("resyncInterval: 60", "but a duration like 60s is needed"),
        ("resyncInterval: 60 s", "says resyncInterval: \"60 s\" is not a duration"),
        ("resyncInterval: -5s", "is not a duration"),
        ("cidrLimit: many", "but a number is needed"),
        ("- 10.0.0.0/8", "is not YAML or JSON with settings"),
        ("nonMasqueradeCIDRs: [", "is not YAML or JSON with settings"),
    ] {
        let error = parsed(text).unwrap_err();
        assert!(error.contains(reason), "{text}: {error}");
    }
    assert!(MasqConfig::parse(b"\xff\xfe").unwrap_err().contains("UTF-8"));
    let many = format!("nonMasqueradeCIDRs: [{}]", vec!["10.0.0.0/8"; 2049].join(", "));
    assert!(parsed(&many).unwrap_err().contains("there is room for 2048"));
}

async fn next(events: &mut mpsc::Receiver<Event>) -> Vec<IpNet> {
    match timeout(Duration::from_secs(5), events.recv()).await {
        Ok(Some(Event::NoMasquerade(mut ranges))) => {
            ranges.retain(|net| !nets(&["169.254.0.0/16", "fe80::/10"]).contains(net));
            ranges
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_file_is_followed_and_a_bad_one_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ip-masq-agent");
    let (sender, mut events) = mpsc::channel(4);
    let mut file = ConfigFile::new(&path, nets(&["100.64.0.0/10"]));
    assert!(file.read(), "not being there is something to know");
    assert_eq!(file.ranges().len(), 6);
    tokio::spawn(file.run(sender));
    // Until it watches: the file may be read twice, and is told of once.
    fs::write(&path, "nonMasqueradeCIDRs: [10.1.0.0/16]").unwrap();
    assert_eq!(next(&mut events).await, nets(&["10.1.0.0/16", "100.64.0.0/10"]));
    fs::write(&path, "nonMasqueradeCIDRs: [10.1.0.0]").unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(events.try_recv().is_err(), "what worked stays");
    fs::write(dir.path().join(".new"), "nonMasqueradeCIDRs: [10.2.0.0/16]").unwrap();
    fs::rename(dir.path().join(".new"), &path).unwrap();
    assert_eq!(next(&mut events).await, nets(&["10.2.0.0/16", "100.64.0.0/10"]));
    fs::remove_file(&path).unwrap();
    assert_eq!(
        next(&mut events).await,
        nets(&["10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16"])
    );
}

/// As kubelet does it: the name is a link through a link that is swapped.
#[tokio::test]
async fn config_map_volumes_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let version = |name: &str, text: &str| {
        fs::create_dir(dir.path().join(name)).unwrap();
        fs::write(dir.path().join(name).join("config"), text).unwrap();
        let link = dir.path().join("..data_tmp");
        symlink(name, &link).unwrap();
        fs::rename(link, dir.path().join("..data")).unwrap();
    };
    version("..1", "nonMasqueradeCIDRs: [10.1.0.0/16]");
    symlink("..data/config", dir.path().join("config")).unwrap();
    let (sender, mut events) = mpsc::channel(4);
    tokio::spawn(ConfigFile::new(&dir.path().join("config"), Vec::new()).run(sender));
    assert_eq!(next(&mut events).await, nets(&["10.1.0.0/16"]));
    version("..2", "nonMasqueradeCIDRs: [10.2.0.0/16]");
    assert_eq!(next(&mut events).await, nets(&["10.2.0.0/16"]));
}

/// Nothing to watch yet, so the interval has to do.
#[tokio::test]
async fn a_directory_may_come_later() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("later/config");
    let (sender, mut events) = mpsc::channel(4);
    let mut file = ConfigFile::new(&path, Vec::new());
    file.read();
    file.config.resync_interval = Duration::from_millis(50);
    tokio::spawn(file.run(sender));
    tokio::time::sleep(Duration::from_millis(100)).await;
    fs::create_dir(dir.path().join("later")).unwrap();
    fs::write(&path, "nonMasqueradeCIDRs: [10.1.0.0/16]").unwrap();
    assert_eq!(next(&mut events).await, nets(&["10.1.0.0/16"]));
}
