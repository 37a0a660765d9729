use crate::support::*;
use candle_core::backprop::GradStore;
use candle_core::{DType, Var};
use candle_nn::Optimizer;
use optim::perp_grad::{OrthogonalProjection, PerpGradConfig};
use optim::transform::*;
use optim::{
    global_norm, AdamW, AdamWConfig, DecayMask, Error, Gradients, ParamGroup, RandomStream,
    SgdConfig, SgdMomentum, Stateful, StepWith,
};
use proptest::prelude::*;

/// The gradients as they come out of a transform.
fn through(
    transform: &mut dyn GradientTransform,
    params: &[(String, Var)],
    store: &GradStore,
) -> Vec<Vec<f64>> {
    let mut gradients = Gradients::collect(params, store);
    assert_eq!(transform.apply(&mut gradients).unwrap(), Flow::Continue);
    (0..params.len())
        .map(|i| values(&gradients.materialized(i).unwrap().unwrap()))
        .collect()
}

fn raw(params: &[(String, Var)], store: &GradStore) -> Vec<Vec<f64>> {
    params
        .iter()
        .map(|(_, v)| values(store.get(v).unwrap()))
        .collect()
}

fn norm(gradients: &[Vec<f64>]) -> f64 {
    gradients
        .iter()
        .flatten()
        .map(|x| x * x)
        .sum::<f64>()
        .sqrt()
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn norms_are_at_most_the_limit(seed in 0u64..1000, limit in 0.01f64..100.0) {
        let params = named_params(seed, DType::F64);
        let store = gradients(&params, seed, 0);
        let before = raw(&params, &store);
        let mut clip = ClipByGlobalNorm::new(limit).unwrap();
        let after = through(&mut clip, &params, &store);
        let (was, is) = (norm(&before), norm(&after));
        prop_assert!((clip.last_norm().unwrap() - was).abs() < 1e-12 * was);
        prop_assert!((global_norm(&params, &store).unwrap() - was).abs() < 1e-12 * was);
        prop_assert!((is - was.min(limit)).abs() < 1e-12 * was);
        let factor = is / was;
        for (a, b) in after.iter().flatten().zip(before.iter().flatten()) {
            prop_assert!((a - factor * b).abs() < 1e-12 * was);
        }
        let each = through(&mut ClipByNorm::new(limit).unwrap(), &params, &store);
        for (a, b) in each.iter().zip(&before) {
            let (is, was) = (norm(std::slice::from_ref(a)), norm(std::slice::from_ref(b)));
            prop_assert!((is - was.min(limit)).abs() < 1e-12 * was);
        }
        let mut clipped = gradients(&params, seed, 0);
        let found = clip_grad_norm(&mut clipped, &params, limit).unwrap();
        prop_assert_eq!(found, global_norm(&params, &store).unwrap());
        let factor = (limit / (was + 1e-6)).min(1.0);
        for (a, b) in raw(&params, &clipped).iter().flatten().zip(before.iter().flatten()) {
            prop_assert!((a - factor * b).abs() < 1e-12 * was);
        }
        let value = through(&mut ClipByValue::new(limit).unwrap(), &params, &store);
        for (a, b) in value.iter().flatten().zip(before.iter().flatten()) {
            prop_assert_eq!(*a, b.clamp(-limit, limit));
        }
    }

    /// A chain of maps gives what the same operations give one after the other on tensors.
    #[test]
    fn maps_compose(seed in 0u64..1000) {
        let params = named_params(seed, DType::F64);
        let store = gradients(&params, seed, 0);
        let mut chain = Chain::new()
            .then(ClipByValue::new(1.0).unwrap())
            .then(AddWeightDecay::new(0.5, DecayMask::NoOneDimensional).unwrap())
            .then(ClipByValue::new(0.7).unwrap())
            .then(ClipByGlobalNorm::new(2.0).unwrap());
        let got = through(&mut chain, &params, &store);
        let mut expected = raw(&params, &store);
        for (g, (_, var)) in expected.iter_mut().zip(&params) {
            for (g, w) in g.iter_mut().zip(values(var)) {
                *g = g.clamp(-1.0, 1.0);
                if var.rank() >= 2 {
                    *g += 0.5 * w;
                }
                *g = g.clamp(-0.7, 0.7);
            }
        }
        let factor = (2.0 / norm(&expected)).min(1.0);
        for (a, b) in got.iter().flatten().zip(expected.iter().flatten()) {
            prop_assert!((a - factor * b).abs() < 1e-13);
        }
    }
}

