//! Sums over tensors in a fixed order: the same bits for any number of threads.
//!
//! Each segment of the work list is summed in eight `f64` lanes, element `i` into lane `i mod 8`;
//! the lanes, then the segments of a tensor, are added in order. Neither the number of threads nor
//! the width of the vector unit has a say.

use super::plan::{Plan, Segment};
use super::rule::Map;
use super::{Element, GradMap, Real};
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Device, Storage, StorageRef, Tensor};
use half::{bf16, f16};
use pulp::{Simd, WithSimd};

const LANES: usize = 8;

/// Sums over one tensor, for a parameter `p` and its mapped gradient `g'`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Moments {
    /// `<p, p>`; 0 without a parameter.
    pub pp: f64,
    /// `<p, g'>`; 0 without a parameter.
    pub pg: f64,
    /// `<g', g'>`.
    pub gg: f64,
    /// Entries of `g'` that are NaN or infinite.
    pub nonfinite: u64,
}

impl Moments {
    fn add(&mut self, other: &Self) {
        self.pp += other.pp;
        self.pg += other.pg;
        self.gg += other.gg;
        self.nonfinite += other.nonfinite;
    }
}

/// [`Moments`] of many (parameter, gradient, map) triples in one parallel pass over memory.
///
/// # Errors
/// [`Error::ShapeMismatch`] or [`Error::DTypeMismatch`] when a pair does not fit,
/// [`Error::InvalidArgument`] for a map that needs a parameter where there is none.
pub fn moments(items: &[(Option<&Tensor>, &Tensor, GradMap)]) -> Result<Vec<Moments>> {
    for (param, grad, map) in items {
        map.check()?;
        match param {
            Some(param) => check_pair(param, grad)?,
            None if map.along != 0.0 => {
                return Err(Error::invalid("along", map.along, "0 without a parameter"))
            }
            None => {}
        }
    }
    if items.iter().any(|(_, grad, _)| !grad.device().is_cpu()) {
        return items.iter().map(on_device).collect();
    }
    // Only tensors that are not contiguous are copied.
    let mut held = Vec::with_capacity(items.len());
    for (param, grad, map) in items {
        let param = param.map(Tensor::contiguous).transpose()?;
        held.push((param, grad.contiguous()?, *map));
    }
    let locked: Vec<Locked<'_>> = held.iter().map(Locked::new).collect();
    let plan = Plan::new(held.iter().map(|(_, grad, _)| grad.elem_count()));
    let partial = plan.map(|segment| locked[segment.tensor].sums(segment));
    let mut totals = vec![Moments::default(); items.len()];
    for (segment, sums) in plan.segments.iter().zip(&partial) {
        totals[segment.tensor].add(sums);
    }
    Ok(totals)
}

/// `<a, b>`, accumulated in `f64`.
///
/// # Errors
/// [`Error::ShapeMismatch`] or [`Error::DTypeMismatch`] when the tensors do not fit.
pub fn dot(a: &Tensor, b: &Tensor) -> Result<f64> {
    let all = moments(&[(Some(a), b, GradMap::default())])?;
    Ok(all.first().map_or(0.0, |m| m.pg))
}

/// `<a, a>`, accumulated in `f64`.
///
/// # Errors
/// [`Error::DTypeMismatch`] for integers.
pub fn sum_squares(a: &Tensor) -> Result<f64> {
    let all = moments(&[(None, a, GradMap::default())])?;
    Ok(all.first().map_or(0.0, |m| m.gg))
}

fn check_pair(param: &Tensor, grad: &Tensor) -> Result<()> {
    if param.dims() != grad.dims() {
        return Err(Error::ShapeMismatch {
            name: "second operand".into(),
            got: grad.dims().to_vec(),
            expected: param.dims().to_vec(),
        });
    }
    if param.dtype() != grad.dtype() {
        return Err(Error::DTypeMismatch {
            name: "second operand".into(),
            got: grad.dtype(),
            expected: format!("{:?}", param.dtype()),
        });
    }
    Ok(())
}

