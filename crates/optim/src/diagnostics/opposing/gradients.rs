//! Do the gradients of the two groups oppose each other?

use super::detect::{median, OpposingPair};
use crate::{Error, Result};
use candle_core::{Tensor, Var};
use tensor_core::kernels::{dot, sum_squares};

/// The gradients of two groups, compared.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupGradReport {
    /// Cosine of the groups' mean gradients; NaN where one is zero.
    pub cos: f64,
    /// Norms of the groups' mean gradients, relative to the median norm of single examples.
    pub norm_ratio: (f64, f64),
    /// `|<v, G>| / |G|` with a given direction `v` of norm 1, for the groups and for the mean of all
    /// `reference` examples.
    pub eig_alignment: Option<(f64, f64, f64)>,
}

/// Compares the groups' mean gradients at the present parameters. `loss(examples)` is the mean loss
/// over those examples; `reference` are the examples whose single gradients the norms are measured
/// by (all of the data, or a sample), one backward pass for each; `direction` is a tensor for each
/// variable, such as the top eigenvector of [`loss_sharpness`](super::loss_sharpness).
///
/// Measure in the valley before the spike ([`OpposingPair::valley_row`]): at the spike both groups
/// may pull the same way.
///
/// # Errors
/// [`Error::TooFew`] for no variables or reference examples; [`Error::Shape`] for a direction that
/// does not fit; [`tensor_core::Error::LostGradient`] when a variable gets no gradient; those of
/// `loss`.
pub fn group_gradients(
    mut loss: impl FnMut(&[usize]) -> candle_core::Result<Tensor>,
    vars: &[(String, Var)],
    pair: &OpposingPair,
    reference: &[usize],
    direction: Option<&[Tensor]>,
) -> Result<GroupGradReport> {
    for (of, got) in [
        ("variables", vars.len()),
        ("reference examples", reference.len()),
    ] {
        if got == 0 {
            return Err(Error::TooFew {
                what: "group gradients",
                of,
                needed: 1,
                got,
            });
        }
    }
    let mut gradient = |examples: &[usize]| gradient_of(&loss(examples)?, vars);
    let (up, down) = (gradient(&pair.up)?, gradient(&pair.down)?);
    let mut norms = Vec::with_capacity(reference.len());
    for i in reference {
        norms.push(norm(&gradient(&[*i])?)?);
    }
    let unit = median(&norms);
    let (up_norm, down_norm) = (norm(&up)?, norm(&down)?);
    let eig_alignment = match direction {
        None => None,
        Some(v) => {
            let all = gradient(reference)?;
            let along = |g: &[Tensor]| Ok::<_, Error>(inner(g, v)?.abs() / norm(g)?);
            Some((along(&up)?, along(&down)?, along(&all)?))
        }
    };
    Ok(GroupGradReport {
        cos: inner(&up, &down)? / (up_norm * down_norm),
        norm_ratio: (up_norm / unit, down_norm / unit),
        eig_alignment,
    })
}

fn gradient_of(loss: &Tensor, vars: &[(String, Var)]) -> Result<Vec<Tensor>> {
    let grads = loss.backward()?;
    let lost = |(name, var): &(String, Var)| grads.get(var).is_none().then(|| name.clone());
    let lost: Vec<String> = vars.iter().filter_map(lost).collect();
    if !lost.is_empty() {
        return Err(tensor_core::Error::LostGradient(lost).into());
    }
    let own = vars.iter().filter_map(|(_, var)| grads.get(var));
    Ok(own.map(Tensor::detach).collect())
}

fn norm(g: &[Tensor]) -> Result<f64> {
    let mut squares = 0.0;
    for g in g {
        squares += sum_squares(g)?;
    }
    Ok(squares.sqrt())
}

fn inner(a: &[Tensor], b: &[Tensor]) -> Result<f64> {
    if a.len() != b.len() {
        let expected = format!("{} tensors", a.len());
        return Err(Error::shape("direction", &[b.len()], expected));
    }
    let mut sum = 0.0;
    for (a, b) in a.iter().zip(b) {
        if a.dims() != b.dims() {
            return Err(Error::shape(
                "direction",
                b.dims(),
                format!("{:?}", a.dims()),
            ));
        }
        sum += dot(a, b)?;
    }
    Ok(sum)
}
