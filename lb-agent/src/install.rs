//! `lb-agent install` and `lb-agent cleanup`: what a node gets before the agent runs, and how it is rid of all of it.
//!
//! - [`conflist`]: our plugin in a network configuration, and out again. - [`conf_dir`]: which configuration that is. -
//!   [`plugin`]: the plugin's file. - [`keep`]: what the running agent sees to.
//!
//! The order is such that a pod can always be created: the plugin's file comes before its name in a configuration, and
//! goes after it.

pub mod conf_dir;
pub mod conflist;
mod files;
pub mod keep;
pub mod plugin;

use crate::cli::{CleanupArgs, InstallArgs};
use crate::kernel::pins::DEFAULT_BPFFS;
use crate::kernel::{leave, node_mounts, remove};
use anyhow::{Context as _, Result};
use conf_dir::{Added, ConfDir};
use lb_attach::records::Records;
use plugin::Plugin;
use std::path::Path;
use std::time::Duration;
use tracing::{info, warn};

/// A configuration that is half written now is whole a moment later.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);

/// Prepares a node.
///
/// # Errors
/// If something is missing that the agent needs, or a network configuration cannot be changed: that one is left as it was.
pub fn install(args: &InstallArgs) -> Result<()> {
    node_mounts::on_node(|| {
        node_mounts::bpffs(&args.bpffs)?;
        args.cgroup.as_deref().map_or(Ok(()), node_mounts::show_cgroup)
    })?;
    if let Some(dir) = args.cni_bin_dir.get() {
        let plugin = Plugin::new(args.cni_plugin.as_deref(), dir)?;
        let written = plugin.install()?;
        info!("{} {}", plugin.target().display(), if written { "written" } else { "is up to date" });
    }
    let Some(dir) = args.cni_conf_dir.get() else { return Ok(()) };
    match add(&ConfDir::new(dir, &args.bpffs)) {
        Ok(Added::To(path)) => info!("added the plugin to {}", path.display()),
        Ok(Added::Already(path)) => info!("the plugin is in {} already", path.display()),
        Ok(Added::None) => {
            info!(
                "no network configuration in {} yet: the agent adds the plugin when there is",
                dir.display()
            );
        }
        Err(error) if args.later => {
            warn!("network configuration left as it is: {error:#}; the agent goes on trying")
        }
        Err(error) => return Err(error).context("network configuration left as it is"),
    }
    Ok(())
}

fn add(conf: &ConfDir) -> Result<Added> {
    let mut result = conf.add();
    for _ in 1..ATTEMPTS {
        if result.is_ok() {
            break;
        }
        std::thread::sleep(PAUSE);
        result = conf.add();
    }
    result
}

/// Takes everything off a node that `install` and the agent have put on it. Can be repeated.
///
/// # Errors
/// If an agent still runs, or something cannot be removed. What comes after it is then still there.
pub fn cleanup(args: &CleanupArgs) -> Result<()> {
    let (bpffs, cgroup) = (args.bpffs.as_path(), args.cgroup.as_deref());
    let _no_agent = node_mounts::on_node(|| remove::wait_for_agents(bpffs))?;
    if let Some(dir) = args.cni_conf_dir.get() {
        let changed =
            ConfDir::new(dir, bpffs).remove().context("take the plugin out of the network configuration")?;
        for path in &changed {
            info!("took the plugin out of {}", path.display());
        }
        if !changed.is_empty() {
            std::thread::sleep(args.grace);
        }
    }
    node_mounts::on_node(|| {
        leave::leave(bpffs, args.drain)?;
        remove::everything(bpffs)
    })?;
    if let Some(dir) = args.cni_bin_dir.get().filter(|_| !args.keep_plugin)
        && plugin::remove(dir)?
    {
        info!("removed {}", dir.join(conflist::PLUGIN).display());
    }
    node_mounts::on_node(|| {
        Records::at(&args.state_dir).remove_all()?;
        if let Some(cgroup) = cgroup {
            node_mounts::hide(cgroup)?;
        }
        // The system's own is others', too.
        if bpffs != Path::new(DEFAULT_BPFFS) && is_empty(bpffs) {
            node_mounts::hide(bpffs)?;
        }
        node_mounts::remove_if_empty(&args.state_dir)
    })?;
    info!("nothing of the agent is left on this node");
    Ok(())
}

/// Whether nobody has pinned anything there. The kernel's own `maps.debug` and `progs.debug` do not count.
fn is_empty(bpffs: &Path) -> bool {
    let own = |name: std::ffi::OsString| name.to_string_lossy().ends_with(".debug");
    std::fs::read_dir(bpffs).is_ok_and(|entries| entries.flatten().all(|entry| own(entry.file_name())))
}
