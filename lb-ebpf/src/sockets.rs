//! The cgroup socket hooks: sockets and tables as `lb_common::socket` wants them.

use crate::tables::{self, FLAGS, LB_NETNS, LB_SOCKET, Maps, NETNS_COOKIE};
use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use core::marker::PhantomData;
use core::ptr::{read_volatile, write_volatile};
use lb_common::addr::{Ip4, Ip6, NetPort};
use lb_common::datapath::Reason;
use lb_common::maps::{
    Affinity, AffinityKey, Frontend, FrontendKey, Range, SlotGroup, SlotGroupKey, SocketKey, SocketPeer,
    flags,
};
use lb_common::socket::{Decision, Socket, SocketTables, from_backend, to_service};

/// The system call goes on.
const ALLOW: i32 = 1;
/// It fails: with EPERM, or what `bpf_set_retval` said.
const DENY: i32 = 0;
const EPERM: i32 = 1;
const ETIMEDOUT: i32 = 110;
const ECONNREFUSED: i32 = 111;
const TCP: u8 = 6;

#[cgroup_sock_addr(connect4)]
pub(crate) fn connect4(ctx: SockAddrContext) -> i32 {
    forward::<Four, Ip4>(&ctx, false)
}

#[cgroup_sock_addr(connect6)]
pub(crate) fn connect6(ctx: SockAddrContext) -> i32 {
    forward6(&ctx, false)
}

#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn sendmsg4(ctx: SockAddrContext) -> i32 {
    forward::<Four, Ip4>(&ctx, true)
}

#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn sendmsg6(ctx: SockAddrContext) -> i32 {
    forward6(&ctx, true)
}

#[cgroup_sock_addr(recvmsg4)]
pub(crate) fn recvmsg4(ctx: SockAddrContext) -> i32 {
    back::<Four, Ip4>(&ctx)
}

#[cgroup_sock_addr(recvmsg6)]
pub(crate) fn recvmsg6(ctx: SockAddrContext) -> i32 {
    back6(&ctx)
}

#[cgroup_sock_addr(getpeername4)]
pub(crate) fn getpeername4(ctx: SockAddrContext) -> i32 {
    back::<Four, Ip4>(&ctx)
}

#[cgroup_sock_addr(getpeername6)]
pub(crate) fn getpeername6(ctx: SockAddrContext) -> i32 {
    back6(&ctx)
}

/// `H` is the hook that the program is for, `A` the family that the socket speaks.
#[inline(always)]
fn forward<H: Hook, A: Maps>(ctx: &SockAddrContext, sticky: bool) -> i32
where
    On<H>: Socket<A> + SocketTables<A>,
{
    let hook = On::<H>::new(ctx);
    if !hook.is_ours() {
        return ALLOW;
    }
    let error = match to_service::<A, _, _>(&mut On::<H>::new(ctx), &hook, sticky) {
        Decision::Allow => return ALLOW,
        Decision::Refuse => ECONNREFUSED,
        Decision::Drop if hook.is_tcp() => ETIMEDOUT,
        Decision::Drop => EPERM,
    };
    if FLAGS.load() & flags::SET_RETVAL != 0 {
        // SAFETY: no pointers.
        unsafe { helpers::bpf_set_retval(-error) };
    }
    DENY
}

/// An IPv6 socket may speak IPv4.
#[inline(always)]
fn forward6(ctx: &SockAddrContext, sticky: bool) -> i32 {
    if On::<Six>::new(ctx).peer6().unmapped().is_some() {
        forward::<Six, Ip4>(ctx, sticky)
    } else {
        forward::<Six, Ip6>(ctx, sticky)
    }
}

#[inline(always)]
fn back<H: Hook, A: Maps>(ctx: &SockAddrContext) -> i32
where
    On<H>: Socket<A> + SocketTables<A>,
{
    let hook = On::<H>::new(ctx);
    if hook.is_ours() {
        from_backend::<A, _, _>(&mut On::<H>::new(ctx), &hook);
    }
    ALLOW
}

#[inline(always)]
fn back6(ctx: &SockAddrContext) -> i32 {
    if On::<Six>::new(ctx).peer6().unmapped().is_some() {
        back::<Six, Ip4>(ctx)
    } else {
        back::<Six, Ip6>(ctx)
    }
}

/// Which address field of the context a hook may touch: the verifier holds each to its own.
trait Hook {
    const IS_V4: bool;
}

/// The `…4` hooks.
struct Four;
/// The `…6` hooks.
struct Six;

impl Hook for Four {
    const IS_V4: bool = true;
}

impl Hook for Six {
    const IS_V4: bool = false;
}

/// A socket in a hook.
struct On<H>(*mut bpf_sock_addr, PhantomData<H>);

impl<H: Hook> On<H> {
    #[inline(always)]
    fn new(ctx: &SockAddrContext) -> Self {
        Self(ctx.sock_addr, PhantomData)
    }

    /// Whether the socket is in a network namespace that is served here.
    #[inline(always)]
    fn is_ours(&self) -> bool {
        FLAGS.load() & flags::SOCKETS_ALL != 0 || self.is_in_node()
    }

    #[inline(always)]
    fn is_tcp(&self) -> bool {
        Socket::<Ip4>::protocol(self) == TCP
    }

    /// Whether the socket is in the node's own network namespace.
    #[inline(always)]
    fn is_in_node(&self) -> bool {
        // SAFETY: the context is valid.
        let cookie = unsafe { helpers::bpf_get_netns_cookie(self.0.cast()) };
        let wanted = NETNS_COOKIE.load();
        if wanted != 0 { cookie == wanted } else { self.is_learned(cookie) }
    }