#[test]
fn maps_reach_the_kernel_without_new_tensors() {
    let params = named_params(1, DType::F64);
    let store = gradients(&params, 1, 0);
    let mut gradients = Gradients::collect(&params, &store);
    let mut chain = Chain::new()
        .then(ClipByGlobalNorm::new(0.1).unwrap())
        .then(OrthogonalProjection::new(PerpGradConfig::default()).unwrap());
    chain.apply(&mut gradients).unwrap();
    for (i, (_, var)) in params.iter().enumerate() {
        let (tensor, map) = gradients.get(i).unwrap();
        assert_eq!(tensor.id(), store.get(var).unwrap().id());
        assert!(map.along != 0.0);
    }
}

/// What a chain inside an optimizer does is what the same optimizer does with the transformed
/// gradients.
#[test]
fn a_chain_inside_the_step_is_the_chain_before_it() {
    let params = named_params(4, DType::F64);
    let twin = copies(&params);
    let chain = || {
        Chain::new()
            .then(ClipByGlobalNorm::new(1.0).unwrap())
            .then(OrthogonalProjection::new(PerpGradConfig::default()).unwrap())
    };
    let adamw = |params: &[(String, Var)]| {
        let group = ParamGroup::named(params.to_vec(), AdamWConfig::default());
        AdamW::with_groups(vec![group]).unwrap()
    };
    let mut fused = adamw(&params).with_transforms(chain());
    let mut plain = adamw(&twin);
    for t in 0..6 {
        fused.step(&gradients(&params, 5, t)).unwrap();
        let store = gradients(&twin, 5, t);
        let mut outside = Gradients::collect(&twin, &store);
        chain().apply(&mut outside).unwrap();
        plain.step(&outside.to_store().unwrap()).unwrap();
    }
    for ((_, a), (_, b)) in params.iter().zip(&twin) {
        assert_close(&values(a), &values(b), 1e-12);
    }
}

fn sgd(params: &[(String, Var)]) -> SgdMomentum {
    let config = SgdConfig {
        lr: 0.1,
        ..SgdConfig::default()
    };
    SgdMomentum::with_groups(vec![ParamGroup::named(params.to_vec(), config)]).unwrap()
}

#[test]
fn accumulation_is_a_step_with_the_mean() {
    let params = named_params(2, DType::F64);
    let twin = copies(&params);
    let accumulate = Accumulate::new(&params, 3).unwrap();
    let numel: usize = params.iter().map(|(_, v)| v.elem_count()).sum();
    assert_eq!(accumulate.state_bytes(), 8 * numel);
    let mut every = sgd(&params).with_transforms(Chain::new().then(accumulate));
    let mut once = sgd(&twin);
    for round in 0..4 {
        let before = all_bits(&params);
        for k in 0..3 {
            assert_eq!(all_bits(&params), before);
            every.step(&gradients(&params, 7, 3 * round + k)).unwrap();
        }
        assert_ne!(all_bits(&params), before);
        let mut mean = GradStore::default();
        for (i, (_, var)) in twin.iter().enumerate() {
            let mut sum = var.zeros_like().unwrap();
            for k in 0..3 {
                let store = gradients(&params, 7, 3 * round + k);
                sum = (sum + store.get(&params[i].1).unwrap()).unwrap();
            }
            mean.insert(var, (sum / 3.0).unwrap());
        }
        once.step(&mean).unwrap();
    }
    assert_eq!((every.counts().taken, once.counts().taken), (4, 4));
    for ((_, a), (_, b)) in params.iter().zip(&twin) {
        assert_close(&values(a), &values(b), 1e-13);
    }
}

