//! `--check`: whether ours is ahead of kube-proxy's modes.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use crate::bench::mode::Mode;
use crate::bench::results::Results;
use crate::bench::services::counted;
use crate::bench::stats::Verdict;

/// Prints the rows that could not be judged, by why they could not: a mode of kube-proxy's that is not there, or does not
/// start with so many Services.
///
/// # Errors
/// If ours is not ahead in every other row, or there is none.
pub(in crate::bench) fn check(results: &Results) -> Result<()> {
    for what in not_judged(results) {
        println!("not judged: {what}");
    }
    let judged = results.compared.len();
    ensure!(judged > 0, "nothing was judged: there is no figure of kube-proxy's beside one of ours");
    let ahead = results.compared.iter().filter(|c| c.verdict == Verdict::Ahead).count();
    ensure!(ahead == judged, "ours is ahead in {ahead} of {judged} rows only");
    println!("ours is ahead in all {judged} rows");
    Ok(())
}

fn not_judged(results: &Results) -> Vec<String> {
    let mut missing = BTreeMap::<_, usize>::new();
    for row in results.rows.iter().filter(|row| row.mode.is_ours()) {
        for against in [Mode::Iptables, Mode::Nftables] {
            let is_there =
                results.compared.iter().any(|c| (c.of, c.mode, c.against) == (row.of, row.mode, against));
            if !is_there {
                *missing.entry((against, row.of.services, row.of.family)).or_default() += 1;
            }
        }
    }
    let missing = missing.into_iter().map(|((against, services, family), rows)| {
        format!("{rows} rows beside {}, {}, {}", against.name(), counted(services), family.name())
    });
    missing.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::family::IpFamily;
    use crate::bench::load::Load;
    use crate::bench::machine::Machine;
    use crate::bench::results::{Compared, Of, Row};
    use crate::bench::stats::Spread;
    use crate::bench::topology::Path;

    fn results(verdicts: &[(Mode, Verdict)]) -> Results {
        let mut results = Results::new(Machine::default(), Vec::new());
        let of = Of { load: Load::Packets, path: Path::SameNode, family: IpFamily::V4, services: 1000 };
        let spread = Spread::of(&[1.0]);
        results.rows.push(Row {
            of,
            mode: Mode::Ours,
            turns: 1,
            figure: spread,
            to_direct: spread,
            whole: None,
            connect: None,
            rate: spread,
            cpu: spread,
            lost: 0.0,
        });
        for &(against, verdict) in verdicts {
            results.compared.push(Compared { of, mode: Mode::Ours, against, ratio: spread, verdict });
        }
        results
    }

    #[test]
    fn every_row_has_to_be_ahead_and_one_there_must_be() {
        let (ahead, even) = (Verdict::Ahead, Verdict::Even);
        assert!(check(&results(&[(Mode::Iptables, ahead), (Mode::Nftables, ahead)])).is_ok());
        let error = check(&results(&[(Mode::Iptables, ahead), (Mode::Nftables, even)])).unwrap_err();
        assert_eq!(error.to_string(), "ours is ahead in 1 of 2 rows only");
        assert!(check(&results(&[])).unwrap_err().to_string().starts_with("nothing was judged"));
    }

    #[test]
    fn what_is_not_judged_is_said() {
        let all = results(&[(Mode::Iptables, Verdict::Ahead), (Mode::Nftables, Verdict::Ahead)]);
        assert_eq!(not_judged(&all), [""; 0]);
        let some = results(&[(Mode::Nftables, Verdict::Ahead)]);
        assert_eq!(not_judged(&some), ["1 rows beside iptables, 1000 Services, IPv4"]);
    }
}
