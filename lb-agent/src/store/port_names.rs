//! Names of ports: of few kinds, in great numbers.

use arcstr::ArcStr;
use std::collections::HashSet;

/// Those in use, and some that were.
#[derive(Debug, Default)]
pub(super) struct PortNames {
    known: HashSet<ArcStr>,
    /// How many were in use when it was last looked.
    used: usize,
}

/// So many are kept without a look.
const FEW: usize = 64;

impl PortNames {
    /// Makes it share its text with all others of that name.
    pub(super) fn share(&mut self, name: &mut ArcStr) {
        if let Some(known) = self.known.get(name) {
            *name = known.clone();
            return;
        }
        if self.known.len() >= FEW.max(2 * self.used) {
            self.known.retain(|name| ArcStr::strong_count(name) != Some(1));
            self.used = self.known.len();
        }
        self.known.insert(name.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shared_and_forgotten() {
        let mut names = PortNames::default();
        let shared = |names: &mut PortNames, text: &str| {
            let mut name = ArcStr::from(text);
            names.share(&mut name);
            name
        };
        let (one, other) = (shared(&mut names, "http"), shared(&mut names, "http"));
        assert!(ArcStr::ptr_eq(&one, &other));
        for n in 0..10 * FEW {
            shared(&mut names, &n.to_string());
        }
        assert!(names.known.len() <= FEW, "{}", names.known.len());
        assert!(ArcStr::ptr_eq(&one, &shared(&mut names, "http")));
        let many: Vec<_> = (0..10 * FEW).map(|n| shared(&mut names, &n.to_string())).collect();
        assert!(names.known.len() > many.len());
    }
}
