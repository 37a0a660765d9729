use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use nn::init::SeededVars;
use optim::{AdamW, AdamWConfig, ParamGroup, Stateful};
use proptest::prelude::*;
use sequence_design::gflownet::loss::{
    detailed_balance, sub_trajectory_balance, trajectory_balance,
};
use sequence_design::gflownet::order::{compare_pairs, pair_order_loss, set_order_loss};
use sequence_design::gflownet::pareto::*;
use sequence_design::gflownet::*;
use sequence_design::{Error, RandomStream};
use std::cmp::Ordering;
use tensor_core::autograd::{check_gradients, CheckConfig};

#[test]
fn reference() {
    let report = FILES.verify("op-gfn", sequence_design::verify::op_gfn);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 34);
}

#[test]
fn reference_with_another_prefix_and_fewer_trajectories() {
    let report = FILES.verify_variant(
        "op-gfn",
        |tensors, _| {
            let renamed = tensors
                .iter()
                .map(|(n, t)| (format!("other.{n}"), t.clone()));
            *tensors = renamed.collect();
        },
        sequence_design::verify::op_gfn,
    );
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 34);
}

struct Trained {
    vars: SeededVars,
    policy: Policy,
}

fn policy<E: Environment>(env: &E, seed: u64, config: &PolicyConfig, dtype: DType) -> Trained {
    let vars = SeededVars::new(&RandomStream::new(seed));
    let vb = vars.builder(dtype, &Device::Cpu);
    let policy = Policy::new(env.feature_width(), env.actions(), config, vb).unwrap();
    Trained { vars, policy }
}

fn adam(vars: &SeededVars, lr: f64, lr_z: f64) -> AdamW {
    let (z, net) = vars
        .trainable()
        .into_iter()
        .partition(|(n, _)| n == "log_z");
    let group = |vars: Vec<(String, Var)>, lr| ParamGroup::named(vars, AdamWConfig::adam(lr));
    AdamW::with_groups(vec![group(net, lr), group(z, lr_z)]).unwrap()
}

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
fn environments_are_graphs_with_a_way_back() {
    fn states<E: Environment>(env: &E) -> usize {
        let all = Enumeration::new(env, 20_000).unwrap();
        for k in all.objects() {
            assert!(env.is_terminal(&all.states()[k]));
        }
        let mut rng = RandomStream::new(1);
        let net = policy(
            env,
            1,
            &PolicyConfig {
                hidden: vec![],
                backward: true,
                ..PolicyConfig::default()
            },
            DType::F32,
        );
        let contexts = vec![vec![]; 8];
        let there = roll_out(
            env,
            &net.policy,
            &contexts,
            Exploration::default(),
            &mut rng,
        )
        .unwrap();
        let back = roll_back(env, &net.policy, &there.objects(), &contexts, &mut rng).unwrap();
        assert_eq!(back.objects(), there.objects());
        for i in 0..8 {
            assert_eq!(back.states()[back.offsets()[i]], env.initial());
            let again = Trajectories::from_actions(env, &[back.actions_of(i).to_vec()]).unwrap();
            assert_eq!(again.object(0), there.object(i));
        }
        all.states().len()
    }
    assert_eq!(states(&HyperGrid::new(3, 5).unwrap()), 125);
    assert_eq!(
        states(&AppendSequence::new(4, 3).unwrap()),
        1 + 3 + 9 + 27 + 81
    );
    assert_eq!(
        states(&AppendSequence::bits(6, 2).unwrap()),
        1 + 4 + 16 + 64
    );
    assert_eq!(
        states(&PrependAppend::new(4, 3).unwrap()),
        1 + 3 + 9 + 27 + 81
    );
    assert_eq!(states(&BagOfItems::new(3, 3).unwrap()), 20);
    assert_eq!(states(&BagOfItems::set(5, 2).unwrap()), 1 + 5 + 10);
    assert_eq!(states(&NasCell::new(3, 4).unwrap()), 125);
    assert_eq!(
        states(&SequenceEdit::new(&[0, 1, 2], 3, 2).unwrap()),
        1 + 6 + 12
    );
    // A block with two stems and one with none: a root, and trees on it.
    let blocks = [("fork", 2), ("end", 0)];
    let blocks = blocks.map(|(name, stems)| Fragment {
        name: name.into(),
        stems,
    });
    let trees = FragmentGraph::new(blocks.to_vec(), 1, 3).unwrap();
    // 1 empty, 2 of one block, 4 of two, and of three: 4 with both stems of the root, 8 chains.
    assert_eq!(states(&trees), 1 + 2 + 4 + 4 + 8);
    assert_eq!(
        AppendSequence::bits(6, 2).unwrap().to_bits(&[2, 1]),
        [true, false, false, true]
    );
}

/// A ring: adding wraps around.
#[derive(Debug)]
struct Ring;

