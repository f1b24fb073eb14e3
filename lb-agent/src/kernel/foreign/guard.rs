//! Looks after netfilter's flows as long as there are any, and sees to it that netfilter goes on with them.

use super::Foreign;
use crate::kernel::netfilter::nft;
use crate::kernel::pins::Pins;
use anyhow::{Context as _, Result};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tracing::{info, warn};

/// Between two looks at the flows that are entered.
const TIDY_EVERY: Duration = Duration::from_secs(10);
/// So many of those make one look at all of netfilter's connections.
const COUNT_EVERY: u32 = 6;

/// Clones are of one guard.
#[derive(Clone)]
pub struct Guard(Arc<Shared>);

struct Shared {
    /// Nothing where the kernel does not track connections.
    foreign: Option<Mutex<Foreign>>,
    /// Netfilter was seen to translate connections to frontends of ours.
    translating: AtomicBool,
}

impl Guard {
    /// Starts to look after them, in a thread.
    ///
    /// # Errors
    /// If the maps cannot be opened.
    pub fn start(pins: &Pins) -> Result<Self> {
        let foreign = match Foreign::open(pins) {
            Ok(foreign) => Some(Mutex::new(foreign)),
            Err(error) => {
                info!("connections that others have translated are not looked for: {error:#}");
                None
            }
        };
        let translating = foreign.as_ref().is_some_and(|foreign| lock(foreign).entered() > 0);
        let guard = Self(Arc::new(Shared { foreign, translating: AtomicBool::new(translating) }));
        let own = guard.clone();
        std::thread::Builder::new()
            .name("netfilter".into())
            .spawn(move || own.run())
            .context("start a thread")?;
        Ok(guard)
    }

    /// Whether it is worth a look at netfilter's connections.
    pub fn expects(&self, first: bool) -> bool {
        self.0.foreign.is_some() && (first || self.0.translating.load(Relaxed))
    }

    /// Looks, where there is something to look at.
    ///
    /// # Errors
    /// If the look fails.
    pub fn look<T: Default>(&self, look: impl FnOnce(&mut Foreign) -> Result<T>) -> Result<T> {
        self.0.foreign.as_ref().map_or_else(|| Ok(T::default()), |foreign| look(&mut lock(foreign)))
    }

    /// So many connections to frontends of ours are netfilter's: it is to go on with them.
    pub fn found(&self, translated: usize) {
        let were_there = self.0.translating.swap(translated > 0, Relaxed);
        if let Err(error) = keep(translated > 0, were_there) {
            warn!(
                "connections that other rules have translated will hang when all those rules are gone: netfilter \
                 cannot be told to go on with them by a table of ours (nft list table inet lb-agent): {error}"
            );
        }
    }

    fn run(&self) {
        for round in 1u32.. {
            std::thread::sleep(TIDY_EVERY);
            if let Err(error) = self.look(Foreign::tidy) {
                warn!("look after netfilter's flows: {error:#}");
            }
            if round.is_multiple_of(COUNT_EVERY) && self.is_translating() {
                match self.look(|foreign| foreign.count()) {
                    Ok(count) => self.found(count),
                    Err(error) => warn!("count netfilter's connections: {error:#}"),
                }
            }
        }
    }

    /// As far as was seen; or somebody has told netfilter to go on, `lb-agent cleanup` for one.
    fn is_translating(&self) -> bool {
        self.0.foreign.is_some()
            && (self.0.translating.load(Relaxed) || nft::has_table(nft::TRACKING).unwrap_or(false))
    }
}

/// Tells netfilter to go on, or not.
fn keep(translated: bool, were_there: bool) -> std::io::Result<()> {
    if translated {
        if !nft::has_table(nft::TRACKING)? {
            nft::keep_tracking()?;
            info!("netfilter goes on with them whoever's rules go: nft list table inet lb-agent");
        }
    } else if nft::stop_tracking()? || were_there {
        info!("no connection to a Service is translated by other rules any more");
    }
    Ok(())
}

fn lock(foreign: &Mutex<Foreign>) -> std::sync::MutexGuard<'_, Foreign> {
    // Whoever panicked: every entry is by itself.
    foreign.lock().unwrap_or_else(PoisonError::into_inner)
}
