//! What is private. The hooks themselves are tested from outside: `tests/datapath`.

use super::{Reason, Verdict};

#[test]
fn verdicts_survive_a_register() {
    let all = Reason::ALL.into_iter().flat_map(|r| [Verdict::Drop(r), Verdict::Reject(r)]);
    for verdict in all.chain([Verdict::Pass]) {
        assert_eq!(Verdict::from_raw(verdict.raw()), verdict);
    }
}

#[test]
fn reasons_are_their_index_and_have_names() {
    let mut names = std::collections::HashSet::new();
    for (index, reason) in (0..).zip(Reason::ALL) {
        assert_eq!(reason as u32, index);
        assert_eq!(Reason::from_index(index), reason);
        assert!(names.insert(reason.name()));
    }
}
