use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Optimizer, VarBuilder};
use nn::init::SeededVars;
use optim::{AdamW, AdamWConfig, ParamGroup, Stateful};
use proptest::prelude::*;
use sequence_design::masked_diffusion::*;
use sequence_design::{RandomStream, Result};
use tensor_core::autograd::grad_check;

#[test]
fn reference() {
    let report = FILES.verify("drakes", sequence_design::verify::drakes);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 20);
}

#[test]
fn reference_under_another_prefix() {
    let report = FILES.verify_variant(
        "drakes",
        |tensors, _| {
            let renamed = tensors.iter().map(|(n, t)| (format!("c1.{n}"), t.clone()));
            *tensors = renamed.collect();
        },
        sequence_design::verify::drakes,
    );
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 20);
}

const LENGTH: usize = 6;

type Net = MaskedDiffusion<CnnDenoiser>;

fn model(seed: u64, dtype: DType) -> (SeededVars, Net) {
    let vars = SeededVars::new(&RandomStream::new(seed));
    let net = rebuilt(vars.builder(dtype, &Device::Cpu));
    (vars, net)
}

fn rebuilt(vb: VarBuilder) -> Net {
    let config = CnnConfig {
        hidden: 8,
        kernel: 3,
        dilations: vec![1, 2],
        stacks: 1,
        time: false,
        ..CnnConfig::dna()
    };
    let dtype = vb.dtype();
    let net = CnnDenoiser::new(&config, vb, &RandomStream::new(0)).unwrap();
    MaskedDiffusion::new(net, 4, dtype, &Device::Cpu).unwrap()
}

fn reward(x: &Tensor) -> Result<Tensor> {
    let w = Tensor::new(&[0.3, 1.0, -0.5, 0.1], &Device::Cpu)?.to_dtype(x.dtype())?;
    Ok(x.broadcast_mul(&w)?.sum(2)?.sum(1)?.tanh()?)
}

fn config() -> DrakesConfig {
    DrakesConfig {
        steps_per_traj: 6,
        truncate_steps: 3,
        alpha: 0.1,
        batch: 3,
        accumulate: 2,
        ..DrakesConfig::default()
    }
}

fn uniforms(seed: u64, count: usize) -> Vec<f64> {
    let mut out = vec![0.0; count];
    RandomStream::new(seed).fill_uniform(&mut out);
    out
}

fn trainer<'a>(
    new: u64,
    old: u64,
    config: DrakesConfig,
    reward: &'a dyn DifferentiableReward,
) -> (
    SeededVars,
    DrakesTrainer<'a, CnnDenoiser, CnnDenoiser, AdamW>,
) {
    let (vars, model) = model(new, DType::F64);
    let (_, frozen) = self::model(old, DType::F64);
    let group = ParamGroup::named(vars.trainable(), AdamWConfig::adam(1e-3));
    let adam = AdamW::with_groups(vec![group]).unwrap();
    let all = vars.trainable();
    let trainer = DrakesTrainer::new(model, frozen, all, reward, adam, config, LENGTH).unwrap();
    (vars, trainer)
}

#[test]
fn schedules_agree_with_their_derivatives() {
    let schedules = [
        NoiseSchedule::default(),
        NoiseSchedule::Cosine { eps: 1e-3 },
        NoiseSchedule::CosineSqr { eps: 1e-3 },
        NoiseSchedule::Linear {
            min: 0.0,
            max: 10.0,
        },
        NoiseSchedule::Geometric {
            min: 1e-3,
            max: 1.0,
        },
    ];
    for schedule in schedules {
        schedule.validate().unwrap();
        for t in [0.1, 0.5, 0.9] {
            let h = 1e-6;
            let slope = (schedule.total(t + h) - schedule.total(t - h)) / (2.0 * h);
            assert!(
                (slope - schedule.rate(t)).abs() < 1e-6 * slope.abs().max(1.0),
                "{schedule:?}"
            );
        }
        let steps = schedule.steps(8, 1e-5).unwrap();
        assert!(steps.iter().all(|s| s.masked > s.masked_after));
    }
    for t in [1e-3, 0.3, 1.0] {
        assert!((NoiseSchedule::default().weight(t) * t - 1.0).abs() < 1e-9);
    }
    assert!(NoiseSchedule::Linear { min: 1.0, max: 1.0 }
        .validate()
        .is_err());
    assert!(NoiseSchedule::default().steps(0, 1e-5).is_err());
}

