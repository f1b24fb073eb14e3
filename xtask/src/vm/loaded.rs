//! What the kernel itself says about the agent's programs.

use super::report::Report;
use crate::lab::Host;
use anyhow::{Context as _, Result, ensure};
use aya::programs::links::LinkType;
use aya::programs::{loaded_links, loaded_programs};
use futures::TryStreamExt as _;
use rtnetlink::packet_route::tc::TcAttribute;
use std::collections::BTreeSet;

/// tcx came with Linux 6.6; before, tc programs hang on a clsact qdisc.
const TCX_SINCE: (u32, u32) = (6, 6);

/// Counts the programs of a node's agent and finds out how they are attached to its devices. The guest runs nothing
/// else that loads programs.
pub(super) fn look(report: &mut Report, node: &Host) {
    let programs: Result<BTreeSet<String>> = loaded_programs()
        .map(|info| Ok(info?.name_as_str().unwrap_or_default().to_owned()))
        .collect::<Result<_>>()
        .context("list the loaded programs");
    let count = programs.and_then(|names| {
        println!("programs: {}", names.iter().map(String::as_str).collect::<Vec<_>>().join(" "));
        report.programs = Some(names.len());
        ensure!(!names.is_empty(), "none");
        Ok(())
    });
    report.check("programs are loaded", count);
    let attach = attach_kind(node);
    let expected = if version(&report.release) >= Some(TCX_SINCE) { "tcx" } else { "clsact" };
    report.attach = attach.as_ref().ok().map(|kind| (*kind).to_owned());
    report.check(
        format!("attached by {expected}"),
        attach.and_then(|kind| {
            ensure!(kind == expected, "it is {kind}");
            Ok(())
        }),
    );
}

fn attach_kind(node: &Host) -> Result<&'static str> {
    // Kernels without tcx also have no such link type to list.
    let tcx = loaded_links().filter_map(|info| info.ok()?.link_type().ok()).any(|kind| kind == LinkType::Tcx);
    let clsact = node.run_in(has_clsact)??;
    Ok(match (tcx, clsact) {
        (true, false) => "tcx",
        (false, true) => "clsact",
        (true, true) => "both",
        (false, false) => "none",
    })
}

fn has_clsact() -> Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, netlink, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        let mut qdiscs = netlink.qdisc().get().execute();
        while let Some(qdisc) = qdiscs.try_next().await.context("list the queueing disciplines")? {
            if qdisc.attributes.iter().any(|a| matches!(a, TcAttribute::Kind(kind) if kind == "clsact")) {
                return Ok(true);
            }
        }
        Ok(false)
    })
}

/// `6.12.117+deb12-cloud-amd64` is 6.12.
pub(super) fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_ordered_as_numbers() {
        assert_eq!(version("6.12.117+deb12-cloud-amd64"), Some((6, 12)));
        assert_eq!(version("7.3-rc1"), Some((7, 3)));
        assert!(version("6.12.1") > Some(TCX_SINCE) && version("5.10.0-46") < Some(TCX_SINCE));
    }
}
