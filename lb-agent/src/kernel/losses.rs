//! Says what packets are lost for want of something that people have to provide, or by our own mistake. The programs
//! count; here it becomes a line of the log and a Kubernetes Event on the node, when it begins and now and then while it
//! lasts.

use super::tables::Tables;
use crate::events::Events;
use anyhow::Result;
use lb_common::datapath::Reason;
use std::time::{Duration, Instant};
use tracing::warn;

/// How often the counters are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// While it lasts, it is said again after that time.
const AGAIN: Duration = Duration::from_secs(600);

/// What people must know, by the Event's reason. The rest is what Services ask for, or what anybody can send.
const LOSSES: [(Reason, &str, &str); 4] = [
    (
        Reason::FlowTableFull,
        "FlowTableFull",
        "the flow table is full, and new connections are refused; `lbctl flows` shows whose flows they are, \
         --flow-table-max makes room",
    ),
    (
        Reason::MasqueradePortsExhausted,
        "MasqueradePortsExhausted",
        "no masquerade port is left for new connections to their destination; `lbctl flows` shows which one it is, \
         --masquerade-ports makes more",
    ),
    (
        Reason::NoMasqueradeAddress,
        "NoMasqueradeAddress",
        "a device by which pods' packets leave has no address of their family; `lbctl status` shows which addresses \
         there are",
    ),
    (
        Reason::SlotMissing,
        "SlotMissing",
        "this must not happen, please report it with what `lbctl status -o json` prints",
    ),
];

/// Follows the counters.
pub struct Losses {
    tables: Tables,
    events: Events,
    told: [Told; LOSSES.len()],
}

/// What was said of one reason.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    counted: u64,
    last: Option<Instant>,
}

impl Told {
    /// Packets that have to be told of now.
    fn news(&mut self, counted: u64, now: Instant) -> Option<u64> {
        let lost = counted.saturating_sub(self.counted);
        if lost == 0 || self.last.is_some_and(|last| now.duration_since(last) < AGAIN) {
            return None;
        }
        *self = Self { counted, last: Some(now) };
        Some(lost)
    }
}

impl Losses {
    /// From now on: what a former agent has seen it has said.
    ///
    /// # Errors
    /// If the counters cannot be read.
    pub fn new(tables: Tables, events: Events) -> Result<Self> {
        let mut told = [Told::default(); LOSSES.len()];
        for (told, (reason, ..)) in told.iter_mut().zip(LOSSES) {
            told.counted = tables.counter(reason)?;
        }
        Ok(Self { tables, events, told })
    }

    /// Looks for ever.
    pub async fn run(mut self) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            for (lost, (reason, event, note)) in self.look(Instant::now()) {
                warn!("{lost} packets dropped ({}): {note}", reason.name());
                self.events.node(event, note);
            }
        }
    }

    /// What is to be said now, and of how many packets.
    fn look(&mut self, now: Instant) -> Vec<(u64, (Reason, &'static str, &'static str))> {
        let losses = LOSSES.into_iter().zip(&mut self.told);
        let news = losses.filter_map(|(loss, told)| {
            let counted = self.tables.counter(loss.0).ok()?;
            Some((told.news(counted, now)?, loss))
        });
        news.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::Bpffs;
    use aya::maps::PerCpuValues;
    use aya::util::nr_cpus;

    #[test]
    fn a_loss_is_told_when_it_begins_and_now_and_then_while_it_lasts() {
        let bpffs = Bpffs::new();
        let mut tables = Tables::open(&bpffs.pins).expect("the maps");
        let mut count = |reason: Reason, value: u64| {
            let mut values = vec![0; nr_cpus().expect("processors")];
            values[0] = value;
            let values = PerCpuValues::try_from(values).expect("one each");
            tables.counters.set(reason as u32, values, 0).expect("count");
        };
        count(Reason::MasqueradePortsExhausted, 5);
        let tables = Tables::open(&bpffs.pins).expect("the maps");
        let mut losses = Losses::new(tables, Events::default()).expect("counters");
        let start = Instant::now();
        let mut said = |after| {
            let news = losses.look(start + after);
            news.into_iter().map(|(lost, (_, event, _))| (event, lost)).collect::<Vec<_>>()
        };
        let second = Duration::from_secs(1);
        assert_eq!(said(Duration::ZERO), [], "what there was before is not ours to tell");
        count(Reason::MasqueradePortsExhausted, 6);
        count(Reason::NoEndpoint, 100);
        assert_eq!(said(second), [("MasqueradePortsExhausted", 1)]);
        count(Reason::MasqueradePortsExhausted, 9);
        count(Reason::FlowTableFull, 2);
        assert_eq!(said(2 * second), [("FlowTableFull", 2)], "each by itself");
        assert_eq!(said(AGAIN), []);
        assert_eq!(said(AGAIN + second), [("MasqueradePortsExhausted", 3)]);
        assert_eq!(said(3 * AGAIN), [], "it is over");
    }
}
