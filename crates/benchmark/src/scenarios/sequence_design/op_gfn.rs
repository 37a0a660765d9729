//! Order-preserving GFlowNets: as good as a reward exponent tuned in hindsight, without tuning; and
//! Pareto fronts without scalarization.

use super::data::binding;
use super::pictures::{fronts, heat_map};
use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    TrialContext, TrialOutcome,
};
use crate::Result;
use candle_core::{DType, Var};
use nn::init::SeededVars;
use optim::transform::{Chain, ClipByGlobalNorm};
use optim::{AdamW, AdamWConfig, ParamGroup};
use sequence_design::gflownet::pareto::{pareto_coverage, pareto_mask};
use sequence_design::gflownet::{
    total_variation, AppendSequence, BaseLoss, Environment, Exploration, GflowConfig, GflowTrainer,
    HyperGrid, Policy, PolicyConfig, ReplayConfig, RewardSignal, Tabular, TabularLandscape,
    TestFunction,
};
use std::collections::HashSet;
use tensor_core::random::RandomStream;

const STRING_STEPS: usize = 1200;
const GRID_STEPS: usize = 600;
const SAMPLES: usize = 512;
const SIDE: usize = 32;

pub(in crate::scenarios) struct OpGfn;

impl Scenario for OpGfn {
    fn definition(&self) -> Definition {
        Definition {
            slug: "op-gfn",
            title: "Order-preserving GFlowNets",
            paper: Paper {
                title: "Order-Preserving GFlowNets",
                venue: "ICLR 2024",
                arxiv: "2310.00386",
            },
            krate: "sequence-design",
            module: "gflownet",
            tags: &["gflownet", "sequence", "multi-objective"],
            version: 2,
            summary: "DNA 8-mers letter by letter, scored between 0 and 1 by a made-up transcription factor, in the \
                      shape of measured scores (with real data: the measured table TFBind8). Perceptron 40-128-128-5, Adam 1e-3 (log Z 0.1), \
                      batches of 16 new strings, 8 of the best tenth and 8 of all seen, 1200 steps, then 512 samples. \
                      Trajectory balance on (score + 0.001)^beta for three beta, against the order alone. \
                      Two objectives (Branin, Currin) on a 32 x 32 grid whose front has 36 points: Pareto order, against \
                      trajectory balance on (w . f)^beta with the weights w as an input; 600 steps of 128 trajectories. \
                      Exactness: a table trained on an 8 x 8 grid, against the enumerated law.",
            notes: "The order has no exponent to tune. The conditional baseline learns log Z as a function of its weights, \
                    and no log reward is clipped. The made-up scores have the distribution of measured ones, with as many objects \
                    above 0.9. With an order alone the learned gaps grow step by step, and how fast depends on the \
                    table. On made-up scores, seeds 11 to 15, that is what all five failing claims come from: after \
                    the 1200 steps the mean is .63 to .81 (.51 to .52, .59 to .63 and .84 to .87 for the three beta), \
                    and 642 to 923 objects above 0.9 have been met (358 to 443 with beta = 1, 611 to 747 with beta = \
                    3). The order gets there later: with 3000 steps the two lowest seeds reach .80 and .84 and have \
                    met 1010 such objects, when beta = 10, which is told the scale that the order has to \
                    find, is at .86 on the first of them. On the measured table, the same seeds, the mean is .78 to \
                    .80 after 1200 steps, and all claims hold but that of beta = 10 (three seeds of five): that \
                    baseline reaches .845 here, .83 where the threshold was measured.",
            data: Data { embedded: "binding-8mers", real: Some("tfbind8") },
            arms: vec![
                Arm::new("tb-1", "TB, beta = 1", Role::Baseline).fixed(&[("beta", 1.0)]),
                Arm::new("tb-3", "TB, beta = 3", Role::Baseline).fixed(&[("beta", 3.0)]),
                Arm::new("tb-10", "TB, beta = 10", Role::Baseline).fixed(&[("beta", 10.0)]),
                Arm::new("op-tb", "order-preserving TB", Role::Method),
                Arm::new("preference-1", "preference-conditioned, beta = 1", Role::Baseline).fixed(&[("beta", 1.0)]),
                Arm::new("preference-16", "preference-conditioned, beta = 16", Role::Baseline).fixed(&[("beta", 16.0)]),
                Arm::new("op-pareto", "Pareto order", Role::Method),
                Arm::new("exact", "table on a small grid", Role::Diagnostic),
            ],
            metrics: vec![
                Metric { name: "score", label: "mean score of 512 samples", better: Better::Higher },
                Metric { name: "hits", label: "objects above 0.9 seen", better: Better::Higher },
                Metric { name: "distinct", label: "distinct among 512 samples", better: Better::Higher },
                Metric { name: "on_front", label: "share of samples on the true front", better: Better::Higher },
                Metric { name: "coverage", label: "share of the true front sampled", better: Better::Higher },
                Metric { name: "tv", label: "total variation from the exact law", better: Better::Lower },
            ],
            claims: vec![
                Claim::every_seed(
                    "beats-1",
                    "mean score at least 0.2 above beta = 1",
                    metric("op-tb", "score").at_least(metric("tb-1", "score") + 0.2),
                ),
                Claim::every_seed(
                    "beats-3",
                    "and at least 0.1 above beta = 3",
                    metric("op-tb", "score").at_least(metric("tb-3", "score") + 0.1),
                ),
                Claim::every_seed(
                    "near-10",
                    "and at most 0.06 below beta = 10",
                    metric("op-tb", "score").at_least(metric("tb-10", "score") - 0.06),
                ),
                Claim::every_seed(
                    "hits-1",
                    "at least twice as many objects above 0.9 as beta = 1",
                    metric("op-tb", "hits").at_least(metric("tb-1", "hits") * 2.0),
                ),
                Claim::every_seed(
                    "hits-3",
                    "and at least 1.1 times as many as beta = 3",
                    metric("op-tb", "hits").at_least(metric("tb-3", "hits") * 1.1),
                ),
                Claim::every_seed(
                    "distinct",
                    "at least 400 of 512 samples are distinct",
                    metric("op-tb", "distinct").at_least(400.0),
                ),
                Claim::every_seed(
                    "front",
                    "at least 0.7 of the samples lie on the true front",
                    metric("op-pareto", "on_front").at_least(0.7),
                ),
                Claim::every_seed(
                    "front-16",
                    "three times as many as of the preference-conditioned sampler with beta = 16",
                    metric("op-pareto", "on_front").at_least(metric("preference-16", "on_front") * 3.0),
                ),
                Claim::every_seed(
                    "coverage",
                    "and they cover at least as much of it",
                    metric("op-pareto", "coverage").at_least(metric("preference-16", "coverage")),
                ),
                Claim::every_seed(
                    "exact",
                    "a table learns the law to a total variation below 0.01",
                    metric("exact", "tv").below(0.01),
                ),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, setting: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        match arm.name {
            "op-tb" => strings(trial, RewardSignal::total_order()),
            "op-pareto" => grid(trial, None),
            "exact" => exact(trial),
            name if name.starts_with("tb-") => {
                // The lowest score is 0.001, whatever the exponent: nothing is clipped.
                let beta = setting.get("beta")?;
                strings(
                    trial,
                    RewardSignal::Scalar {
                        beta,
                        clip_min: -100.0,
                    },
                )
            }
            _ => grid(trial, Some(setting.get("beta")?)),
        }
    }
}

fn adam(vars: &SeededVars, lr: f64) -> Result<AdamW> {
    let (z, net): (Vec<(String, Var)>, Vec<_>) = vars
        .trainable()
        .into_iter()
        .partition(|(name, _)| name == "log_z");
    let group = |vars, lr| ParamGroup::named(vars, AdamWConfig::adam(lr));
    let groups = match z.is_empty() {
        true => vec![group(net, lr)],
        false => vec![group(net, lr), group(z, 0.1)],
    };
    let clip = Chain::new().then(ClipByGlobalNorm::new(10.0)?);
    Ok(AdamW::with_groups(groups)?.with_transforms(clip))
}

fn policy(
    trial: &TrialContext,
    features: usize,
    actions: usize,
    config: &PolicyConfig,
) -> Result<(SeededVars, Policy)> {
    let vars = SeededVars::new(&trial.stream("weights"));
    let vb = vars.builder(DType::F32, &trial.device);
    let policy = Policy::new(features, actions, config, vb)?;
    Ok((vars, policy))
}

fn strings(trial: &TrialContext, signal: RewardSignal<Vec<u8>>) -> Result<TrialOutcome> {
    let table = binding(trial)?;
    let rows = table.sequences.iter().map(|s| s.to_vec()).zip(table.scores);
    let landscape = TabularLandscape::normalized(rows)?;
    let env = AppendSequence::new(8, 4)?;
    let config = PolicyConfig::default();
    let (vars, policy) = policy(trial, env.feature_width(), env.actions(), &config)?;
    let optimizer = adam(&vars, 1e-3)?;
    let config = GflowConfig {
        signal,
        batch: 32,
        exploration: Exploration {
            epsilon: 0.05,
            temperature: 1.0,
        },
        replay: Some(ReplayConfig::default()),
        ..GflowConfig::default()
    };
    let score = |strings: &[Vec<u8>]| -> sequence_design::Result<Vec<Vec<f64>>> {
        Ok(strings
            .iter()
            .map(|s| vec![landscape.get(s).unwrap_or(f64::NAN) + 1e-3])
            .collect())
    };
    let mut trainer = GflowTrainer::new(env, policy, optimizer, config, score)?;
    let mut rng = trial.stream("training");
    let mut curve = Curve::new("mean score of new strings", "step");
    let mut mean = 0.0;
    for step in 0..STRING_STEPS {
        trial.step(step, STRING_STEPS)?;
        mean += trainer.step(&mut rng)?.mean_score / 20.0;
        if (step + 1) % 20 == 0 {
            curve.push((step + 1) as f64, mean);
            mean = 0.0;
        }
    }
    let samples = trainer.sample(SAMPLES, &mut trial.stream("samples"))?;
    let scores = samples.iter().filter_map(|s| landscape.get(s));
    let hits = trainer
        .visited()
        .values()
        .filter(|v| v[0] > 0.9 + 1e-3)
        .count();
    let distinct: HashSet<&Vec<u8>> = samples.iter().collect();
    Ok(TrialOutcome::default()
        .metric("score", scores.sum::<f64>() / SAMPLES as f64)
        .metric("hits", hits as f64)
        .metric("distinct", distinct.len() as f64)
        .curve(curve))
}

/// `w` on the simplex, uniformly: Dirichlet(1, 1).
fn preferences(count: usize, rng: &mut RandomStream) -> sequence_design::Result<Vec<Vec<f32>>> {
    let draw = |_| {
        let w = rng.next_uniform() as f32;
        vec![w, 1.0 - w]
    };
    Ok((0..count).map(draw).collect())
}

/// The two objectives on the grid: with `beta` the preference-conditioned baseline, without it the
/// Pareto order.
fn grid(trial: &TrialContext, beta: Option<f64>) -> Result<TrialOutcome> {
    let grid = HyperGrid::new(2, SIDE)?;
    let both = |state: &[u16]| -> sequence_design::Result<Vec<f64>> {
        Ok(vec![
            TestFunction::Branin.on(&grid, state)?,
            TestFunction::Currin.on(&grid, state)?,
        ])
    };
    let width = if beta.is_some() { 2 } else { 0 };
    let config = PolicyConfig {
        hidden: vec![64, 64],
        flow: beta.is_some(),
        log_z: beta.is_none().then_some(0.0),
        ..PolicyConfig::default()
    };
    let features = grid.feature_width() + width;
    let (vars, policy) = policy(trial, features, grid.actions(), &config)?;
    let optimizer = adam(&vars, if beta.is_some() { 5e-3 } else { 1e-2 })?;
    let config = GflowConfig {
        loss: BaseLoss::TrajectoryBalance,
        signal: match beta {
            Some(beta) => RewardSignal::Scalar {
                beta,
                clip_min: -100.0,
            },
            None => RewardSignal::pareto_order(),
        },
        batch: 128,
        exploration: Exploration {
            epsilon: 0.05,
            temperature: 1.0,
        },
        ..GflowConfig::default()
    };
    let all = |states: &[Vec<u16>]| states.iter().map(|s| both(s)).collect();
    let mut trainer = GflowTrainer::new(grid.clone(), policy, optimizer, config, all)?;
    if beta.is_some() {
        let weighted =
            |states: &[Vec<u16>], w: &[Vec<f32>]| -> sequence_design::Result<Vec<Vec<f64>>> {
                let one = |(s, w): (&Vec<u16>, &Vec<f32>)| {
                    let f = both(s)?;
                    Ok(vec![f[0] * f64::from(w[0]) + f[1] * f64::from(w[1])])
                };
                states.iter().zip(w).map(one).collect()
            };
        trainer = trainer.conditional(2, preferences, weighted)?;
    }
    let mut rng = trial.stream("training");
    let mut curve = Curve::new("share of new points on the front", "step");
    let front = true_front(&grid, both)?;
    for step in 0..GRID_STEPS {
        trial.step(step, GRID_STEPS)?;
        trainer.step(&mut rng)?;
        if (step + 1) % 20 == 0 {
            let drawn = trainer.sample(128, &mut trial.stream("watch"))?;
            let on = drawn.iter().filter(|s| front.cells.contains(*s)).count();
            curve.push((step + 1) as f64, on as f64 / 128.0);
        }
    }
    let samples = trainer.sample(SAMPLES, &mut trial.stream("samples"))?;
    let on_front = samples.iter().filter(|s| front.cells.contains(*s)).count();
    let found: sequence_design::Result<Vec<Vec<f64>>> = samples.iter().map(|s| both(s)).collect();
    let found = found?;
    let mut counts = vec![0.0; SIDE * SIDE];
    samples
        .iter()
        .for_each(|s| counts[grid.index(s)] += 1.0 / SAMPLES as f64);
    let marks: Vec<bool> = (0..SIDE * SIDE)
        .map(|k| {
            front
                .cells
                .contains(&vec![(k / SIDE) as u16, (k % SIDE) as u16])
        })
        .collect();
    let caption = "512 samples on the grid (dark: many) and the true front (outlined)";
    Ok(TrialOutcome::default()
        .metric("on_front", on_front as f64 / SAMPLES as f64)
        .metric("coverage", pareto_coverage(&found, &front.points, 1e-12)?)
        .curve(curve)
        .picture(heat_map(caption, &[&counts], SIDE, &marks))
        .picture(fronts(
            "objectives of the samples (filled) and of the true front (rings)",
            ["Branin", "Currin"],
            &found,
            &front.points,
        )))
}

struct Front {
    cells: HashSet<Vec<u16>>,
    points: Vec<Vec<f64>>,
}

fn true_front(
    grid: &HyperGrid,
    both: impl Fn(&[u16]) -> sequence_design::Result<Vec<f64>>,
) -> Result<Front> {
    let side = grid.side as u16;
    let cells: Vec<Vec<u16>> = (0..side)
        .flat_map(|x| (0..side).map(move |y| vec![x, y]))
        .collect();
    let values: sequence_design::Result<Vec<Vec<f64>>> = cells.iter().map(|c| both(c)).collect();
    let values = values?;
    let mask = pareto_mask(&values);
    let kept = |k: &usize| mask[*k];
    Ok(Front {
        cells: (0..cells.len())
            .filter(kept)
            .map(|k| cells[k].clone())
            .collect(),
        points: (0..cells.len())
            .filter(kept)
            .map(|k| values[k].clone())
            .collect(),
    })
}

/// A table on the 8 x 8 grid with its usual reward, trained by trajectory balance.
fn exact(trial: &TrialContext) -> Result<TrialOutcome> {
    const STEPS: usize = 600;
    let grid = HyperGrid::new(2, 8)?;
    let env = Tabular::new(grid.clone(), 1000)?;
    let (law, _) = env.enumeration().target(|x| grid.reward(x))?;
    let config = PolicyConfig {
        hidden: vec![],
        backward: true,
        ..PolicyConfig::default()
    };
    let (vars, policy) = policy(trial, env.feature_width(), env.actions(), &config)?;
    let optimizer = adam(&vars, 0.05)?;
    let config = GflowConfig {
        signal: RewardSignal::scalar(1.0),
        batch: 128,
        exploration: Exploration {
            epsilon: 0.2,
            temperature: 1.0,
        },
        ..GflowConfig::default()
    };
    let score = |states: &[Vec<u16>]| -> sequence_design::Result<Vec<Vec<f64>>> {
        Ok(states.iter().map(|s| vec![grid.reward(s)]).collect())
    };
    let mut trainer = GflowTrainer::new(env.clone(), policy, optimizer, config, score)?;
    let mut rng = trial.stream("training");
    let mut curve = Curve::new("total variation from the exact law", "step").log_y();
    let learned = |policy: &Policy| env.enumeration().terminating(&env, policy, &[]);
    for step in 0..STEPS {
        trial.step(step, STEPS)?;
        if step == STEPS * 2 / 3 {
            candle_nn::Optimizer::set_learning_rate(trainer.optimizer_mut(), 0.005);
        }
        trainer.step(&mut rng)?;
        if (step + 1) % 20 == 0 {
            curve.push(
                (step + 1) as f64,
                total_variation(&learned(trainer.policy())?, &law),
            );
        }
    }
    let found = learned(trainer.policy())?;
    let ordered = |values: &[f64]| {
        let mut out = vec![0.0; 64];
        for (state, p) in env.enumeration().states().iter().zip(values) {
            out[grid.index(state)] = *p;
        }
        out
    };
    let caption = "learned law (left) and exact law (right)";
    Ok(TrialOutcome::default()
        .metric("tv", total_variation(&found, &law))
        .curve(curve)
        .picture(heat_map(
            caption,
            &[&ordered(&found), &ordered(&law)],
            8,
            &[false; 64],
        )))
}
