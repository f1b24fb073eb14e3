//! Requests and responses.

use crate::dialect::Dialect;
use crate::objects::{Filter, Page, plural};
use crate::watch::{Watch, status};
use crate::{Right, Shared, Streaming, lock};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

type Body = BoxBody<Bytes, Infallible>;

pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        if lock(&shared.behaviour).down {
            continue;
        }
        let shared = shared.clone();
        tokio::spawn(async move {
            // As the real one does: or an event waits for the client's delayed acknowledgement of the one before.
            let _ = stream.set_nodelay(true);
            if !shared.tls.is_on() {
                connection(stream, shared).await;
            } else if let Some(stream) = shared.tls.accept(stream).await {
                connection(stream, shared).await;
            }
        });
    }
}

async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin, shared: Arc<Shared>) {
    let mut cut = shared.cut.subscribe();
    let service = service_fn(move |request| answer(request, shared.clone()));
    let connection =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        _ = connection => {}
        _ = cut.changed() => {}
    }
}

fn answer_with(value: &Value) -> Response<Body> {
    let code = if value["kind"] == "Status" { value["code"].as_u64().unwrap_or(200) } else { 200 };
    Response::builder()
        .status(code as u16)
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(value.to_string())).boxed())
        .unwrap()
}

/// A path taken apart.
struct Target {
    dialect: Dialect,
    kind: String,
    namespace: Option<String>,
    name: Option<String>,
    status: bool,
}

impl Target {
    fn of(path: &str) -> Option<Self> {
        let (dialect, path) = Dialect::of(path)?;
        let mut parts: Vec<_> = path.split('/').map(str::to_owned).collect();
        let namespace =
            (parts[0] == "namespaces" && parts.len() > 2).then(|| parts.drain(..2).nth(1)).flatten();
        let mut parts = parts.into_iter();
        let (kind, name) = (parts.next()?, parts.next());
        Some(Self { dialect, kind, namespace, name, status: parts.next().as_deref() == Some("status") })
    }

    /// Notes the right that a request took.
    fn took(&self, verb: String, shared: &Shared) {
        let part = if self.status { "/status" } else { "" };
        let (group, resource) = (self.dialect.group().into(), format!("{}{part}", self.kind));
        lock(&shared.rights).insert(Right { group, resource, verb });
    }
}

async fn answer(request: Request<Incoming>, shared: Arc<Shared>) -> Result<Response<Body>, Infallible> {
    let behaviour = lock(&shared.behaviour).clone();
    let asker = request.headers().get("user-agent").and_then(|value| value.to_str().ok());
    lock(&shared.askers).insert(asker.unwrap_or_default().to_owned());
    let is_known = |token: &String| {
        let given = request.headers().get("authorization").and_then(|value| value.to_str().ok());
        given.and_then(|given| given.strip_prefix("Bearer ")) == Some(token)
    };
    if !behaviour.token.as_ref().is_none_or(is_known) {
        lock(&shared.requests).push("unauthorized".into());
        return Ok(answer_with(&status(401, "Unauthorized", "Unauthorized")));
    }
    if request.uri().path() == "/version" {
        return Ok(answer_with(&json!({
            "major": "1", "minor": "20", "gitVersion": "v1.20.2", "gitCommit": "", "gitTreeState": "", "buildDate": "",
            "goVersion": "", "compiler": "", "platform": "",
        })));
    }
    let Some(target) = Target::of(request.uri().path()) else {
        return Ok(answer_with(&status(404, "NotFound", request.uri().path())));
    };
    let query = query(request.uri().query().unwrap_or_default());
    if request.method() == Method::GET && target.name.is_none() {
        let watch = query.get("watch").is_some_and(|value| matches!(value.as_str(), "true" | "1"));
        target.took(if watch { "watch" } else { "list" }.into(), &shared);
        return Ok(read(target, &query, shared).await);
    }
    let method = request.method().clone();
    let verb = match method {
        Method::POST => "create".into(),
        Method::PUT => "update".into(),
        _ => method.as_str().to_lowercase(),
    };
    target.took(verb, &shared);
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let answer = write(&method, &target, serde_json::from_slice(&body).unwrap_or_default(), &shared);
    shared.raise();
    Ok(answer_with(&answer))
}

