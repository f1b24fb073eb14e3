//! HTTP servers for machines that ask how we are: a handful of paths, short answers.

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

/// Somebody else may have the port for a moment: the agent that we replace.
const BIND_AGAIN: Duration = Duration::from_secs(2);
/// Slow or idle clients must not use up our file descriptors.
const CONNECTIONS: usize = 64;
/// Also for the next request on a connection: longer than load balancers rest between their checks.
const HEADERS_WITHIN: Duration = Duration::from_secs(75);

/// Answers a path, or does not know it.
pub type Handler = Arc<dyn Fn(&str) -> Option<Reply> + Send + Sync>;

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Status code.
    pub status: StatusCode,
    /// Header of that name.
    pub content_type: &'static str,
    /// Another header.
    pub header: Option<(&'static str, HeaderValue)>,
    /// Contents.
    pub body: String,
}

impl Reply {
    /// 200 with plain text.
    pub fn text(body: impl Into<String>) -> Self {
        let content_type = "text/plain; charset=utf-8";
        Self { status: StatusCode::OK, content_type, header: None, body: body.into() }
    }

    /// A status with JSON.
    pub fn json(status: StatusCode, body: impl Into<String>) -> Self {
        Self { status, content_type: "application/json", ..Self::text(body) }
    }

    fn not_found() -> Self {
        Self { status: StatusCode::NOT_FOUND, ..Self::text("404 page not found\n") }
    }
}

/// Serves for ever. A port that is taken is waited for: health checks are no reason not to forward packets.
pub async fn serve(what: &str, address: SocketAddr, handler: Handler) {
    accept(what, address, bind(what, address).await, handler).await;
}

/// Serves on a socket for ever. Connections end with the future.
pub(super) async fn accept(what: &str, address: SocketAddr, listener: TcpListener, handler: Handler) {
    let limit = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(permit) = limit.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!("{what} on {address}: {error}");
                tokio::time::sleep(BIND_AGAIN).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let handler = handler.clone();
        connections.spawn(async move {
            let service = service_fn(move |request| std::future::ready(answer(&handler, &request)));
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADERS_WITHIN)
                .title_case_headers(true)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                debug!("a client of {address}: {error}");
            }
            drop(permit);
        });
    }
}

async fn bind(what: &str, address: SocketAddr) -> TcpListener {
    let mut complained = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                info!("{what} on http://{address}");
                return listener;
            }
            Err(error) if !std::mem::replace(&mut complained, true) => {
                warn!(
                    "{what} cannot listen on {address}: {error}; trying again every {BIND_AGAIN:?}, Services are served"
                );
            }
            Err(error) => debug!("{what} cannot listen on {address}: {error}"),
        }
        tokio::time::sleep(BIND_AGAIN).await;
    }
}

fn answer(handler: &Handler, request: &Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let reply = handler(request.uri().path()).unwrap_or_else(Reply::not_found);
    let mut response = Response::new(Full::new(Bytes::from(reply.body)));
    *response.status_mut() = reply.status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
    response.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if let Some((name, value)) = reply.header {
        response.headers_mut().insert(name, value);
    }
    Ok(response)
}
