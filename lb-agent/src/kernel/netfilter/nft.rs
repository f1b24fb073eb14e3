//! nftables: kube-proxy's tables, and one of our own that keeps netfilter translating what it has begun to.
//!
//! The kernel tracks connections, and translates those that it knows, only as long as somebody's rules ask for it. When
//! kube-proxy's were the only ones and go, every connection that they translated would hang, whatever `conntrack -L` still
//! lists. So as long as there are such connections, a table of ours asks for it, and does nothing else.

use lb_attach::netlink::Netlink;
use netlink_packet_core::{DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP};
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, Expressions, Hook, InetHookNumber,
    NfTablesMessage, Operator, Register, RuleAttribute, RuleMessage, TableAttribute, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use std::io;

/// Our table.
pub const TRACKING: (NetfilterProtoFamily, &str) = (NetfilterProtoFamily::Inet, "lb-agent");

/// `NFNL_SUBSYS_NFTABLES`.
const NFTABLES: u16 = 10;
// The `ct` expression, which the library does not have (linux/netfilter/nf_tables.h).
const NFTA_CT_DREG: u16 = 1;
const NFTA_CT_KEY: u16 = 2;
const NFT_CT_STATE: u32 = 0;
/// `NF_CT_STATE_INVALID_BIT`.
const INVALID: u32 = 1;

/// The chains that make the kernel translate: where it does so, at the usual priorities.
const TRANSLATING: [(&str, InetHookNumber, i32); 4] = [
    ("prerouting", InetHookNumber::PreRouting, -100),
    ("output", InetHookNumber::LocalOut, -100),
    ("postrouting", InetHookNumber::PostRouting, 100),
    ("input", InetHookNumber::LocalIn, 100),
];

/// The names of all tables, with their families, of the calling thread's network namespace.
///
/// # Errors
/// What the kernel says: it may have no nftables.
pub fn tables() -> io::Result<Vec<(NetfilterProtoFamily, String)>> {
    let question =
        message(NetfilterProtoFamily::Unspec, NfTablesMessage::GetTable(TableMessage { attributes: vec![] }));
    let mut all = Vec::new();
    Netlink::open(NETLINK_NETFILTER)?.ask(NLM_F_DUMP, question, |answer: NetfilterMessage| {
        if let NetfilterMessageInner::NfTables(NfTablesMessage::NewTable(table)) = answer.inner {
            let name = table.attributes.into_iter().find_map(|attribute| match attribute {
                TableAttribute::Name(name) => Some(name),
                _ => None,
            });
            all.extend(name.map(|name| (answer.header.family, name)));
        }
    })?;
    Ok(all)
}

/// As [`tables`]; that the kernel has no nftables is no error.
///
/// # Errors
/// What the kernel says.
pub fn tables_if_any() -> io::Result<Vec<(NetfilterProtoFamily, String)>> {
    match tables() {
        Err(error) if lacks_nftables(&error) => Ok(Vec::new()),
        all => all,
    }
}

/// Whether there is a table.
///
/// # Errors
/// What the kernel says; that it has no nftables is no error.
pub fn has_table((family, name): (NetfilterProtoFamily, &str)) -> io::Result<bool> {
    Ok(tables_if_any()?.iter().any(|(f, n)| (*f, n.as_str()) == (family, name)))
}

