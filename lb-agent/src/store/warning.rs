//! Why (a part of) a Service cannot be served.

use super::ObjectName;
use crate::model::FrontendAddr;
use std::net::IpAddr;

/// One thing about a Service that is not served, and why. The rest of the Service is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum Warning {
    /// Neither TCP nor UDP.
    #[error("port {port:?} is not served: protocol {protocol} is not supported")]
    Protocol {
        /// Name of the port.
        port: Box<str>,
        /// What it asks for.
        protocol: Box<str>,
    },
    /// Not an IP address, or one that nothing can be sent to.
    #[error("{field}: {value:?} is not a usable IP address")]
    Address {
        /// Where it stands in the object.
        field: &'static str,
        /// What stands there.
        value: Box<str>,
    },
    /// Not an address range.
    #[error("{field}: {value:?} is not a CIDR")]
    Cidr {
        /// Where it stands in the object.
        field: &'static str,
        /// What stands there.
        value: Box<str>,
    },
    /// Outside of 1..=65535.
    #[error("{field}: {number} is not a port number")]
    PortNumber {
        /// Where it stands in the object.
        field: &'static str,
        /// What stands there.
        number: i32,
    },
    /// An address in a family that the object does not have.
    #[error("{field}: {address} is not served: {reason}")]
    Family {
        /// Where it stands in the object.
        field: &'static str,
        /// The address.
        address: IpAddr,
        /// What it does not fit with.
        reason: &'static str,
    },
    /// Nobody gave the Service an address.
    #[error(
        "not served: it has no clusterIP (a manifest has to name it, there is no API server to choose one)"
    )]
    NoClusterIp,
    /// A slice of an `addressType` that is not IP.
    #[error("slice {slice} is not served: addressType {kind:?}")]
    AddressType {
        /// The slice.
        slice: ObjectName,
        /// Its type.
        kind: Box<str>,
    },
    /// `externalIPs` are switched off.
    #[error("spec.externalIPs is not served: --external-ips=false")]
    ExternalIps,
    /// An older Service has the same address, port and protocol.
    #[error("{} {}:{} is not served: {owner} is older and has it already", .frontend.protocol, .frontend.addr().ip(), .frontend.addr().port())]
    Taken {
        /// What both claim.
        frontend: FrontendAddr,
        /// Who has it.
        owner: ObjectName,
    },
}

impl Warning {
    /// All of [`Self::reason`]'s.
    pub const REASONS: [&str; 5] =
        ["UnsupportedProtocol", "KubeProxyIncorrectIPVersion", "InvalidValue", "AddressTaken", "NotServed"];

    /// The word by which people and alerts find it, in Events and metrics; kube-proxy's where it has one.
    pub const fn reason(&self) -> &'static str {
        Self::REASONS[self.reason_index()]
    }

    /// Its reason's place in [`Self::REASONS`].
    pub(crate) const fn reason_index(&self) -> usize {
        match self {
            Self::Protocol { .. } => 0,
            Self::Family { .. } => 1,
            Self::Address { .. } | Self::Cidr { .. } | Self::PortNumber { .. } => 2,
            Self::Taken { .. } => Self::TAKEN,
            Self::NoClusterIp | Self::AddressType { .. } | Self::ExternalIps => 4,
        }
    }

    /// [`Self::reason_index`] of [`Self::Taken`].
    pub(crate) const TAKEN: usize = 3;
}