proptest! {
    #![proptest_config(cases(16))]

    /// Masked positions have a law over the real tokens, the others are certain.
    #[test]
    fn rows_are_laws(seed in 0u64..1000) {
        let (_, model) = model(seed, DType::F64);
        let mut rng = RandomStream::new(seed);
        let tokens: Vec<u32> = (0..2 * LENGTH).map(|_| rng.below(5).unwrap() as u32).collect();
        let x = Tensor::from_slice(&tokens, (2, LENGTH), &Device::Cpu).unwrap();
        let x = one_hot(&x, 5, DType::F64).unwrap();
        let p = values(&model.log_p_x0(&x, &[0.0; 2], false).unwrap().exp().unwrap());
        for (token, row) in tokens.iter().zip(p.chunks(5)) {
            prop_assert!((row[..4].iter().sum::<f64>() - 1.0).abs() < 1e-12 && row[4] == 0.0);
            if *token < 4 {
                prop_assert_eq!(row[*token as usize], 1.0);
            }
        }
    }

    /// The hard part of a trajectory is the sampler's; the cache changes no token; a cold relaxed step
    /// is a hard one.
    #[test]
    fn trajectories_are_samples(seed in 0u64..1000) {
        let (_, model) = model(seed, DType::F64);
        let u = uniforms(seed, 6 * 3 * LENGTH * 5);
        let relaxation = Relaxation { steps: 6, truncate_steps: 0, temperature: 1.0, copy_flag_temp: None };
        let hard = model.relaxed_trajectory_with(3, LENGTH, &relaxation, &u).unwrap();
        let cold = Relaxation { truncate_steps: 6, temperature: 1e-6, ..relaxation };
        let cold = model.relaxed_trajectory_with(3, LENGTH, &cold, &u).unwrap();
        for (a, b) in hard.iter().zip(&cold) {
            let (a, b) = (values(a), values(b));
            prop_assert!(a.iter().zip(&b).all(|(x, y)| (x - y).abs() < 1e-9));
        }
        let plain = |cache| {
            let config = SampleConfig { steps: 6, cache, ..SampleConfig::default() };
            model.sample_with(3, LENGTH, &config, &u).unwrap()
        };
        let (with, without) = (plain(true), plain(false));
        prop_assert_eq!(values(&with.tokens), values(&without.tokens));
        prop_assert!(with.evaluations <= without.evaluations);
        let last = values(&hard[6].argmax(2).unwrap());
        for (a, b) in last.iter().zip(values(&with.tokens)) {
            prop_assert!(*a == b || *a == 4.0);
        }
    }
}

#[test]
fn fixed_tokens_stay_and_rows_do_not_depend_on_their_batch() {
    let (_, model) = model(1, DType::F32);
    let mask = 4u32;
    let fixed = Tensor::new(&[[0u32, mask, 3, mask, mask, 1], [mask; 6]], &Device::Cpu).unwrap();
    let config = SampleConfig {
        steps: 8,
        ..SampleConfig::default()
    };
    let rng = RandomStream::new(3);
    let both = model
        .sample(2, LENGTH, Some(&fixed), &config, &rng)
        .unwrap()
        .tokens
        .to_vec2::<u32>()
        .unwrap();
    assert_eq!([both[0][0], both[0][2], both[0][5]], [0, 3, 1]);
    assert!(both.iter().flatten().all(|t| *t < 4));
    let first = fixed.narrow(0, 0, 1).unwrap();
    let alone = model
        .sample(1, LENGTH, Some(&first), &config, &rng)
        .unwrap()
        .tokens
        .to_vec2::<u32>()
        .unwrap();
    assert_eq!(alone[0], both[0]);
    assert!(model.sample(0, LENGTH, None, &config, &rng).is_err());
    let wrong = Tensor::new(&[[9u32; 6]], &Device::Cpu).unwrap();
    assert!(model
        .sample(1, LENGTH, Some(&wrong), &config, &rng)
        .is_err());
}

