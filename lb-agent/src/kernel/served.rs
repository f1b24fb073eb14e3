//! The bits of the addresses that have frontends: see [`Served`].

use super::pins::Pins;
use super::tables::{NodeAddr, array};
use anyhow::{Context as _, Result};
use aya::maps::{Array, MapData};
use lb_common::maps;

/// The bits of one family. What it knows of the map is its own: there must not be two that write.
pub(super) struct Served {
    map: Array<MapData, u64>,
    /// As they are in the map, once they have been read.
    words: Vec<u64>,
}

impl Served {
    pub(super) fn open(pins: &Pins, name: &str) -> Result<Self> {
        Ok(Self { map: array(pins, name)?, words: Vec::new() })
    }

    /// An address is about to have a frontend.
    pub(super) fn add<A: NodeAddr>(&mut self, addr: A) -> Result<()> {
        self.read()?;
        let place = maps::Served::of(addr);
        self.write(place.word, self.words[place.word as usize] | place.bit)
    }

    /// These are all that have any.
    pub(super) fn renew<A: NodeAddr>(&mut self, addrs: impl Iterator<Item = A>) -> Result<()> {
        self.read()?;
        let mut words = vec![0; self.words.len()];
        for place in addrs.map(maps::Served::of) {
            words[place.word as usize] |= place.bit;
        }
        (0..).zip(words).try_for_each(|(index, word)| self.write(index, word))
    }

    /// Whether the programs look for frontends of an address.
    #[cfg(test)]
    pub(super) fn is_known<A: NodeAddr>(&self, addr: A) -> bool {
        let place = maps::Served::of(addr);
        place.is_in(self.map.get(&place.word, 0).expect("a word"))
    }

    fn read(&mut self) -> Result<()> {
        if self.words.is_empty() {
            let words = (0..maps::Served::WORDS).map(|index| self.map.get(&index, 0));
            self.words = words.collect::<Result<_, _>>().context("read which addresses are served")?;
        }
        Ok(())
    }

    fn write(&mut self, index: u32, word: u64) -> Result<()> {
        let known = &mut self.words[index as usize];
        if *known != word {
            self.map.set(index, word, 0).context("write which addresses are served")?;
            *known = word;
        }
        Ok(())
    }
}
