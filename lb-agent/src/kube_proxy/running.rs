//! Whether kube-proxy still runs on this node.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

/// Where its metrics are unless told otherwise; k3s, which has it inside, leaves it at that.
const METRICS: &str = "127.0.0.1:10249";
/// Loopback answers at once or not at all.
const PATIENCE: Duration = Duration::from_secs(1);

/// Who it is, if there is one.
pub(super) fn find() -> Option<String> {
    process().map(|pid| format!("process {pid}")).or_else(|| {
        let answer = ask(METRICS.parse().ok()?)?;
        is_kube_proxys(&answer).then(|| format!("its metrics are served at {METRICS}"))
    })
}

/// A process of that name in our network namespace, as far as we see the node's processes.
fn process() -> Option<u32> {
    let netns = |process: &Path| fs::metadata(process.join("ns/net")).ok().map(|meta| meta.ino());
    let ours = netns(Path::new("/proc/self"))?;
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let path = entry.path();
        let name = fs::read_to_string(path.join("comm")).ok()?;
        (name.trim() == "kube-proxy" && netns(&path) == Some(ours)).then_some(pid)
    })
}

fn ask(at: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&at, PATIENCE).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    Some(String::from_utf8_lossy(&answer).into_owned())
}

/// Ours have its names, too, and names of our own.
fn is_kube_proxys(metrics: &str) -> bool {
    let has = |name: &str| metrics.lines().any(|line| line.starts_with(name));
    has("kubeproxy_sync_proxy_rules_") && !has("lb_services")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_are_not_taken_for_kube_proxys() {
        let theirs = "HTTP/1.0 200 OK\r\n\r\nkubeproxy_sync_proxy_rules_last_timestamp_seconds 1.7e+09\n";
        assert!(is_kube_proxys(theirs));
        assert!(!is_kube_proxys(&format!("{theirs}lb_services 3\n")));
        assert!(!is_kube_proxys("HTTP/1.0 404 Not Found\r\n\r\n"));
    }
}
