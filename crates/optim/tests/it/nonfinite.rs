//! One policy for NaN and infinity, the same in every optimizer.

use crate::support::*;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_nn::Optimizer;
use optim::spam::Spam;
use optim::*;

/// Two good steps, then one with a NaN and an infinity in the first tensor.
fn poisoned<O: Optimizer + Stateful>(mut optimizer: O, params: &[(String, Var)]) -> Outcome<O> {
    run(&mut optimizer, params, 1, 0..2);
    let (params_before, state_before) = (all_bits(params), state_bits(&optimizer));
    let mut grads: GradStore = gradients(params, 1, 2);
    let mut first = values(grads.get(&params[0].1).unwrap());
    first[3] = f64::NAN;
    first[8] = f64::INFINITY;
    let bad = Tensor::from_vec(first, params[0].1.dims(), params[0].1.device()).unwrap();
    grads.insert(&params[0].1, bad.to_dtype(params[0].1.dtype()).unwrap());
    let result = optimizer.step(&grads);
    Outcome {
        optimizer,
        params_before,
        state_before,
        result,
    }
}

struct Outcome<O> {
    optimizer: O,
    params_before: Vec<Vec<u64>>,
    state_before: Vec<(String, Vec<u64>)>,
    result: candle_core::Result<()>,
}

/// Moments only: counters may change in a step that is left out.
fn state_bits(optimizer: &impl Stateful) -> Vec<(String, Vec<u64>)> {
    let state = optimizer.state().unwrap();
    let moments = state.iter().filter(|(name, _)| {
        name.starts_with("m.") || name.starts_with("v.") || name.starts_with("b.")
    });
    moments.map(|(n, t)| (n.clone(), bits(t))).collect()
}

fn check_policies<O: Optimizer + Stateful>(
    build: impl Fn(&[(String, Var)], NonFinite) -> O,
    counts: impl Fn(&O) -> StepCounts,
) {
    for dtype in [DType::F32, DType::F64] {
        let fresh = || named_params(1, dtype);

        let params = fresh();
        let held = poisoned(build(&params, NonFinite::Hold), &params);
        held.result.unwrap();
        let after = all_bits(&params);
        for (i, (new, old)) in after[0].iter().zip(&held.params_before[0]).enumerate() {
            assert_eq!(new == old, i == 3 || i == 8, "entry {i}");
        }
        for (_, var) in &params {
            assert!(values(var).iter().all(|x| x.is_finite()));
        }
        for ((_, before), (_, now)) in held.state_before.iter().zip(state_bits(&held.optimizer)) {
            if now.len() == params[0].1.elem_count() {
                assert_eq!((before[3], before[8]), (now[3], now[8]));
            }
        }
        assert_eq!(counts(&held.optimizer).held, 2);

        let params = fresh();
        let passed = poisoned(build(&params, NonFinite::Propagate), &params);
        passed.result.unwrap();
        assert!(values(&params[0].1)[3].is_nan());

        let params = fresh();
        let skipped = poisoned(build(&params, NonFinite::SkipStep), &params);
        skipped.result.unwrap();
        assert_eq!(all_bits(&params), skipped.params_before);
        assert_eq!(state_bits(&skipped.optimizer), skipped.state_before);
        assert_eq!(counts(&skipped.optimizer).skipped, 1);

        let params = fresh();
        let refused = poisoned(build(&params, NonFinite::Error), &params);
        let message = refused.result.unwrap_err().to_string();
        assert!(
            message.contains("attn.w") && message.contains('2'),
            "{message}"
        );
        assert!(!message.contains("bias"), "{message}");
        assert_eq!(all_bits(&params), refused.params_before);
        assert_eq!(state_bits(&refused.optimizer), refused.state_before);
    }
}

fn group<C>(params: &[(String, Var)], config: C) -> Vec<ParamGroup<C>> {
    vec![ParamGroup::named(params.to_vec(), config)]
}

#[test]
fn lion() {
    let build = |params: &[(String, Var)], nonfinite| {
        let config = LionConfig {
            nonfinite,
            ..LionConfig::default()
        };
        Lion::with_groups(group(params, config)).unwrap()
    };
    check_policies(build, Lion::counts);
}

#[test]
fn adamw() {
    let build = |params: &[(String, Var)], nonfinite| {
        let config = AdamWConfig {
            nonfinite,
            ..AdamWConfig::default()
        };
        AdamW::with_groups(group(params, config)).unwrap()
    };
    check_policies(build, AdamW::counts);
}

#[test]
fn sgd() {
    let build = |params: &[(String, Var)], nonfinite| {
        let config = SgdConfig {
            nonfinite,
            ..SgdConfig::default()
        };
        SgdMomentum::with_groups(group(params, config)).unwrap()
    };
    check_policies(build, SgdMomentum::counts);
}

#[test]
fn spam() {
    let build = |params: &[(String, Var)], nonfinite| {
        let config = SpamConfig {
            nonfinite,
            ..SpamConfig::default()
        };
        Spam::with_groups(group(params, config), &RandomStream::new(1)).unwrap()
    };
    check_policies(build, Spam::counts);
}

/// Decay of all entries of a sparse tensor is a pass of its own; held entries stay held in it.
#[test]
fn a_sparse_tensor_with_full_decay_holds_too() {
    let w = var(&[1.0; 6]);
    let config = SpamConfig {
        density: Some(0.5),
        weight_decay: 0.1,
        ..SpamConfig::default()
    };
    let params = [("w".to_string(), w.clone())];
    let mut optimizer = Spam::with_groups(group(&params, config), &RandomStream::new(1)).unwrap();
    let mut grad = [0.0; 6];
    grad[2] = f64::NAN;
    optimizer.step(&store(&w, &tensor(&grad))).unwrap();
    let moved: Vec<bool> = values(&w).iter().map(|x| *x != 1.0).collect();
    assert_eq!(moved, [true, true, false, true, true, true]);
}
