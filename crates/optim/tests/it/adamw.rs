use crate::support::*;
use candle_core::{DType, Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW};
use optim::{AdamW, AdamWConfig, ParamGroup, WeightDecay};

fn settings() -> ParamsAdamW {
    ParamsAdamW {
        lr: 3e-3,
        beta1: 0.85,
        beta2: 0.98,
        eps: 1e-7,
        weight_decay: 0.05,
    }
}

fn adamw(params: &[(String, Var)], config: AdamWConfig) -> AdamW {
    AdamW::with_groups(vec![ParamGroup::named(params.to_vec(), config)]).unwrap()
}

#[test]
fn steps_like_candles_adamw() {
    for (dtype, tol) in [(DType::F64, 1e-13), (DType::F32, 1e-5)] {
        let params = named_params(1, dtype);
        let twin = copies(&params);
        let mut ours = adamw(&params, AdamWConfig::from(&settings()));
        let vars = twin.iter().map(|(_, v)| v.clone()).collect();
        let mut theirs = candle_nn::AdamW::new(vars, settings()).unwrap();
        for t in 0..20 {
            ours.step(&gradients(&params, 2, t)).unwrap();
            theirs.step(&gradients(&twin, 2, t)).unwrap();
        }
        for ((_, a), (_, b)) in params.iter().zip(&twin) {
            assert_close(&values(a), &values(b), tol);
        }
    }
}

/// One element by hand, with torch's formulas.
fn by_hand(w: f64, grads: &[f64], config: &AdamWConfig) -> f64 {
    let (mut w, mut m, mut v) = (w, 0.0, 0.0);
    for (i, g) in grads.iter().enumerate() {
        let t = i as i32 + 1;
        let mut g = *g;
        match config.decay {
            WeightDecay::Coupled => g += config.weight_decay * w,
            WeightDecay::Decoupled => w -= config.lr * config.weight_decay * w,
        }
        m += (1.0 - config.beta1) * (g - m);
        v = config.beta2 * v + (1.0 - config.beta2) * g * g;
        let denominator = v.sqrt() / (1.0 - config.beta2.powi(t)).sqrt() + config.eps;
        w -= config.lr / (1.0 - config.beta1.powi(t)) * m / denominator;
    }
    w
}

#[test]
fn both_kinds_of_decay_and_a_late_parameter() {
    let grads = [0.3, -1.2, 0.7, 2.0];
    for decay in [WeightDecay::Coupled, WeightDecay::Decoupled] {
        let config = AdamWConfig {
            weight_decay: 0.3,
            decay,
            ..AdamWConfig::adam(0.1)
        };
        let (w, late) = (var(&[0.8]), var(&[-0.6]));
        let params = [
            ("w".to_string(), w.clone()),
            ("late".to_string(), late.clone()),
        ];
        let mut optimizer = adamw(&params, config.clone());
        for (t, g) in grads.iter().enumerate() {
            let mut grads = store(&w, &tensor(&[*g]));
            if t >= 2 {
                grads.insert(&late, tensor(&[*g]));
            }
            optimizer.step(&grads).unwrap();
        }
        assert_close(&values(&w), &[by_hand(0.8, &grads, &config)], 1e-14);
        // Its bias correction counts its own steps.
        assert_close(
            &values(&late),
            &[by_hand(-0.6, &grads[2..], &config)],
            1e-14,
        );
    }
}

#[test]
fn trains_a_model_as_a_drop_in() {
    let mut rng = optim::RandomStream::new(1);
    let x = normal(&mut rng, &[64, 8], DType::F32);
    let target = normal(&mut rng, &[8, 1], DType::F32);
    let y = x.matmul(&target).unwrap();
    let w = Var::zeros((8, 1), DType::F32, &candle_core::Device::Cpu).unwrap();
    let config = AdamWConfig {
        lr: 0.05,
        weight_decay: 0.0,
        ..AdamWConfig::default()
    };
    let mut optimizer = AdamW::new(vec![w.clone()], config).unwrap();
    let loss = || -> candle_core::Result<Tensor> { (x.matmul(&w)? - &y)?.sqr()?.mean_all() };
    for _ in 0..300 {
        optimizer.backward_step(&loss().unwrap()).unwrap();
    }
    assert!(values(&loss().unwrap())[0] < 1e-4);
}

#[test]
fn empty_and_bad_input() {
    let mut none = AdamW::new(vec![], AdamWConfig::default()).unwrap();
    none.step(&Default::default()).unwrap();
    for (change, field) in [
        (
            (|c: &mut AdamWConfig| c.eps = -1.0) as fn(&mut AdamWConfig),
            "eps",
        ),
        (|c| c.beta2 = 1.0, "beta2"),
        (|c| c.weight_decay = f64::NAN, "weight_decay"),
    ] {
        let mut config = AdamWConfig::default();
        change(&mut config);
        let error = AdamW::new(vec![], config).unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
    }
}
