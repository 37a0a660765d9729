//! The reference of `bib`: a fitted table, first gradients and whole runs of designs.

use crate::bidirectional::{
    AdaptiveEta, Bidirectional, DesignConfig, DesignReport, Encoding, Eta, Gamma, LinearHead, Mode,
    OfflineTable, RidgeConfig, SequenceFeatures,
};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use tensor_core::verify::{Reference, Tolerance};

const FIRST: Tolerance = Tolerance::Mixed(1e-8);
const RUN: Tolerance = Tolerance::Mixed(1e-6);

/// `mean_l tanh(e_l W + position_l)`
struct Tanh {
    weight: Tensor,
    positions: Tensor,
}

impl SequenceFeatures for Tanh {
    fn features(&self, tokens: &Tensor) -> Result<Tensor> {
        let (b, t, v) = tokens.dims3()?;
        let flat = tokens
            .contiguous()?
            .reshape((b * t, v))?
            .matmul(&self.weight)?;
        let h = flat.reshape((b, t, ()))?.broadcast_add(&self.positions)?;
        Ok(h.tanh()?.mean(1)?)
    }

    fn place(&self) -> (DType, Device) {
        (DType::F64, Device::Cpu)
    }
}

/// Checks every case of the file (a prefix before `offline_seqs`).
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn bib(reference: &mut Reference) -> Result<()> {
    for prefix in reference.cases("offline_seqs") {
        case(reference, &prefix)?;
    }
    // Measured scores: data of an experiment, not the result of a computation.
    for name in reference.names() {
        if name
            .rsplit('.')
            .next()
            .is_some_and(|n| n.starts_with("tfbind8_"))
        {
            reference.input(&name)?;
        }
    }
    Ok(())
}

fn encoding(reference: &Reference) -> Result<Encoding> {
    let alphabet = match reference.metadata().contains_key("alphabet") {
        true => reference.number("alphabet")?,
        false => 4,
    };
    match reference.text("kind")? {
        "dna" => Ok(Encoding::Kmers { k: 3, alphabet }),
        "protein" => Ok(Encoding::Residues { alphabet }),
        other => Err(reference
            .bad(format!("metadata `kind` = `{other}` is not known"))
            .into()),
    }
}

fn case(reference: &mut Reference, prefix: &str) -> Result<()> {
    let name = |part: &str| format!("{prefix}{part}");
    let encoding = encoding(reference)?;
    let model = Tanh {
        weight: reference.input(&name("embed_w"))?.tensor(DType::F64)?,
        positions: reference.input(&name("embed_pos"))?.tensor(DType::F64)?,
    };
    let rows = reference.input(&name("offline_seqs"))?;
    let length = rows.shape.last().copied().unwrap_or(1).max(1);
    let letters: Vec<u8> = rows.indices()?.iter().map(|c| *c as u8).collect();
    let sequences: Vec<Vec<u8>> = letters.chunks(length).map(<[u8]>::to_vec).collect();
    let raw = reference.input(&name("offline_raw"))?.values;
    let phi = encoding.features_of(&model, &sequences)?;
    reference.compare_tensor(&name("offline_phi"), &phi, FIRST)?;
    let table = OfflineTable::fit(&phi, &raw, RidgeConfig::default())?;
    fitted(reference, prefix, &table, &phi)?;

    let noise = reference.input(&name("init_noise"))?.values;
    let start = reference.input(&name("candidate"))?.indices()?;
    let start: Vec<u8> = start.iter().map(|c| *c as u8).collect();
    let weights = reference.input(&name("proxy_w"))?;
    let biases = reference.input(&name("proxy_b"))?.values;
    let width = weights.shape.last().copied().unwrap_or(1).max(1);
    let heads = weights.values.chunks(width).zip(&biases);
    let heads: Vec<LinearHead> = heads
        .map(|(w, b)| LinearHead {
            weight: w.to_vec(),
            bias: *b,
        })
        .collect();
    let lr: f64 = reference.number("lr")?;
    let config = DesignConfig {
        target: reference.number("y_h")?,
        steps: reference.number("T")?,
        gamma: Gamma::Adaptive {
            lr,
            beta: (0.9, 0.999),
        },
        eta: Eta::Fixed(lr),
        ..DesignConfig::default()
    };
    let designer = |config: DesignConfig| {
        Bidirectional::new(&model, table.clone(), encoding, heads.clone(), config)
    };
    first(
        reference,
        prefix,
        &designer(config.clone())?,
        (&model, encoding),
        (&start, &noise),
    )?;
    for run in reference.cases("_loss_forward") {
        let Some(kind) = run.strip_prefix(prefix) else {
            continue;
        };
        let config = config_of(reference, kind, &config)?;
        let designer = designer(config)?;
        let logits = designer.start_logits(&start, &noise);
        let report = designer.optimize_from(std::slice::from_ref(&start), vec![logits])?;
        whole(reference, &run, &report)?;
    }
    Ok(())
}

