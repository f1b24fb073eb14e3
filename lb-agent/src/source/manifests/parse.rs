//! From the text of a file to objects and problems.

use crate::objects;
use crate::store::{Change, Node, ObjectName, Service, Slice};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tracing::debug;

/// Which object: kind and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Service(ObjectName),
    Slice(ObjectName),
    /// This node's; others do not concern us.
    Node,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => write!(f, "Service {name}"),
            Self::Slice(name) => write!(f, "EndpointSlice {name}"),
            Self::Node => f.write_str("Node"),
        }
    }
}

/// Something in a file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file.
    pub path: PathBuf,
    /// The line, counted from 1, where it is known.
    pub line: Option<u64>,
    /// Kind and name, as far as they are known.
    pub object: Option<String>,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if let Some(object) = &self.object {
            write!(f, ": {object}")?;
        }
        write!(f, ": {}; what it served before stays, the rest of the file is served", self.message)
    }
}

impl Problem {
    pub(super) fn of_file(path: &Path, message: String) -> Self {
        Self { path: path.into(), line: None, object: None, message }
    }
}

/// What a file holds.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    pub(super) objects: BTreeMap<Key, Change>,
    /// The objects that could not be read; `None` for one whose name could not be read either.
    pub(super) broken: BTreeSet<Option<Key>>,
    pub(super) problems: Vec<Problem>,
}

impl Parsed {
    pub(super) fn unreadable(problem: Problem) -> Self {
        Self { broken: [None].into(), problems: vec![problem], ..Self::default() }
    }
}

/// Reads a file's documents.
pub(super) fn file(path: &Path, text: &str, node_name: &str) -> Parsed {
    let mut parsed = Parsed::default();
    let json = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
    let format = if json { Format::Json } else { Format::Yaml };
    for (line, text) in documents(text, format) {
        Document { path, line, text, format, node_name }.read(&mut parsed);
    }
    parsed
}

/// The documents of a file with the number of lines before each. A line of `---` separates them wherever it stands;
/// splitting first keeps a broken one from hiding those behind it.
fn documents(text: &str, format: Format) -> Vec<(u64, &str)> {
    if format == Format::Json {
        return vec![(0, text)];
    }
    let mut documents = Vec::new();
    let (mut start, mut start_line, mut at) = (0, 0, 0);
    for (number, line) in (0..).zip(text.split_inclusive('\n')) {
        let marker = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if marker {
            documents.push((start_line, &text[start..at]));
            (start, start_line) = (at, number);
        }
        at += line.len();
    }
    documents.push((start_line, &text[start..]));
    documents
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Yaml,
    Json,
}

/// What every object starts with.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Header {
    api_version: Option<String>,
    kind: Option<String>,
    metadata: Option<Metadata>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
}

#[derive(Deserialize)]
struct List<T> {
    #[serde(default = "Vec::new")]
    items: Vec<T>,
}

/// What went wrong, and on which line of the document.
type Fault = (Option<u64>, String);

struct Document<'a> {
    path: &'a Path,
    /// Lines of the file before it.
    line: u64,
    text: &'a str,
    format: Format,
    node_name: &'a str,
}

