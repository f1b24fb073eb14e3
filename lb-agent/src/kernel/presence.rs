//! The marks of what the flow tables have: see [`Presence`].

use super::pins::Pins;
use super::tables::{NodeAddr, array};
use anyhow::{Context as _, Result};
use aya::maps::{Array, MapData};
use lb_common::maps::{FlowKey, Presence};

const WORD: u32 = u64::BITS;

/// The maps with the marks.
pub struct Marks {
    marks: Array<MapData, u32>,
    presence: Array<MapData, Presence>,
}

impl Marks {
    /// The pinned ones.
    ///
    /// # Errors
    /// If they cannot be opened.
    pub fn open(pins: &Pins) -> Result<Self> {
        Ok(Self { marks: array(pins, "LB_MARK")?, presence: array(pins, "LB_PRESENCE")? })
    }

    /// Has the programs look everything up until [`Self::renew`] says otherwise: entries may come about that are not marked,
    /// as long as programs are attached that know nothing of it.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn distrust(&mut self) -> Result<()> {
        let round = self.presence()?.round.max(Presence::FIRST);
        self.set(Presence { complete: 0, round })
    }

    /// Marks what is about to be entered.
    ///
    /// # Errors
    /// If it cannot be written. It must not be entered then.
    pub fn mark<A: NodeAddr>(&mut self, key: &FlowKey<A>) -> Result<()> {
        let round = self.presence()?.round;
        self.marks.set(key.mark(), round, 0).context("mark a flow")
    }

    /// All entries that were there have been met: those that are marked for others only need not be looked up any more after
    /// the next two times. With `complete`, all programs mark what they enter.
    ///
    /// # Errors
    /// If it cannot be written. The round goes on then.
    pub fn renew(&mut self, met: &Met, complete: bool) -> Result<()> {
        let round = self.presence()?.round;
        for place in met.places() {
            self.marks.set(place, round, 0).context("mark the flows")?;
        }
        self.set(Presence { complete: complete.into(), round: round.wrapping_add(1) })
    }

    fn presence(&self) -> Result<Presence> {
        self.presence.get(&0, 0).context("read which marks count")
    }

    fn set(&mut self, presence: Presence) -> Result<()> {
        self.presence.set(0, presence, 0).context("write which marks count")
    }
}

/// The marks of all entries of a table, or of several.
#[derive(Clone, Debug)]
pub struct Met(Vec<u64>);

impl Met {
    /// An entry with that key was met.
    pub fn add<A: NodeAddr>(&mut self, key: &FlowKey<A>) {
        let place = key.mark();
        self.0[(place / WORD) as usize] |= 1 << (place % WORD);
    }

    fn places(&self) -> impl Iterator<Item = u32> {
        let bits = |word: u64| (0..WORD).filter(move |bit| word >> bit & 1 != 0);
        (0..).zip(&self.0).flat_map(move |(index, word)| bits(*word).map(move |bit| index * WORD + bit))
    }
}

impl Default for Met {
    fn default() -> Self {
        Self(vec![0; (Presence::PLACES / WORD) as usize])
    }
}