/// The same sums by tensor operations, where the data live on a device.
fn on_device((param, grad, map): &(Option<&Tensor>, &Tensor, GradMap)) -> Result<Moments> {
    // Half precision would overflow in the sums; f64 stays what it is.
    let dtype = match grad.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let sum = |x: Tensor| -> Result<f64> {
        let total = x.to_dtype(dtype)?.sum_all()?.to_device(&Device::Cpu)?;
        Ok(total.to_dtype(DType::F64)?.to_scalar::<f64>()?)
    };
    let mapped = map.apply(grad, param.unwrap_or(grad))?.to_dtype(dtype)?;
    // 0 x is 0 for finite x and NaN otherwise, and NaN differs from itself.
    let residue = mapped.affine(0.0, 0.0)?;
    let nonfinite = sum(residue.ne(&residue)?)? as u64;
    let (pp, pg) = match param {
        None => (0.0, 0.0),
        Some(param) => {
            let param = param.to_dtype(dtype)?;
            (sum(param.sqr()?)?, sum((param * &mapped)?)?)
        }
    };
    Ok(Moments {
        pp,
        pg,
        gg: sum(mapped.sqr()?)?,
        nonfinite,
    })
}

/// Read locks on one pair of tensors.
struct Locked<'a> {
    param: Option<(StorageRef<'a>, usize)>,
    grad: (StorageRef<'a>, usize),
    map: GradMap,
    dtype: DType,
}

impl<'a> Locked<'a> {
    fn new((param, grad, map): &'a (Option<Tensor>, Tensor, GradMap)) -> Self {
        let lock = |tensor: &'a Tensor| {
            let (storage, layout) = tensor.storage_and_layout();
            (storage, layout.start_offset())
        };
        Self {
            param: param.as_ref().map(lock),
            grad: lock(grad),
            map: *map,
            dtype: grad.dtype(),
        }
    }

    fn sums(&self, segment: &Segment) -> Moments {
        match self.dtype {
            DType::F32 => self.typed::<f32>(segment),
            DType::F64 => self.typed::<f64>(segment),
            DType::BF16 => self.typed::<bf16>(segment),
            _ => self.typed::<f16>(segment),
        }
        .unwrap_or(Moments {
            nonfinite: u64::MAX,
            ..Moments::default()
        })
    }

    fn typed<P: Element>(&self, segment: &Segment) -> Option<Moments> {
        let grad = slice::<P>(&self.grad, segment)?;
        let param = match &self.param {
            None => None,
            Some(param) => Some(slice::<P>(param, segment)?),
        };
        Some(pulp::Arch::new().dispatch(Sums {
            param,
            grad,
            map: Map::new(&self.map),
        }))
    }
}

fn slice<'s, P: Element>(
    (storage, offset): &'s (StorageRef<'_>, usize),
    segment: &Segment,
) -> Option<&'s [P]> {
    let cpu: &CpuStorage = match &**storage {
        Storage::Cpu(cpu) => cpu,
        _ => return None,
    };
    let start = offset + segment.start;
    P::slice(cpu)?.get(start..start + segment.len)
}

struct Sums<'a, P: Element> {
    param: Option<&'a [P]>,
    grad: &'a [P],
    map: Map<P::Compute>,
}

impl<P: Element> WithSimd for Sums<'_, P> {
    type Output = Moments;

    #[inline(always)]
    fn with_simd<V: Simd>(self, _: V) -> Moments {
        match self.param {
            Some(param) => lanes::<P, true>(param, self.grad, self.map),
            None => lanes::<P, false>(self.grad, self.grad, self.map),
        }
    }
}

#[inline(always)]
fn lanes<P: Element, const PAIR: bool>(param: &[P], grad: &[P], map: Map<P::Compute>) -> Moments {
    let (mut pp, mut pg, mut gg) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    let mut nonfinite = [0u32; LANES];
    let mut one = |lane: usize, p: P, g: P| {
        let p = p.load();
        // Without a parameter `along` is 0, and the gradient stands in for it.
        let g = map.apply(g.load(), p);
        nonfinite[lane] = nonfinite[lane].wrapping_add(u32::from(!g.is_finite()));
        let (p, g) = (p.to_f64(), g.to_f64());
        gg[lane] += g * g;
        if PAIR {
            pp[lane] += p * p;
            pg[lane] += p * g;
        }
    };
    let whole = grad.len() - grad.len() % LANES;
    for (p, g) in param[..whole]
        .chunks_exact(LANES)
        .zip(grad[..whole].chunks_exact(LANES))
    {
        for lane in 0..LANES {
            one(lane, p[lane], g[lane]);
        }
    }
    for (lane, (p, g)) in param[whole..].iter().zip(&grad[whole..]).enumerate() {
        one(lane, *p, *g);
    }
    let sum = |lanes: [f64; LANES]| lanes.iter().sum();
    Moments {
        pp: sum(pp),
        pg: sum(pg),
        gg: sum(gg),
        nonfinite: nonfinite.iter().map(|n| u64::from(*n)).sum(),
    }
}
