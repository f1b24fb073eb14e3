//! Prometheus' text format, as far as names and labels go.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use promql_parser::parser::{self, Expr};

/// Of each series' name the labels, and their values.
pub(crate) struct Exported(pub(crate) BTreeMap<String, BTreeMap<String, BTreeSet<String>>>);

impl Exported {
    /// Reads what an exporter answers. Series of one name have the same labels.
    pub(crate) fn parse(body: &str) -> Result<Self> {
        let mut all: BTreeMap<String, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
        for line in body.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
            let (series, value) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
            value.parse::<f64>().with_context(|| line.to_owned())?;
            // A series with all of its labels is an expression, too.
            let Ok(Expr::VectorSelector(series)) = parser::parse(series) else {
                anyhow::bail!("no series: {line}")
            };
            let name = series.name.with_context(|| line.to_owned())?;
            let new = !all.contains_key(&name);
            let labels = all.entry(name).or_default();
            for label in &series.matchers.matchers {
                ensure!(new || labels.contains_key(&label.name), "{line}: others have no {}", label.name);
                labels.entry(label.name.clone()).or_default().insert(label.value.clone());
            }
            ensure!(labels.len() == series.matchers.matchers.len(), "{line}: others have more labels");
        }
        Ok(Self(all))
    }
}