/// Deletes a table with all that is in it. Whether there was one.
///
/// # Errors
/// What the kernel says; that it has no nftables is no error.
pub fn delete_table((family, name): (NetfilterProtoFamily, &str)) -> io::Result<bool> {
    match transact([(0, message(family, NfTablesMessage::DeleteTable(table(name))))]) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound || lacks_nftables(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Has netfilter go on with the connections that it knows, whoever else's rules go. Can be repeated.
///
/// # Errors
/// What the kernel says: it may have no nftables.
pub fn keep_tracking() -> io::Result<()> {
    let (family, name) = TRACKING;
    let message = |inner| (NLM_F_CREATE, message(family, inner));
    let mut all = vec![
        // So that there is one to delete, whatever was in it.
        message(NfTablesMessage::NewTable(table(name))),
        message(NfTablesMessage::DeleteTable(table(name))),
        message(NfTablesMessage::NewTable(table(name))),
    ];
    for (chain, hook, priority) in TRANSLATING {
        all.push(message(NfTablesMessage::NewChain(base_chain(chain, "nat", hook, priority))));
    }
    all.push(message(NfTablesMessage::NewChain(base_chain(
        "tracking",
        "filter",
        InetHookNumber::PreRouting,
        0,
    ))));
    all.push(message(NfTablesMessage::NewRule(RuleMessage {
        attributes: vec![
            RuleAttribute::Table(name.into()),
            RuleAttribute::Chain("tracking".into()),
            RuleAttribute::Expressions(if_invalid().into_iter().map(Into::into).collect()),
        ],
    })));
    transact(all)
}

/// Has netfilter forget, as far as we are concerned. Whether it was told to go on.
///
/// # Errors
/// What the kernel says.
pub fn stop_tracking() -> io::Result<bool> {
    delete_table(TRACKING)
}

fn lacks_nftables(error: &io::Error) -> bool {
    // An unknown subsystem of netfilter's.
    error.kind() == io::ErrorKind::InvalidInput || error.raw_os_error() == Some(libc::EOPNOTSUPP)
}

/// `ct state invalid`, and then nothing.
fn if_invalid() -> Vec<Expressions> {
    let word = |kind, value: u32| DefaultNla::new(kind, value.to_be_bytes().to_vec());
    let register = Register::Reg1;
    let value = |value: u32| DataAttribute::Value(value.to_ne_bytes().to_vec());
    vec![
        Expressions::Other {
            expression_type: "ct".into(),
            attributes: vec![word(NFTA_CT_DREG, register.into()), word(NFTA_CT_KEY, NFT_CT_STATE)],
        },
        Expressions::Bitwise(vec![
            Bitwise::SourceRegister(register),
            Bitwise::DestinationRegister(register),
            Bitwise::Length(size_of::<u32>() as u32),
            Bitwise::Mask(value(INVALID)),
            Bitwise::Xor(value(0)),
        ]),
        Expressions::Cmp(vec![
            Cmp::SourceRegister(register),
            Cmp::Op(Operator::NotEqual),
            Cmp::Data(value(0)),
        ]),
    ]
}

fn table(name: &str) -> TableMessage {
    TableMessage { attributes: vec![TableAttribute::Name(name.into())] }
}

fn base_chain(name: &str, kind: &str, hook: InetHookNumber, priority: i32) -> ChainMessage {
    ChainMessage {
        attributes: vec![
            ChainAttribute::Table(TRACKING.1.into()),
            ChainAttribute::Name(name.into()),
            ChainAttribute::Hook(vec![Hook::Number(hook.into()), Hook::Priority(priority.cast_unsigned())]),
            ChainAttribute::Type(kind.into()),
        ],
    }
}

fn message(family: NetfilterProtoFamily, inner: NfTablesMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), inner)
}

/// All or none.
fn transact(messages: impl IntoIterator<Item = (u16, NetfilterMessage)>) -> io::Result<()> {
    let edge = |inner: ControlMessage| {
        (0, NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFTABLES), inner))
    };
    let messages = messages.into_iter().map(|(flags, message)| (flags | NLM_F_ACK, message));
    let all = std::iter::once(edge(ControlMessage::BatchBegin)).chain(messages);
    Netlink::open(NETLINK_NETFILTER)?.send_all(all.chain(std::iter::once(edge(ControlMessage::BatchEnd))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netfilter::testing::Namespace;

    #[test]
    fn our_table_comes_and_goes_and_leaves_others_alone() {
        let _alone = Namespace::new();
        let other = (NetfilterProtoFamily::IPv4, "kube-proxy");
        transact([(NLM_F_CREATE, message(other.0, NfTablesMessage::NewTable(table(other.1))))])
            .expect("a table");
        assert!(!has_table(TRACKING).expect("an answer") && !stop_tracking().expect("nothing to stop"));
        for _ in 0..2 {
            keep_tracking().expect("a table of ours");
            assert_eq!(tables().expect("tables").len(), 2);
            assert!(has_table(TRACKING).expect("an answer"));
        }
        assert!(stop_tracking().expect("it goes") && !has_table(TRACKING).expect("an answer"));
        assert!(has_table(other).expect("an answer"));
        assert!(delete_table(other).expect("it goes") && !delete_table(other).expect("it is gone"));
        assert_eq!(tables().expect("tables"), []);
    }
}
