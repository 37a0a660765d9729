//! NaN from a network must not wander through all further steps, and looking for it must not make a
//! device wait.

use crate::error::{check, Error, Result};
use candle_core::{DType, Tensor};
use tensor_core::kernels::sum_squares;

/// When samplers and solvers look whether their samples are finite.
///
/// Every check leaves one number on the device; reading it back makes the host wait. However late they
/// are read, the error names the first step that was not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FiniteCheck {
    /// At every step on the CPU, where nothing waits; at the end elsewhere.
    #[default]
    Auto,
    /// After every so many steps, and at the end.
    Every(usize),
    /// At the end.
    AtEnd,
}

impl FiniteCheck {
    /// Checks the field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for an interval of 0.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Every(steps) => check::at_least_one("FiniteCheck::Every", *steps),
            Self::Auto | Self::AtEnd => Ok(()),
        }
    }

    fn every(self, x: &Tensor) -> usize {
        match self {
            Self::Every(steps) => steps,
            Self::Auto if x.device().is_cpu() => 1,
            Self::Auto | Self::AtEnd => usize::MAX,
        }
    }
}

/// The numbers that have not been read yet.
pub(crate) struct Watch {
    check: FiniteCheck,
    /// What was seen at which step, and a number that is 0 where it was finite.
    pending: Vec<(String, usize, Tensor)>,
}

impl Watch {
    pub(crate) fn new(check: FiniteCheck) -> Result<Self> {
        check.validate()?;
        Ok(Self {
            check,
            pending: Vec::new(),
        })
    }

    /// Looks at what a step made; reads the numbers where that is due.
    pub(crate) fn see(&mut self, x: &Tensor, step: usize, what: impl Fn() -> String) -> Result<()> {
        if x.elem_count() == 0 {
            return Ok(());
        }
        let every = self.check.every(x);
        if every == 1 {
            return finite(x, step, what);
        }
        // 0 times infinity is NaN, like 0 times NaN; nothing overflows.
        let mark = x.detach().affine(0.0, 0.0)?.sum_all()?;
        self.pending.push((what(), step, mark));
        match (step + 1).is_multiple_of(every) {
            true => self.finish(),
            false => Ok(()),
        }
    }

    /// Reads all numbers that are left.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        if pending.is_empty() {
            return Ok(());
        }
        let marks: Vec<&Tensor> = pending.iter().map(|(_, _, mark)| mark).collect();
        let marks = Tensor::stack(&marks, 0)?.to_dtype(DType::F64)?;
        let marks = marks.to_vec1::<f64>()?;
        match pending.into_iter().zip(marks).find(|(_, m)| m.is_nan()) {
            Some(((what, step, _), _)) => Err(Error::NonFinite { what, step }),
            None => Ok(()),
        }
    }
}

/// One pass over the sample, read at once.
pub(crate) fn finite(x: &Tensor, step: usize, what: impl Fn() -> String) -> Result<()> {
    if x.elem_count() == 0 || sum_squares(x)?.is_finite() {
        return Ok(());
    }
    Err(Error::NonFinite { what: what(), step })
}

/// The name of a type without the paths of its modules: `Interval<Apg>`.
pub(crate) fn type_name<T: ?Sized>() -> String {
    let mut name = String::new();
    for part in std::any::type_name::<T>().split_inclusive(|c: char| "<>,&() ".contains(c)) {
        name.push_str(part.rsplit("::").next().unwrap_or(part));
    }
    name.trim_start_matches("&mut ")
        .trim_start_matches('&')
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn names_have_no_paths() {
        assert_eq!(type_name::<crate::Ddim>(), "Ddim");
        assert_eq!(type_name::<&mut crate::Euler>(), "Euler");
        let nested = type_name::<crate::DpmSolverPP2S<crate::schedule::VpSde>>();
        assert_eq!(nested, "DpmSolverPP2S<VpSde>");
    }

    /// Read late or at once, the first bad step is named; large numbers are no infinity.
    #[test]
    fn late_reading_names_the_first_bad_step() {
        let at = |value: f32| Tensor::full(value, (2, 3), &Device::Cpu);
        for check in [
            FiniteCheck::AtEnd,
            FiniteCheck::Every(4),
            FiniteCheck::Every(100),
        ] {
            let mut watch = Watch::new(check).unwrap();
            for step in 0..3 {
                watch
                    .see(&at(1e30).unwrap(), step, || "fine".into())
                    .unwrap();
            }
            let mut failed = None;
            for step in 3..6 {
                let bad = at(if step == 4 { f32::INFINITY } else { f32::NAN }).unwrap();
                failed = failed.or(watch.see(&bad, step, || format!("{step}")).err());
            }
            let error = failed.or(watch.finish().err()).unwrap();
            assert!(matches!(error, Error::NonFinite { what, step: 3 } if what == "3"));
        }
        assert!(Watch::new(FiniteCheck::Every(0)).is_err());
        let mut watch = Watch::new(FiniteCheck::Auto).unwrap();
        assert!(watch.see(&at(f32::NAN).unwrap(), 0, || "x".into()).is_err());
    }
}
