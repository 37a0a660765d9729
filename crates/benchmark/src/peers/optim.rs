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
    let shapes = gpt2_shapes();
    let python = |name| Peer::Python(name, json!({ "shapes": shapes }));
    for (slug, peers) in [
        ("adamw", &["AdamW fused", "AdamW foreach"][..]),
        ("sgd", &["SGD fused", "SGD foreach"]),
        ("lion", &["lion-pytorch", "AdamW fused"]),
        ("spam", &["pytorch-optimizer SPAM", "AdamW fused"]),
        (
            "perp-grad",
            &["pytorch-optimizer OrthoGrad over AdamW fused"],
        ),
    ] {
        for name in peers {
            compare(session, slug, python(name))?;
        }
    }
    if session.wants(GROUP, "adamw") {
        let work = Workload::new(&shapes)?;
        let mut stock =
            candle_nn::AdamW::new(work.vars.clone(), candle_nn::ParamsAdamW::default())?;
        let peer = Peer::Rust(
            "candle_nn::AdamW",
            Box::new(|| Ok(stock.step(&work.grads)?)),
        );
        compare(session, "adamw", peer)?;
    }
    if session.wants(GROUP, "spam") {
        let work = Workload::new(&shapes)?;
        let config = SpamConfig {
            density: Some(0.25),
            delta_t: 0,
            ..SpamConfig::default()
        };
        let group = ParamGroup::new(work.vars.clone(), config);
        let spam = Spam::with_groups(vec![group], &RandomStream::new(0))?;
        step(
            session,
            "spam",
            "Spam, density 0.25",
            work,
            spam,
            python("AdamW fused"),
        )?;
    }
    Ok(())
}

/// Our optimizer for a method beside one peer.
fn compare(session: &mut Session<'_>, slug: &'static str, peer: Peer<'_>) -> Result<()> {
    if !session.wants(GROUP, slug) {
        return Ok(());
    }
    let work = Workload::new(&gpt2_shapes())?;
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
    work: Workload,
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
