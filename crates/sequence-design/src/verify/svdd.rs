//! The reference of `svdd`: the runs over tokens. The Gaussian run belongs to `thalweg-guidance`.

use super::drakes::{model, reward_parts, Convolution};
use crate::masked_diffusion::MaskedDiffusion;
use crate::svdd::{MaskedKernel, Tokens};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use guidance::svdd::{PosteriorMeanValue, ReverseKernel, Svdd, SvddOutput, Value};
use tensor_core::random::RandomStream;
use tensor_core::verify::{Array, Reference, Tolerance};

/// A kernel that takes its uniform numbers from the file: `[S, M, B, L, K + 1]`.
struct Given<'a> {
    kernel: MaskedKernel<'a, Convolution>,
    uniforms: Array,
}

impl ReverseKernel for Given<'_> {
    type State = Tokens;

    fn steps(&self) -> usize {
        self.kernel.steps()
    }

    fn init(&self, streams: &mut [RandomStream]) -> guidance::Result<Tokens> {
        self.kernel.init(streams)
    }

    fn propose(
        &self,
        x: &Tokens,
        step: usize,
        m: usize,
        _: &mut [RandomStream],
    ) -> guidance::Result<Tokens> {
        let (given, b) = (self.uniforms.shape[1], self.uniforms.shape[2]);
        let per_row: usize = self.uniforms.shape[3..].iter().product();
        let values = &self.uniforms.values;
        let of_row = |row: usize| {
            move |candidate: usize, u: &mut [f64]| {
                let at = ((step * given + candidate) * b + row) * per_row;
                u.copy_from_slice(&values[at..at + per_row]);
            }
        };
        let draws = (0..b).map(of_row).collect();
        let proposed = self.kernel.propose_with(x, step, m, draws);
        proposed.map_err(|e| candle_core::Error::wrap(e).into())
    }

    fn predict_clean(&self, x: &Tokens, done: usize) -> guidance::Result<Tokens> {
        self.kernel.predict_clean(x, done)
    }

    fn finish(&self, x: Tokens) -> guidance::Result<Tokens> {
        self.kernel.finish(x)
    }
}

/// Checks both runs over tokens of every case (a prefix before `u_gumbel`), greedy and at the file's
/// temperature.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn svdd(reference: &mut Reference) -> Result<()> {
    for prefix in reference.cases("u_gumbel") {
        case(reference, &prefix)?;
    }
    Ok(())
}

fn case(reference: &mut Reference, prefix: &str) -> Result<()> {
    let name = |part: &str| format!("{prefix}{part}");
    let net = Convolution::read(reference, &name("conv_weight"), &name("conv_bias"))?;
    let model = model(reference, net)?;
    let mut input =
        |part: &str| -> Result<Tensor> { Ok(reference.input(&name(part))?.tensor(DType::F64)?) };
    let (lin, pair) = (input("reward_lin")?, input("reward_pair")?);
    let (value_lin, value_bias) = (input("value_lin")?, input("value_bias")?);
    let vocab = model.vocab;
    let hot = |x: &Tokens| -> guidance::Result<Tensor> {
        let hot = x.padded(vocab, DType::F64, &Device::Cpu);
        hot.map_err(|e| candle_core::Error::wrap(e).into())
    };
    let learned = |x: &Tokens, _: usize| -> guidance::Result<Tensor> {
        let e = hot(x)?;
        let linear = e.broadcast_mul(&value_lin)?.sum(2)?.sum(1)?;
        let wave = e.sum(2)?.sum(1)?.sin()?.affine(0.3, 0.0)?;
        Ok((linear.broadcast_add(&value_bias)? + wave)?)
    };
    let reward = |x: &Tokens| -> guidance::Result<Tensor> {
        let parts = reward_parts(&hot(x)?, &lin, &pair);
        let (linear, neighbors) =
            parts.map_err(|e| guidance::Error::from(candle_core::Error::wrap(e)))?;
        Ok((linear + neighbors)?)
    };
    let uniforms = reference.input(&name("u_gumbel"))?;
    let select = reference.input(&name("u_select"))?;
    for (run, kind) in ["mc", "pm"].into_iter().enumerate() {
        let uniforms = uniforms.row(run)?;
        let [steps, m, b, l, _] = uniforms.shape[..] else {
            return Err(reference
                .bad("`u_gumbel` is not [2, S, M, B, L, K + 1]")
                .into());
        };
        let kernel = Given {
            kernel: MaskedKernel::new(&model, l, steps)?,
            uniforms,
        };
        let mean = PosteriorMeanValue::new(&kernel, &reward);
        let value: &dyn Value<Tokens> = if run == 0 { &learned } else { &mean };
        let select = select.row(run)?;
        let select = select.values.chunks(b).map(<[f64]>::to_vec).collect();
        for tempered in [false, true] {
            let alpha = if tempered {
                reference.number("alpha")?
            } else {
                0.0
            };
            let out = Svdd::new(&kernel, value)
                .duplicates(m)
                .alpha(alpha)
                .given_uniforms(Clone::clone(&select))
                .record(true)
                .sample(b, &RandomStream::new(0))?;
            compare(
                reference,
                (&name(kind), tempered),
                &model,
                &kernel,
                value,
                out,
            )?;
        }
    }
    Ok(())
}

fn compare(
    reference: &mut Reference,
    (name, tempered): (&str, bool),
    model: &MaskedDiffusion<Convolution>,
    kernel: &Given<'_>,
    value: &dyn Value<Tokens>,
    out: SvddOutput<Tokens>,
) -> Result<()> {
    let (exact, near) = (Tolerance::Mismatches(0), Tolerance::Absolute(1e-9));
    let history = out.history.unwrap_or_default();
    let states: Result<Vec<Tensor>> = history.iter().map(|s| s.tensor(&Device::Cpu)).collect();
    let states = states?;
    let all = Tensor::stack(&states, 0)?;
    if tempered {
        let index: Vec<f64> = out
            .selected_index
            .concat()
            .into_iter()
            .map(f64::from)
            .collect();
        let mut values = out.values.concat();
        if values.is_empty() {
            // A single candidate is not valued on the way.
            for (done, state) in history.iter().enumerate().skip(1) {
                values.extend(
                    value
                        .value(state, done)?
                        .to_dtype(DType::F64)?
                        .to_vec1::<f64>()?,
                );
            }
        }
        reference.compare_tensor(&format!("{name}_states_alpha"), &all, exact)?;
        reference.compare(&format!("{name}_values_alpha"), &values, near)?;
        reference.compare(&format!("{name}_index_alpha"), &index, exact)?;
        return Ok(());
    }
    reference.compare_tensor(&format!("{name}_states"), &all, exact)?;
    let laws: Result<Vec<Tensor>> = kernel
        .kernel
        .grid()
        .iter()
        .zip(&states)
        .map(|(step, x)| model.next_law(x, step))
        .collect();
    reference.compare_tensor(&format!("{name}_q"), &Tensor::stack(&laws?, 0)?, near)?;
    let last = out.states.tensor(&Device::Cpu)?;
    Ok(reference.compare_tensor(&format!("{name}_final"), &last, exact)?)
}
