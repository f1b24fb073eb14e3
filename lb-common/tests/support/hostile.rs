//! Packets that nobody should send: seeded, so that a failure can be seen again.

use super::build::{self, ACK, ETH, FIN, L4, RST, SYN, TOO_BIG};
use super::cluster::{Net, sock};
use super::world::{Action, Hook};
use std::net::{IpAddr, SocketAddr};

/// splitmix64
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

fn end(rng: &mut Rng, n: &Net) -> SocketAddr {
    let ip: IpAddr = rng.of(&[
        n.pod, n.near, n.far, n.vip, n.vip, n.node, n.node, n.overlay, n.gateway, n.outside, n.internet,
    ]);
    let port = rng.of(&[80, 81, 82, 83, 84, 85, 443, 5000, 5001, 8080, 8084, 30080, 30081, 10_000, 10_001]);
    sock(ip, port)
}

/// Two ends of a flow of `paths::node`, before or after a translation.
fn plausible(rng: &mut Rng, n: &Net) -> (SocketAddr, SocketAddr) {
    let client = rng.of(&[n.pod, n.outside]);
    let client = sock(client, rng.of(&[5000, 5001, 5002, 5003]));
    let masq = sock(rng.of(&[n.node, n.overlay, n.gateway]), rng.of(&[10_000, 10_001, 10_002, 10_003]));
    let backend = rng.of(&[
        sock(n.near, 8080),
        sock(n.near, 8084),
        sock(n.far, 8080),
        sock(n.pod, 8080),
        sock(n.internet, 443),
    ]);
    let vip = rng.of(&[
        sock(n.vip, 80),
        sock(n.vip, 81),
        sock(n.vip, 82),
        sock(n.vip, 83),
        sock(n.vip, 84),
        sock(n.node, 30080),
        sock(n.node, 30081),
    ]);
    rng.of(&[
        (client, vip),
        (client, vip),
        (client, backend),
        (backend, client),
        (backend, masq),
        (masq, backend),
    ])
}

fn l4(rng: &mut Rng) -> L4 {
    rng.of(&[
        L4::Tcp(SYN),
        L4::Tcp(SYN),
        L4::Tcp(SYN | ACK),
        L4::Tcp(ACK),
        L4::Tcp(FIN | ACK),
        L4::Tcp(RST),
        L4::Udp,
        L4::Udp,
        L4::EchoRequest,
        L4::EchoReply,
    ])
}

/// A well-formed packet between any two of the addresses that matter.
pub(crate) fn good(rng: &mut Rng, v6: bool) -> Vec<u8> {
    let n = Net::of(v6);
    let l4 = l4(rng);
    let (src, dst) = if rng.one_in(4) { (end(rng, &n), end(rng, &n)) } else { plausible(rng, &n) };
    let len = rng.of(&[0, 1, 2, 7, 64, 500]);
    let data = rng.bytes(len);
    let frame = build::packet(src, dst, l4, &data);
    match rng.below(8) {
        0 | 1 => {
            let outer = end(rng, &n);
            let from = if rng.one_in(2) { src } else { outer };
            let quoted = &frame[ETH..];
            let len = if rng.one_in(2) { quoted.len() } else { rng.below(quoted.len() + 1) };
            build::error(dst.ip(), from.ip(), TOO_BIG, &quoted[..len])
        }
        2 => with_options(rng, frame),
        3 => fragment(rng, frame),
        4 if !v6 && l4 == L4::Udp => {
            let mut frame = frame;
            frame[ETH + 26..ETH + 28].fill(0);
            frame
        }
        _ => frame,
    }
}

