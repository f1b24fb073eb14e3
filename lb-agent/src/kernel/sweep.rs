//! Ends flows that have timed out.

use super::tables::Tables;
use std::time::Duration;

/// Sweeps the flow tables.
pub struct Sweeper {
    _tables: Tables,
}

impl Sweeper {
    /// A sweeper of `tables`.
    pub fn new(tables: Tables) -> Self {
        Self { _tables: tables }
    }

    /// Sweeps for ever.
    pub async fn run(self) {
        loop {
            tokio::time::sleep(Duration::from_secs(30)).await;
        }
    }
}
