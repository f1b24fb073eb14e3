//! What we have to do with netfilter: connections that it translated before we came, and those that it is to go on with
//! when we go.
//!
//! - [`conntrack`]: its table of connections. - [`nft`]: changes of rules, all or none.

pub mod conntrack;
pub mod nft;

#[cfg(test)]
pub(crate) mod testing;
