//! One optimizer step over the 148 tensors of GPT-2 (124 million parameters), gradients given.

use super::{Case, Peer, Session};
use crate::perf::{gpt2_shapes, Workload};
use anyhow::Result;
use candle_nn::Optimizer;
use optim::perp_grad::{PerpGrad, PerpGradConfig};
use optim::{
    AdamW, AdamWConfig, Lion, LionConfig, ParamGroup, SgdConfig, SgdMomentum, Spam, SpamConfig,
};
use serde_json::json;
use tensor_core::random::RandomStream;

const GROUP: &str = "optim";

pub(super) fn cases(session: &mut Session<'_>) -> Result<()> {
    let wanted: Vec<_> = ["adamw", "sgd", "lion", "spam", "perp-grad"]
        .into_iter()
        .filter(|slug| session.wants(GROUP, slug))
        .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let shapes = gpt2_shapes();
    // Drawn once: the steps of all optimizers go over the same parameters.
    let work = Workload::new(&shapes)?;
    let python = |name| Peer::Python(name, json!({ "shapes": shapes }));
    for slug in wanted {
        for name in torch_peers(slug) {
            compare(session, slug, &work, python(name))?;
        }
        match slug {
            "adamw" => stock(session, &work)?,
            "spam" => sparse(session, &work, python("AdamW fused"))?,
            _ => {}
        }
    }
    Ok(())
}

/// What a user of Python would take for the method.
fn torch_peers(slug: &str) -> &'static [&'static str] {
    match slug {
        "adamw" => &["AdamW fused", "AdamW foreach"],
        "sgd" => &["SGD fused", "SGD foreach"],
        "lion" => &["lion-pytorch", "AdamW fused"],
        "spam" => &["pytorch-optimizer SPAM", "AdamW fused"],
        _ => &["pytorch-optimizer OrthoGrad over AdamW fused"],
    }
}

fn stock(session: &mut Session<'_>, work: &Workload) -> Result<()> {
    let mut stock = candle_nn::AdamW::new(work.vars.clone(), candle_nn::ParamsAdamW::default())?;
    let peer = Peer::Rust(
        "candle_nn::AdamW",
        Box::new(|| Ok(stock.step(&work.grads)?)),
    );
    compare(session, "adamw", work, peer)
}

fn sparse(session: &mut Session<'_>, work: &Workload, peer: Peer<'_>) -> Result<()> {
    let config = SpamConfig {
        density: Some(0.25),
        delta_t: 0,
        ..SpamConfig::default()
    };
    let group = ParamGroup::new(work.vars.clone(), config);
    let spam = Spam::with_groups(vec![group], &RandomStream::new(0))?;
    step(session, "spam", "Spam, density 0.25", work, spam, peer)
}

/// Our optimizer for a method beside one peer.
fn compare(
    session: &mut Session<'_>,
    slug: &'static str,
    work: &Workload,
    peer: Peer<'_>,
) -> Result<()> {
    let vars = work.vars.clone();
    match slug {
        "sgd" => {
            let sgd = SgdMomentum::new(vars, SgdConfig::default())?;
            step(session, slug, "SgdMomentum", work, sgd, peer)
        }
        "lion" => {
            let lion = Lion::new(vars, LionConfig::default())?;
            step(session, slug, "Lion", work, lion, peer)
        }
        "spam" => {
            let spam = Spam::new(vars, SpamConfig::default())?;
            step(session, slug, "Spam", work, spam, peer)
        }
        "perp-grad" => {
            let config = (PerpGradConfig::default(), AdamWConfig::default());
            let perp = <PerpGrad<AdamW> as Optimizer>::new(vars, config)?;
            step(session, slug, "PerpGrad<AdamW>", work, perp, peer)
        }
        _ => {
            let adam = AdamW::new(vars, AdamWConfig::default())?;
            step(session, slug, "AdamW", work, adam, peer)
        }
    }
}

fn step<O: Optimizer + Send>(
    session: &mut Session<'_>,
    slug: &'static str,
    ours: &'static str,
    work: &Workload,
    mut optimizer: O,
    peer: Peer<'_>,
) -> Result<()> {
    session.measure(Case {
        slug,
        operation: "step, GPT-2 124M".to_string(),
        ours,
        call: Box::new(move || Ok(optimizer.step(&work.grads)?)),
        peer,
    })
}
