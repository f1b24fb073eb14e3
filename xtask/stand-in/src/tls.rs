//! Certificates that are renewed while the server runs.

use std::sync::{Arc, Mutex};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::server::TlsStream;

/// The server's side of TLS.
#[derive(Default)]
pub(crate) struct Tls(Mutex<Option<TlsAcceptor>>);

impl Tls {
    /// From now on connections are encrypted, under a certificate that nobody has seen yet. Returns it as PEM: it is its own
    /// authority.
    pub(crate) fn renew(&self) -> String {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .expect("a certificate and its key");
        *crate::lock(&self.0) = Some(TlsAcceptor::from(Arc::new(config)));
        made.cert.pem()
    }

    pub(crate) fn is_on(&self) -> bool {
        crate::lock(&self.0).is_some()
    }

    /// `None` if the client does not trust us, or does not speak TLS.
    pub(crate) async fn accept(&self, stream: TcpStream) -> Option<TlsStream<TcpStream>> {
        let acceptor = crate::lock(&self.0).clone()?;
        acceptor.accept(stream).await.ok()
    }
}