#[test]
fn networks_give_every_variable_a_gradient() {
    let rng = RandomStream::new(1);
    let vars = SeededVars::new(&rng);
    let config = CnnConfig {
        hidden: 6,
        stacks: 1,
        dropout: 0.1,
        ..CnnConfig::dna()
    };
    let cnn = CnnDenoiser::new(&config, vars.builder(DType::F32, &Device::Cpu), &rng).unwrap();
    let mut timed = MaskedDiffusion::new(cnn, 4, DType::F32, &Device::Cpu).unwrap();
    timed.time_conditioning = true;
    let x0 = Tensor::new(&[[0u32, 1, 2, 3, 0], [3, 2, 1, 0, 3]], &Device::Cpu).unwrap();
    let loss = timed.nll(&x0, None, &mut rng.clone()).unwrap().loss;
    let trained: Vec<(String, Var)> = vars
        .trainable()
        .into_iter()
        .filter(|(n, _)| n != "frequencies")
        .collect();
    grad_check(&[&loss], &trained).unwrap();
    // Answers of a network that sees the level cannot be kept.
    let error = timed
        .sample(1, 5, None, &SampleConfig::default(), &rng)
        .unwrap_err();
    assert!(error.to_string().contains("cache"), "{error}");
    let config = SampleConfig {
        cache: false,
        steps: 4,
        ..SampleConfig::default()
    };
    timed.sample(1, 5, None, &config, &rng).unwrap();

    let vars = SeededVars::new(&rng);
    let config = TransformerConfig {
        vocab: 4,
        length: 5,
        width: 8,
        heads: 2,
        layers: 2,
    };
    let net = TransformerDenoiser::new(&config, vars.builder(DType::F64, &Device::Cpu)).unwrap();
    let model = MaskedDiffusion::new(net, 4, DType::F64, &Device::Cpu).unwrap();
    let attention = Tensor::new(
        &[[1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0, 0.0]],
        &Device::Cpu,
    )
    .unwrap();
    let nll = model.nll(&x0, Some(&attention), &mut rng.clone()).unwrap();
    grad_check(&[&nll.loss], &vars.trainable()).unwrap();
    let zeros = attention.zeros_like().unwrap();
    assert!(model.nll(&x0, Some(&zeros), &mut rng.clone()).is_err());
    let guided = ClassifierFree {
        conditional: &model.denoiser,
        unconditional: &model.denoiser,
        weight: 3.0,
    };
    let x = one_hot(&x0, 5, DType::F64).unwrap();
    let sigma = Tensor::zeros(2, DType::F64, &Device::Cpu).unwrap();
    let (a, b) = (
        guided.logits(&x, &sigma, false).unwrap(),
        model.denoiser.logits(&x, &sigma, false).unwrap(),
    );
    assert!(values(&a)
        .iter()
        .zip(values(&b))
        .all(|(a, b)| (a - b).abs() < 1e-12));
    assert!(model
        .nll(
            &Tensor::new(&[[4u32; 5]], &Device::Cpu).unwrap(),
            None,
            &mut rng.clone()
        )
        .is_err());
    assert!(model.log_likelihood(&x0, 4, 0, &mut rng.clone()).is_err());
    let likely = model.log_likelihood(&x0, 16, 4, &mut rng.clone()).unwrap();
    assert!(likely.iter().all(|l| *l < 0.0 && *l > -20.0), "{likely:?}");
}

/// The whole loss against central differences, without straight-through.
#[test]
fn the_gradient_is_that_of_the_loss() {
    let u = uniforms(5, 6 * 3 * LENGTH * 5);
    for kl in [KlForm::Path, KlForm::Released] {
        let config = DrakesConfig {
            straight_through: false,
            kl,
            ..config()
        };
        let (vars, trainer) = trainer(1, 2, config, &reward);
        let run = trainer.trajectory_with(&u, 0).unwrap();
        let mut rng = RandomStream::new(9);
        for (name, var) in vars.trainable() {
            let direction = rng
                .normal(0.0, 1.0, var.shape(), DType::F64, &Device::Cpu)
                .unwrap();
            let exact = run.grads.get(&var).unwrap();
            let exact = values(&(exact * &direction).unwrap().sum_all().unwrap())[0];
            let start = var.as_detached_tensor().copy().unwrap();
            let h = 1e-6;
            let at = |sign: f64| {
                let moved = (&start + direction.affine(sign * h, 0.0).unwrap()).unwrap();
                var.set(&moved).unwrap();
                trainer.trajectory_with(&u, 0).unwrap().loss
            };
            let numeric = (at(1.0) - at(-1.0)) / (2.0 * h);
            var.set(&start).unwrap();
            assert!(
                (numeric - exact).abs() < 1e-5 * exact.abs().max(1e-2),
                "{name}: {numeric} {exact}"
            );
        }
    }
}

