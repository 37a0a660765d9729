use super::{adam, policy};
use crate::support::*;
use candle_core::{DType, Device, Tensor};
use nn::init::SeededVars;
use optim::Stateful;
use sequence_design::gflownet::order::compare_pairs;
use sequence_design::gflownet::*;
use sequence_design::{Error, RandomStream};
use std::cmp::Ordering;

fn gc(strings: &[Vec<u8>]) -> sequence_design::Result<Vec<Vec<f64>>> {
    let one = |s: &Vec<u8>| s.iter().filter(|c| **c == 1 || **c == 2).count() as f64;
    Ok(strings.iter().map(|s| vec![one(s)]).collect())
}

fn string_config() -> GflowConfig<Vec<u8>> {
    GflowConfig {
        replay: Some(ReplayConfig::default()),
        backward_augment: 4,
        ..GflowConfig::default()
    }
}

/// Every order-preserving variant raises the score, and no order gives `log Z` a gradient.
#[test]
fn orders_are_enough() {
    let compare: Comparator<Vec<u8>> = std::sync::Arc::new(|a, b| {
        let count = |s: &Vec<u8>| s.iter().filter(|c| **c == 1 || **c == 2).count();
        count(a).cmp(&count(b))
    });
    let pareto = |form| RewardSignal::ParetoOrder { weight: None, form };
    let signals = [
        RewardSignal::total_order(),
        RewardSignal::TotalOrder {
            weight: Some(1.0),
            max_gap: Some(5.0),
        },
        RewardSignal::CustomOrder {
            weight: None,
            max_gap: None,
            compare,
        },
        pareto(ParetoForm::Set),
        pareto(ParetoForm::Pairs),
        pareto(ParetoForm::Binary),
    ];
    let bases = [
        BaseLoss::TrajectoryBalance,
        BaseLoss::DetailedBalance,
        BaseLoss::sub_trajectory(),
        BaseLoss::FlowMatching { reward_weight: 1.0 },
    ];
    let runs = signals
        .iter()
        .map(|s| (s.clone(), bases[0]))
        .chain(bases[1..].iter().map(|b| {
            (
                RewardSignal::TotalOrder {
                    weight: Some(1.0),
                    max_gap: None,
                },
                *b,
            )
        }));
    for (signal, loss) in runs {
        let env = PrependAppend::new(5, 4).unwrap();
        let config = PolicyConfig {
            hidden: vec![32],
            backward: true,
            flow: true,
            log_z: Some(1.5),
            ..PolicyConfig::default()
        };
        let net = policy(&env, 2, &config, DType::F32);
        let config = GflowConfig {
            loss,
            signal: signal.clone(),
            backward_kl: 0.1,
            ..string_config()
        };
        let optimizer = adam(&net.vars, 5e-3, 0.1);
        let mut trainer = GflowTrainer::new(env, net.policy, optimizer, config, gc).unwrap();
        let mut rng = RandomStream::new(4);
        let mut last = 0.0;
        for _ in 0..150 {
            last = trainer.step(&mut rng).unwrap().mean_score;
        }
        assert!(last > 3.0, "{signal:?} {loss:?}: {last}");
        assert_eq!(values(trainer.policy().log_z().unwrap()), [1.5]);
        let objects = [vec![0; 5], vec![1, 0, 0, 0, 0], vec![1, 2, 1, 2, 1]];
        let l = trainer.log_reward_hat(&objects, &mut rng).unwrap();
        assert!(l.iter().sum::<f64>().abs() < 1e-9 && l[2] > l[0], "{l:?}");
    }
}

