//! Who may ask whom in which way, and what comes of it: every combination, against Kubernetes' rules.

mod cells;
mod extras;
mod histories;
mod judge;
mod oracle;
mod site;

use anyhow::Result;
use cells::Cell;
use judge::{Case, judge};
use site::Site;

#[test]
fn every_cell() -> Result<()> {
    let site = Site::start("matrix", &[("services.yaml", site::matrix())])?;
    let cases: Vec<_> = Cell::all().iter().map(|cell| Case::of(&site, cell)).collect();
    judge(&site, &cases).map(drop)
}
