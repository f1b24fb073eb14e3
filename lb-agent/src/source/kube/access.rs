//! The way to the API server. Credentials are followed: whatever file they are in (token, certificates, the kubeconfig
//! itself), a change counts from the next request on, and one that makes no sense is as if it had not happened.

use super::Error;
use super::link::{Link, Trouble};
use crate::metrics::Sample;
use ::kube::client::Body;
use ::kube::config::{KubeConfigOptions, Kubeconfig};
use ::kube::{Client, Config};
use hyper::header::{HeaderValue, USER_AGENT};
use hyper::{Method, Request, Response, StatusCode, Uri};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tracing::{info, warn};

/// Bookmarks arrive every minute, so a connection that is silent for longer is dead.
const SILENCE: Duration = Duration::from_secs(90);
/// A server that does not even do that is away.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// Who asks, for the API server's audit log and its metrics.
const WHO: &str = concat!("lb-agent/", env!("CARGO_PKG_VERSION"));

/// Where Kubernetes puts a pod's credentials.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Where the API server is and how to be let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// What a kubeconfig file says.
    Kubeconfig(PathBuf),
    /// What the cluster gives its pods.
    InCluster,
    /// No credentials.
    Anonymous,
}

/// An API server that can be asked; clones share the connection.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    watching: Client,
    pub(super) link: Link,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Cluster").field(&self.link.url()).finish()
    }
}

impl Cluster {
    /// Prepares the way to the API server; `master` overrides its address.
    ///
    /// # Errors
    /// If the configuration is unusable. That the server cannot be reached is not an error: it may come.
    pub async fn open(access: Access, master: Option<&str>) -> Result<Self, Error> {
        let master = master.map(address).transpose()?;
        let way = Way { access, master };
        let (connected, url) = way.connect().await?;
        let host = url.authority().map(ToString::to_string).unwrap_or_default();
        let link = Link::new(url.to_string().trim_end_matches('/'), &host);
        let requests = Arc::new(Requests { way, link: link.clone(), now: Mutex::new(connected) });
        let client = |tells| {
            let requests = Arc::clone(&requests);
            let service = tower::service_fn(move |request| {
                let requests = Arc::clone(&requests);
                async move { requests.send(request, tells).await }
            });
            Client::new(service, "default")
        };
        Ok(Self { client: client(false), watching: client(true), link })
    }

    /// To ask it with.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// To watch it with: for what is asked again until it is answered. Whether it is tells of the server.
    pub(super) fn watching(&self) -> Client {
        self.watching.clone()
    }

    /// The server's address, for people.
    pub fn url(&self) -> &str {
        self.link.url()
    }

    /// What was asked and how it went, for the metrics.
    pub fn samples(&self) -> Vec<Sample> {
        self.link.samples()
    }
}

fn address(url: &str) -> Result<Uri, Error> {
    let parsed = url.parse::<Uri>().ok().filter(|uri| uri.scheme().is_some() && uri.authority().is_some());
    parsed.ok_or_else(|| Error::Master(url.into()))
}

/// How to come to a client.
struct Way {
    access: Access,
    master: Option<Uri>,
}

/// A client and what it was made of.
struct Connected {
    client: Client,
    /// Files and their contents.
    made_of: Vec<(PathBuf, Option<Vec<u8>>)>,
    /// That newer contents do not work has been said.
    complained: bool,
}

impl Connected {
    fn is_up_to_date(&self) -> bool {
        self.made_of.iter().all(|(path, contents)| std::fs::read(path).ok() == *contents)
    }
}