impl Environment for Ring {
    type State = u8;
    fn actions(&self) -> usize {
        2
    }
    fn initial(&self) -> u8 {
        0
    }
    fn max_steps(&self) -> usize {
        2
    }
    fn forward_mask(&self, _: &u8, mask: &mut [bool]) {
        mask[0] = true;
    }
    fn backward_mask(&self, _: &u8, mask: &mut [bool]) {
        mask[0] = true;
    }
    fn step(&self, state: &mut u8, _: usize) {
        *state = (*state + 1) % 3;
    }
    fn undo(&self, state: &mut u8, _: usize) {
        *state = (*state + 2) % 3;
    }
    fn feature_width(&self) -> usize {
        1
    }
    fn write_features(&self, state: &u8, out: &mut [f32]) {
        out[0] = f32::from(*state);
    }
}

#[test]
fn broken_environments_are_named() {
    let error = Enumeration::new(&Ring, 10).unwrap_err().to_string();
    assert!(error.contains("cycle"), "{error}");
    let net = policy(&Ring, 1, &PolicyConfig::default(), DType::F32);
    let mut rng = RandomStream::new(0);
    let error = roll_out(
        &Ring,
        &net.policy,
        &[vec![]],
        Exploration::default(),
        &mut rng,
    )
    .unwrap_err();
    assert!(error.to_string().contains("beyond 2 steps"), "{error}");
    let error = Enumeration::new(&HyperGrid::new(2, 9).unwrap(), 80).unwrap_err();
    assert!(error.to_string().contains("more than 80"), "{error}");
    let env = AppendSequence::new(3, 2).unwrap();
    let net = policy(&env, 1, &PolicyConfig::default(), DType::F32);
    let error = roll_back(&env, &net.policy, &[vec![0, 1]], &[vec![]], &mut rng).unwrap_err();
    assert!(error.to_string().contains("no object"), "{error}");
    assert!(Trajectories::from_actions(&env, &[vec![0, 2, 1]]).is_err());
    assert!(Trajectories::from_actions(&env, &[vec![0, 1]]).is_err());
    assert!(HyperGrid::new(0, 4).is_err() && HyperGrid::new(2, 1).is_err());
    assert!(AppendSequence::new(0, 4).is_err() && AppendSequence::bits(7, 2).is_err());
    assert!(BagOfItems::set(2, 3).is_err() && SequenceEdit::new(&[3], 3, 1).is_err());
    assert!(TabularLandscape::normalized([(vec![0], 1.0), (vec![1], 1.0)]).is_err());
    assert!(TabularLandscape::normalized([(vec![0], f64::NAN)]).is_err());
    assert!(TabularLandscape::normalized([(vec![0], 1.0), (vec![0], 2.0)]).is_err());
    assert!(TabularLandscape::normalized([]).is_err());
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

proptest! {
    #![proptest_config(cases(64))]

    /// A monotone transform of the scores and a constant in the log reward change nothing.
    #[test]
    fn only_the_order_counts(seed in 0u64..1000, shift in -5.0..5.0f64) {
        let b = 9;
        let mut rng = RandomStream::new(seed);
        let scores: Vec<f64> = (0..b).map(|_| rng.below(5).unwrap() as f64).collect();
        let perm = rng.permutation(b).unwrap();
        let orders = compare_pairs(&scores, &perm);
        let moved: Vec<f64> = scores.iter().map(|s| (0.7 * s).exp() - 3.0).collect();
        prop_assert_eq!(&orders, &compare_pairs(&moved, &perm));
        let l = normal(seed, &[b], DType::F64);
        let loss = |l: &Tensor| values(&pair_order_loss(l, &perm, &orders, None).unwrap())[0];
        let shifted = l.affine(1.0, shift).unwrap();
        prop_assert!((loss(&l) - loss(&shifted)).abs() < 1e-12);
        let points: Vec<Vec<f64>> = scores.iter().map(|s| vec![*s]).collect();
        let mask = pareto_mask(&points);
        let set = |l: &Tensor| values(&set_order_loss(l, &mask).unwrap())[0];
        prop_assert!((set(&l) - set(&shifted)).abs() < 1e-12);
    }

    /// The loss over all pairs approaches its lower bound only along rewards that keep the order.
    #[test]
    fn the_loss_is_smallest_where_the_order_is_kept(seed in 0u64..1000) {
        let b = 6;
        let scores: Vec<f64> = RandomStream::new(seed).permutation(b).unwrap().iter().map(|x| f64::from(*x)).collect();
        let total = |l: &[f64]| {
            let l = Tensor::new(l, &Device::Cpu).unwrap();
            let mut sum = 0.0;
            for shift in 1..b as u32 {
                let perm: Vec<u32> = (0..b as u32).map(|i| (i + shift) % b as u32).collect();
                let orders = compare_pairs(&scores, &perm);
                sum += values(&pair_order_loss(&l, &perm, &orders, None).unwrap())[0];
            }
            sum
        };
        let kept: Vec<f64> = scores.iter().map(|s| 40.0 * s).collect();
        prop_assert!(total(&kept) < 1e-12);
        let mut swapped = kept.clone();
        swapped.swap(0, 1);
        prop_assert!(total(&swapped) > 1.0);
    }

    #[test]
    fn fronts_are_those_of_brute_force(seed in 0u64..1000, d in 1usize..5, n in 1usize..20) {
        let mut rng = RandomStream::new(seed);
        let points: Vec<Vec<f64>> = (0..n).map(|_| (0..d).map(|_| rng.below(4).unwrap() as f64).collect()).collect();
        let brute: Vec<bool> = points.iter().map(|p| !points.iter().any(|q| dominates(q, p))).collect();
        prop_assert_eq!(pareto_mask(&points), brute);
    }

    /// Against inclusion and exclusion over all subsets.
    #[test]
    fn the_hypervolume_is_exact(seed in 0u64..1000, d in 1usize..5, n in 1usize..7) {
        let mut rng = RandomStream::new(seed);
        let points: Vec<Vec<f64>> = (0..n).map(|_| (0..d).map(|_| rng.next_uniform() - 0.2).collect()).collect();
        let reference = vec![0.1; d];
        let mut expected = 0.0;
        for subset in 1u32..1 << n {
            let members = || (0..n).filter(move |i| subset >> i & 1 == 1);
            let side = |k: usize| members().map(|i| points[i][k] - reference[k]).fold(f64::INFINITY, f64::min).max(0.0);
            let sign = if subset.count_ones() % 2 == 1 { 1.0 } else { -1.0 };
            expected += sign * (0..d).map(side).product::<f64>();
        }
        let found = hypervolume(&points, &reference).unwrap();
        prop_assert!((found - expected).abs() < 1e-12, "{} {}", found, expected);
    }
}

#[test]
fn pareto_tools() {
    let front = vec![vec![0.0, 1.0], vec![0.5, 0.5], vec![1.0, 0.0]];
    assert_eq!(
        pareto_coverage(&front[..2], &front, 1e-9).unwrap(),
        2.0 / 3.0
    );
    assert_eq!(igd_plus(&front, &front).unwrap(), 0.0);
    let short = igd_plus(&[vec![0.5, 0.0]], &[vec![0.5, 0.5]]).unwrap();
    assert!((short - 0.5).abs() < 1e-15);
    let weights = vec![vec![0.5, 0.5], vec![1.0, 0.0]];
    assert!((r2(&front, &[1.0, 1.0], &weights).unwrap() - 0.125).abs() < 1e-15);
    assert!(hypervolume(&[], &[]).is_err() && hypervolume(&front, &[0.0]).is_err());
    assert!(hypervolume(&[vec![f64::NAN, 1.0]], &[0.0, 0.0]).is_err());
    assert!(r2(&front, &[1.0], &weights).is_err());
    // A point with NaN is worst, and counts when there is nothing else.
    assert_eq!(
        pareto_mask(&[vec![f64::NAN, 9.0], vec![0.0, 0.0]]),
        [false, true]
    );
    let words = [b"ACGT".to_vec(), b"ACGA".to_vec(), b"TTTT".to_vec()];
    let distance = |a: &Vec<u8>, b: &Vec<u8>| edit_distance(a, b) as f64;
    assert_eq!(edit_distance(b"kitten", b"sitting"), 3);
    assert_eq!(diversity(&words, distance), (1.0 + 3.0 + 4.0) / 3.0);
    assert_eq!(modes(&words, &[0.9, 1.0, 0.8], 0.5, 1.0, distance), [1, 2]);
}

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

/// The known front of two functions on the 32 x 32 grid.
#[test]
fn test_functions() {
    let grid = HyperGrid::new(2, 32).unwrap();
    let all = Enumeration::new(&grid, 2000).unwrap();
    let both = [TestFunction::Branin, TestFunction::Currin];
    let at = |s: &Vec<u16>| both.iter().map(|f| f.on(&grid, s).unwrap()).collect();
    let points: Vec<Vec<f64>> = all.states().iter().map(at).collect();
    assert_eq!(pareto_mask(&points).iter().filter(|m| **m).count(), 36);
    for f in [TestFunction::Shubert, TestFunction::Sphere] {
        let values = all.states().iter().map(|s| f.on(&grid, s).unwrap());
        assert!(values.into_iter().all(|v| (-0.01..1.01).contains(&v)));
    }
    // Beale's function has its zero at (3, 1/2).
    assert!(TestFunction::Beale.at(3.0, 0.5) < 1e-20);
    let cube = HyperGrid::new(3, 4).unwrap();
    assert!(TestFunction::Branin.on(&cube, &[0, 0, 0]).is_err());
}
