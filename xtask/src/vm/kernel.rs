//! A kernel to boot: its image and its modules, unpacked from packages into a cache or named by hand.

use super::apt::Apt;
use crate::system::output;
use anyhow::{Context as _, Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the lab and the programs' attachment are made of; built in or loaded, but there.
const MODULES: [&str; 6] = ["veth", "bridge", "vxlan", "sch_ingress", "cls_bpf", "act_bpf"];
/// Loaded where a kernel has them as modules (IPv6 need not be one, and is looked for in the guest).
const OPTIONAL_MODULES: [&str; 3] = ["br_netfilter", "ipv6", "tun"];

/// What a kernel named by its files is called.
pub(super) const CUSTOM: &str = "custom";

/// A bootable kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    /// What it is called on the command line and in the report.
    pub(super) name: String,
    pub(super) image: PathBuf,
    /// `lib/modules/<release>`.
    modules: PathBuf,
}

impl Kernel {
    /// A kernel named by its files.
    pub(super) fn from_files(image: PathBuf, modules: PathBuf) -> Result<Self> {
        for path in [&image, &modules.join("kernel")] {
            fs::metadata(path).with_context(|| format!("kernel files: {}", path.display()))?;
        }
        Ok(Self { name: CUSTOM.into(), image, modules })
    }

    /// The kernel of this series that an earlier run has unpacked under `cache`.
    pub(super) fn cached(cache: &Path, series: &str) -> Option<Self> {
        let dir = cache.join(series);
        let release = ["lib/modules", "usr/lib/modules"].iter().find_map(|sub| only_entry(&dir.join(sub)))?;
        fs::metadata(release.join("modules.builtin")).ok()?;
        // Older packages keep the image in /boot, newer ones beside the modules.
        let boot = fs::read_dir(dir.join("boot")).into_iter().flatten().filter_map(|e| Some(e.ok()?.path()));
        let image = boot.chain([release.join("vmlinuz")]).find(|p| {
            p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz")) && p.exists()
        })?;
        Some(Self { name: series.into(), image, modules: release })
    }

    /// Downloads the newest kernel of this series that the archive still holds, and unpacks it under `cache`.
    pub(super) fn fetch(cache: &Path, series: &str, apt: &Apt) -> Result<Self> {
        let mut failures = String::new();
        // The archive's index may name packages that are gone: then an older one may still be there.
        for candidate in apt.candidates(series)?.iter().take(3) {
            let dir = tempfile::tempdir_in(cache)?;
            if let Err(error) = apt.unpack(candidate, dir.path()) {
                failures += &format!("\n{error:#}");
                continue;
            }
            eprintln!("{series}: unpacked Debian's {} {}", candidate.package, candidate.version);
            let _ = fs::remove_dir_all(cache.join(series));
            fs::rename(dir.keep(), cache.join(series))?;
            return Self::cached(cache, series)
                .with_context(|| format!("{} lacks vmlinuz, modules or modules.builtin", candidate.package));
        }
        bail!("no package of kernel {series} could be downloaded:{failures}")
    }

    /// The modules to load, decompressed, each after those that it needs: (name, contents).
    pub(super) fn modules(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files = BTreeMap::new();
        collect_modules(&self.modules.join("kernel"), &mut files)?;
        let builtin = self.modules.join("modules.builtin");
        let builtin: BTreeSet<String> = fs::read_to_string(&builtin)
            .with_context(|| format!("read {}", builtin.display()))?
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect();
        let mut order = Vec::new();
        let mut seen = builtin;
        let optional = OPTIONAL_MODULES.into_iter().filter(|module| files.contains_key(*module));
        for module in MODULES.into_iter().chain(optional) {
            visit(module, &files, &mut seen, &mut order).with_context(|| format!("kernel {}", self.name))?;
        }
        Ok(order)
    }
}

fn only_entry(dir: &Path) -> Option<PathBuf> {
    Some(fs::read_dir(dir).ok()?.next()?.ok()?.path())
}

fn visit(
    module: &str,
    files: &BTreeMap<String, PathBuf>,
    seen: &mut BTreeSet<String>,
    order: &mut Vec<(String, Vec<u8>)>,
) -> Result<()> {
    if !seen.insert(module.to_owned()) {
        return Ok(());
    }
    let file = files.get(module).with_context(|| format!("no module {module}, and it is not built in"))?;
    let contents = read_module(file)?;
    for dependency in dependencies(&contents) {
        visit(&dependency, files, seen, order).with_context(|| format!("needed by {module}"))?;
    }
    order.push((module.to_owned(), contents));
    Ok(())
}

fn collect_modules(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect_modules(&entry.path(), files)?;
        } else if let Some(name) = module_name(&entry.path()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// `drivers/net/ip6-tunnel.ko.xz` is the module `ip6_tunnel`.
fn module_name(path: &Path) -> Option<String> {
    let (stem, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(stem.replace('-', "_"))
}

fn read_module(file: &Path) -> Result<Vec<u8>> {
    let decompressor = match file.extension().and_then(|e| e.to_str()) {
        Some("ko") => return fs::read(file).with_context(|| format!("read {}", file.display())),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => bail!("{}: unknown compression", file.display()),
    };
    let out = Command::new(decompressor).arg("-dc").arg(file).output();
    let out = out.with_context(|| format!("start {decompressor}"))?;
    if !out.status.success() {
        // Again, for its words.
        output(Command::new(decompressor).arg("-t").arg(file))?;
    }
    Ok(out.stdout)
}

/// The `depends=` entry of the module's `.modinfo`, which is what depmod's file is for in-tree modules.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|w| w == KEY) else { return Vec::new() };
    let value = module[at + KEY.len()..].split(|b| *b == 0).next().unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_modules_name_and_needs() {
        assert_eq!(module_name(Path::new("kernel/net/ip6-tunnel.ko.xz")).as_deref(), Some("ip6_tunnel"));
        assert_eq!(module_name(Path::new("kernel/modules.order")), None);
        assert_eq!(
            dependencies(b"\x7fELF..\0alias=x\0depends=udp_tunnel,ip6-udp-tunnel\0x"),
            ["udp_tunnel", "ip6_udp_tunnel"]
        );
        assert!(dependencies(b"\0depends=\0intree=Y\0").is_empty());
    }

    #[test]
    fn modules_come_after_what_they_need_and_a_missing_one_is_named() {
        let cache = tempfile::tempdir().unwrap();
        let modules = cache.path().join("1.0/lib/modules/1.0-test");
        fs::create_dir_all(modules.join("kernel")).unwrap();
        fs::create_dir(cache.path().join("1.0/boot")).unwrap();
        fs::write(cache.path().join("1.0/boot/vmlinuz-1.0-test"), "").unwrap();
        fs::write(modules.join("modules.builtin"), "kernel/net/cls_bpf.ko\n").unwrap();
        for (name, needs) in
            [("veth", ""), ("bridge", "stp"), ("stp", ""), ("vxlan", ""), ("sch_ingress", "")]
        {
            fs::write(modules.join(format!("kernel/{name}.ko")), format!("\0depends={needs}\0")).unwrap();
        }
        let kernel = Kernel::cached(cache.path(), "1.0").unwrap();
        let error = format!("{:#}", kernel.modules().unwrap_err());
        assert_eq!(error, "kernel 1.0: no module act_bpf, and it is not built in");
        fs::write(modules.join("kernel/act_bpf.ko"), "\0depends=\0").unwrap();
        let names: Vec<_> = kernel.modules().unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["veth", "stp", "bridge", "vxlan", "sch_ingress", "act_bpf"]);
    }
}
