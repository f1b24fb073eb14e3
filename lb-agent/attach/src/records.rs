//! What the CNI plugin remembers of a pod: a small JSON file for each interface, for CHECK, DEL and GC, and for people.
//!
//! `<state directory>/pods/<container>:<interface>.json`

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{ErrorKind, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// The state directory, unless told.
pub const DEFAULT_STATE_DIR: &str = "/run/lb-agent";

/// A pod's interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// The network's name.
    pub network: String,
    /// The container's id, as the runtime has it.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// The interface's name in the pod.
    pub ifname: String,
    /// `namespace/name`, if the runtime said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// Its device on the host, if it has one that packets can be met at.
    pub device: Option<Device>,
    /// Why nothing is attached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// A device, told apart from a later one with the same index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// Hardware address, in hexadecimal digits.
    pub mac: String,
}

impl Device {
    /// What is remembered of a device.
    pub fn of(link: &crate::snapshot::Link) -> Self {
        let mac: Vec<String> = link.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        Self { index: link.index, name: link.name.clone(), mac: mac.join(":") }
    }
}

/// The directory of records.
#[derive(Clone, Debug)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    /// The records below a state directory, which need not exist.
    pub fn at(state_dir: &Path) -> Self {
        Self { dir: state_dir.join("pods") }
    }

    /// Where a record is.
    pub fn path(&self, container_id: &str, ifname: &str) -> PathBuf {
        // Neither name may hold a colon.
        self.dir.join(format!("{container_id}:{ifname}.json"))
    }

    /// The record of an interface, if there is one.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(&self, container_id: &str, ifname: &str) -> Result<Option<Record>> {
        read(&self.path(container_id, ifname))
    }

    /// Writes a record, in place of a former one without a moment between.
    ///
    /// # Errors
    /// If the directory or the file cannot be written.
    pub fn write(&self, record: &Record) -> Result<()> {
        let path = self.path(&record.container_id, &record.ifname);
        let write = || -> Result<()> {
            fs::create_dir_all(&self.dir)?;
            let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
            file.write_all(&serde_json::to_vec_pretty(record)?)?;
            file.persist(&path)?;
            Ok(())
        };
        write().with_context(|| format!("write the record {}", path.display()))
    }

    /// Removes them all.
    ///
    /// # Errors
    /// If they cannot be removed.
    pub fn remove_all(&self) -> Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove the records in {}", self.dir.display()))
            }
            _ => Ok(()),
        }
    }

    /// Removes a record, which need not be there.
    ///
    /// # Errors
    /// If there is one that cannot be removed.
    pub fn remove(&self, container_id: &str, ifname: &str) -> Result<()> {
        let path = self.path(container_id, ifname);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove the record {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// All that can be read. Those that cannot are left out and said.
    ///
    /// # Errors
    /// If there is a directory that cannot be listed.
    pub fn all(&self) -> Result<Vec<Record>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| format!("list the records in {}", self.dir.display()))?,
        };
        let mut all = Vec::new();
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read(&path) {
                Ok(record) => all.extend(record),
                Err(error) => tracing::warn!("{error:#}"),
            }
        }
        Ok(all)
    }
}

fn read(path: &Path) -> Result<Option<Record>> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        text => text.with_context(|| format!("read the record {}", path.display()))?,
    };
    match serde_json::from_slice(&text) {
        Ok(record) => Ok(Some(record)),
        Err(error) => bail!("{} is no record of a pod: {error}", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(container_id: &str, ifname: &str) -> Record {
        Record {
            network: "cbr0".into(),
            container_id: container_id.into(),
            ifname: ifname.into(),
            pod: Some("default/web".into()),
            ips: vec!["10.244.1.5".parse().unwrap(), "fd00::5".parse().unwrap()],
            device: Some(Device { index: 7, name: "veth7".into(), mac: "0a:00:00:00:00:07".into() }),
            note: None,
        }
    }

    #[test]
    fn what_is_written_is_read_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::at(dir.path());
        assert_eq!(records.all().unwrap(), []);
        assert_eq!(records.read("a", "eth0").unwrap(), None);
        records.remove("a", "eth0").unwrap();
        for one in [record("a", "eth0"), record("a", "net1"), record("a-net1", "eth0"), record("a", "eth0")] {
            records.write(&one).unwrap();
            assert_eq!(records.read(&one.container_id, &one.ifname).unwrap(), Some(one));
        }
        assert_eq!(records.all().unwrap().len(), 3);
        records.remove("a", "net1").unwrap();
        assert_eq!(records.read("a", "net1").unwrap(), None);
        assert_eq!(fs::read_dir(dir.path().join("pods")).unwrap().count(), 2, "nothing else is left");
    }

    #[test]
    fn a_broken_record_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::at(dir.path());
        records.write(&record("a", "eth0")).unwrap();
        fs::write(records.path("b", "eth0"), "{").unwrap();
        assert!(records.read("b", "eth0").unwrap_err().to_string().contains("b:eth0.json is no record"));
        assert_eq!(records.all().unwrap(), [record("a", "eth0")]);
    }
}
