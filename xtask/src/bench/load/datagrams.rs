//! UDP: round trips, and packets in windows that the server acknowledges, so that what is counted has arrived.

use std::io::{IoSlice, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg, setsockopt, sockopt};

use super::{PAYLOAD, WINDOW, says};

/// Room for several windows, whatever the machine's default is.
const ROOM: usize = 4 << 20;
/// After that, an answer is lost.
const PATIENCE: Duration = Duration::from_secs(1);

/// A socket on an address.
pub(super) fn bind(address: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(address).with_context(|| format!("binding {address}"))?;
    setsockopt(&socket, sockopt::RcvBufForce, &ROOM).context("making room for packets")?;
    Ok(socket)
}

/// The server: for ever.
pub(super) fn answer(socket: &UdpSocket) {
    let mut bytes = [[0; PAYLOAD]; WINDOW];
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(WINDOW, None);
    // Since the last answer.
    let mut count: u64 = 0;
    loop {
        let mut slices: Vec<_> = bytes.iter_mut().map(|b| [IoSliceMut::new(b)]).collect();
        // It waits for the first packet only.
        let flags = MsgFlags::MSG_WAITFORONE;
        let Ok(got) = recvmmsg(socket.as_raw_fd(), &mut headers, slices.iter_mut(), flags, None) else {
            continue;
        };
        let from: Vec<_> = got.map(|message| message.address).collect();
        for (i, from) in from.into_iter().enumerate() {
            count += 1;
            if bytes[i][0] == says::QUIET {
                continue;
            }
            let to = from.and_then(|a| match (a.as_sockaddr_in(), a.as_sockaddr_in6()) {
                (Some(a), _) => Some(SocketAddr::V4((*a).into())),
                (_, Some(a)) => Some(SocketAddr::V6((*a).into())),
                _ => None,
            });
            let _ = to.map(|to| socket.send_to(&u64::to_le_bytes(count), to));
            count = 0;
        }
    }
}

fn connect(to: SocketAddr) -> Result<UdpSocket> {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to).with_context(|| format!("connecting to {to}"))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// One datagram there and back, over and over.
pub(super) fn round_trips(samples: &mut [u32], to: SocketAddr) -> Result<()> {
    let socket = connect(to)?;
    let mut answer = [0; 8];
    for sample in samples {
        let start = Instant::now();
        socket.send(&[says::NEXT])?;
        socket.recv(&mut answer).with_context(|| format!("no answer from {to}"))?;
        *sample = super::drive::nanoseconds(start);
    }
    Ok(())
}

/// `count` packets, in whole windows; how many arrived.
pub(super) fn packets(count: u64, to: SocketAddr) -> Result<u64> {
    let socket = connect(to)?;
    let (mut quiet, mut last) = ([says::QUIET; PAYLOAD], [says::QUIET; PAYLOAD]);
    last[0] = says::NEXT;
    quiet[PAYLOAD - 1] = 0;
    let slices: Vec<_> =
        (1..=WINDOW).map(|i| [IoSlice::new(if i == WINDOW { &last } else { &quiet })]).collect();
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(WINDOW, None);
    let (mut arrived, mut answer, mut sent) = (0, [0; 8], 0);
    while sent < count {
        let window =
            sendmmsg(socket.as_raw_fd(), &mut headers, &slices, [None; WINDOW], [], MsgFlags::empty());
        let window = window.with_context(|| format!("sending to {to}"))?.count();
        ensure!(window == WINDOW, "{window} of {WINDOW} packets could be sent to {to}");
        sent += window as u64;
        // The window's last packet may be lost, too: then its other packets count with the next window.
        match socket.recv(&mut answer) {
            Ok(_) => arrived += u64::from_le_bytes(answer),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e).with_context(|| format!("no answer from {to}")),
        }
    }
    Ok(arrived)
}
