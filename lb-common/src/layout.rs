//! The layouts of the maps, described: so that another version can read by field names what is pinned.

use crate::addr::{Ip4, Ip6, NetPort};
use crate::maps::{
    Addr, Affinity, AffinityKey, Flow, FlowKey, Frontend, FrontendKey, Range, ServiceName, Set, Slot,
    SlotGroup, SlotGroupKey, SocketKey, SocketPeer, SourceKey,
};

/// A field of a record.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Where it begins.
    pub offset: usize,
    /// Its length.
    pub size: usize,
    /// How many elements it has.
    pub count: usize,
    /// The fields of each element; empty if it is a plain value.
    pub of: &'static [Field],
}

/// What has a described layout.
pub trait Described {
    /// The fields; none for plain values.
    const FIELDS: &'static [Field] = &[];
    /// How many elements: other than one for arrays.
    const COUNT: usize = 1;
}

const fn field<T, F: Described>(name: &'static str, offset: usize, _: fn(&T) -> *const F) -> Field {
    Field { name, offset, size: size_of::<F>(), count: F::COUNT, of: F::FIELDS }
}

/// Whether fields cover a record of that size without a gap.
const fn covers(fields: &[Field], size: usize) -> bool {
    let (mut at, mut i) = (0, 0);
    while i < fields.len() {
        if fields[i].offset != at {
            return false;
        }
        at += fields[i].size;
        i += 1;
    }
    at == size
}

macro_rules! plain {
    ($($ty:ty),*) => {$(impl Described for $ty {})*};
}
plain!(u8, u16, u32, u64, NetPort, Ip4, Ip6);

impl<T: Described, const N: usize> Described for [T; N] {
    const FIELDS: &'static [Field] = T::FIELDS;
    const COUNT: usize = N;
}

macro_rules! described {
    ($ty:ident: $($field:ident)*) => {
        impl Described for $ty {
            const FIELDS: &'static [Field] = &[
                $(field(stringify!($field), core::mem::offset_of!($ty, $field), |r: &$ty| &raw const r.$field)),*
            ];
        }
        const _: () = assert!(covers($ty::FIELDS, size_of::<$ty>()), "not all fields are listed");
    };
    ($ty:ident<A>: $($(#[$cfg:meta])? $field:ident)*) => {
        impl<A: Addr + Described> Described for $ty<A> {
            const FIELDS: &'static [Field] = &[
                $($(#[$cfg])? field(
                    stringify!($field), core::mem::offset_of!($ty<A>, $field), |r: &$ty<A>| &raw const r.$field
                )),*
            ];
        }
        const _: () = {
            assert!(covers(<$ty<Ip4>>::FIELDS, size_of::<$ty<Ip4>>()), "not all fields are listed");
            assert!(covers(<$ty<Ip6>>::FIELDS, size_of::<$ty<Ip6>>()), "not all fields are listed");
        };
    };
}

described!(FlowKey<A>: src dst sport dport proto variant pad);
described!(Flow<A>: client vip backend masq client_port vip_port backend_port masq_port last_seen backend_id
    backend_epoch service alias_port #[cfg(feature = "layout-next")] spare masq_device proto side flags state);
described!(FrontendKey<A>: addr port proto pad);
described!(Frontend: internal external service affinity flags kind pad);
described!(Set: id count);
described!(SlotGroupKey: set group);
described!(SlotGroup<A>: slots);
described!(Slot<A>: addr port flags backend_id backend_epoch pad);
described!(SourceKey<A>: service addr);
described!(Range<A>: first mask);
described!(AffinityKey: client service pad);
described!(Affinity: addr port pad index last_used timeout);
described!(ServiceName: namespace name port);
described!(SocketKey: cookie addr port proto direction pad);
described!(SocketPeer: addr port pad backend_id backend_epoch pad2);

/// Room for the description that is pinned beside the maps.
pub const ROOM: usize = 16 << 10;