#[test]
fn scores_that_make_no_sense() {
    let env = AppendSequence::new(3, 2).unwrap();
    let trainer = |signal, score: f64| {
        let net = policy(&env, 2, &PolicyConfig::default(), DType::F32);
        let config = GflowConfig {
            signal,
            batch: 4,
            ..GflowConfig::default()
        };
        let optimizer = adam(&net.vars, 1e-3, 0.1);
        let objective = move |x: &[Vec<u8>]| {
            Ok(x.iter()
                .map(|x| vec![if x[0] == 0 { score } else { 1.0 }])
                .collect())
        };
        GflowTrainer::new(env.clone(), net.policy, optimizer, config, objective).unwrap()
    };
    let mut rng = RandomStream::new(1);
    let mut step = |signal, score| {
        let mut trainer = trainer(signal, score);
        (0..6)
            .map(|_| trainer.step(&mut rng))
            .collect::<Result<Vec<_>, Error>>()
    };
    // A logarithm of a negative number and an infinite reward are errors, zero is clipped.
    assert!(step(RewardSignal::scalar(1.0), -1.0).is_err());
    assert!(step(RewardSignal::scalar(1.0), f64::INFINITY).is_err());
    assert!(step(RewardSignal::scalar(1.0), 0.0).is_ok());
    // NaN is the worst, and counted; constant scores tie everywhere.
    for signal in [
        RewardSignal::scalar(1.0),
        RewardSignal::total_order(),
        RewardSignal::pareto_order(),
    ] {
        let reports = step(signal.clone(), f64::NAN).unwrap();
        assert!(reports.iter().map(|r| r.not_numbers).sum::<usize>() > 0);
        assert!(reports.iter().all(|r| r.loss.is_finite()));
        assert!(step(signal, 1.0).is_ok());
    }
    // One object makes no pair.
    let net = policy(&env, 2, &PolicyConfig::default(), DType::F32);
    let before = net
        .vars
        .trainable()
        .iter()
        .map(|(_, v)| bits(v))
        .collect::<Vec<_>>();
    let config = GflowConfig {
        batch: 1,
        ..GflowConfig::default()
    };
    let optimizer = adam(&net.vars, 1e-3, 0.1);
    let mut alone = GflowTrainer::new(env.clone(), net.policy, optimizer, config, gc).unwrap();
    assert!(alone.step(&mut rng).unwrap().skipped);
    assert_eq!(
        before,
        net.vars
            .trainable()
            .iter()
            .map(|(_, v)| bits(v))
            .collect::<Vec<_>>()
    );
    assert_eq!(
        compare_pairs(&[f64::NAN, 1.0, f64::NAN], &[1, 0, 0]),
        [Ordering::Less, Ordering::Greater, Ordering::Equal]
    );
}

