//! Many short connections.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::ask::Ask;
use super::wire::millis;

/// `probe churn`: opens a connection, asks once, closes it, over and over; counts what went wrong.
#[derive(Clone, Debug, clap::Args)]
pub struct Churn {
    /// The protocol
    #[arg(value_parser = ["tcp"])]
    pub transport: String,
    /// Where to
    pub to: SocketAddr,
    /// How many connections in all
    #[arg(long)]
    pub count: usize,
    /// How many at a time
    #[arg(long, default_value_t = 1)]
    pub concurrency: usize,
    /// How long to wait for each answer, in milliseconds
    #[arg(long, default_value = "2000", value_parser = millis)]
    pub timeout: Duration,
}

/// What became of the connections.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChurnReport {
    /// Connections that were answered.
    pub ok: usize,
    /// Connections that were not, by what went wrong.
    pub errors: BTreeMap<String, usize>,
    /// Who answered how many.
    pub names: BTreeMap<String, usize>,
    /// How long it took, in seconds.
    pub seconds: f64,
}

impl Churn {
    /// So many connections, so many at a time.
    pub fn new(to: SocketAddr, count: usize, concurrency: usize) -> Self {
        Self { transport: "tcp".into(), to, count, concurrency, timeout: Duration::from_secs(2) }
    }

    pub(crate) fn args(&self) -> Vec<String> {
        let [to, timeout] = [self.to.to_string(), self.timeout.as_millis().to_string()];
        let [count, concurrency] = [self.count, self.concurrency].map(|n| n.to_string());
        ["churn", "tcp", &to, "--count", &count, "--concurrency", &concurrency, "--timeout", &timeout]
            .map(String::from)
            .to_vec()
    }

    pub(crate) fn run(&self) -> ChurnReport {
        let (start, started) = (Instant::now(), AtomicUsize::new(0));
        let report = Mutex::new(ChurnReport::default());
        let ask = Ask::tcp(self.to).timeout(self.timeout);
        std::thread::scope(|scope| {
            for _ in 0..self.concurrency.clamp(1, self.count.max(1)) {
                scope.spawn(|| {
                    while started.fetch_add(1, Ordering::Relaxed) < self.count {
                        let result = ask.run(|answer| {
                            let mut report = report.lock().unwrap_or_else(|e| e.into_inner());
                            match &answer.0 {
                                Ok(reply) => {
                                    report.ok += 1;
                                    *report.names.entry(reply.name.clone()).or_default() += 1;
                                }
                                Err(e) => *report.errors.entry(e.to_string()).or_default() += 1,
                            }
                            Ok(())
                        });
                        debug_assert!(result.is_ok(), "only the report can fail");
                    }
                });
            }
        });
        let report = report.into_inner().unwrap_or_else(|e| e.into_inner());
        ChurnReport { seconds: start.elapsed().as_secs_f64(), ..report }
    }
}
