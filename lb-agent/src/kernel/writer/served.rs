//! When the bits of served addresses are made anew: see [`lb_common::maps::Served`].

use super::MapWriter;
use anyhow::Result;

/// So many frontends, at least, have gone by then, and more than are left.
const MANY: usize = 1000;

impl MapWriter {
    /// Clears the bits of addresses that have no frontends any more, when there may be many.
    pub(super) fn forget_served(&mut self) -> Result<()> {
        let left = self.frontends.iter().sum::<usize>();
        if self.gone > left.max(MANY) {
            self.tables.renew_served()?;
            self.gone = 0;
        }
        Ok(())
    }
}