#[test]
fn accumulation_and_spike_clipping_resume_in_the_middle() {
    let params = named_params(2, DType::F32);
    let chain = |params: &[(String, Var)]| {
        let spikes = SpikeClipConfig {
            threshold: 2.0,
            clip_after: 2,
            ..SpikeClipConfig::default()
        };
        Chain::new()
            .then(Accumulate::new(params, 3).unwrap())
            .then(SpikeClip::new(params, spikes).unwrap())
            .then(ClipByGlobalNorm::new(1.0).unwrap())
    };
    let mut first = sgd(&params).with_transforms(chain(&params));
    run(&mut first, &params, 3, 0..11);
    let twin = copies(&params);
    let mut second = sgd(&twin).with_transforms(chain(&twin));
    second.load_state(&first.state().unwrap()).unwrap();
    run(&mut first, &params, 3, 11..20);
    run(&mut second, &twin, 3, 11..20);
    assert_eq!(all_bits(&params), all_bits(&twin));
    // Another chain refuses the state and names what is there.
    let mut other = sgd(&twin).with_transforms(Chain::new());
    let error = other.load_state(&first.state().unwrap()).unwrap_err();
    assert!(error.to_string().contains("0.done"), "{error}");
}

#[test]
fn a_chain_that_refuses_a_state_is_what_it_was() {
    let params = named_params(2, DType::F32);
    let spikes = || SpikeClip::new(&params, SpikeClipConfig::default()).unwrap();
    let mut chain = Chain::new().then(spikes()).then(spikes());
    through(&mut chain, &params, &gradients(&params, 1, 0));
    let before = chain.state().unwrap();
    through(&mut chain, &params, &gradients(&params, 1, 1));
    let now = chain.state().unwrap();
    // The first stage's part is good, the second one's is not.
    let mut bad = before.clone();
    bad.remove("1.v.bias").unwrap();
    let error = chain.load_state(&bad).unwrap_err().to_string();
    assert!(error.contains("v.bias"), "{error}");
    for (name, tensor) in chain.state().unwrap() {
        assert_eq!(bits(&tensor), bits(&now[&name]), "{name}");
    }
    chain.load_state(&before).unwrap();
    assert_ne!(
        bits(&now["0.v.bias"]),
        bits(&chain.state().unwrap()["0.v.bias"])
    );
}

#[test]
fn spike_clipping_follows_its_own_past() {
    let w = var(&[0.0, 0.0]);
    let params = [("w".to_string(), w.clone())];
    let config = SpikeClipConfig {
        threshold: 4.0,
        beta2: 0.5,
        clip_after: 3,
        min_v: 0.0,
    };
    let mut clip = SpikeClip::new(&params, config).unwrap();
    let (mut v, mut expected) = ([0.0f64; 2], Vec::new());
    let grads = [
        [1.0, -1.0],
        [2.0, 0.5],
        [100.0, -0.1],
        [f64::INFINITY, -50.0],
    ];
    for (t, g) in grads.iter().enumerate() {
        let out = through(&mut clip, &params, &store(&w, &tensor(g)));
        let mut now = [0.0; 2];
        for i in 0..2 {
            now[i] = g[i];
            if t + 1 >= 3 && g[i] * g[i] > 4.0 * v[i] {
                now[i] = g[i].signum() * (4.0 * v[i]).sqrt();
            }
            v[i] = 0.5 * v[i] + 0.5 * now[i] * now[i];
        }
        expected.push(now.to_vec());
        assert_close(&out[0], &now, 1e-15);
    }
    assert_eq!(clip.clipped(), 2);
    assert!(expected[3].iter().all(|x| x.is_finite()));
    // NaN passes and leaves no trace.
    let before = bits(&clip.state().unwrap()["v.w"]);
    let out = through(
        &mut clip,
        &params,
        &store(&w, &tensor(&[f64::NAN, f64::NAN])),
    );
    assert!(out[0].iter().all(|x| x.is_nan()));
    assert_eq!(bits(&clip.state().unwrap()["v.w"]), before);
}

