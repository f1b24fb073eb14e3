//! Functions that the verifier looks at by themselves ("global" ones, Linux 5.6): once, whatever they are called with, and not once
//! for each way that leads to them. That takes a name that is seen from outside, and no arguments but the context and numbers.

use crate::tc::Around;
use aya_ebpf::bindings::__sk_buff;
use lb_common::addr::{Ip4, Ip6};
use lb_common::datapath::apart;

/// Where the context is not needed. (The compiler leaves out an argument that is not used, and the verifier insists on it.) Code
/// that does need it is refused by any verifier.
const NO_PACKET: Around<false> = Around(core::ptr::null_mut());

/// What [`lb_common::datapath::Apart`] does, for a family.
macro_rules! apart {
    ($family:ty: $put_draft:ident, $free_port:ident, $port_of_closed:ident, $own_port:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $put_draft(side: u32) -> u32 {
            apart::put_draft::<$family, _>(&NO_PACKET, side)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $free_port(skb: *mut __sk_buff) -> u32 {
            apart::free_port::<$family, _>(&Around::<false>(skb))
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $port_of_closed() -> u32 {
            apart::port_of_closed::<$family, _>(&NO_PACKET)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $own_port() -> u32 {
            apart::own_port::<$family, _>(&NO_PACKET)
        }
    };
}

apart!(Ip4: put_draft4, free_port4, port_of_closed4, own_port4);
apart!(Ip6: put_draft6, free_port6, port_of_closed6, own_port6);