impl Way {
    /// A client by what the files say now, and the server's address.
    async fn connect(&self) -> Result<(Connected, Uri), Error> {
        let (mut config, files) = match &self.access {
            Access::Kubeconfig(path) => kubeconfig(path).await?,
            Access::InCluster => {
                let files = ["ca.crt", "token"].map(|file| Path::new(SERVICE_ACCOUNT).join(file));
                (Config::incluster().map_err(Error::InCluster)?, files.into())
            }
            Access::Anonymous => {
                let url = self.master.clone().ok_or_else(|| Error::Master(String::new()))?;
                (Config::new(url), Vec::new())
            }
        };
        // Read before they are used: what changes in between is noticed by the next request.
        let made_of = files.into_iter().map(|path| (path.clone(), std::fs::read(path).ok())).collect();
        if let Some(url) = &self.master {
            config.cluster_url = url.clone();
        }
        config.connect_timeout = Some(CONNECT_WITHIN);
        config.read_timeout = Some(SILENCE);
        // A connection that rested for a minute has all of that time for its next answer.
        config.reset_reader_on_write = true;
        // Whoever asks tries again, and knows best how long to wait.
        config.default_retry = false;
        if config.root_cert.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::NoCertificate);
        }
        let url = config.cluster_url.clone();
        let client = Client::try_from(config).map_err(Error::Client)?;
        Ok((Connected { client, made_of, complained: false }, url))
    }
}

/// A kubeconfig file's configuration, and all files that it is made of.
async fn kubeconfig(path: &Path) -> Result<(Config, Vec<PathBuf>), Error> {
    let fail = |error| Error::Kubeconfig(path.display().to_string(), error);
    let mut kubeconfig = Kubeconfig::read_from(path).map_err(fail)?;
    let mut files = vec![path.to_owned()];
    for user in kubeconfig.auth_infos.iter().filter_map(|named| named.auth_info.as_ref()) {
        let named = [&user.token_file, &user.client_certificate, &user.client_key];
        files.extend(named.into_iter().flatten().map(PathBuf::from));
    }
    for cluster in kubeconfig.clusters.iter_mut().filter_map(|named| named.cluster.as_mut()) {
        files.extend(cluster.certificate_authority.as_ref().map(PathBuf::from));
        if cluster.proxy_url.as_ref().is_some_and(|url| !url.is_empty()) {
            return Err(Error::Proxy(path.display().to_string()));
        }
        // Else kube would take one from HTTPS_PROXY, which is meant for the way to the internet: we have to reach the
        // API server before anything else works.
        cluster.proxy_url = Some("http://none.invalid".into());
    }
    let options = KubeConfigOptions::default();
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(fail)?;
    config.proxy_url = None;
    Ok((config, files))
}

/// All requests pass here.
struct Requests {
    way: Way,
    link: Link,
    now: Mutex<Connected>,
}

impl Requests {
    async fn send(&self, mut request: Request<Body>, tells: bool) -> Result<Response<Body>, ::kube::Error> {
        request.headers_mut().insert(USER_AGENT, HeaderValue::from_static(WHO));
        let method = request.method().clone();
        let path = tells.then(|| request.uri().path().to_owned());
        let client = self.client().await;
        let start = Instant::now();
        let result = client.send(request).await;
        let code = result.as_ref().map_or(0, |response| response.status().as_u16());
        self.link.count(name(&method), code, start.elapsed());
        if let Some(path) = path {
            let trouble = match result.as_ref().map(Response::status) {
                Err(error) => Some(Trouble::Unreachable(root(error))),
                Ok(StatusCode::UNAUTHORIZED) => Some(Trouble::Unauthorized),
                Ok(status) if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() => {
                    Some(Trouble::Unavailable(status.as_u16()))
                }
                Ok(_) => None,
            };
            match trouble {
                Some(trouble) => self.link.fails(&path, &trouble),
                None => self.link.works(&path),
            }
        }
        result
    }

    /// A client with the latest credentials that work. Requests are few: watches are renewed every few minutes.
    async fn client(&self) -> Client {
        let mut now = self.now.lock().await;
        if !now.is_up_to_date() {
            match self.way.connect().await {
                Ok((new, _)) => {
                    info!("the credentials for the API server have changed: using the new ones");
                    *now = new;
                }
                Err(error) if !std::mem::replace(&mut now.complained, true) => {
                    warn!(
                        "the credentials for the API server have changed, but cannot be used: {error}; using the old ones"
                    );
                }
                Err(_) => {}
            }
        }
        now.client.clone()
    }
}

/// The words of the innermost error: the others say where in the client it came by.
fn root(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

fn name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}
