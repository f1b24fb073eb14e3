//! The bits that save look-ups: see [`lb_common::maps::Served`] and [`lb_common::maps::Masquerading`].

use super::pins::Pins;
use super::tables::{NodeAddr, array};
use anyhow::{Context as _, Result};
use aya::maps::{Array, MapData};
use lb_common::maps;

/// The bits of devices that masquerade. None is ever cleared: a device that stops is looked up in vain.
pub struct Masquerading(Array<MapData, u64>);

impl Masquerading {
    /// The pinned ones.
    ///
    /// # Errors
    /// If they cannot be opened.
    pub fn open(pins: &Pins) -> Result<Self> {
        array(pins, "LB_MASQUERADE").map(Self)
    }

    /// A device is about to have that entry.
    ///
    /// # Errors
    /// If it cannot be said. The device must not have it then.
    pub fn add(&mut self, index: u32, device: &maps::Device) -> Result<()> {
        if device.flags & maps::Device::MASQUERADE == 0 {
            return Ok(());
        }
        let bit = maps::Masquerading::bit(index);
        let word = self.0.get(&bit.word, 0).context("read which devices masquerade")?;
        self.0.set(bit.word, word | bit.mask, 0).context("write which devices masquerade")
    }

    /// Whether the programs ask for the device's entry.
    #[cfg(test)]
    pub(super) fn is_known(&self, index: u32) -> bool {
        let bit = maps::Masquerading::bit(index);
        bit.is_in(self.0.get(&bit.word, 0).expect("a word"))
    }
}

/// The bits of one family's served addresses. What it knows of the map is its own: there must not be two that write.
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
        let bit = maps::Served::bit(addr);
        self.write(bit.word, self.words[bit.word as usize] | bit.mask)
    }

    /// These are all that have any.
    pub(super) fn renew<A: NodeAddr>(&mut self, addrs: impl Iterator<Item = A>) -> Result<()> {
        self.read()?;
        let mut words = vec![0; self.words.len()];
        for bit in addrs.map(maps::Served::bit) {
            words[bit.word as usize] |= bit.mask;
        }
        (0..).zip(words).try_for_each(|(index, word)| self.write(index, word))
    }

    /// Whether the programs look for frontends of an address.
    #[cfg(test)]
    pub(super) fn is_known<A: NodeAddr>(&self, addr: A) -> bool {
        let bit = maps::Served::bit(addr);
        bit.is_in(self.map.get(&bit.word, 0).expect("a word"))
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
