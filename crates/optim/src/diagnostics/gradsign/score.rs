//! The score and its companions.

use super::counter::SignCounter;
use super::tape::SignTape;
use crate::error::check;
use crate::{Error, Result};
use candle_core::{DType, Tensor, Var};
use tensor_core::kernels::{dot, sum_squares};

/// How the columns' agreement becomes one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SignReduction {
    /// Their sum: the paper's algorithm, in which larger models score higher.
    #[default]
    Sum,
    /// Their mean.
    Mean,
}

/// Which parameters count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ParamSelect {
    /// Those with at least two dimensions: the weights of linear layers and convolutions, without
    /// biases and norms, as in the published numbers.
    #[default]
    LinearAndConvWeights,
    /// All.
    All,
}

/// How the signs of the examples are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Method {
    /// Factored where a tape has all counted parameters, otherwise per example.
    #[default]
    Auto,
    /// A forward and a backward pass for every example alone.
    PerExample,
    /// One backward pass over the batch, through the layers of a [`SignTape`].
    Factored,
}

/// Settings of [`gradsign`].
#[derive(Debug, Clone)]
pub struct GradSignConfig {
    /// How columns are combined.
    pub reduction: SignReduction,
    /// Which parameters count.
    pub params: ParamSelect,
    /// How the signs are found.
    pub method: Method,
    /// Leave out parameters with a NaN among their examples' gradients, and count them; otherwise
    /// they are an error.
    pub skip_nan: bool,
    /// Examples of one forward and backward pass in the factored form. `None`: all for inputs
    /// `[n, features]`, and 16 for images and sequences, whose activations then stay in the cache.
    pub chunk: Option<usize>,
    /// The tape that the network's layers were made by.
    pub tape: Option<SignTape>,
}

impl Default for GradSignConfig {
    fn default() -> Self {
        Self {
            reduction: SignReduction::Sum,
            params: ParamSelect::LinearAndConvWeights,
            method: Method::Auto,
            skip_nan: true,
            chunk: None,
            tape: None,
        }
    }
}

/// What [`gradsign`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct GradSignReport {
    /// `tau`, or its mean per parameter.
    pub score: f64,
    /// `tau / (n m)`, in `[0, 1]`.
    pub agreement: f64,
    /// Parameters that count (`m`).
    pub params: usize,
    /// Multiplications of a forward pass over one example; known for the factored form only.
    pub multiplications: Option<u64>,
    /// `tau` of each tensor by name.
    pub per_tensor: Vec<(String, f64)>,
    /// Parameters left out because of a NaN.
    pub nan_params: usize,
}

/// Examples of a pass over images or sequences.
const IMAGES: usize = 16;

/// The GradSign score of a network: `model` maps inputs `[n, ..]` to outputs, `loss` outputs and
/// targets to the mean (or summed) loss, one element. `params` are the network's variables.
///
/// # Errors
/// [`Error::Shape`] when inputs and targets do not have the same number of examples, or none;
/// [`Error::InvalidArgument`] when no parameter counts, or [`Method::Factored`] has no tape that
/// covers them; [`Error::NonFiniteGradient`] for a NaN unless
/// [`skip_nan`](GradSignConfig::skip_nan); those of model and loss.
pub fn gradsign<M, L>(
    model: M,
    params: &[(String, Var)],
    x: &Tensor,
    y: &Tensor,
    loss: L,
    config: &GradSignConfig,
) -> Result<GradSignReport>
where
    M: Fn(&Tensor) -> candle_core::Result<Tensor>,
    L: Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
{
    if let Some(chunk) = config.chunk {
        check::at_least_one("GradSignConfig::chunk", chunk)?;
    }
    let n = examples(x, y)?;
    let counts = |(_, var): &&(String, Var)| match config.params {
        ParamSelect::All => true,
        ParamSelect::LinearAndConvWeights => var.rank() >= 2,
    };
    let chosen: Vec<(String, Var)> = params.iter().filter(counts).cloned().collect();
    if chosen.is_empty() {
        let expected = "at least one that counts";
        return Err(Error::argument("params", params.len(), expected));
    }
    let tape = covering(&chosen, config)?;
    let mut counter = SignCounter::for_params(&chosen);
    let mut multiplications = None;
    match tape {
        Some(tape) => {
            let chunk = match (config.chunk, x.rank()) {
                (Some(chunk), _) => chunk,
                (None, 0..=2) => n,
                (None, _) => IMAGES,
            };
            for from in (0..n).step_by(chunk) {
                let count = chunk.min(n - from);
                let (x, y) = (x.narrow(0, from, count)?, y.narrow(0, from, count)?);
                tape.start();
                let counted = factored(tape, &mut counter, &chosen, || Ok(loss(&model(&x)?, &y)?));
                multiplications = Some(tape.multiplications(count));
                tape.stop();
                counted?;
            }
            counter.set_examples(n);
        }
        None => {
            for i in 0..n {
                let out = model(&x.narrow(0, i, 1)?)?;
                let grads = loss(&out, &y.narrow(0, i, 1)?)?.backward()?;
                counter.push(&chosen, &grads)?;
            }
        }
    }
    if !config.skip_nan && counter.nan_params() > 0 {
        return Err(Error::NonFiniteGradient(counter.spoiled()));
    }
    let m: usize = chosen.iter().map(|(_, var)| var.elem_count()).sum();
    Ok(GradSignReport {
        score: counter.score(config.reduction),
        agreement: counter.score(SignReduction::Sum) / (n as f64 * m as f64),
        params: m,
        multiplications,
        per_tensor: counter.per_tensor(),
        nan_params: counter.nan_params(),
    })
}

