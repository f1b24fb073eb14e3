//! One scan after the other.

use crate::support::NODE;
use lb_agent::source::manifests::{Manifests, Scan};
use lb_agent::store::Change;
use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, SystemTime};

pub(crate) const WEB: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web, creationTimestamp: null}
spec:
  clusterIP: 10.96.0.1
  ports: [{port: 80, targetPort: http}]
";

const SLICE: &str = "\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-1
  labels: {kubernetes.io/service-name: web}
addressType: IPv4
ports: [{port: 8080}]
endpoints:
- addresses: [10.0.0.1]
  nodeName: node-a
";

struct Dir {
    dir: tempfile::TempDir,
    manifests: Manifests,
}

impl Dir {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let manifests = Manifests::new(dir.path(), NODE);
        Self { dir, manifests }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Old enough not to be taken for a file that is being written.
    fn write(&self, file: &str, text: impl AsRef<[u8]>) {
        let path = self.path().join(file);
        std::fs::write(&path, text).unwrap();
        let file = std::fs::File::options().append(true).open(&path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(5)).unwrap();
    }

    fn scan(&mut self) -> Scan {
        self.manifests.scan(&HashSet::new(), &HashSet::new()).unwrap()
    }

    /// What changed, and the problems without their path.
    fn look(&mut self) -> (Vec<String>, Vec<String>) {
        let scan = self.scan();
        let prefix = format!("{}/", self.path().display());
        let suffix = "; what it served before stays, the rest of the file is served";
        let text = |problem: &dyn ToString| problem.to_string().replace(&prefix, "").replace(suffix, "");
        let problems = scan.problems.iter().map(|problem| text(problem)).collect();
        (scan.changes.iter().map(brief).collect(), problems)
    }

    fn changes(&mut self) -> Vec<String> {
        let (changes, problems) = self.look();
        assert_eq!(problems, [""; 0]);
        changes
    }
}

/// `+Service default/web`, `-…` for what is gone.
pub(crate) fn brief(change: &Change) -> String {
    let sign = |there: bool| if there { '+' } else { '-' };
    match change {
        Change::Service(name, object) => format!("{}Service {name}", sign(object.is_some())),
        Change::Slice(name, object) => format!("{}EndpointSlice {name}", sign(object.is_some())),
        Change::Node(object) => format!("{}Node", sign(object.is_some())),
        Change::Addresses(_) => "Addresses".into(),
    }
}

fn named(name: &str) -> String {
    WEB.replace("name: web", &format!("name: {name}"))
}

