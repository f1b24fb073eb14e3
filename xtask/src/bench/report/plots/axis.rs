//! From values to pixels.

/// Straight or by powers of ten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    Linear,
    Log,
}

/// A range of values along a range of pixels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    scale: Scale,
    values: (f64, f64),
    pixels: (f64, f64),
}

impl Axis {
    /// From zero, with some room at the end.
    pub(super) fn from_zero(most: f64, pixels: (f64, f64)) -> Self {
        Self { scale: Scale::Linear, values: (0.0, most * 1.05), pixels }
    }

    /// Around positive values, with room at both ends: powers of ten if they are far apart or it is `log` anyway.
    pub(super) fn around(values: impl Iterator<Item = f64>, log: bool, pixels: (f64, f64)) -> Self {
        let (low, high) = values.fold((f64::INFINITY, 0.0_f64), |(low, high), v| (low.min(v), high.max(v)));
        let (low, high) = if low.is_finite() && high > 0.0 { (low, high) } else { (1.0, 1.0) };
        if !log && high < 4.0 * low {
            return Self::from_zero(high, pixels);
        }
        let room = (high / low).max(2.0).powf(0.06);
        Self { scale: Scale::Log, values: (low / room, high * room), pixels }
    }

    pub(super) fn at(&self, value: f64) -> f64 {
        let ((from, to), (start, end)) = (self.values, self.pixels);
        let share = match self.scale {
            Scale::Linear => (value - from) / (to - from),
            Scale::Log => (value / from).ln() / (to / from).ln(),
        };
        start + share * (end - start)
    }

    /// Round values along it.
    pub(super) fn ticks(&self) -> Vec<f64> {
        let (from, to) = self.values;
        let decade = |v: f64| 10_f64.powf(v.log10().floor());
        let inside =
            |values: Vec<f64>| values.into_iter().filter(|&v| v >= from && v <= to).collect::<Vec<_>>();
        match self.scale {
            Scale::Linear => {
                let rough = (to - from) / 5.0;
                let power = decade(rough);
                let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|m| m * power);
                let step = step.into_iter().find(|&s| s >= rough).unwrap_or(power);
                (0..12)
                    .map(|i| (from / step).ceil() * step + f64::from(i) * step)
                    .filter(|&v| v <= to)
                    .collect()
            }
            Scale::Log => {
                let powers =
                    || std::iter::successors(Some(decade(from)), |v| Some(v * 10.0)).take_while(|&v| v <= to);
                let plain = inside(powers().collect());
                if plain.len() >= 3 {
                    return plain;
                }
                inside(powers().flat_map(|p| [1.0, 2.0, 5.0].map(|m| m * p)).collect())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_far_apart_are_shown_by_powers_of_ten() {
        let axis = Axis::around([1.0, 30_000.0].into_iter(), false, (0.0, 100.0));
        assert_eq!(axis.scale, Scale::Log);
        assert_eq!(axis.ticks(), [1.0, 10.0, 100.0, 1000.0, 10_000.0]);
        assert!(axis.at(1.0) > 0.0 && axis.at(30_000.0) < 100.0);
        assert!((axis.at(100.0) - axis.at(10.0) - (axis.at(10.0) - axis.at(1.0))).abs() < 1e-9);
        let near = Axis::around([35.0, 80.0].into_iter(), false, (100.0, 0.0));
        assert_eq!((near.scale, near.at(0.0)), (Scale::Linear, 100.0));
        assert_eq!(near.ticks(), [0.0, 20.0, 40.0, 60.0, 80.0]);
    }

    #[test]
    fn few_powers_get_company() {
        let axis = Axis::around([30.0, 300.0].into_iter(), true, (0.0, 1.0));
        assert_eq!(axis.ticks(), [50.0, 100.0, 200.0]);
    }
}
