use super::{adam, policy};
use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use sequence_design::gflownet::loss::{
    detailed_balance, sub_trajectory_balance, trajectory_balance,
};
use sequence_design::gflownet::*;
use sequence_design::RandomStream;
use tensor_core::autograd::{check_gradients, CheckConfig};

fn table() -> PolicyConfig {
    PolicyConfig {
        hidden: vec![],
        backward: true,
        flow: true,
        ..PolicyConfig::default()
    }
}

/// Every loss leads to the same law, `R / Z`, and trajectory balance to `log Z` as well.
#[test]
fn all_losses_reach_the_exact_law() {
    let losses = [
        BaseLoss::TrajectoryBalance,
        BaseLoss::DetailedBalance,
        BaseLoss::sub_trajectory(),
        BaseLoss::SubTrajectory(SubTrajectoryWeights::Geometric(0.9)),
        BaseLoss::FlowMatching { reward_weight: 1.0 },
        BaseLoss::LogPartitionVariance,
    ];
    for loss in losses {
        let mut grid = HyperGrid::new(2, 4).unwrap();
        grid.r0 = 0.5;
        grid.cos = true;
        grid.r1 = 3.0;
        let env = Tabular::new(grid.clone(), 100).unwrap();
        let (law, z) = env.enumeration().target(|x| grid.reward(x)).unwrap();
        let net = policy(&env, 1, &table(), DType::F64);
        let config = GflowConfig {
            loss,
            signal: RewardSignal::scalar(1.0),
            batch: 64,
            exploration: Exploration {
                epsilon: 0.2,
                temperature: 1.0,
            },
            ..GflowConfig::default()
        };
        let score = |x: &[Vec<u16>]| Ok(x.iter().map(|x| vec![grid.reward(x)]).collect());
        let optimizer = adam(&net.vars, 0.05, 0.05);
        let mut trainer =
            GflowTrainer::new(env.clone(), net.policy, optimizer, config, score).unwrap();
        let mut rng = RandomStream::new(3);
        for step in 0..500 {
            if step == 350 {
                candle_nn::Optimizer::set_learning_rate(trainer.optimizer_mut(), 0.005);
            }
            trainer.step(&mut rng).unwrap();
        }
        let found = env
            .enumeration()
            .terminating(&env, trainer.policy(), &[])
            .unwrap();
        assert!((found.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        let distance = total_variation(&found, &law);
        assert!(distance < 0.01, "{loss:?}: {distance}");
        if loss == BaseLoss::TrajectoryBalance {
            let log_z = values(trainer.policy().log_z().unwrap())[0];
            assert!((log_z - z.ln()).abs() < 0.02, "{log_z} {}", z.ln());
            let objects: Vec<_> = env.enumeration().states().to_vec();
            let l = trainer.log_reward_hat(&objects, &mut rng).unwrap();
            let exact: Vec<f64> = objects.iter().map(|x| grid.reward(x).ln()).collect();
            let mean = exact.iter().sum::<f64>() / exact.len() as f64;
            for (l, r) in l.iter().zip(&exact) {
                assert!((l - (r - mean)).abs() < 0.1, "{l} {r}");
            }
        }
    }
}

/// The other way round: tables that solve the flow equations have zero loss on any trajectory.
#[test]
fn exact_flows_have_zero_loss() {
    let env = BagOfItems::new(3, 2).unwrap().or_smaller();
    let env = Tabular::new(env, 100).unwrap();
    let states = env.enumeration().states().to_vec();
    let reward = |s: &Vec<u8>| 1.0 + f64::from(s[0]) * 2.0 + f64::from(s[1]) * 0.3;
    // F(s) = R(s) + sum over children of F(child) / parents(child), children first.
    let parents = |s: &Vec<u8>| s.iter().filter(|c| **c > 0).count() as f64;
    let mut flow = vec![0.0; states.len()];
    let (a, n) = (env.actions(), states.len());
    let mut logits = vec![0.0f64; n * a];
    for k in (0..n).rev() {
        let mut mask = vec![false; a];
        env.forward_mask(&states[k], &mut mask);
        flow[k] = reward(&states[k]);
        logits[k * a + a - 1] = reward(&states[k]).ln();
        for action in (0..a - 1).filter(|x| mask[*x]) {
            let mut child = states[k].clone();
            env.step(&mut child, action);
            let at = env.enumeration().position(&child).unwrap();
            let edge = flow[at] / parents(&child);
            flow[k] += edge;
            logits[k * a + action] = edge.ln();
        }
    }
    struct Exact(Tensor, Tensor, Tensor);
    impl PolicyNet for Exact {
        fn heads(&self, features: &Tensor) -> sequence_design::Result<Heads> {
            Ok(Heads {
                forward: features.matmul(&self.0)?,
                backward: None,
                log_flow: Some(features.matmul(&self.1)?.squeeze(1)?),
            })
        }
        fn log_z(&self) -> Option<&Tensor> {
            Some(&self.2)
        }
        fn place(&self) -> (DType, Device) {
            (DType::F64, Device::Cpu)
        }
    }
    let cpu = &Device::Cpu;
    let log_flow: Vec<f64> = flow.iter().map(|f| f.ln()).collect();
    let exact = Exact(
        Tensor::from_vec(logits, (n, a), cpu).unwrap(),
        Tensor::from_vec(log_flow.clone(), (n, 1), cpu).unwrap(),
        Tensor::new(log_flow[0], cpu).unwrap(),
    );
    let contexts = vec![vec![]; 50];
    let mut rng = RandomStream::new(5);
    let batch = roll_out(&env, &exact, &contexts, Exploration::default(), &mut rng).unwrap();
    let e = Evaluated::new(&env, &exact, &batch).unwrap();
    let rewards: Vec<f64> = batch.objects().iter().map(|s| reward(s).ln()).collect();
    let rewards = loss::log_rewards(&rewards, &e.log_pf).unwrap();
    let flows = EdgeFlows::new(&env, &exact, &batch, &e).unwrap();
    let lambda = SubTrajectoryWeights::Lambda(0.9);
    let losses = [
        trajectory_balance(&e, &rewards),
        detailed_balance(&e, Some(&rewards)),
        detailed_balance(&e, None),
        sub_trajectory_balance(&e, Some(&rewards), lambda),
        loss::flow_matching(&flows),
        loss::flow_matching_reward(&flows, &rewards),
        loss::log_partition_variance(&e, &rewards),
    ];
    for loss in losses {
        assert!(values(&loss.unwrap())[0] < 1e-20);
    }
    let (law, _) = env.enumeration().target(reward).unwrap();
    let found = env.enumeration().terminating(&env, &exact, &[]).unwrap();
    assert!(total_variation(&law, &found) < 1e-12);
}

#[test]
fn masked_log_prob_is_the_softmax_over_the_mask() {
    let mask = [true, true, false, true, false, true, false, false];
    for dtype in [DType::F64, DType::F32] {
        let logits = Var::from_tensor(&normal(1, &[2, 4], dtype)).unwrap();
        let host = values(&logits);
        let row = |i: usize| {
            let sum: f64 = (0..4)
                .filter(|a| mask[4 * i + a])
                .map(|a| host[4 * i + a].exp())
                .sum();
            move |x: f64| x - sum.ln()
        };
        let found = masked_log_prob(&logits, &mask, &Wanted::Action(vec![3, 1])).unwrap();
        let expected = [row(0)(host[3]), row(1)(host[5])];
        for (a, b) in values(&found).iter().zip(expected) {
            assert!((a - b).abs() < 1e-6);
        }
    }
    let logits = Var::from_tensor(&normal(1, &[2, 4], DType::F64)).unwrap();
    for wanted in [Wanted::Action(vec![3, 1]), Wanted::Mean] {
        let f = || {
            let log_p =
                masked_log_prob(&logits, &mask, &wanted).map_err(candle_core::Error::wrap)?;
            (log_p * Tensor::new(&[0.7, -1.3], &Device::Cpu)?)?.sum_all()
        };
        check_gradients(
            f,
            &[("logits".into(), logits.clone())],
            CheckConfig::default(),
        )
        .unwrap();
    }
    assert!(masked_log_prob(&logits, &mask, &Wanted::Action(vec![2, 1])).is_err());
    assert!(masked_log_prob(&logits, &[false; 8], &Wanted::Mean).is_err());
    assert!(masked_log_prob(&logits, &mask[..4], &Wanted::Mean).is_err());
}