#[test]
fn files_documents_and_lists() {
    let mut dir = Dir::new();
    dir.write("a.yaml", format!("# a comment\n---\n{WEB}---   # next\n{SLICE}\n---\n\n---\nkind: Deployment\napiVersion: apps/v1\nmetadata: {{name: web}}\n"));
    dir.write("b.yml", "kind: Service\napiVersion: serving.knative.dev/v1\nmetadata: {name: web}\n");
    dir.write(
        "c.json",
        r#"{"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "node-a"}}"#,
    );
    dir.write("d.json", r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-b"}}"#);
    dir.write("e.yaml", "kind: List\napiVersion: v1\nitems:\n- {kind: Service, apiVersion: v1, metadata: {name: x, namespace: n}, spec: {}}\n- {kind: Pod, apiVersion: v1, metadata: {name: p}}\n");
    dir.write("f.json", "{\"kind\": \"ServiceList\", \"items\": [\n{\"metadata\": {\"name\": \"y\"}}]}");
    dir.write("empty.yaml", "");
    for ignored in [".a.yaml.swp", ".hidden.yaml", "a.yaml~", "#a.yaml#", "notes.txt", "a.yaml.tmp"] {
        dir.write(ignored, "{{{");
    }
    std::fs::create_dir(dir.path().join("dir.yaml")).unwrap();
    assert_eq!(
        dir.changes(),
        [
            "+Service default/web",
            "+Service default/y",
            "+Service n/x",
            "+EndpointSlice default/web-1",
            "+Node"
        ]
    );
    assert_eq!(dir.changes(), [""; 0]);
}

#[test]
fn files_and_objects_come_and_go() {
    let mut dir = Dir::new();
    dir.write("a.yaml", format!("{WEB}---\n{}", named("db")));
    dir.write("b.yaml", SLICE);
    dir.changes();
    dir.write("a.yaml", WEB.replace("port: 80", "port: 81"));
    assert_eq!(dir.changes(), ["+Service default/web", "-Service default/db"]);
    // Moved to another file: nothing happened.
    std::fs::rename(dir.path().join("a.yaml"), dir.path().join("z.yaml")).unwrap();
    assert_eq!(dir.changes(), [""; 0]);
    std::fs::remove_file(dir.path().join("b.yaml")).unwrap();
    assert_eq!(dir.changes(), ["-EndpointSlice default/web-1"]);
    // Two files have it: the last counts, and its going brings back the other.
    dir.write("zz.yaml", WEB);
    assert_eq!(dir.changes(), ["+Service default/web"]);
    std::fs::remove_file(dir.path().join("zz.yaml")).unwrap();
    assert_eq!(dir.changes(), ["+Service default/web"]);
    // A slice whose label goes is no longer anybody's.
    dir.write("b.yaml", SLICE);
    dir.changes();
    dir.write("b.yaml", SLICE.replace("kubernetes.io/service-name", "app"));
    assert_eq!(dir.changes(), ["-EndpointSlice default/web-1"]);
    dir.write("z.yaml", "");
    assert_eq!(dir.changes(), ["-Service default/web"]);
}

#[test]
fn a_broken_document_is_named_and_keeps_what_it_served() {
    let mut dir = Dir::new();
    let db = named("db");
    dir.write("a.yaml", format!("{WEB}---\n{db}---\n{}", named("cache")));
    dir.changes();
    let broken = db.replace("port: 80", "port: eighty");
    dir.write("a.yaml", format!("{}---\n{broken}", WEB.replace("port: 80", "port: 81")));
    let (changes, problems) = dir.look();
    assert_eq!(changes, ["+Service default/web", "-Service default/cache"], "db stays, cache is gone");
    assert_eq!(problems.len(), 1);
    assert!(problems[0].starts_with("a.yaml:13: Service default/db: "), "{}", problems[0]);
    assert!(problems[0].contains("eighty") || problems[0].contains("invalid"), "{}", problems[0]);
    assert!(dir.manifests.has_broken_files());
    assert_eq!(dir.look(), (vec![], vec![]), "said once");
    // Mended.
    dir.write("a.yaml", format!("{WEB}---\n{db}"));
    assert_eq!(dir.changes(), ["+Service default/web"]);
    assert!(!dir.manifests.has_broken_files());
}

#[test]
fn text_that_cannot_be_parsed_takes_nothing_away() {
    let mut dir = Dir::new();
    dir.write("a.yaml", format!("{WEB}---\n{}", named("db")));
    dir.write("b.json", r#"{"kind": "Service", "apiVersion": "v1", "metadata": {"name": "j"}}"#);
    dir.changes();
    dir.write(
        "a.yaml",
        format!("{WEB}---\n{}---\n{}", "kind: Service\nmetadata:\n  name: db\n bad: [\n", named("new")),
    );
    dir.write("b.json", "{\"kind\": \"Service\",\n \"apiVersion\" \"v1\"}");
    let (changes, problems) = dir.look();
    assert_eq!(changes, ["+Service default/new"]);
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(
        problems[0].starts_with("a.yaml:11: Service db: ")
            || problems[0].starts_with("a.yaml:12: Service db: "),
        "{}",
        problems[0]
    );
    assert!(problems[1].starts_with("b.json:2: "), "{}", problems[1]);
    dir.write("a.yaml", [0xff, 0xfe, b'a']);
    let (changes, problems) = dir.look();
    assert_eq!(changes, [""; 0]);
    assert_eq!(problems, ["a.yaml: is not text (UTF-8)"]);
}

#[test]
fn objects_that_are_not_quite_right() {
    for (text, expected) in [
        ("metadata: {name: x}\n", "a.yaml:1: no `kind`: not a Kubernetes object"),
        ("\n---\nkind: Service\napiVersion: v1\n", "a.yaml:3: Service: no `metadata.name`"),
        (
            "kind: EndpointSlice\napiVersion: discovery.k8s.io/v1beta1\nmetadata: {name: x}\n",
            "a.yaml:1: EndpointSlice default/x: this apiVersion is not supported: use discovery.k8s.io/v1",
        ),
        (
            "kind: List\nitems:\n- kind: Service\n  apiVersion: v1\n  metadata: {name: a}\n- kind: Service\n  apiVersion: v1\n  metadata: {name: b}\n  spec: {ports: 7}\n",
            "a.yaml:6: Service default/b: invalid type",
        ),
        ("kind: List\nitems:\n- {kind: Service, metadata: {name: 7}}\n", "a.yaml:3: invalid type"),
        ("[]", "a.yaml:1: "),
        ("just text", "a.yaml:1: "),
    ] {
        let mut dir = Dir::new();
        dir.write("a.yaml", text);
        let (_, problems) = dir.look();
        assert_eq!(problems.len(), 1, "{text}: {problems:?}");
        assert!(problems[0].starts_with(expected), "{}", problems[0]);
    }
}

#[test]
fn unreadable_files_and_directories_change_nothing() {
    let mut dir = Dir::new();
    dir.write("a.yaml", WEB);
    dir.changes();
    // A link to nowhere cannot be read; permissions do not stop root.
    std::fs::remove_file(dir.path().join("a.yaml")).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.path().join("a.yaml")).unwrap();
    let (changes, problems) = dir.look();
    assert_eq!(changes, [""; 0]);
    assert!(problems[0].starts_with("a.yaml: cannot be read: "), "{problems:?}");
    assert_eq!(dir.look(), (vec![], vec![]));
    std::fs::rename(dir.path(), dir.path().with_extension("moved")).unwrap();
    assert!(dir.manifests.scan(&HashSet::new(), &HashSet::new()).is_err());
    std::fs::rename(dir.path().with_extension("moved"), dir.path()).unwrap();
    assert_eq!(dir.look(), (vec![], vec![]));
}

#[test]
fn a_file_that_is_being_written_is_left_alone() {
    let mut dir = Dir::new();
    dir.write("a.yaml", WEB);
    dir.changes();
    let path = dir.path().join("a.yaml");
    // Emptied a moment ago.
    std::fs::write(&path, "").unwrap();
    assert_eq!(dir.changes(), [""; 0]);
    // Half of it is there, and somebody has it open.
    dir.write("a.yaml", &named("db")[..40]);
    let scan = dir.manifests.scan(&HashSet::new(), &[path.clone()].into()).unwrap();
    assert!(scan.changes.is_empty() && scan.problems.is_empty());
    dir.write("a.yaml", named("db"));
    assert_eq!(dir.changes(), ["+Service default/db", "-Service default/web"]);
}

#[test]
fn long_lists_are_read() {
    let mut dir = Dir::new();
    let item = |i: usize| {
        format!(
            "- apiVersion: v1\n  kind: Service\n  metadata: {{name: s{i}}}\n  spec:\n    clusterIP: 10.96.0.1\n    ports: [{{port: 80}}]\n"
        )
    };
    let text: String = (0..20_000).map(item).collect();
    dir.write("a.yaml", format!("apiVersion: v1\nkind: List\nitems:\n{text}"));
    assert_eq!(dir.changes().len(), 20_000);
}