#[test]
fn guards() {
    let (good, bad) = (var(&[1.0, 2.0]), var(&[3.0, 4.0]));
    let params = [
        ("good".to_string(), good.clone()),
        ("bad".to_string(), bad.clone()),
    ];
    let mut grads = store(&good, &tensor(&[1.0, 1.0]));
    grads.insert(&bad, tensor(&[f64::INFINITY, 1.0]));
    let mut skip = sgd(&params).with_transforms(Chain::new().then(NonFiniteGuard::default()));
    skip.step(&grads).unwrap();
    assert_eq!(
        (values(&good), values(&bad)),
        (vec![1.0, 2.0], vec![3.0, 4.0])
    );
    assert_eq!((skip.counts().taken, skip.counts().skipped), (0, 1));
    let guard = NonFiniteGuard::new(Guard::Error);
    let mut refuse = sgd(&params).with_transforms(Chain::new().then(guard));
    let error = refuse.step(&grads).unwrap_err().to_string();
    assert!(
        error.contains("`bad` (1 entries)") && !error.contains("good"),
        "{error}"
    );
    let mut zero = NonFiniteGuard::new(Guard::Zero);
    assert_eq!(through(&mut zero, &params, &grads)[1], [0.0, 1.0]);
    assert_eq!(zero.found(), 1);
}

#[test]
fn clipping_leaves_non_finite_entries_to_the_policy() {
    let w = var(&[0.0; 3]);
    let params = [("w".to_string(), w.clone())];
    let grads = store(&w, &tensor(&[3.0, f64::NAN, 4.0]));
    let mut clip = ClipByGlobalNorm::new(1.0).unwrap();
    let out = through(&mut clip, &params, &grads);
    assert_eq!(clip.last_norm(), Some(5.0));
    assert_close(&[out[0][0], out[0][2]], &[0.6, 0.8], 1e-15);
    assert!(out[0][1].is_nan());
    let mut held = sgd(&params).with_transforms(Chain::new().then(clip));
    held.step(&grads).unwrap();
    assert_close(&values(&w), &[-0.06, 0.0, -0.08], 1e-15);
    assert_eq!(held.counts().held, 1);
}

#[test]
fn transforms_refuse_other_parameters_and_bad_settings() {
    let params = named_params(1, DType::F32);
    let store = gradients(&params, 1, 0);
    let mut other = Accumulate::new(&params[1..], 2).unwrap();
    let mut gradients = Gradients::collect(&params, &store);
    let error = other.apply(&mut gradients).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { .. }));
    assert!(Accumulate::new(&params, 0).is_err());
    assert!(ClipByGlobalNorm::new(0.0).is_err());
    assert!(ClipByValue::new(f64::INFINITY).is_err());
    assert!(ClipByNorm::new(-1.0).is_err());
    assert!(AddWeightDecay::new(-1.0, DecayMask::All).is_err());
    let config = SpikeClipConfig {
        threshold: 0.0,
        ..SpikeClipConfig::default()
    };
    assert!(SpikeClip::new(&params, config).is_err());
}

#[test]
fn a_step_takes_a_transform_along() {
    let w = var(&[0.0]);
    let mut optimizer = sgd(&[("w".into(), w.clone())]);
    let mut clip = ClipByValue::new(0.5).unwrap();
    let report = optimizer
        .step_with(&store(&w, &tensor(&[7.0])), &mut clip)
        .unwrap();
    assert_eq!((report.withheld, report.held), (None, 0));
    assert_close(&values(&w), &[-0.05], 1e-15);
    let _ = RandomStream::new(0);
}