/// The tape by which the chosen parameters' signs are found, if it is.
fn covering<'a>(
    chosen: &[(String, Var)],
    config: &'a GradSignConfig,
) -> Result<Option<&'a SignTape>> {
    let tape = match (config.method, &config.tape) {
        (Method::PerExample, _) | (Method::Auto, None) => return Ok(None),
        (Method::Factored, None) => {
            let expected = "a tape beside it (GradSignConfig::tape)";
            return Err(Error::argument("method", config.method, expected));
        }
        (_, Some(tape)) => tape,
    };
    let outside = chosen.iter().find(|(_, var)| !tape.covers(var));
    match (outside, config.method) {
        (None, _) => Ok(Some(tape)),
        (Some((name, _)), Method::Factored) => {
            let expected = format!("`{name}` in a layer of the tape");
            Err(Error::argument("method", config.method, expected))
        }
        (Some(_), _) => Ok(None),
    }
}

fn factored(
    tape: &SignTape,
    counter: &mut SignCounter,
    chosen: &[(String, Var)],
    forward: impl FnOnce() -> Result<Tensor>,
) -> Result<()> {
    let grads = forward()?.backward()?;
    for (i, (_, var)) in chosen.iter().enumerate() {
        // A weight that was not called counts as zeros.
        if let Some(signs) = tape.signs(var, &grads)? {
            counter.merge(i, &signs);
        }
    }
    Ok(())
}

fn examples(x: &Tensor, y: &Tensor) -> Result<usize> {
    let (n, targets) = (x.dims().first(), y.dims().first());
    match (n, targets) {
        (Some(n), Some(m)) if n == m && *n > 0 => Ok(*n),
        _ => {
            let expected = format!("as many examples as the inputs {:?}, at least 1", x.dims());
            Err(Error::shape("targets", y.dims(), expected))
        }
    }
}

/// Euclidean norm of the batch gradient over all parameters: a baseline score.
///
/// # Errors
/// Those of candle.
pub fn grad_norm(loss: &Tensor, params: &[(String, Var)]) -> Result<f64> {
    let grads = loss.backward()?;
    let mut squares = 0.0;
    for (_, var) in params {
        if let Some(grad) = grads.get(var) {
            squares += sum_squares(grad)?;
        }
    }
    Ok(squares.sqrt())
}

/// Mean cosine between the examples' gradients and their mean; `loss(i)` is the loss of example `i`
/// alone. Holds one mean gradient, and passes over the examples twice. Zero gradients count as a
/// cosine of 0.
///
/// # Errors
/// [`Error::TooFew`] for no examples; those of `loss`.
pub fn grad_angle(
    mut loss: impl FnMut(usize) -> candle_core::Result<Tensor>,
    n: usize,
    params: &[(String, Var)],
) -> Result<f64> {
    if n == 0 {
        return Err(Error::TooFew {
            what: "a mean gradient",
            of: "examples",
            needed: 1,
            got: 0,
        });
    }
    let mut mean: Vec<Tensor> = Vec::new();
    for i in 0..n {
        let own = gradients(&loss(i)?, params)?;
        mean = match mean.is_empty() {
            true => own,
            false => {
                let pairs = mean.iter().zip(&own);
                pairs
                    .map(|(a, b)| a + b)
                    .collect::<candle_core::Result<_>>()?
            }
        };
    }
    let norm = |x: &[Tensor]| -> Result<f64> {
        let squares: Result<Vec<f64>> = x.iter().map(|x| Ok(sum_squares(x)?)).collect();
        Ok(squares?.iter().sum::<f64>().sqrt())
    };
    let length = norm(&mean)?;
    let mut total = 0.0;
    for i in 0..n {
        let own = gradients(&loss(i)?, params)?;
        let mut inner = 0.0;
        for (a, b) in own.iter().zip(&mean) {
            inner += dot(a, b)?;
        }
        let product = norm(&own)? * length;
        if product > 0.0 {
            total += inner / product;
        }
    }
    Ok(total / n as f64)
}

fn gradients(loss: &Tensor, params: &[(String, Var)]) -> Result<Vec<Tensor>> {
    let grads = loss.backward()?;
    let one = |(_, var): &(String, Var)| match grads.get(var) {
        Some(grad) => Ok(grad.detach()),
        None => Ok(var.zeros_like()?),
    };
    params.iter().map(one).collect()
}

/// SynFlow: `sum_k |w_k dR/dw_k|` with all weights replaced by their absolute values and `R` the
/// sum of the outputs for an input of ones, of the shape `input` (`[1, ..]`). Needs no data. The
/// variables have the same bits afterwards.
///
/// # Errors
/// Those of the model.
pub fn synflow(
    model: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    params: &[(String, Var)],
    input: &[usize],
) -> Result<f64> {
    let Some((_, first)) = params.first() else {
        return Err(Error::argument("params", 0, "at least one variable"));
    };
    let ones = Tensor::ones(input, first.dtype(), first.device())?;
    let mut saved = Vec::with_capacity(params.len());
    for (_, var) in params {
        saved.push(var.as_tensor().detach().copy()?);
    }
    let linear = || -> Result<f64> {
        for ((_, var), value) in params.iter().zip(&saved) {
            var.set(&value.abs()?)?;
        }
        let grads = model(&ones)?.sum_all()?.backward()?;
        let mut total = 0.0;
        for (_, var) in params {
            if let Some(grad) = grads.get(var) {
                let product = (grad.detach() * var.as_detached_tensor())?;
                let sum = product.abs()?.sum_all()?.to_dtype(DType::F64)?;
                total += sum.to_scalar::<f64>()?;
            }
        }
        Ok(total)
    };
    let score = linear();
    for ((_, var), value) in params.iter().zip(&saved) {
        var.set(value)?;
    }
    score
}
