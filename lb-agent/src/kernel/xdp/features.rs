//! What a device's driver can do with XDP, by the kernel's own word (6.3).

use anyhow::{Context as _, Result};
use lb_attach::netlink::Netlink;
use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLM_F_ACK, Nla as _, NlasIterator, ParseableParametrized, parse_u64,
};
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};
use netlink_sys::protocols::NETLINK_GENERIC;

/// The family's name, and the numbers of its uapi (linux/netdev.h).
const FAMILY: &str = "netdev";
const DEV_GET: u8 = 1;
const IFINDEX: u16 = 1;
const XDP_FEATURES: u16 = 3;
/// `NETDEV_XDP_ACT_NDO_XMIT`
const TAKES_REDIRECTED: u64 = 1 << 2;

/// Whether a device takes packets that are redirected to it; nothing if the kernel does not know of such questions.
pub(super) fn of(index: u32) -> Result<Option<bool>> {
    let netlink = Netlink::open(NETLINK_GENERIC).context("open a netlink socket")?;
    let Some(family) = family(&netlink) else { return Ok(None) };
    let index = DefaultNla::new(IFINDEX, index.to_ne_bytes().to_vec());
    let header = GenlHeader { cmd: DEV_GET, version: 1 };
    let question = GenlMessage::new(header, Device(vec![index]), family);
    let mut features = None;
    netlink
        .ask(NLM_F_ACK, question, |answer: GenlMessage<Device>| {
            features = features.or(answer.payload.features())
        })
        .context("ask what the driver can do")?;
    Ok(features.map(|bits| bits & TAKES_REDIRECTED != 0))
}

/// The family's number: nothing before 6.3.
fn family(netlink: &Netlink) -> Option<u16> {
    let nlas = vec![GenlCtrlAttrs::FamilyName(FAMILY.into())];
    let question = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas });
    let mut id = None;
    let answered = netlink.ask(NLM_F_ACK, question, |answer: GenlMessage<GenlCtrl>| {
        id = answer.payload.nlas.iter().find_map(|nla| match nla {
            GenlCtrlAttrs::FamilyId(id) => Some(*id),
            _ => None,
        });
    });
    answered.ok().and(id)
}

/// A message about a device.
#[derive(Clone, Debug)]
struct Device(Vec<DefaultNla>);

impl Device {
    fn features(&self) -> Option<u64> {
        let nla = self.0.iter().find(|nla| nla.kind() == XDP_FEATURES)?;
        let mut value = vec![0; nla.value_len()];
        nla.emit_value(&mut value);
        parse_u64(&value).ok()
    }
}

impl GenlFamily for Device {
    fn family_name() -> &'static str {
        FAMILY
    }

    fn command(&self) -> u8 {
        DEV_GET
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for Device {
    fn buffer_len(&self) -> usize {
        self.0.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.0.as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Device {
    fn parse_with_param(bytes: &[u8], _: GenlHeader) -> Result<Self, DecodeError> {
        use netlink_packet_core::Parseable as _;
        NlasIterator::new(bytes).map(|nla| DefaultNla::parse(&nla?)).collect::<Result<_, _>>().map(Self)
    }
}
