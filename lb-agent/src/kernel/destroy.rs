//! Connected UDP sockets of host processes leave backends that are gone.
//!
//! `connect` puts the backend into the socket, and no hook runs for its `send`. So the kernel is asked to end such
//! sockets: the process's next `recv` fails with `ECONNABORTED` (or its next `send` with `EDESTADDRREQ`), and it
//! connects anew, as it would after any other error. Only sockets that our hooks connected are touched, and only those
//! whose backend's epoch has been raised since.

#[cfg(test)]
mod tests;

use super::diag::{self, Diag};
use super::pins::Pins;
use super::sockets;
use super::tables::Tables;
use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, MapData};
use lb_common::addr::{Ip6, NetPort};
use lb_common::maps::{SocketKey, SocketPeer};
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;
use tracing::{info, warn};

const UDP: u8 = 17;
/// [`SocketKey::direction`] of the entry that says which Service a backend stands for.
const TO_SERVICE: u8 = 0;
/// Endpoints that come and go in a storm do not make us look more often than so.
const REST: Duration = Duration::from_millis(50);
/// A `connect` that was under way when the epoch was raised has ended by then.
const ONCE_MORE: Duration = Duration::from_secs(1);

/// Ends sockets.
struct Destroyer {
    diag: Diag,
    sockets: HashMap<MapData, SocketKey, SocketPeer>,
    epochs: Array<MapData, u32>,
}

/// Starts a thread that looks whenever it is nudged, and once now: a former agent may have been killed before it
/// could. `None` where the kernel cannot do it, which has been said then.
///
/// # Errors
/// If the maps cannot be opened.
pub fn start(pins: &Pins) -> Result<Option<SyncSender<()>>> {
    let diag = match Diag::open().and_then(|diag| probe(&diag).map(|()| diag)) {
        Ok(diag) => diag,
        Err(error) => {
            warn!(
                "this kernel does not end sockets for us ({error}; it takes CONFIG_INET_DIAG_DESTROY and \
                 CONFIG_INET_UDP_DIAG): connected UDP sockets of the host's processes stay with a backend that is \
                 gone until they connect anew"
            );
            return Ok(None);
        }
    };
    let destroyer = Destroyer::open(pins, diag)?;
    // One is as good as many.
    let (nudge, nudged) = sync_channel(1);
    std::thread::Builder::new()
        .name("udp-sockets".into())
        .spawn(move || destroyer.run(&nudged))
        .context("start a thread")?;
    Ok(Some(nudge))
}

/// Ends a socket of our own, to see whether the kernel does.
fn probe(diag: &Diag) -> io::Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    // Discard: nothing is sent by a connect.
    socket.connect("127.0.0.1:9")?;
    let port = socket.local_addr()?.port();
    let listed = diag.connected()?;
    let ours = |other: &&diag::UdpSocket| other.id.source_port == port && other.id.destination_port == 9;
    diag.destroy(listed.iter().find(ours).ok_or(io::ErrorKind::NotFound)?)
}

impl Destroyer {
    fn open(pins: &Pins, diag: Diag) -> Result<Self> {
        Ok(Self { diag, sockets: sockets::peers(pins)?, epochs: Tables::open(pins)?.epochs })
    }

    fn run(&self, nudged: &Receiver<()>) {
        let mut once_more = true;
        loop {
            match self.look() {
                Ok(0) => {}
                Ok(ended) => info!(
                    "ended {ended} connected UDP sockets of the host's processes: their backends are gone"
                ),
                Err(error) => warn!("connected UDP sockets of backends that are gone: {error:#}"),
            }
            std::thread::sleep(REST);
            let next = match once_more {
                true => nudged.recv_timeout(ONCE_MORE),
                false => nudged.recv().map_err(Into::into),
            };
            once_more = match next {
                Ok(()) => true,
                Err(RecvTimeoutError::Timeout) => false,
                Err(RecvTimeoutError::Disconnected) => return,
            };
        }
    }

    /// Ends the sockets whose backend is gone, and counts them.
    fn look(&self) -> Result<usize> {
        let mut ended = 0;
        for socket in self.diag.connected().context("list the connected UDP sockets")? {
            if self.is_stale(&socket) {
                match self.diag.destroy(&socket) {
                    Ok(()) => ended += 1,
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                    Err(error) => {
                        return Err(error).with_context(|| format!("end the socket {:?}", socket.id));
                    }
                }
            }
        }
        Ok(ended)
    }

    /// Whether our hook connected it, to a backend that is gone.
    fn is_stale(&self, socket: &diag::UdpSocket) -> bool {
        let addr = match socket.id.destination_address {
            IpAddr::V4(ip) => Ip6::mapped(ip.into()),
            IpAddr::V6(ip) => ip.into(),
        };
        let key = SocketKey {
            cookie: socket.cookie(),
            addr,
            port: NetPort::new(socket.id.destination_port),
            proto: UDP,
            direction: TO_SERVICE,
            pad: 0,
        };
        let Ok(peer) = self.sockets.get(&key, 0) else { return false };
        peer.backend_id != 0
            && self.epochs.get(&peer.backend_id, 0).is_ok_and(|epoch| epoch != peer.backend_epoch)
    }
}
