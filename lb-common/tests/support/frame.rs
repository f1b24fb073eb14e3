//! A packet as the tc hooks meet it.

use bytemuck::Pod;
use lb_common::checksum::{Sum, update};
use lb_common::datapath::{Covered, Packet, Reason, Reshape};

/// Bytes from the Ethernet header on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) bytes: Vec<u8>,
    /// `CHECKSUM_PARTIAL`: the transport checksum is the pseudo header's sum, to be completed by the device.
    pub(crate) partial: bool,
}

impl Frame {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, partial: false }
    }

    /// As the helpers see a checksum: at an even offset, whole.
    fn checksum(&mut self, offset: usize) -> Result<&mut [u8], Reason> {
        if !offset.is_multiple_of(2) || offset > 0xffff {
            return Err(Reason::Malformed);
        }
        self.bytes.get_mut(offset..offset + 2).ok_or(Reason::Malformed)
    }
}

impl Packet for Frame {
    fn read<T: Pod>(&self, offset: usize) -> Option<T> {
        self.load(offset)
    }

    fn load<T: Pod>(&self, offset: usize) -> Option<T> {
        self.bytes.get(offset..offset + size_of::<T>()).map(bytemuck::pod_read_unaligned)
    }

    fn store<T: Pod>(&mut self, offset: usize, value: &T) -> Result<(), Reason> {
        let place = self.bytes.get_mut(offset..offset + size_of::<T>()).ok_or(Reason::Malformed)?;
        place.copy_from_slice(bytemuck::bytes_of(value));
        Ok(())
    }

    fn l3_checksum(&mut self, offset: usize, change: Sum) -> Result<(), Reason> {
        let place = self.checksum(offset)?;
        let old = u16::from_ne_bytes([place[0], place[1]]);
        place.copy_from_slice(&update(old, change).to_ne_bytes());
        Ok(())
    }

    // net/core/filter.c, bpf_l4_csum_replace; net/core/utils.c, inet_proto_csum_replace_by_diff.
    fn l4_checksum(&mut self, offset: usize, change: Sum, of: Covered) -> Result<(), Reason> {
        let partial = self.partial;
        let place = self.checksum(offset)?;
        let old = u16::from_ne_bytes([place[0], place[1]]);
        if of.zero_is_none && old == 0 {
            return Ok(());
        }
        let mut new = match (partial, of.pseudo_header) {
            (false, _) => update(old, change),
            (true, true) => Sum(u32::from(old)).plus(change).fold(),
            (true, false) => old,
        };
        if of.zero_is_none && new == 0 {
            new = 0xffff;
        }
        place.copy_from_slice(&new.to_ne_bytes());
        Ok(())
    }
}

impl Reshape for Frame {
    fn truncate(&mut self, len: usize) -> Result<(), Reason> {
        self.bytes.resize(len, 0);
        Ok(())
    }

    fn insert_after_ethernet(&mut self, len: usize) -> Result<(), Reason> {
        self.bytes.splice(14..14, std::iter::repeat_n(0, len));
        Ok(())
    }

    // As the programs find out.
    fn checksum_is_partial(&mut self, offset: usize) -> bool {
        let Some(before) = self.load::<u16>(offset) else { return false };
        let any = Covered { pseudo_header: false, zero_is_none: false };
        if self.l4_checksum(offset, Sum(1), any).is_err() {
            return false;
        }
        self.load::<u16>(offset) == Some(before)
    }
}
