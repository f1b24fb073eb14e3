//! An API server in the lab.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use lb_stand_in::Api;

use super::Host;

/// The stand-in on a host; it ends with this value.
#[derive(Debug)]
pub struct ApiServer {
    api: Arc<Api>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl ApiServer {
    /// Starts it on a free port of the host's main IPv4 address, where all nodes reach it.
    ///
    /// # Errors
    /// If it does not start within five seconds.
    pub fn start(host: &Host) -> Result<Self> {
        let ((ready, started), (stop, stopped)) = (channel(), tokio::sync::oneshot::channel());
        let (host, address) = (host.clone(), SocketAddr::new(host.v4().into(), 0));
        let thread = std::thread::spawn(move || {
            let served = host.run_in(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                runtime.map(|runtime| {
                    runtime.block_on(async {
                        let _ = ready.send(Arc::new(Api::start_on(address).await));
                        let _ = stopped.await;
                    });
                })
            });
            assert!(matches!(served, Ok(Ok(()))), "{served:?}");
        });
        let api = started.recv_timeout(Duration::from_secs(5)).context("the API server did not start")?;
        Ok(Self { api, stop: Some(stop), thread: Some(thread) })
    }

    /// The server itself: its objects and its behaviour.
    pub fn api(&self) -> &Arc<Api> {
        &self.api
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