async fn read(target: Target, query: &HashMap<String, String>, shared: Arc<Shared>) -> Response<Body> {
    let get = |key: &str| query.get(key).map(String::as_str).unwrap_or_default();
    let is = |key: &str| matches!(get(key), "true" | "1");
    let behaviour = lock(&shared.behaviour).clone();
    let filter = Filter {
        namespace: target.namespace,
        labels: get("labelSelector").into(),
        fields: get("fieldSelector").into(),
    };
    let (kind, dialect) = (target.kind, target.dialect);
    let streaming = is("sendInitialEvents") && behaviour.streaming != Streaming::Unknown;
    let verb = match (is("watch"), streaming) {
        (false, _) => "list",
        (true, true) => "stream",
        (true, false) => "watch",
    };
    lock(&shared.requests).push(format!("{verb} {kind}"));
    if let Some((_, code, message)) = behaviour.unread.filter(|(unread, ..)| *unread == kind) {
        return answer_with(&status(code, "Refused", message));
    }
    let slow = behaviour.slow_kind.is_none_or(|slow| slow == kind) && verb != "watch";
    if slow {
        tokio::time::sleep(behaviour.slow_list).await;
    }
    if verb == "list" {
        let limit = get("limit").parse().unwrap_or(usize::MAX);
        let token = query.get("continue").map(String::as_str);
        if token.is_some() && behaviour.old_pages {
            return answer_with(&status(410, "Expired", "the continue token is too old"));
        }
        let page = lock(&shared.objects).page(&kind, &filter, limit, token);
        return match page {
            Some(page) => list(page, &kind, dialect, shared),
            None => answer_with(&status(410, "Expired", "the continue token is too old")),
        };
    }
    let watch = Watch {
        kind,
        dialect,
        filter,
        version: get("resourceVersion").parse().unwrap_or(0),
        bookmarks: is("allowWatchBookmarks"),
        initial_events: is("sendInitialEvents"),
        timeout: Duration::from_secs(get("timeoutSeconds").parse().unwrap_or(300)),
    };
    if let Some(refusal) = watch.refusal(&shared) {
        return answer_with(&refusal);
    }
    let (send, mut receive) = mpsc::channel::<Value>(16);
    tokio::spawn(watch.run(shared.clone(), send));
    let stream = futures::stream::poll_fn(move |context| {
        let line = |event: Value| {
            if event["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"] == "true" {
                shared.has_listed();
            }
            Ok(Frame::data(Bytes::from(format!("{event}\n"))))
        };
        receive.poll_recv(context).map(|event| event.map(line))
    });
    let body = StreamBody::new(stream);
    Response::builder().header("content-type", "application/json").body(body.boxed()).unwrap()
}

/// A page of a list. In pieces, so that it shows when the client has got all of it but what its socket holds.
fn list(page: Page, kind: &str, dialect: Dialect, shared: Arc<Shared>) -> Response<Body> {
    const PIECE: usize = 1 << 16;
    let (kind, api_version) = dialect.type_of(kind);
    let mut meta = json!({"resourceVersion": page.version.to_string()});
    let ends = page.rest.is_none();
    if let Some((left, token)) = page.rest {
        meta["remainingItemCount"] = left.into();
        meta["continue"] = token.into();
    }
    let items = page.items.into_iter().map(|item| {
        let mut item = Arc::unwrap_or_clone(item);
        dialect.say(&mut item);
        item.to_string()
    });
    let items = items.collect::<Vec<_>>().join(",");
    let mut rest = Bytes::from(format!(
        "{{\"kind\":\"{kind}List\",\"apiVersion\":\"{api_version}\",\"metadata\":{meta},\"items\":[{items}]}}"
    ));
    let pieces = std::iter::from_fn(move || {
        let piece = rest.split_to(PIECE.min(rest.len()));
        if rest.is_empty() && !piece.is_empty() && ends {
            shared.has_listed();
        }
        (!piece.is_empty()).then(|| Ok(Frame::data(piece)))
    });
    let body = StreamBody::new(futures::stream::iter(pieces));
    Response::builder().header("content-type", "application/json").body(body.boxed()).unwrap()
}

fn write(method: &Method, target: &Target, mut object: Value, shared: &Shared) -> Value {
    let mut objects = lock(&shared.objects);
    lock(&shared.requests).push(format!("{} {}", method.as_str().to_lowercase(), target.kind));
    if let Some((_, code, message)) =
        lock(&shared.behaviour).refused.filter(|(kind, ..)| *kind == target.kind)
    {
        return status(code, "Refused", message);
    }
    let namespace = target.namespace.clone().unwrap_or_default();
    let homeless = target.kind == "events" && object["regarding"]["namespace"].is_null();
    if homeless && *method == Method::POST && namespace != "kube-system" && lock(&shared.behaviour).old_events
    {
        return status(
            422,
            "Invalid",
            "involvedObject.namespace: Invalid value: \"\": does not match event.namespace",
        );
    }
    let named = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let key = (target.kind.clone(), namespace.clone(), target.name.clone().unwrap_or(named));
    let current = objects.get(&key).map(|object| (**object).clone());
    let stored = |object: Arc<Value>| (*object).clone();
    match (method.clone(), current) {
        (Method::POST, None) => {
            assert_eq!(plural(object["kind"].as_str().unwrap_or_default()), target.kind, "{object}");
            if !namespace.is_empty() {
                object["metadata"]["namespace"] = namespace.into();
            }
            stored(objects.apply(object))
        }
        (Method::POST, Some(_)) => status(409, "AlreadyExists", &key.2),
        (_, None) => status(404, "NotFound", &key.2),
        // A merge patch of one level, which is all that anybody sends.
        (Method::PATCH, Some(mut current)) => {
            for (field, value) in object.as_object().into_iter().flatten() {
                current[field] = value.clone();
            }
            stored(objects.apply(current))
        }
        (Method::PUT, Some(mut current)) if target.status => {
            current["status"] = object["status"].take();
            stored(objects.apply(current))
        }
        (Method::PUT, Some(current)) => {
            object["metadata"]["namespace"] = namespace.into();
            object["status"] = current["status"].clone();
            stored(objects.apply(object))
        }
        (Method::DELETE, Some(_)) => objects.delete(&key.0, &key.1, &key.2).map(stored).unwrap_or_default(),
        (Method::GET, Some(current)) => current,
        (method, _) => status(405, "MethodNotAllowed", method.as_str()),
    }
}

fn query(text: &str) -> HashMap<String, String> {
    let pairs = text.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(k, v)| (decode(k), decode(v)))
        .collect()
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digits = [rest.next().unwrap_or(b'0'), rest.next().unwrap_or(b'0')];
                u8::from_str_radix(std::str::from_utf8(&digits).unwrap_or("0"), 16).unwrap_or(b'?')
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).unwrap_or_default()
}
