//! Medians, spreads, and whether a difference is one.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// The middle of some figures, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Spread {
    pub(super) min: f64,
    /// A quarter lies below.
    pub(super) low: f64,
    pub(super) median: f64,
    /// A quarter lies above.
    pub(super) high: f64,
    pub(super) max: f64,
}

impl Spread {
    /// Of at least one figure.
    pub(super) fn of(values: &[f64]) -> Self {
        let at = |q| quantile(values, q);
        Self { min: at(0.0), low: at(0.25), median: at(0.5), high: at(0.75), max: at(1.0) }
    }

    /// Of one over each figure.
    pub(super) fn inverse(self) -> Self {
        Self {
            min: 1.0 / self.max,
            low: 1.0 / self.high,
            median: 1.0 / self.median,
            high: 1.0 / self.low,
            max: 1.0 / self.min,
        }
    }
}

/// The value below which the share `q` of the values lies; NaN of nothing.
pub(super) fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = q * sorted.len().saturating_sub(1) as f64;
    let (below, above) = (at.floor() as usize, at.ceil() as usize);
    match (sorted.get(below), sorted.get(above)) {
        (Some(a), Some(b)) => a + (b - a) * at.fract(),
        _ => f64::NAN,
    }
}

/// Nanoseconds, three digits exact.
#[derive(Clone, Debug)]
pub(super) struct Times(Histogram<u64>);

impl Times {
    pub(super) fn new() -> Self {
        // The only way to fail is a precision of more than five digits.
        Self(Histogram::new(3).unwrap_or_else(|_| unreachable!("three digits are possible")))
    }

    pub(super) fn of(samples: impl IntoIterator<Item = u32>) -> Self {
        let mut times = Self::new();
        samples.into_iter().for_each(|ns| times.0 += u64::from(ns));
        times
    }

    /// Microseconds below which half, nine in ten and 99 in a hundred lie; none of nothing.
    pub(super) fn quantiles(&self) -> Option<Quantiles> {
        let of = |q| self.quantile(q);
        (!self.0.is_empty()).then(|| Quantiles { p50: of(0.5), p90: of(0.9), p99: of(0.99) })
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.0 += &other.0;
    }

    /// Microseconds.
    pub(super) fn quantile(&self, q: f64) -> f64 {
        self.0.value_at_quantile(q) as f64 / 1000.0
    }
}

/// Of many times, in the unit that it says beside.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Quantiles {
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
}

/// Whether A is faster than B, from turns that were taken side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    Ahead,
    Even,
    Behind,
}

impl Verdict {
    /// From the ratios A/B of the turns. Ahead and behind only if three turns in four say so: what happens to both
    /// alike (another process, a slower clock) is no part of the ratio, what hits one turn alone is outvoted.
    pub(super) fn of(ratios: &[f64]) -> Self {
        if quantile(ratios, 0.75) < 1.0 {
            Self::Ahead
        } else if quantile(ratios, 0.25) > 1.0 {
            Self::Behind
        } else {
            Self::Even
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ahead => "ahead",
            Self::Even => "even",
            Self::Behind => "BEHIND",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_neighbours() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(quantile(&values, 0.0), 1.0);
        assert_eq!(quantile(&values, 0.5), 2.5);
        assert_eq!(quantile(&values, 1.0), 4.0);
        assert!(quantile(&[], 0.5).is_nan());
    }

    #[test]
    fn the_inverse_keeps_its_order() {
        let spread = Spread::of(&[1.0, 2.0, 4.0, 5.0, 10.0]).inverse();
        let expected = Spread { min: 0.1, low: 0.2, median: 0.25, high: 0.5, max: 1.0 };
        assert_eq!(spread, expected);
    }

    #[test]
    fn a_verdict_needs_three_turns_in_four() {
        assert_eq!(Verdict::of(&[0.9, 0.8, 0.9, 0.7, 1.5]), Verdict::Ahead);
        assert_eq!(Verdict::of(&[0.9, 1.1, 0.9, 1.2]), Verdict::Even);
        assert_eq!(Verdict::of(&[1.1, 1.2, 1.3, 0.9, 1.1]), Verdict::Behind);
    }

    #[test]
    fn times_are_microseconds() {
        let mut times = Times::of([1000, 2000, 3000]);
        times.add(&Times::of([2000, 2000]));
        let quantiles = times.quantiles().unwrap();
        assert!((quantiles.p50 - 2.0).abs() < 0.01 && (quantiles.p99 - 3.0).abs() < 0.01);
        assert!(Times::new().quantiles().is_none());
    }
}
