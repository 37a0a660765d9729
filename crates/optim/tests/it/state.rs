//! Stopping and resuming gives the same bits, in every optimizer.

use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;
use optim::perp_grad::{PerpGrad, PerpGradConfig};
use optim::spam::Spam;
use optim::transform::{Chain, ClipByGlobalNorm};
use optim::*;
use tensor_core::checkpoint::Checkpoint;

fn check<O: Stateful>(build: impl Fn(&[(String, Var)]) -> O) {
    for dtype in [DType::F32, DType::F64] {
        resumes(&build, dtype);
        undoes(&build, dtype);
    }
    refuses(&build);
}

/// Interrupted at every step of a run that crosses every counter's boundary.
fn resumes<O: Stateful>(build: &impl Fn(&[(String, Var)]) -> O, dtype: DType) {
    for stop in [0, 1, 5, 6, 7, 12] {
        let params = named_params(1, dtype);
        let mut first = build(&params);
        run(&mut first, &params, 2, 0..stop);
        let path = std::env::temp_dir().join(format!(
            "thalweg-optim-{}-{:?}.safetensors",
            std::process::id(),
            std::thread::current().id(),
        ));
        Checkpoint::new("test", first.state().unwrap())
            .save(&path)
            .unwrap();
        let twin = copies(&params);
        let mut second = build(&twin);
        // Whatever it did before is forgotten.
        run(&mut second, &copies(&params), 3, 0..2);
        let saved = Checkpoint::load(&path, &Device::Cpu).unwrap();
        second.load_state(&saved.tensors).unwrap();
        std::fs::remove_file(&path).unwrap();
        run(&mut first, &params, 2, stop..stop + 16);
        run(&mut second, &twin, 2, stop..stop + 16);
        assert_eq!(all_bits(&params), all_bits(&twin), "stopped at {stop}");
        let (a, b) = (first.state().unwrap(), second.state().unwrap());
        assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
        for (name, tensor) in &a {
            assert_eq!(bits(tensor), bits(&b[name]), "{name}");
        }
    }
}

fn undoes<O: Stateful>(build: &impl Fn(&[(String, Var)]) -> O, dtype: DType) {
    let params = named_params(1, dtype);
    let mut optimizer = build(&params);
    run(&mut optimizer, &params, 2, 0..5);
    let (before, snapshot) = (all_bits(&params), optimizer.snapshot().unwrap());
    run(&mut optimizer, &params, 2, 5..14);
    let there = all_bits(&params);
    assert_ne!(before, there);
    optimizer.restore(&snapshot).unwrap();
    assert_eq!(all_bits(&params), before);
    run(&mut optimizer, &params, 2, 5..14);
    assert_eq!(all_bits(&params), there);
    let other = build(&params[1..]);
    assert!(optimizer.restore(&other.snapshot().unwrap()).is_err());
}

fn refuses<O: Stateful>(build: &impl Fn(&[(String, Var)]) -> O) {
    let params = named_params(1, DType::F32);
    let mut optimizer = build(&params);
    run(&mut optimizer, &params, 2, 0..3);
    let good = optimizer.state().unwrap();
    let mut bad = good.clone();
    let names: Vec<String> = bad
        .iter()
        .filter(|(_, t)| t.dtype() == DType::F32)
        .map(|(n, _)| n.clone())
        .collect();
    bad.remove(&names[0]);
    bad.insert(
        names[1].clone(),
        Tensor::zeros(99, DType::F32, &Device::Cpu).unwrap(),
    );
    bad.insert(
        "stranger".into(),
        Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap(),
    );
    let message = optimizer.load_state(&bad).unwrap_err().to_string();
    assert!(message.contains("stranger"), "{message}");
    // Nothing was changed.
    let now = optimizer.state().unwrap();
    for (name, tensor) in &good {
        assert_eq!(bits(tensor), bits(&now[name]), "{name}");
    }
    bad.remove("stranger");
    let message = optimizer.load_state(&bad).unwrap_err().to_string();
    let plain = |name: &str| name.trim_start_matches("inner.").to_string();
    assert!(message.contains(&plain(&names[0])), "{message}");
    assert!(message.contains("99"), "{message}");
    let half = good
        .iter()
        .map(|(n, t)| {
            let t = if t.dtype() == DType::F32 {
                t.to_dtype(DType::BF16).unwrap()
            } else {
                t.clone()
            };
            (n.clone(), t)
        })
        .collect();
    let message = optimizer.load_state(&half).unwrap_err().to_string();
    assert!(message.contains("BF16"), "{message}");
}

