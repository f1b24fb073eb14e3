//! The bits that save look-ups: see [`lb_common::maps::Served`] and [`lb_common::maps::Masquerading`].

use super::pins::Pins;
use super::syscall;
use super::tables::{NodeAddr, array, open};
use anyhow::{Context as _, Result};
use aya::maps::{Array, MapData};
use lb_common::maps::{self, Bit};
use std::os::fd::AsFd as _;

/// The bits of devices that masquerade. None is ever cleared: a device that stops is looked up in vain.
pub struct Masquerading(Bits);

impl Masquerading {
    /// The pinned ones.
    ///
    /// # Errors
    /// If they cannot be opened.
    pub fn open(pins: &Pins) -> Result<Self> {
        Bits::open(pins, "LB_MASQUERADE").map(Self)
    }

    /// A device is about to have that entry.
    ///
    /// # Errors
    /// If it cannot be said. The device must not have it then.
    pub fn add(&mut self, index: u32, device: &maps::Device) -> Result<()> {
        if device.flags & maps::Device::MASQUERADE == 0 {
            return Ok(());
        }
        self.0.set(maps::Masquerading::bit(index))
    }

    /// Whether the programs ask for the device's entry.
    #[cfg(test)]
    pub(super) fn is_known(pins: &Pins, index: u32) -> bool {
        is_set(pins, "LB_MASQUERADE", maps::Masquerading::bit(index))
    }
}

/// The bits of one family's served addresses.
pub(super) struct Served {
    pins: Pins,
    name: String,
    /// Once they were needed: who only reads the tables does not need them.
    opened: Option<Bits>,
}

impl Served {
    pub(super) fn new(pins: &Pins, name: String) -> Self {
        Self { pins: pins.clone(), name, opened: None }
    }

    /// An address is about to have a frontend.
    pub(super) fn add<A: NodeAddr>(&mut self, addr: A) -> Result<()> {
        self.bits()?.set(maps::Served::bit(addr))
    }

    /// These are all that have any.
    pub(super) fn renew<A: NodeAddr>(&mut self, addrs: impl Iterator<Item = A>) -> Result<()> {
        self.bits()?.renew(addrs.map(maps::Served::bit))
    }

    /// Whether the programs look for frontends of an address.
    #[cfg(test)]
    pub(super) fn is_known<A: NodeAddr>(&self, addr: A) -> bool {
        is_set(&self.pins, &self.name, maps::Served::bit(addr))
    }

    fn bits(&mut self) -> Result<&mut Bits> {
        if self.opened.is_none() {
            self.opened = Some(Bits::open(&self.pins, &self.name)?);
        }
        self.opened.as_mut().context("no map")
    }
}

/// An array of bits. What it knows of the map is its own: there must not be two at a time that write.
struct Bits {
    name: String,
    map: Array<MapData, u64>,
    /// What is in it.
    words: Vec<u64>,
}

impl Bits {
    fn open(pins: &Pins, name: &str) -> Result<Self> {
        let map = array(pins, name)?;
        let mut words = vec![0; map.len() as usize];
        syscall::for_each(open(pins, name)?.fd().as_fd(), |index: &u32, word: &u64| {
            words[*index as usize] = *word;
            Ok(())
        })
        .with_context(|| format!("read the bits of {name}"))?;
        Ok(Self { name: name.to_owned(), map, words })
    }

    fn set(&mut self, bit: Bit) -> Result<()> {
        self.write(bit.word, self.words[bit.word as usize] | bit.mask)
    }

    /// These are all that are set.
    fn renew(&mut self, bits: impl Iterator<Item = Bit>) -> Result<()> {
        let mut words = vec![0; self.words.len()];
        for bit in bits {
            words[bit.word as usize] |= bit.mask;
        }
        (0..).zip(words).try_for_each(|(index, word)| self.write(index, word))
    }

    fn write(&mut self, index: u32, word: u64) -> Result<()> {
        let known = &mut self.words[index as usize];
        if *known != word {
            self.map.set(index, word, 0).with_context(|| format!("write the bits of {}", self.name))?;
            *known = word;
        }
        Ok(())
    }
}

#[cfg(test)]
fn is_set(pins: &Pins, name: &str, bit: Bit) -> bool {
    let map: Array<_, u64> = array(pins, name).expect("the map");
    bit.is_in(map.get(&bit.word, 0).expect("a word"))
}