    /// Before 5.14 user space cannot ask for its namespace's cookie. Instead it names a socket of its own, and the
    /// hook that meets it notes where it is.
    #[inline(always)]
    fn is_learned(&self, cookie: u64) -> bool {
        let Some(learned) = LB_NETNS.get_ptr_mut(0) else { return false };
        // SAFETY: a valid map value; a word is written at once.
        unsafe {
            if LB_NETNS.get(1).is_some_and(|socket| *socket != 0 && *socket == self.socket_cookie()) {
                *learned = cookie;
                return false;
            }
            *learned != 0 && *learned == cookie
        }
    }

    #[inline(always)]
    fn socket_cookie(&self) -> u64 {
        // SAFETY: the context is valid.
        unsafe { helpers::bpf_get_socket_cookie(self.0.cast()) }
    }

    #[inline(always)]
    fn port(&self) -> NetPort {
        // SAFETY: the context is valid. Volatile: the verifier wants accesses of the field's own size.
        NetPort::from_wire(unsafe { read_volatile(&raw const (*self.0).user_port) } as u16)
    }

    #[inline(always)]
    fn set_port(&mut self, port: NetPort) {
        // SAFETY: as above.
        unsafe { write_volatile(&raw mut (*self.0).user_port, u32::from(port.wire())) };
    }

    #[inline(always)]
    fn peer6(&self) -> Ip6 {
        // SAFETY: as above.
        let word = |i: usize| unsafe { u64::from(read_volatile(&raw const (*self.0).user_ip6[i])) };
        if cfg!(target_endian = "little") {
            Ip6::from_wire(word(0) | word(1) << 32, word(2) | word(3) << 32)
        } else {
            Ip6::from_wire(word(0) << 32 | word(1), word(2) << 32 | word(3))
        }
    }

    #[inline(always)]
    fn set_peer6(&mut self, ip: Ip6) {
        let (high, low) = ip.wire();
        let words = if cfg!(target_endian = "little") {
            [high as u32, (high >> 32) as u32, low as u32, (low >> 32) as u32]
        } else {
            [(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32]
        };
        // SAFETY: as above; spelled out because the context takes no computed offsets.
        unsafe {
            write_volatile(&raw mut (*self.0).user_ip6[0], words[0]);
            write_volatile(&raw mut (*self.0).user_ip6[1], words[1]);
            write_volatile(&raw mut (*self.0).user_ip6[2], words[2]);
            write_volatile(&raw mut (*self.0).user_ip6[3], words[3]);
        }
    }
}

impl<H: Hook> Socket<Ip4> for On<H> {
    #[inline(always)]
    fn peer(&self) -> (Ip4, NetPort) {
        let ip = if H::IS_V4 {
            // SAFETY: as above.
            Ip4::from_wire(unsafe { read_volatile(&raw const (*self.0).user_ip4) })
        } else {
            self.peer6().unmapped().unwrap_or_default()
        };
        (ip, self.port())
    }

    #[inline(always)]
    fn set_peer(&mut self, addr: Ip4, port: NetPort) {
        if H::IS_V4 {
            // SAFETY: as above.
            unsafe { write_volatile(&raw mut (*self.0).user_ip4, addr.wire()) };
        } else {
            self.set_peer6(Ip6::mapped(addr));
        }
        self.set_port(port);
    }

    #[inline(always)]
    fn protocol(&self) -> u8 {
        // SAFETY: as above.
        unsafe { read_volatile(&raw const (*self.0).protocol) as u8 }
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        self.socket_cookie()
    }
}

impl<H: Hook> Socket<Ip6> for On<H> {
    #[inline(always)]
    fn peer(&self) -> (Ip6, NetPort) {
        (self.peer6(), self.port())
    }

    #[inline(always)]
    fn set_peer(&mut self, addr: Ip6, port: NetPort) {
        self.set_peer6(addr);
        self.set_port(port);
    }

    #[inline(always)]
    fn protocol(&self) -> u8 {
        Socket::<Ip4>::protocol(self)
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        self.socket_cookie()
    }
}

impl<H: Hook, A: Maps> SocketTables<A> for On<H> {
    #[inline(always)]
    fn frontend(&self, key: &FrontendKey<A>) -> Option<&Frontend> {
        tables::frontend(key)
    }

    #[inline(always)]
    fn slot_group(&self, key: &SlotGroupKey) -> Option<&SlotGroup<A>> {
        tables::slot_group(key)
    }

    #[inline(always)]
    fn backend_epoch(&self, id: u32) -> u32 {
        tables::backend_epoch(id)
    }

    #[inline(always)]
    fn socket(&self, key: &SocketKey) -> Option<&SocketPeer> {
        // SAFETY: an entry that is evicted meanwhile may show another socket's peer for a moment; the table is sized
        // so that it has long been idle then.
        unsafe { LB_SOCKET.get(key) }
    }

    #[inline(always)]
    fn put_socket(&self, key: &SocketKey, peer: &SocketPeer) {
        // A full table evicts: this cannot fail in a way that matters.
        let _ = LB_SOCKET.insert(key, peer, 0);
    }

    #[inline(always)]
    fn cluster_ips(&self) -> Option<&Range<A>> {
        A::range().get(0)
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<&Affinity> {
        tables::affinity(key)
    }

    #[inline(always)]
    fn put_affinity(&self, key: &AffinityKey, affinity: &Affinity) {
        tables::put_affinity(key, affinity);
    }

    #[inline(always)]
    fn is_node(&self) -> bool {
        // Where only the node's sockets are served, this one is.
        FLAGS.load() & flags::SOCKETS_ALL == 0 || self.is_in_node()
    }

    #[inline(always)]
    fn now(&self) -> u32 {
        tables::now()
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: no arguments.
        unsafe { helpers::bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn count(&self, reason: Reason) {
        tables::count(reason);
    }
}