/// IPv4 options, or IPv6 extension headers.
fn with_options(rng: &mut Rng, mut frame: Vec<u8>) -> Vec<u8> {
    if frame[12] == 8 {
        let words = 1 + rng.below(10);
        frame.splice(ETH + 20..ETH + 20, std::iter::repeat_n(1, words * 4));
        frame[ETH] = 0x45 + words as u8;
        set_len4(&mut frame);
    } else {
        for _ in 0..1 + rng.below(7) {
            let kind = rng.of(&[0, 43, 60, 60, 51, 44]);
            let units = if kind == 44 || rng.one_in(2) { 0 } else { rng.below(256) };
            let len = if kind == 51 { (units + 2) * 4 } else { (units + 1) * 8 };
            let mut header = vec![0; len];
            (header[0], header[1]) = (frame[ETH + 6], units as u8);
            if kind != 44 && kind != 51 {
                // PadN over all of it.
                for option in header[2..].chunks_mut(250) {
                    let pad = option.len();
                    option[0] = u8::from(pad > 1);
                    if pad > 1 {
                        option[1] = (pad - 2) as u8;
                    }
                }
            }
            frame[ETH + 6] = kind;
            frame.splice(ETH + 40..ETH + 40, header);
        }
        set_len6(&mut frame);
    }
    frame
}

/// A first, a middle or a whole "fragment".
fn fragment(rng: &mut Rng, mut frame: Vec<u8>) -> Vec<u8> {
    let offset = rng.of(&[0u16, 0, 1, 185]);
    let more = rng.one_in(2);
    if frame[12] == 8 {
        let field = offset | if more { 0x2000 } else { 0 };
        frame[ETH + 6..ETH + 8].copy_from_slice(&field.to_be_bytes());
        set_len4(&mut frame);
    } else {
        let field = (offset << 3 | u16::from(more)).to_be_bytes();
        let header = [frame[ETH + 6], 0, field[0], field[1], 0, 0, 0, 1];
        frame[ETH + 6] = 44;
        frame.splice(ETH + 40..ETH + 40, header);
        set_len6(&mut frame);
    }
    frame
}

/// Total length and header checksum, from the frame.
fn set_len4(frame: &mut [u8]) {
    let header = ETH..ETH + usize::from(frame[ETH] & 0xf) * 4;
    let len = (frame.len() - ETH) as u16;
    frame[ETH + 2..ETH + 4].copy_from_slice(&len.to_be_bytes());
    frame[ETH + 10..ETH + 12].fill(0);
    let mut sum: u32 = frame[header].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    frame[ETH + 10..ETH + 12].copy_from_slice(&(!sum as u16).to_be_bytes());
}

fn set_len6(frame: &mut [u8]) {
    let len = (frame.len() - ETH - 40) as u16;
    frame[ETH + 4..ETH + 6].copy_from_slice(&len.to_be_bytes());
}

/// A packet of a flow that passes through the node, as far as the other node's network is routed.
pub(crate) fn passing(rng: &mut Rng, v6: bool) -> Vec<u8> {
    let n = Net::of(v6);
    let client = sock(n.outside, rng.of(&[5000, 5001, 5002, 5003]));
    let masq = sock(rng.of(&[n.node, n.overlay]), rng.of(&[10_000, 10_001, 10_002, 10_003]));
    let (src, dst) = rng.of(&[(client, sock(n.node, 30081)), (sock(n.far, 8080), masq)]);
    let len = rng.of(&[0, 1, 2, 7, 64, 500]);
    let data = rng.bytes(len);
    let flags = rng.of(&[SYN, SYN | ACK, ACK, ACK, ACK, ACK | FIN, RST]);
    let l4 = rng.of(&[L4::Udp, L4::Tcp(flags), L4::Tcp(flags)]);
    build::packet(src, dst, l4, &data)
}

/// A packet with something wrong with it, most of the time.
pub(crate) fn bad(rng: &mut Rng, v6: bool) -> Vec<u8> {
    let frame = good(rng, v6);
    spoil(rng, frame)
}