#[test]
fn bad_configurations_are_named() {
    type Change = fn(&mut GflowConfig<Vec<u8>>);
    let cases: [(Change, &str); 8] = [
        (|c| c.batch = 0, "batch"),
        (|c| c.updates = 0, "updates"),
        (|c| c.backward_kl = -1.0, "backward_kl"),
        (|c| c.backward_augment = 3, "backward_augment"),
        (|c| c.exploration.epsilon = 1.5, "epsilon"),
        (|c| c.exploration.temperature = 0.0, "temperature"),
        (|c| c.signal = RewardSignal::scalar(f64::NAN), "beta"),
        (
            |c| c.loss = BaseLoss::SubTrajectory(SubTrajectoryWeights::Lambda(0.0)),
            "lambda",
        ),
    ];
    for (change, field) in cases {
        let mut config = GflowConfig::default();
        change(&mut config);
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
    let env = AppendSequence::new(3, 2).unwrap();
    let net = policy(&env, 1, &PolicyConfig::default(), DType::F32);
    let config = GflowConfig {
        loss: BaseLoss::DetailedBalance,
        ..GflowConfig::default()
    };
    let optimizer = adam(&net.vars, 1e-3, 0.1);
    let mut trainer = GflowTrainer::new(env, net.policy, optimizer, config, gc).unwrap();
    let error = trainer.step(&mut RandomStream::new(1)).unwrap_err();
    assert!(error.to_string().contains("state flow"), "{error}");
}

#[test]
fn resuming_gives_the_same_bits() {
    let env = AppendSequence::new(5, 4).unwrap();
    let start = |seed| {
        let net = policy(&env, seed, &PolicyConfig::default(), DType::F32);
        let optimizer = adam(&net.vars, 1e-2, 0.1);
        (
            net.vars,
            GflowTrainer::new(env.clone(), net.policy, optimizer, string_config(), gc).unwrap(),
        )
    };
    let all = |vars: &SeededVars| {
        vars.trainable()
            .iter()
            .map(|(_, v)| bits(v))
            .collect::<Vec<_>>()
    };
    let (vars, mut whole) = start(1);
    let mut rng = RandomStream::new(7);
    for _ in 0..10 {
        whole.step(&mut rng).unwrap();
    }
    let saved = (
        whole.state().unwrap(),
        whole.optimizer_mut().state().unwrap(),
        rng.state(),
    );
    let weights: Vec<Tensor> = vars
        .trainable()
        .iter()
        .map(|(_, v)| v.as_detached_tensor().copy().unwrap())
        .collect();
    let finish = |trainer: &mut GflowTrainer<_, _, _>, rng: &mut RandomStream| {
        (0..10)
            .map(|_| trainer.step(rng).unwrap())
            .collect::<Vec<_>>()
    };
    let reports = finish(&mut whole, &mut rng);
    let (other, mut resumed) = start(2);
    for ((_, var), value) in other.trainable().iter().zip(&weights) {
        var.set(value).unwrap();
    }
    resumed.load_state(&saved.0).unwrap();
    resumed.optimizer_mut().load_state(&saved.1).unwrap();
    let mut rng = RandomStream::from_state(&saved.2);
    assert_eq!(finish(&mut resumed, &mut rng), reports);
    assert_eq!(all(&vars), all(&other));
    let mut broken = saved.0.clone();
    broken.remove("replay.actions");
    assert!(resumed.load_state(&broken).is_err());
}

#[test]
fn contexts_reach_policy_and_objective() {
    // The context says which of two letters is wanted.
    let env = AppendSequence::new(4, 2).unwrap();
    let vars = SeededVars::new(&RandomStream::new(1));
    let vb = vars.builder(DType::F32, &Device::Cpu);
    let config = PolicyConfig {
        hidden: vec![32],
        flow: true,
        log_z: None,
        ..PolicyConfig::default()
    };
    let net = Policy::new(env.feature_width() + 1, env.actions(), &config, vb).unwrap();
    let config = GflowConfig {
        signal: RewardSignal::scalar(4.0),
        ..GflowConfig::default()
    };
    let optimizer = adam(&vars, 5e-3, 0.1);
    let draw = |count, rng: &mut RandomStream| {
        Ok((0..count)
            .map(|_| vec![if rng.next_uniform() < 0.5 { 0.0 } else { 1.0 }])
            .collect())
    };
    let score = |x: &[Vec<u8>], c: &[Vec<f32>]| {
        let hits = |(x, c): (&Vec<u8>, &Vec<f32>)| {
            0.1 + x.iter().filter(|s| f32::from(**s) == c[0]).count() as f64
        };
        Ok(x.iter().zip(c).map(|p| vec![hits(p)]).collect())
    };
    let mut trainer = GflowTrainer::new(env.clone(), net, optimizer, config, gc)
        .unwrap()
        .conditional(1, draw, score)
        .unwrap();
    let mut rng = RandomStream::new(2);
    for _ in 0..300 {
        trainer.step(&mut rng).unwrap();
    }
    for wanted in [0u8, 1] {
        let contexts = vec![vec![f32::from(wanted)]; 64];
        let drawn = roll_out(
            &env,
            trainer.policy(),
            &contexts,
            Exploration::default(),
            &mut rng,
        )
        .unwrap();
        let hits: usize = drawn
            .objects()
            .iter()
            .flatten()
            .filter(|s| **s == wanted)
            .count();
        assert!(hits > 180, "{hits} of 256");
    }
}
