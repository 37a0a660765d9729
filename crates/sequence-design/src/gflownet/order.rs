//! Losses that know nothing but an order on the objects.
//!
//! The learned log reward `l(x)` is solved from the base loss' condition at the end (see
//! [`trajectory_log_reward`](super::loss::trajectory_log_reward) and its neighbours). A set `X` of
//! objects has the target "uniform over the maximal elements of `X`", and the loss is the cross
//! entropy of `softmax_X l` against it: on pairs of a total order, on the whole batch for Pareto
//! dominance.

use crate::{Error, Result};
use candle_core::Tensor;
use nn::activation::Activation;
use std::cmp::Ordering;

/// Orders of `scores[i]` against `scores[perm[i]]`, higher being better; equal where the difference
/// is below 1e-6 of the range. NaN is the worst of all.
pub fn compare_pairs(scores: &[f64], perm: &[u32]) -> Vec<Ordering> {
    let finite = || scores.iter().copied().filter(|s| s.is_finite());
    let range = finite().fold(f64::NEG_INFINITY, f64::max) - finite().fold(f64::INFINITY, f64::min);
    let tie = if range.is_finite() { 1e-6 * range } else { 0.0 };
    let rank = |s: f64| if s.is_nan() { f64::NEG_INFINITY } else { s };
    let compare = |(a, j): (&f64, &u32)| {
        let (a, b) = (rank(*a), rank(scores[*j as usize]));
        match a == b || (a - b).abs() < tie {
            true => Ordering::Equal,
            false => a.total_cmp(&b),
        }
    };
    scores.iter().zip(perm).map(compare).collect()
}

/// Mean over `i` of the cross entropy of `softmax(l_i, l_perm(i))` against `(1, 0)`, `(0, 1)` or,
/// for a tie, `(1/2, 1/2)`.
///
/// Beyond `max_gap` in the right direction a pair is satisfied and has no gradient: without it the
/// gaps grow for ever. Adding a constant to `l` changes nothing.
///
/// # Errors
/// [`Error::Shape`] when the lists do not have the length of `l` `[B]`.
pub fn pair_order_loss(
    l: &Tensor,
    perm: &[u32],
    orders: &[Ordering],
    max_gap: Option<f64>,
) -> Result<Tensor> {
    let b = l.dims1()?;
    if perm.len() != b || orders.len() != b {
        let got = [perm.len(), orders.len()];
        return Err(Error::shape(
            "permutation and orders",
            &got,
            format!("[{b}]"),
        ));
    }
    let perm = Tensor::from_slice(perm, b, l.device())?;
    let difference = (l - l.index_select(&perm, 0)?)?;
    // -log softmax of the first is softplus(-d); each order weighs the two sides.
    let side = |sign: f64, right: Ordering| -> Result<Tensor> {
        let weight = |o: &Ordering| match *o {
            Ordering::Equal => 0.5,
            other => f64::from(u8::from(other == right)),
        };
        let weights: Vec<f64> = orders.iter().map(weight).collect();
        let weights = Tensor::from_vec(weights, b, l.device())?.to_dtype(l.dtype())?;
        let mut towards = difference.affine(sign, 0.0)?;
        if let Some(gap) = max_gap {
            towards = towards.minimum(gap)?;
        }
        let losses = Activation::Softplus.of(&towards.neg()?)?;
        Ok((losses * weights)?)
    };
    let sum = (side(1.0, Ordering::Greater)? + side(-1.0, Ordering::Less)?)?;
    Ok(sum.mean_all()?)
}

/// Cross entropy of `softmax l` over the whole set against "uniform over the maximal elements".
///
/// # Errors
/// [`Error::Shape`] for a mask of another length, [`Error::InvalidArgument`] without a maximal
/// element.
pub fn set_order_loss(l: &Tensor, maximal: &[bool]) -> Result<Tensor> {
    let b = l.dims1()?;
    if maximal.len() != b {
        return Err(Error::shape("maximal", &[maximal.len()], format!("[{b}]")));
    }
    let count = maximal.iter().filter(|m| **m).count();
    if count == 0 {
        return Err(Error::argument("maximal", 0, "at least one element"));
    }
    let target: Vec<f64> = maximal
        .iter()
        .map(|m| -f64::from(u8::from(*m)) / count as f64)
        .collect();
    let target = Tensor::from_vec(target, b, l.device())?.to_dtype(l.dtype())?;
    let log_p = nn::softmax::log_softmax(l, 0)?;
    Ok((log_p * target)?.sum_all()?)
}

/// Binary cross entropy of `sigmoid(l)` against "is maximal", mean over the set. Unlike the others
/// it fixes the constant in `l`.
///
/// # Errors
/// As [`set_order_loss`].
pub fn binary_order_loss(l: &Tensor, maximal: &[bool]) -> Result<Tensor> {
    let b = l.dims1()?;
    if maximal.len() != b {
        return Err(Error::shape("maximal", &[maximal.len()], format!("[{b}]")));
    }
    let signs: Vec<f64> = maximal
        .iter()
        .map(|m| if *m { -1.0 } else { 1.0 })
        .collect();
    let signs = Tensor::from_vec(signs, b, l.device())?.to_dtype(l.dtype())?;
    Ok(Activation::Softplus.of(&(l * signs)?)?.mean_all()?)
}
