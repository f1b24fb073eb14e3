//! Ids of Service ports and their names in the map, for tools.

use super::gone;
use crate::model::ServicePort;
use crate::store::ObjectName;
use anyhow::{Context as _, Result};
use aya::maps::{HashMap as BpfHashMap, MapData};
use lb_common::maps::ServiceName;
use std::collections::HashMap;

#[derive(Debug, Default)]
pub(super) struct Names {
    ids: HashMap<ServicePort, u32>,
    /// How many frontends use an id. Whose it is, is in the map, and read there when it is needed.
    held: HashMap<u32, u32>,
    last: u32,
}

type Map = BpfHashMap<MapData, u32, ServiceName>;

impl Names {
    pub(super) fn adopt(&mut self, map: &Map) -> Result<()> {
        for entry in map.iter() {
            let (id, name) = entry.context("read the names")?;
            let service = read(&name);
            self.last = self.last.max(id);
            self.ids.insert(service, id);
            self.held.insert(id, 0);
        }
        Ok(())
    }

    /// The id of a Service port, new and written if need be. It stays as long as it is held.
    pub(super) fn id(&mut self, map: &mut Map, service: &ServicePort) -> Result<u32> {
        if let Some(id) = self.ids.get(service) {
            return Ok(*id);
        }
        // Zero means no Service.
        let id = self.last + 1;
        map.insert(id, write(service), 0).with_context(|| format!("write the name of {service}"))?;
        self.last = id;
        self.ids.insert(service.clone(), id);
        self.held.insert(id, 0);
        Ok(id)
    }

    /// Removes names that a killed agent left behind, once all that are used are held.
    pub(super) fn drop_orphans(&mut self, map: &mut Map) -> Result<()> {
        let orphans: Vec<_> = self.held.iter().filter(|(_, n)| **n == 0).map(|(id, _)| *id).collect();
        orphans.into_iter().try_for_each(|id| self.drop_if_unused(map, id).map(drop))
    }

    /// How many are in the map.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    pub(super) fn is_known(&self, id: u32) -> bool {
        self.held.contains_key(&id)
    }

    /// Removes the name if nobody holds it. Whether it is gone.
    pub(super) fn drop_if_unused(&mut self, map: &mut Map, id: u32) -> Result<bool> {
        if self.held.get(&id).is_none_or(|count| *count > 0) {
            return Ok(false);
        }
        self.held.remove(&id);
        let written = map.get(&id, 0).map(|name| read(&name));
        match &written {
            Ok(service) if self.ids.get(service) == Some(&id) => drop(self.ids.remove(service)),
            // Somebody else has removed it, or it was too long for the map.
            _ => self.ids.retain(|_, other| *other != id),
        }
        gone(map.remove(&id)).with_context(|| match &written {
            Ok(service) => format!("delete the name of {service}"),
            Err(_) => format!("delete the name of the Service port {id}"),
        })?;
        Ok(true)
    }

    pub(super) fn hold(&mut self, id: u32) {
        if let Some(count) = self.held.get_mut(&id) {
            *count += 1;
        }
    }

    /// Gives back one use of an id; true if it was the last, and the id means nothing any more.
    pub(super) fn release(&mut self, map: &mut Map, id: u32) -> Result<bool> {
        let Some(count) = self.held.get_mut(&id) else { return Ok(false) };
        *count = count.saturating_sub(1);
        self.drop_if_unused(map, id)
    }
}

fn write(service: &ServicePort) -> ServiceName {
    let field = |s: &str| {
        let mut bytes = [0u8; 64];
        let len = s.len().min(bytes.len());
        bytes[..len].copy_from_slice(&s.as_bytes()[..len]);
        bytes
    };
    ServiceName {
        namespace: field(service.service.namespace()),
        name: field(service.service.name()),
        port: field(&service.port),
    }
}

/// The Service port that an entry of the names map stands for.
pub(crate) fn read(name: &ServiceName) -> ServicePort {
    let field = |bytes: &[u8; 64]| {
        let len = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    };
    ServicePort {
        service: ObjectName::new(&field(&name.namespace), &field(&name.name)),
        port: field(&name.port).into(),
    }
}