fn group<C>(params: &[(String, Var)], config: C) -> Vec<ParamGroup<C>> {
    vec![ParamGroup::named(params.to_vec(), config)]
}

#[test]
fn lion() {
    check(|params| Lion::with_groups(group(params, LionConfig::default())).unwrap());
}

#[test]
fn adamw() {
    check(|params| AdamW::with_groups(group(params, AdamWConfig::default())).unwrap());
}

#[test]
fn sgd() {
    let config = SgdConfig {
        dampening: 0.2,
        ..SgdConfig::default()
    };
    check(|params| SgdMomentum::with_groups(group(params, config.clone())).unwrap());
}

fn spam_config(density: Option<f64>) -> SpamConfig {
    SpamConfig {
        delta_t: 7,
        warmup: 3,
        threshold: 3.0,
        clip_after: 2,
        density,
        weight_decay: 0.1,
        ..SpamConfig::default()
    }
}

#[test]
fn dense_spam() {
    let stream = RandomStream::new(5);
    check(|params| Spam::with_groups(group(params, spam_config(None)), &stream).unwrap());
}

/// The new masks are drawn in the step before the reset: stopping between the two keeps them.
#[test]
fn sparse_spam() {
    let stream = RandomStream::new(5);
    check(|params| Spam::with_groups(group(params, spam_config(Some(0.4))), &stream).unwrap());
}

#[test]
fn masks_continue_with_the_saved_stream() {
    let params = named_params(1, DType::F32);
    let build = |params: &[(String, Var)], seed| {
        let config = spam_config(Some(0.4));
        Spam::with_groups(group(params, config), &RandomStream::new(seed)).unwrap()
    };
    let mut first = build(&params, 5);
    run(&mut first, &params, 2, 0..4);
    let twin = copies(&params);
    let mut second = build(&twin, 6);
    assert_ne!(first.masks(), second.masks());
    second.load_state(&first.state().unwrap()).unwrap();
    run(&mut first, &params, 2, 4..20);
    run(&mut second, &twin, 2, 4..20);
    assert_eq!(first.masks(), second.masks());
    assert_eq!(all_bits(&params), all_bits(&twin));
}

#[test]
fn perp_grad_saves_the_optimizer_underneath() {
    check(|params| {
        let inner = AdamW::with_groups(group(params, AdamWConfig::default())).unwrap();
        let clip = Chain::new().then(ClipByGlobalNorm::new(1.0).unwrap());
        PerpGrad::wrap(PerpGradConfig::default(), inner)
            .unwrap()
            .with_transforms(clip)
    });
}

#[test]
fn names_must_differ() {
    let (a, b) = (var(&[1.0]), var(&[2.0]));
    let params = [("w".to_string(), a), ("w".to_string(), b)];
    let error = AdamW::with_groups(group(&params, AdamWConfig::default())).unwrap_err();
    assert!(matches!(error, Error::DuplicateParameter(name) if name == "w"));
}

#[test]
fn a_new_optimizer_drops_in_for_candles() {
    fn train<O: Optimizer>(config: O::Config) -> f64 {
        let w = var(&[2.0, -1.0]);
        let mut optimizer = O::new(vec![w.clone()], config).unwrap();
        for _ in 0..50 {
            optimizer.set_learning_rate(0.05);
            optimizer
                .backward_step(&w.sqr().unwrap().sum_all().unwrap())
                .unwrap();
        }
        values(&w).iter().map(|x| x * x).sum()
    }
    assert!(train::<candle_nn::SGD>(0.1) < 5.0);
    assert!(train::<Lion>(LionConfig::default()) < 5.0);
    assert!(train::<AdamW>(AdamWConfig::default()) < 5.0);
    assert!(train::<SgdMomentum>(SgdConfig::default()) < 5.0);
    assert!(train::<Spam>(SpamConfig::default()) < 5.0);
}
