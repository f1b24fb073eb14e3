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
    pins: Pins,
    name: String,
    /// The map and what is in it, once it was needed: who only reads the tables does not need it.
    opened: Option<(Array<MapData, u64>, Vec<u64>)>,
}

impl Served {
    pub(super) fn new(pins: &Pins, name: String) -> Self {
        Self { pins: pins.clone(), name, opened: None }
    }

    /// An address is about to have a frontend.
    pub(super) fn add<A: NodeAddr>(&mut self, addr: A) -> Result<()> {
        let (map, words) = self.open()?;
        let bit = maps::Served::bit(addr);
        let word = words[bit.word as usize] | bit.mask;
        write(map, words, bit.word, word)
    }

    /// These are all that have any.
    pub(super) fn renew<A: NodeAddr>(&mut self, addrs: impl Iterator<Item = A>) -> Result<()> {
        let (map, words) = self.open()?;
        let mut new = vec![0; words.len()];
        for bit in addrs.map(maps::Served::bit) {
            new[bit.word as usize] |= bit.mask;
        }
        (0..).zip(new).try_for_each(|(index, word)| write(map, words, index, word))
    }

    /// Whether the programs look for frontends of an address.
    #[cfg(test)]
    pub(super) fn is_known<A: NodeAddr>(&self, addr: A) -> bool {
        let map: Array<_, u64> = array(&self.pins, &self.name).expect("the map");
        let bit = maps::Served::bit(addr);
        bit.is_in(map.get(&bit.word, 0).expect("a word"))
    }

    fn open(&mut self) -> Result<&mut (Array<MapData, u64>, Vec<u64>)> {
        if self.opened.is_none() {
            let map = array(&self.pins, &self.name)?;
            let words = (0..maps::Served::WORDS).map(|index| map.get(&index, 0));
            let words = words.collect::<Result<_, _>>().context("read which addresses are served")?;
            self.opened = Some((map, words));
        }
        self.opened.as_mut().context("no map")
    }
}

fn write(map: &mut Array<MapData, u64>, words: &mut [u64], index: u32, word: u64) -> Result<()> {
    let known = &mut words[index as usize];
    if *known != word {
        map.set(index, word, 0).context("write which addresses are served")?;
        *known = word;
    }
    Ok(())
}
