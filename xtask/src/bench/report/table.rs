//! Markdown tables that read well on a terminal, too.

use std::fmt::Write as _;

/// A table, its columns lined up.
pub(super) struct Table(Vec<Vec<String>>);

impl Table {
    pub(super) fn new(head: &[&str]) -> Self {
        Self(vec![head.iter().map(|&h| h.into()).collect()])
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.0.push(cells);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.len() == 1
    }

    pub(super) fn render(&self, out: &mut String) {
        let columns = self.0[0].len();
        let width = |i: usize| self.0.iter().map(|row| row[i].chars().count()).max().unwrap_or_default();
        let widths: Vec<_> = (0..columns).map(width).collect();
        for (i, row) in self.0.iter().enumerate() {
            let cells = row.iter().zip(&widths).map(|(cell, &width)| format!(" {cell:<width$} |"));
            let _ = writeln!(out, "|{}", cells.collect::<String>());
            if i == 0 {
                let rule = widths.iter().map(|width| format!("{}|", "-".repeat(width + 2)));
                let _ = writeln!(out, "|{}", rule.collect::<String>());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up_in_any_script() {
        let mut table = Table::new(&["a", "µs"]);
        table.row(vec!["–".into(), "10.5".into()]);
        let mut out = String::new();
        table.render(&mut out);
        assert_eq!(out, "| a | µs   |\n|---|------|\n| – | 10.5 |\n");
    }
}
