//! What goes over the wire and onto the terminal.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a server says about a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// The server's name.
    pub name: String,
    /// The client as the server sees it.
    pub peer: SocketAddr,
    /// The server's own address as the request named it.
    pub local: SocketAddr,
    /// Bytes of the request.
    pub bytes: u64,
    /// Offset of the first wrong byte of an upload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wrong_at: Option<u64>,
}

/// A request that was answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Who answered; empty for a ping.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The source of the request as the server saw it; nothing for a ping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<SocketAddr>,
    /// The destination of the request as the server saw it; nothing for a ping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<SocketAddr>,
    /// Source address of the answer as the client's socket reports it.
    pub from: SocketAddr,
    /// `getpeername` of a connected socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peername: Option<SocketAddr>,
    /// The client's own address (`getsockname`).
    pub own: SocketAddr,
    /// From the first packet to the answer, in microseconds; TCP's handshake included.
    pub us: u64,
}

/// Why a request was not answered.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Failure {
    /// Refused: TCP reset in answer to a SYN, or ICMP port unreachable.
    Refused,
    /// No answer in time.
    Timeout,
    /// The connection was reset, or ended before the answer.
    Reset,
    /// No route, or ICMP host or network unreachable.
    Unreachable,
    /// Forbidden: ICMP administratively prohibited, or a local policy.
    Denied,
    /// Larger than the path allows, with fragmentation forbidden.
    TooBig,
    /// Bytes arrived that were not sent.
    Corrupt,
    /// An earlier connection still has the source port.
    Taken,
    /// Anything else, in words.
    #[serde(untagged)]
    Other(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refused => "refused",
            Self::Timeout => "timeout",
            Self::Reset => "reset",
            Self::Unreachable => "unreachable",
            Self::Denied => "denied",
            Self::TooBig => "too big",
            Self::Corrupt => "corrupt",
            Self::Taken => "taken",
            Self::Other(text) => text,
        })
    }
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        use io::ErrorKind as K;
        match e.kind() {
            K::ConnectionRefused => Self::Refused,
            K::TimedOut | K::WouldBlock => Self::Timeout,
            K::ConnectionReset | K::ConnectionAborted | K::BrokenPipe | K::UnexpectedEof => Self::Reset,
            K::HostUnreachable | K::NetworkUnreachable => Self::Unreachable,
            K::PermissionDenied => Self::Denied,
            K::AddrNotAvailable | K::AddrInUse => Self::Taken,
            _ if e.raw_os_error() == Some(libc::EMSGSIZE) => Self::TooBig,
            // A connected UDP socket that somebody has ended, as seen by its next send.
            _ if e.raw_os_error() == Some(libc::EDESTADDRREQ) => Self::Reset,
            _ => Self::Other(e.to_string()),
        }
    }
}

/// What became of one request. `{"ok":true,"name":…}` or `{"ok":false,"error":…}` as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Line", into = "Line")]
pub struct Answer(pub Result<Reply, Failure>);

/// [`Answer`] as JSON.
#[derive(Serialize, Deserialize)]
struct Line {
    ok: bool,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    reply: Option<Reply>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
}

impl From<Answer> for Line {
    fn from(answer: Answer) -> Self {
        let ok = answer.0.is_ok();
        match answer.0 {
            Ok(reply) => Self { ok, reply: Some(reply), error: None },
            Err(failure) => Self { ok, reply: None, error: Some(failure) },
        }
    }
}

impl From<Line> for Answer {
    fn from(line: Line) -> Self {
        Self(line.reply.ok_or_else(|| line.error.unwrap_or_else(|| Failure::Other("no reason given".into()))))
    }
}

impl Answer {
    /// Who answered.
    pub fn name(&self) -> Option<&str> {
        self.0.as_ref().ok().map(|r| r.name.as_str())
    }

    /// The client's address as the server saw it.
    pub fn source(&self) -> Option<IpAddr> {
        self.0.as_ref().ok()?.peer.map(|p| p.ip())
    }