#[test]
fn checkpointed_trajectories_have_the_same_gradient() {
    let u = uniforms(5, 6 * 3 * LENGTH * 5);
    for kl in [KlForm::Path, KlForm::Released, KlForm::None] {
        let run = |checkpoint| {
            let config = DrakesConfig {
                kl,
                checkpoint,
                copy_flag_temp: Some(0.5),
                ..config()
            };
            let (vars, trainer) = trainer(1, 2, config, &reward);
            let run = trainer.trajectory_with(&u, 0).unwrap();
            let grads: Vec<f64> = vars
                .trainable()
                .iter()
                .flat_map(|(_, v)| values(run.grads.get(v).unwrap()))
                .collect();
            (run.loss, grads)
        };
        let (a, b) = (run(false), run(true));
        assert!((a.0 - b.0).abs() < 1e-12);
        assert!(a.1.iter().zip(&b.1).all(|(x, y)| (x - y).abs() < 1e-12));
    }
}

#[test]
fn two_equal_models_do_not_diverge() {
    let u = uniforms(5, 6 * 3 * LENGTH * 5);
    let constant = |x: &Tensor| -> Result<Tensor> { Ok((x * x.zeros_like()?)?.sum(2)?.sum(1)?) };
    let (vars, trainer) = trainer(1, 1, config(), &constant);
    let run = trainer.trajectory_with(&u, 0).unwrap();
    assert!(run.kl.iter().flatten().all(|kl| kl.abs() < 1e-14));
    for (_, var) in vars.trainable() {
        assert!(run
            .grads
            .get(&var)
            .is_none_or(|g| values(g).iter().all(|x| x.abs() < 1e-13)));
    }
    let (_, other) = self::trainer(1, 2, config(), &constant);
    let run = other.trajectory_with(&u, 0).unwrap();
    assert!(run.kl.iter().flatten().all(|kl| *kl >= -1e-14) && run.kl[0][0] > 0.0);
    // A part of the hard steps, that many times: right in the mean.
    let strided = DrakesConfig {
        kl_stride: 3,
        ..config()
    };
    let (_, strided) = self::trainer(1, 2, strided, &constant);
    let mean: f64 = (0..3)
        .map(|first| {
            strided.trajectory_with(&u, first).unwrap().kl[..3]
                .concat()
                .iter()
                .sum::<f64>()
                / 3.0
        })
        .sum();
    assert!((mean - run.kl[..3].concat().iter().sum::<f64>()).abs() < 1e-12);
}

#[test]
fn training_raises_the_reward_and_resumes_with_the_same_bits() {
    let config = DrakesConfig {
        batch: 8,
        accumulate: 1,
        alpha: 1e-3,
        ..config()
    };
    let (vars, mut whole) = trainer(1, 1, config.clone(), &reward);
    whole.optimizer_mut().set_learning_rate(2e-2);
    let mut rng = RandomStream::new(4);
    let run = |t: &mut DrakesTrainer<_, _, _>, rng: &mut RandomStream, n| {
        (0..n).map(|_| t.step(rng).unwrap()).collect::<Vec<_>>()
    };
    let early = run(&mut whole, &mut rng, 15);
    let saved = (
        whole.optimizer_mut().state().unwrap(),
        rng.state(),
        whole.updates(),
    );
    let weights: Vec<Tensor> = vars
        .trainable()
        .iter()
        .map(|(_, v)| v.as_detached_tensor().copy().unwrap())
        .collect();
    let late = run(&mut whole, &mut rng, 15);
    assert!(
        late[14].reward_hard > early[0].reward_hard + 0.3,
        "{} {}",
        early[0].reward_hard,
        late[14].reward_hard
    );
    let (again, mut resumed) = trainer(1, 1, config, &reward);
    resumed.optimizer_mut().set_learning_rate(2e-2);
    again
        .trainable()
        .iter()
        .zip(&weights)
        .for_each(|((_, var), w)| var.set(w).unwrap());
    resumed.optimizer_mut().load_state(&saved.0).unwrap();
    resumed.set_updates(saved.2);
    let mut rng = RandomStream::from_state(&saved.1);
    assert_eq!(run(&mut resumed, &mut rng, 15), late);
    let all = |vars: &SeededVars| {
        vars.trainable()
            .iter()
            .map(|(_, v)| bits(v))
            .collect::<Vec<_>>()
    };
    assert_eq!(all(&vars), all(&again));
}

