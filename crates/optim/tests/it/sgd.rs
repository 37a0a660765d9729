use crate::support::*;
use candle_nn::Optimizer;
use optim::{ParamGroup, SgdConfig, SgdMomentum, WeightDecay};

/// One element by hand, with torch's formulas.
fn by_hand(w: f64, grads: &[f64], config: &SgdConfig) -> f64 {
    let (mut w, mut buffer) = (w, None);
    for g in grads {
        let mut g = *g;
        match config.decay {
            WeightDecay::Coupled => g += config.weight_decay * w,
            WeightDecay::Decoupled => w *= 1.0 - config.lr * config.weight_decay,
        }
        let b = match buffer {
            None => g,
            Some(b) => config.momentum * b + (1.0 - config.dampening) * g,
        };
        buffer = Some(b);
        w -= config.lr
            * if config.nesterov {
                g + config.momentum * b
            } else {
                b
            };
    }
    w
}

#[test]
fn every_variant_is_torchs() {
    let grads = [0.3, -1.2, 0.7, 2.0, -0.1];
    for (momentum, dampening, nesterov) in [(0.0, 0.0, false), (0.8, 0.3, false), (0.8, 0.0, true)]
    {
        for decay in [WeightDecay::Coupled, WeightDecay::Decoupled] {
            let config = SgdConfig {
                lr: 0.1,
                momentum,
                dampening,
                nesterov,
                weight_decay: 0.2,
                decay,
                ..SgdConfig::default()
            };
            let w = var(&[0.7]);
            let mut optimizer = SgdMomentum::new(vec![w.clone()], config.clone()).unwrap();
            for g in grads {
                optimizer.step(&store(&w, &tensor(&[g]))).unwrap();
            }
            assert_close(&values(&w), &[by_hand(0.7, &grads, &config)], 1e-14);
        }
    }
}

#[test]
fn a_regime_can_switch_hyper_parameters() {
    let w = var(&[1.0]);
    let config = SgdConfig {
        lr: 0.1,
        ..SgdConfig::default()
    };
    let group = ParamGroup::new(vec![w.clone()], config.clone());
    let mut optimizer = SgdMomentum::with_groups(vec![group]).unwrap();
    optimizer.step(&store(&w, &tensor(&[1.0]))).unwrap();
    let next = SgdConfig {
        lr: 0.01,
        momentum: 0.5,
        ..config
    };
    optimizer.set_config(0, next.clone()).unwrap();
    optimizer.step(&store(&w, &tensor(&[1.0]))).unwrap();
    assert_close(&values(&w), &[0.9 - 0.01 * 1.5], 1e-15);
    assert!(optimizer.set_config(1, next).is_err());
}

#[test]
fn nesterov_needs_momentum() {
    let config = SgdConfig {
        momentum: 0.0,
        nesterov: true,
        ..SgdConfig::default()
    };
    let error = SgdMomentum::new(vec![], config).unwrap_err();
    assert!(error.to_string().contains("nesterov"), "{error}");
}