/// Most of the time, something is wrong with it afterwards.
pub(crate) fn spoil(rng: &mut Rng, mut frame: Vec<u8>) -> Vec<u8> {
    match rng.below(10) {
        0 => {
            // Nonsense behind a credible Ethernet header.
            let len = rng.below(120);
            let tail = rng.bytes(len);
            frame.truncate(ETH);
            frame.extend(tail);
        }
        1 | 2 => {
            let len = rng.below(frame.len() + 1);
            frame.truncate(len.max(ETH + 1));
        }
        3 => {
            let len = rng.below(40);
            let tail = rng.bytes(len);
            frame.extend(tail);
        }
        4..=6 => {
            // In the headers, where it hurts.
            for _ in 0..1 + rng.below(4) {
                let at = ETH + rng.below(frame.len().min(ETH + 100) - ETH);
                frame[at] = if rng.one_in(2) { rng.next() as u8 } else { frame[at] ^ 1 << rng.below(8) };
            }
        }
        7 => {
            // A length that lies, under a good header checksum.
            let lie = (rng.below(frame.len() + 64) as u16).to_be_bytes();
            if frame[12] == 8 {
                set_len4(&mut frame);
                let old = u16::from_be_bytes([frame[ETH + 2], frame[ETH + 3]]);
                let sum = u16::from_be_bytes([frame[ETH + 10], frame[ETH + 11]]);
                frame[ETH + 2..ETH + 4].copy_from_slice(&lie);
                let sum = u32::from(!sum) + u32::from(!old) + u32::from(u16::from_be_bytes(lie));
                let sum = (sum & 0xffff) + (sum >> 16);
                frame[ETH + 10..ETH + 12]
                    .copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
            } else {
                frame[ETH + 4..ETH + 6].copy_from_slice(&lie);
            }
        }
        _ => {}
    }
    frame
}

/// Whether etherparse finds ports (or an ICMP header) where the packet's own lengths say that they are, or a later
/// fragment, which has none. The payload may be cut short: that is for the receiver to see.
fn readable(frame: &[u8]) -> bool {
    let Ok(packet) = etherparse::LaxSlicedPacket::from_ethernet(frame) else { return false };
    let (payload, declared) = match packet.net {
        Some(etherparse::LaxNetSlice::Ipv4(ip)) => {
            let header = ip.header();
            (ip.payload().clone(), usize::from(header.total_len()).checked_sub(header.slice().len()))
        }
        Some(etherparse::LaxNetSlice::Ipv6(ip)) => {
            let extensions = ip.extensions().slice().len();
            (ip.payload().clone(), usize::from(ip.header().payload_length()).checked_sub(extensions))
        }
        _ => return false,
    };
    if is_later_fragment(frame) {
        return true;
    }
    // A length of zero stands for more than 64 KiB.
    let zero = frame[if frame[12] == 8 { 16..18 } else { 18..20 }] == [0, 0];
    payload.payload.len() >= 8
        && (zero || declared.is_some_and(|len| len >= 8))
        && matches!(payload.ip_number.0, 6 | 17 | 1 | 58)
}

fn is_later_fragment(frame: &[u8]) -> bool {
    use etherparse::{Ipv6ExtensionSlice, LaxNetSlice};
    match etherparse::LaxSlicedPacket::from_ethernet(frame).ok().and_then(|packet| packet.net) {
        Some(LaxNetSlice::Ipv4(ip)) => ip.header().fragments_offset().value() != 0,
        Some(LaxNetSlice::Ipv6(ip)) => ip.extensions().clone().into_iter().any(|extension| {
            matches!(extension, Ipv6ExtensionSlice::Fragment(f) if f.fragment_offset().value() != 0)
        }),
        _ => false,
    }
}

/// What must hold whatever was sent: see the messages.
pub(crate) fn check(hook: Hook, before: &[u8], after: &[u8], action: Action) -> Result<(), String> {
    let was_valid = build::valid(before);
    let fail = |why: &str| {
        Err(format!("{why}\n  before {before:02x?}\n  after  {after:02x?}\n  {hook:?}, {action:?}"))
    };
    if action == Action::Reply {
        return match (build::valid(after), was_valid) {
            (None, _) => fail("the answer is no packet"),
            (Some(false), Some(true)) => fail("the answer's checksums are wrong"),
            _ => Ok(()),
        };
    }
    if action == Action::Drop || before == after {
        return Ok(());
    }
    if before.len() != after.len() {
        return fail("its length was changed");
    }
    if !readable(before) {
        return fail("a packet was rewritten that is none");
    }
    if was_valid == Some(true) && build::valid(after) != Some(true) {
        return fail("checksums were right before");
    }
    // The one rule: an ingress hook leaves the source alone, an egress hook the destination.
    let (src, dst) = if before[12] == 8 { (26..30, 30..34) } else { (22..38, 38..54) };
    let other = if hook == Hook::Ingress { src } else { dst };
    if before[other.clone()] != after[other] {
        return fail("the wrong end was rewritten");
    }
    Ok(())
}