fn config_of(reference: &Reference, kind: &str, base: &DesignConfig) -> Result<DesignConfig> {
    let base = base.clone();
    Ok(match kind {
        "bib" => base,
        "bib_eta" => DesignConfig {
            eta: Eta::Adaptive(AdaptiveEta::default()),
            ..base
        },
        "fixed" => DesignConfig {
            gamma: Gamma::Fixed(0.5),
            ..base
        },
        "forward" => DesignConfig {
            mode: Mode::Forward,
            ..base
        },
        "backward" => DesignConfig {
            mode: Mode::Backward,
            ..base
        },
        other => {
            return Err(reference
                .bad(format!("a run `{other}` is not known"))
                .into())
        }
    })
}

fn fitted(
    reference: &mut Reference,
    prefix: &str,
    table: &OfflineTable,
    phi: &Tensor,
) -> Result<()> {
    let name = |part: &str| format!("{prefix}{part}");
    let (mean, std) = table.moments();
    reference.compare(&name("offline_y"), table.normalized(), FIRST)?;
    reference.compare(&name("y_mean"), &[mean], FIRST)?;
    reference.compare(&name("y_std"), &[std], FIRST)?;
    reference.compare(&name("beta"), &[table.ridge()], FIRST)?;
    reference.compare(&name("primal_w"), table.weights(), FIRST)?;
    // The dual coefficients are ill-conditioned: they are compared through what they predict.
    let dual = reference.input(&name("coeffs"))?.tensor(DType::F64)?;
    let weights = phi.t()?.matmul(&dual.unsqueeze(1)?)?.squeeze(1)?;
    Ok(reference.compare_tensor(&name("primal_w"), &weights, FIRST)?)
}

/// Tokens, features, score and gradients of the start.
fn first(
    reference: &mut Reference,
    prefix: &str,
    designer: &Bidirectional<'_, Tanh>,
    (model, encoding): (&Tanh, Encoding),
    (start, noise): (&[u8], &[f64]),
) -> Result<()> {
    let name = |part: &str| format!("{prefix}{part}");
    let logits = designer.start_logits(start, noise);
    let shape = (1, start.len(), encoding.alphabet());
    let x = Tensor::from_slice(&logits, shape, &Device::Cpu)?;
    let tokens = encoding.straight_through(&x)?;
    reference.compare_tensor(&name("token_input0"), &tokens.squeeze(0)?, FIRST)?;
    let phi = model.features(&tokens)?;
    reference.compare_tensor(&name("phi0"), &phi.squeeze(0)?, FIRST)?;
    reference.compare(&name("score0"), &designer.scores(&phi)?, FIRST)?;
    let slopes = designer.slopes_at(start, &logits)?;
    reference.compare(&name("grad_forward0"), &slopes.forward, FIRST)?;
    reference.compare(&name("grad_backward0"), &slopes.backward, FIRST)?;
    Ok(reference.compare(&name("grad_score0"), &slopes.score, FIRST)?)
}

fn whole(reference: &mut Reference, run: &str, report: &DesignReport) -> Result<()> {
    let losses = &report.losses[0];
    let forward: Vec<f64> = losses.iter().map(|l| l.forward).collect();
    let backward: Vec<f64> = losses.iter().map(|l| l.backward).collect();
    let parts = [
        ("x", report.logits[0].concat()),
        ("gamma", report.gamma_history[0].clone()),
        ("lr", report.eta_history[0].clone()),
        ("loss_forward", forward),
        ("loss_backward", backward),
    ];
    for (part, values) in parts {
        reference.compare(&format!("{run}_{part}"), &values, RUN)?;
    }
    Ok(())
}
