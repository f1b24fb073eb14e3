//! Programs that do nothing where ours would be: what there is to lose before a program has done anything.

use anyhow::{Context, Result};
use aya::programs::{SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use lb_attach::snapshot;

use crate::bench::programs::object;
use crate::lab::{Host, Lab};

/// Puts them on both hooks of the nodes' uplinks, overlays and pods' devices. They go with what is returned.
pub(super) fn start(lab: &Lab) -> Result<Ebpf> {
    let path = object("lb-ebpf-bench")?;
    let mut ebpf =
        EbpfLoader::new().load_file(&path).with_context(|| format!("loading {}", path.display()))?;
    let empty: &mut SchedClassifier =
        ebpf.program_mut("empty").context("no program empty")?.try_into().context("program empty")?;
    empty.load().context("loading the program empty")?;
    for node in [lab.node(0), lab.node(1)] {
        attach(node, empty)?;
    }
    Ok(ebpf)
}

fn attach(node: &Host, program: &mut SchedClassifier) -> Result<()> {
    node.run_in(|| {
        for link in snapshot::links()? {
            // An uplink of a lab's node is a veth, too.
            if !matches!(link.kind.as_deref(), Some("veth" | "vxlan")) {
                continue;
            }
            for hook in [TcAttachType::Ingress, TcAttachType::Egress] {
                let attached = program.attach(&link.name, hook);
                attached.with_context(|| format!("attaching to {} of {}", link.name, node.name()))?;
            }
        }
        Ok(())
    })?
}