    /// Why there was no answer.
    pub fn failure(&self) -> Option<&Failure> {
        self.0.as_ref().err()
    }
}

/// IPv4 addresses as such, also where an IPv6 socket reports them.
pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// Milliseconds on the command line.
pub(crate) fn millis(text: &str) -> Result<Duration, std::num::ParseIntError> {
    text.parse().map(Duration::from_millis)
}

/// Length of the repeating part of bulk data: a prime, so that a lost or doubled packet shifts the pattern.
const PERIOD: usize = 65521;

/// The bytes of bulk transfers.
pub(crate) struct Pattern(Vec<u8>);

impl Pattern {
    /// Most bytes that [`Self::at`] gives at once.
    pub(crate) const CHUNK: usize = PERIOD;

    pub(crate) fn new() -> Self {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let one: Vec<u8> = (0..PERIOD).map(|_| next()).collect();
        Self([one.as_slice(), &one].concat())
    }

    /// `len` bytes of the stream from `offset` on.
    pub(crate) fn at(&self, offset: u64, len: usize) -> &[u8] {
        let start = (offset % PERIOD as u64) as usize;
        &self.0[start..start + len.min(Self::CHUNK)]
    }

    /// Writes `total` bytes.
    pub(crate) fn send(&self, to: &mut impl io::Write, total: u64) -> io::Result<()> {
        let mut sent = 0;
        while sent < total {
            let chunk = self.at(sent, usize::try_from(total - sent).unwrap_or(usize::MAX));
            to.write_all(chunk)?;
            sent += chunk.len() as u64;
        }
        Ok(())
    }

    /// Reads `total` bytes; the offset of the first wrong one, if any.
    pub(crate) fn receive(&self, from: &mut impl io::Read, total: u64) -> io::Result<Option<u64>> {
        let (mut buffer, mut read, mut wrong) = (vec![0; Self::CHUNK], 0u64, None);
        while read < total {
            let most = buffer.len().min(usize::try_from(total - read).unwrap_or(usize::MAX));
            let n = from.read(&mut buffer[..most])?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (got, expected) = (&buffer[..n], self.at(read, n));
            if wrong.is_none() && got != expected {
                let differs = got.iter().zip(expected).position(|(a, b)| a != b).unwrap_or_default();
                wrong = Some(read + differs as u64);
            }
            read += n as u64;
        }
        Ok(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_survive_json() {
        let reply = Reply {
            name: "web-1".into(),
            peer: Some("10.244.1.10:4711".parse().unwrap()),
            local: None,
            from: "[fd00::1]:80".parse().unwrap(),
            peername: None,
            own: "[::1]:5".parse().unwrap(),
            us: 7,
        };
        for answer in
            [Answer(Ok(reply)), Answer(Err(Failure::TooBig)), Answer(Err(Failure::Other("odd".into())))]
        {
            let json = serde_json::to_string(&answer).unwrap();
            assert_eq!(serde_json::from_str::<Answer>(&json).unwrap(), answer, "{json}");
        }
        assert_eq!(
            serde_json::to_string(&Answer(Err(Failure::Timeout))).unwrap(),
            r#"{"ok":false,"error":"timeout"}"#
        );
    }

    #[test]
    fn pattern_notices_lost_doubled_and_changed_bytes() {
        let (pattern, total) = (Pattern::new(), 300_000);
        let mut data = Vec::new();
        pattern.send(&mut data, total).unwrap();
        assert_eq!(data.len() as u64, total);
        assert_eq!(pattern.receive(&mut data.as_slice(), total).unwrap(), None);

        let lost = [&data[..100_000], &data[101_448..], &data[..1448]].concat();
        let at = pattern.receive(&mut lost.as_slice(), total).unwrap().unwrap();
        assert!((100_000..100_010).contains(&at), "{at}");
        let mut changed = data.clone();
        changed[250_000] ^= 1;
        assert_eq!(pattern.receive(&mut changed.as_slice(), total).unwrap(), Some(250_000));
        assert!(pattern.receive(&mut &data[1..], total).is_err(), "an early end is an error");
    }
}