impl Document<'_> {
    fn decode<T: DeserializeOwned>(&self) -> Result<T, Fault> {
        match self.format {
            Format::Json => serde_json::from_str(self.text)
                .map_err(|error| (Some(error.line() as u64), error.to_string())),
            Format::Yaml => {
                let mut options = serde_saphyr::Options::default();
                // The limits are for strangers' input; a long List would exceed them.
                options.budget = None;
                // A namespace may be called `n`.
                options.strict_booleans = true;
                serde_saphyr::from_str_with_options(self.text, options).map_err(|error| {
                    let line = error.location().map(|location| location.line());
                    (line, first_line(&error.without_snippet().to_string()))
                })
            }
        }
    }

    fn read(&self, parsed: &mut Parsed) {
        let header = match self.decode::<Option<Header>>() {
            Ok(None) => return,
            Ok(Some(header)) => header,
            Err(fault) => return self.fail(parsed, None, self.guess(), fault),
        };
        let Some(kind) = header.kind.as_deref() else {
            let message = "no `kind`: not a Kubernetes object".to_owned();
            return self.fail(parsed, None, None, (None, message));
        };
        if let Some(kind) = kind.strip_suffix("List") {
            return self.read_list(parsed, kind);
        }
        self.read_object(parsed, &header, None, |kind| kind.read_text(self));
    }

    fn read_list(&self, parsed: &mut Parsed, kind: &str) {
        let items: Result<Vec<(Option<u64>, Value)>, Fault> = match self.format {
            Format::Json => self
                .decode::<List<Value>>()
                .map(|list| list.items.into_iter().map(|item| (None, item)).collect()),
            Format::Yaml => self.decode::<List<serde_saphyr::Spanned<Value>>>().map(|list| {
                list.items.into_iter().map(|item| (Some(item.referenced.line()), item.value)).collect()
            }),
        };
        let items = match items {
            Ok(items) => items,
            Err(fault) => return self.fail(parsed, None, Some(format!("{kind}List")), fault),
        };
        for (line, item) in items {
            let mut header = match Header::deserialize(&item) {
                Ok(header) => header,
                Err(error) => {
                    self.fail(parsed, None, None, (line, error.to_string()));
                    continue;
                }
            };
            // The items of a ServiceList do not repeat what they are.
            if !kind.is_empty() && header.kind.is_none() {
                header.kind = Some(kind.to_owned());
            }
            self.read_object(parsed, &header, line, |kind| kind.read_value(item, self.node_name));
        }
    }

    fn read_object(
        &self,
        parsed: &mut Parsed,
        header: &Header,
        line: Option<u64>,
        decode: impl FnOnce(Kind) -> Result<Object, Fault>,
    ) {
        let kind = header.kind.as_deref().unwrap_or_default();
        let version = header.api_version.as_deref();
        let Some(known) = Kind::of(kind, version) else {
            return debug!("{}: {kind} {} is not for us", self.path.display(), version.unwrap_or_default());
        };
        let meta = header.metadata.as_ref();
        let Some(name) = meta.and_then(|meta| meta.name.as_deref()).filter(|name| !name.is_empty()) else {
            return self.fail(parsed, None, Some(kind.into()), (line, "no `metadata.name`".into()));
        };
        let namespace = meta.and_then(|meta| meta.namespace.as_deref()).unwrap_or_default();
        let name = ObjectName::new(namespace, name);
        if known == Kind::Node && name.name() != self.node_name {
            return;
        }
        let key = Key::new(kind, &name);
        let label = if known == Kind::Node { name.name().to_owned() } else { name.to_string() };
        let label = format!("{kind} {label}");
        if known == Kind::OldSlice {
            let message = "this apiVersion is not supported: use discovery.k8s.io/v1".to_owned();
            return self.fail(parsed, key, Some(label), (line, message));
        }
        let object = match decode(known) {
            Ok(object) => object,
            Err((inner, message)) => return self.fail(parsed, key, Some(label), (inner.or(line), message)),
        };
        let change = match object {
            Object::Service(service) => Change::Service(name, Some(service)),
            Object::Slice(Some(slice)) => Change::Slice(name, Some(slice)),
            Object::Slice(None) => {
                return debug!("{label} has no label kubernetes.io/service-name, or asks not to be served");
            }
            Object::Node(node) => Change::Node(Some(node)),
        };
        parsed.objects.extend(key.map(|key| (key, change)));
    }

    fn fail(&self, parsed: &mut Parsed, key: Option<Key>, object: Option<String>, (line, message): Fault) {
        // Without a line of its own, a document is named by its first.
        let separator = u64::from(self.text.starts_with("---"));
        let line = self.line + line.filter(|line| *line > 0).unwrap_or(1 + separator);
        parsed.problems.push(Problem { path: self.path.into(), line: Some(line), object, message });
        parsed.broken.insert(key);
    }

    /// Kind and name for a message about text that cannot be parsed.
    fn guess(&self) -> Option<String> {
        let field = |name: &str| {
            let value =
                self.text.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'));
            value
                .map(|value| value.trim().trim_matches(['"', '\'']).to_owned())
                .filter(|value| !value.is_empty())
        };
        let kind = field("kind")?;
        Some(field("name").map_or(kind.clone(), |name| format!("{kind} {name}")))
    }
}

/// The kinds that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Service,
    Slice,
    OldSlice,
    Node,
}

enum Object {
    Service(Arc<Service>),
    Slice(Option<Arc<Slice>>),
    Node(Node),
}

impl Kind {
    /// Other groups have kinds of the same name.
    fn of(kind: &str, version: Option<&str>) -> Option<Self> {
        match (kind, version) {
            ("Service", None | Some("v1")) => Some(Self::Service),
            ("Node", None | Some("v1")) => Some(Self::Node),
            ("EndpointSlice", None | Some("discovery.k8s.io/v1")) => Some(Self::Slice),
            ("EndpointSlice", Some(version)) if version.starts_with("discovery.k8s.io/") => {
                Some(Self::OldSlice)
            }
            _ => None,
        }
    }

    fn read_text(self, document: &Document<'_>) -> Result<Object, Fault> {
        Ok(match self {
            Self::Service => Object::service(&document.decode()?),
            Self::Node => Object::node(&document.decode()?),
            Self::Slice | Self::OldSlice => Object::slice(&document.decode()?, document.node_name),
        })
    }

    fn read_value(self, value: Value, node_name: &str) -> Result<Object, Fault> {
        fn decode<T: DeserializeOwned>(value: Value) -> Result<T, Fault> {
            serde_json::from_value(value).map_err(|error| (None, error.to_string()))
        }
        Ok(match self {
            Self::Service => Object::service(&decode(value)?),
            Self::Node => Object::node(&decode(value)?),
            Self::Slice | Self::OldSlice => Object::slice(&decode(value)?, node_name),
        })
    }
}

impl Object {
    fn service(service: &objects::Service) -> Self {
        Self::Service(Arc::new(service.into()))
    }

    fn slice(slice: &objects::EndpointSlice, node_name: &str) -> Self {
        Self::Slice(Slice::new(slice, node_name).map(Arc::new))
    }

    fn node(node: &objects::Node) -> Self {
        Self::Node(node.into())
    }
}

fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or_default().to_owned()
}