/// Constants in the frozen model change nothing but the work, more relaxed steps than there are are
/// all of them, and a judge sees what the reward sees.
#[test]
fn one_update_in_three_ways() {
    let all = DrakesConfig {
        truncate_steps: 6,
        ..config()
    };
    let more = DrakesConfig {
        truncate_steps: 60,
        ..config()
    };
    let run = |config: &DrakesConfig, constants: bool| {
        let (vars, new) = model(1, DType::F64);
        let (old_vars, old) = model(2, DType::F64);
        let old = match constants {
            true => rebuilt(old_vars.frozen(DType::F64, &Device::Cpu).unwrap()),
            false => old,
        };
        let group = ParamGroup::named(vars.trainable(), AdamWConfig::adam(1e-3));
        let adam = AdamW::with_groups(vec![group]).unwrap();
        let names = vars.trainable();
        let config = config.clone();
        let trainer = DrakesTrainer::new(new, old, names, &reward, adam, config, LENGTH);
        let mut trainer = trainer.unwrap().judged_by(&reward);
        let report = trainer.step(&mut RandomStream::new(3)).unwrap();
        assert_eq!(report.reward_eval, Some(report.reward_hard));
        let vars = vars.trainable();
        let bits: Vec<_> = vars.iter().map(|(_, v)| bits(v)).collect();
        (report, bits)
    };
    let first = run(&all, false);
    assert!(first == run(&all, true));
    assert!(first == run(&more, true));
    let (_, mut plain) = trainer(1, 2, all, &reward);
    let report = plain.step(&mut RandomStream::new(3)).unwrap();
    assert_eq!(report.reward_eval, None);
}

#[test]
fn bad_settings_and_rewards_are_named() {
    type Change = fn(&mut DrakesConfig);
    let cases: [(Change, &str); 7] = [
        (|c| c.truncate_steps = 0, "truncate_steps"),
        (
            |c| c.gumbel_temp = Temperature::Constant(0.0),
            "gumbel_temp",
        ),
        (|c| c.alpha = f64::NAN, "alpha"),
        (|c| c.grad_clip = 0.0, "grad_clip"),
        (|c| c.batch = 0, "batch"),
        (|c| c.kl_stride = 0, "kl_stride"),
        (|c| c.copy_flag_temp = Some(-1.0), "copy_flag_temp"),
    ];
    for (change, field) in cases {
        let mut bad = config();
        change(&mut bad);
        let error = bad.validate().unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
    let looked_up =
        |x: &Tensor| -> Result<Tensor> { Ok(x.argmax(2)?.to_dtype(DType::F64)?.sum(1)?) };
    let (vars, new) = model(1, DType::F64);
    let (_, frozen) = model(2, DType::F64);
    let sgd = candle_nn::SGD::new(vec![], 0.1).unwrap();
    let failed = DrakesTrainer::new(
        new,
        frozen,
        vars.trainable(),
        &looked_up,
        sgd,
        config(),
        LENGTH,
    );
    let error = failed.err().unwrap().to_string();
    assert!(error.contains("look-up"), "{error}");
    let nan = |x: &Tensor| -> Result<Tensor> { Ok(x.affine(f64::NAN, 0.0)?.sum(2)?.sum(1)?) };
    let (vars, mut trainer) = trainer(1, 2, config(), &nan);
    let before: Vec<_> = vars.trainable().iter().map(|(_, v)| bits(v)).collect();
    assert!(trainer.step(&mut RandomStream::new(1)).is_err());
    assert_eq!(
        before,
        vars.trainable()
            .iter()
            .map(|(_, v)| bits(v))
            .collect::<Vec<_>>()
    );
}
