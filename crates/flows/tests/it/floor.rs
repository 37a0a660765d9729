//! Levels, predictions, samplers and the loop.

use crate::support::*;
use candle_core::{DType, Device, Tensor};
use flows::guidance::{CondRole, Query, Role, Unguided};
use flows::level::mix;
use flows::prediction::{replace_rows, select_rows};
use flows::sampler::Hook;
use flows::schedule::{Beta, Ddpm, Edm, RectifiedFlow, Schedule, Shift, VpSde};
use flows::stepper::Correction;
use flows::*;
use proptest::prelude::*;
use std::cell::Cell;

fn forms() -> Vec<Prediction> {
    vec![
        Prediction::Eps,
        Prediction::X0,
        Prediction::V,
        Prediction::Score,
        Prediction::Velocity(PathSpeed::DataMinusNoise),
        Prediction::Velocity(PathSpeed::NoiseMinusData),
        Prediction::Velocity(PathSpeed::Custom(|l| (l.sigma, -l.alpha))),
    ]
}

proptest! {
    #![proptest_config(cases(24))]

    /// Any prediction to any other and back, one level for all or one each.
    #[test]
    fn conversions_round_trip(angle in 0.05f64..1.5, seed in 0u64..1000, per_row: bool) {
        for (dtype, tol) in [(DType::F64, 1e-12), (DType::F32, 1e-6)] {
            let (x0, eps) = (normal(seed, &[3, 2, 2], dtype), normal(seed + 1, &[3, 2, 2], dtype));
            let level = |a: f64| Level::new(a.sin(), a.cos(), 0.0).unwrap();
            let levels = match per_row {
                false => Levels::Same(level(angle)),
                true => Levels::PerRow(vec![level(angle), level(0.3), level(1.2)]),
            };
            let x = mix(&x0, &eps, &levels).unwrap();
            let d = Denoised::from_raw(&x0, Prediction::X0, &x, &levels).unwrap();
            // Divisions by alpha and sigma lose as many digits.
            let worst = levels.values(3, |l| 1.0 / (l.alpha * l.sigma)).into_iter().fold(1.0, f64::max);
            for a in forms() {
                let raw = d.to_raw(a).unwrap();
                let back = Denoised::from_raw(&raw, a, &x, &levels).unwrap();
                prop_assert!(distance(&back.x0, &x0) < tol * 10.0 * worst.powi(2), "{a:?}");
                for b in forms() {
                    let (direct, round) = (d.to_raw(b).unwrap(), back.to_raw(b).unwrap());
                    let scale = values(&direct).iter().fold(1.0_f64, |m, x| m.max(x.abs()));
                    prop_assert!(distance(&direct, &round) < tol * 10.0 * scale * worst.powi(3));
                }
            }
        }
    }

    /// `at_lambda` finds the level whose `lambda` was asked for.
    #[test]
    fn schedules_invert(part in 0.01f64..0.99) {
        let ddpm = Ddpm::new(Beta::STABLE_DIFFUSION, 1000).unwrap();
        let schedules: [&dyn Schedule; 4] =
            [&ddpm, &VpSde::default(), &Edm::default(), &RectifiedFlow::default()];
        for schedule in schedules {
            let (from, to) = schedule.range();
            let level = schedule.level(from + part * (to - from)).unwrap();
            let back = schedule.at_lambda(level.lambda()).unwrap();
            prop_assert!((back.alpha - level.alpha).abs() < 1e-9);
            prop_assert!((back.sigma / level.sigma - 1.0).abs() < 1e-9);
            prop_assert!((back.model_time - level.model_time).abs() < 1e-6 * (1.0 + level.model_time.abs()));
        }
    }

    /// Replacing rows by themselves changes nothing; what was replaced is found again.
    #[test]
    fn rows_are_replaced_where_they_belong(rows in proptest::sample::subsequence(vec![0u32, 1, 2, 3], 0..4)) {
        let (x, new) = (normal(1, &[4, 3], DType::F64), normal(2, &[rows.len(), 3], DType::F64));
        let same = replace_rows(&x, &rows, &select_rows(&x, &rows).unwrap()).unwrap();
        prop_assert_eq!(bits(&same), bits(&x));
        let changed = replace_rows(&x, &rows, &new).unwrap();
        prop_assert_eq!(bits(&select_rows(&changed, &rows).unwrap()), bits(&new));
    }
}

fn vp_grid(steps: usize) -> Grid {
    Grid::uniform_lambda_between(&VpSde::default(), 1.0, 0.005, steps).unwrap()
}

fn sample(stepper: impl Stepper, grid: Grid, noise: &Tensor) -> Tensor {
    let mixture = mixture(noise.dtype());
    let condition = Condition::classes(&[1], &Device::Cpu).unwrap();
    let mut sampler = Sampler::new(&mixture, grid).stepper(stepper);
    sampler
        .sample(noise, &condition, None, &RandomStream::new(5))
        .unwrap()
        .x
}

#[test]
fn euler_is_ddim_for_every_schedule() {
    let noise = normal(3, &[4, 3], DType::F64);
    let flow = Grid::uniform_time_between(&RectifiedFlow::default(), 0.02, 1.0, 9).unwrap();
    let shifted = RectifiedFlow {
        shift: Shift::Constant(3.0),
        ..RectifiedFlow::default()
    };
    let edm = Grid::karras(&Edm::default(), 0.01, 20.0, 7.0, 9).unwrap();
    let grids = [
        vp_grid(9),
        edm,
        flow,
        Grid::uniform_time_between(&shifted, 0.02, 0.97, 9).unwrap(),
    ];
    for grid in grids {
        let ddim = sample(Ddim::default(), grid.clone(), &noise);
        assert!(distance(&ddim, &sample(Euler, grid, &noise)) < 1e-10);
    }
}

/// The slope of the logarithm of the error over the number of steps.
fn order(make: impl Fn() -> Box<dyn Stepper>) -> f64 {
    let noise = normal(4, &[8, 3], DType::F64);
    let fine = sample(Heun, vp_grid(1500), &noise);
    let error = |n| distance(&sample(make(), vp_grid(n), &noise), &fine).ln();
    (error(40) - error(160)) / 4.0_f64.ln()
}

#[test]
fn observed_orders() {
    let first = order(|| Box::new(Ddim::default()));
    assert!((0.8..1.2).contains(&first), "{first}");
    let second: [fn() -> Box<dyn Stepper>; 4] = [
        || Box::new(Heun),
        || Box::new(DpmSolverPP2M::default()),
        || Box::new(DpmSolverPP2M::new(Correction::Heun, 0)),
        || Box::new(DpmSolverPP2S::new(VpSde::default())),
    ];
    for (i, make) in second.into_iter().enumerate() {
        let found = order(make);
        assert!(found > 1.8, "{i}: {found}");
    }
    // With first steps as long as the others the third order shows in the size of the error only.
    let noise = normal(4, &[8, 3], DType::F64);
    let fine = sample(Heun, vp_grid(1000), &noise);
    let error = |stepper: Box<dyn Stepper>| distance(&sample(stepper, vp_grid(30), &noise), &fine);
    let third = error(Box::<DpmSolverPP3M>::default());
    assert!(
        third < 0.7 * error(Box::<DpmSolverPP2M>::default()),
        "{third}"
    );
}

/// The first two steps have lower orders of their own: they are so short here that their error is
/// of a higher order than the rest's.
#[test]
fn the_third_order_shows_behind_short_first_steps() {
    let schedule = VpSde::default();
    let noise = normal(4, &[8, 3], DType::F64);
    let ends = vp_grid(1);
    let [first, last] = [ends.levels()[0], ends.levels()[1]];
    let error = |n: usize, fine: &Tensor| {
        let (from, h) = (first.lambda(), (last.lambda() - first.lambda()) / n as f64);
        let short = 0.1 * h.powi(2);
        let mut levels = vec![first];
        for lambda in [from + short, from + 2.0 * short] {
            levels.push(schedule.at_lambda(lambda).unwrap());
        }
        levels.extend((1..n).map(|i| schedule.at_lambda(from + i as f64 * h).unwrap()));
        levels.push(last);
        let grid = Grid::custom(levels).unwrap();
        distance(&sample(DpmSolverPP3M::default(), grid, &noise), fine).ln()
    };
    let fine = sample(Heun, vp_grid(6000), &noise);
    let found = (error(60, &fine) - error(240, &fine)) / 4.0_f64.ln();
    assert!((2.7..3.4).contains(&found), "{found}");
}

/// For Gaussian data of variance `v` the flow is linear with a known factor.
#[test]
fn a_gaussian_is_scaled_by_its_closed_form() {
    let v = 0.4;
    let means = Tensor::zeros((1, 3), DType::F64, &Device::Cpu).unwrap();
    let gaussian = AnalyticMixture::new(&means, &[v], &[1.0]).unwrap();
    let grid = vp_grid(400);
    let noise = normal(6, &[5, 3], DType::F64);
    let x = Sampler::new(&gaussian, grid.clone())
        .stepper(Heun)
        .sample(&noise, &Condition::Null, None, &RandomStream::new(0))
        .unwrap()
        .x;
    let spread = |l: &Level| l.alpha.powi(2) * v + l.sigma.powi(2);
    let (first, last) = (grid.levels()[0], grid.levels()[400]);
    let factor = first.sigma * (spread(&last) / spread(&first)).sqrt();
    assert!(distance(&x, &noise.affine(factor, 0.0).unwrap()) < 1e-4);
}

#[test]
fn the_last_step_to_a_clean_level_returns_the_clean_sample() {
    let noise = normal(7, &[2, 3], DType::F64);
    let steppers: Vec<Box<dyn Stepper>> = vec![
        Box::new(Ddim::ancestral()),
        Box::new(Euler),
        Box::new(Heun),
        Box::new(DpmSolverPP2M::default()),
        Box::new(DpmSolverPP3M::default()),
        Box::new(DpmSolverPP2S::new(VpSde::default())),
    ];
    for stepper in steppers {
        let mixture = mixture(DType::F64);
        let grid = Grid::with_clean_end(vp_grid(6).levels().to_vec()).unwrap();
        let out = Sampler::new(&mixture, grid)
            .stepper(stepper)
            .record(true)
            .sample(&noise, &Condition::Null, None, &RandomStream::new(1))
            .unwrap();
        let trace = out.trace.unwrap();
        assert_eq!(bits(&out.x), bits(trace.x0.last().unwrap()));
        assert_eq!((trace.x.len(), trace.x0.len()), (8, 7));
    }
}

/// A flow starts without any signal, where `sigma / alpha` is infinite.
#[test]
fn pure_noise_is_a_legal_start_where_the_rule_allows_it() {
    let grid = Grid::uniform_time(&RectifiedFlow::default(), 8).unwrap();
    let noise = normal(8, &[3, 3], DType::F64);
    for stepper in [
        Box::new(Ddim::default()) as Box<dyn Stepper>,
        Box::new(DpmSolverPP2M::default()),
        Box::new(DpmSolverPP3M::default()),
        Box::new(DpmSolverPP2S::new(RectifiedFlow::default())),
    ] {
        let x = sample(stepper, grid.clone(), &noise);
        assert!(values(&x).iter().all(|v| v.is_finite()));
    }
    let mixture = mixture(DType::F64);
    let refused = Sampler::new(&mixture, grid)
        .stepper(Heun)
        .sample(&noise, &Condition::Null, None, &RandomStream::new(0))
        .unwrap_err();
    assert!(refused.to_string().contains("alpha = 0"), "{refused}");
}

/// Elementwise, so that rows cannot depend on the size of a matrix product.
fn elementwise() -> impl Denoiser {
    Closure::new(Prediction::X0, |x, levels, _| {
        levels.scale(&x.tanh()?, |l| l.alpha)
    })
}

#[test]
fn rows_do_not_depend_on_their_batch() {
    let noise = normal(9, &[4, 3], DType::F32);
    let denoiser = elementwise();
    let run = |noise: &Tensor, rng: &RandomStream, first: usize| {
        let streams = (0..noise.dims()[0]).map(|i| rng.split_index("row", (first + i) as u64));
        let mut sampler = Sampler::new(&denoiser, vp_grid(7)).stepper(Ddim::ancestral());
        let x = sampler.grid().start(noise).unwrap();
        let streams = Noise::Rows(streams.collect());
        let out = sampler.sample_from(&x, &Condition::Null, None, streams);
        bits(&out.unwrap().x)
    };
    let rng = RandomStream::new(2);
    let all = run(&noise, &rng, 0);
    for i in 0..4 {
        let one = run(&noise.narrow(0, i, 1).unwrap(), &rng, i);
        assert_eq!(one, all[3 * i..3 * (i + 1)]);
    }
}

#[test]
fn network_calls_may_be_split() {
    let noise = normal(10, &[5, 3], DType::F64);
    let denoiser = elementwise();
    let run = |rows| {
        let mut sampler = Sampler::new(&denoiser, vp_grid(4)).max_rows(rows);
        let rng = RandomStream::new(0);
        let out = sampler
            .sample(&noise, &Condition::Null, None, &rng)
            .unwrap();
        (bits(&out.x), out.nfe)
    };
    let (whole, parts) = (run(100), run(2));
    assert_eq!(whole.0, parts.0);
    assert_eq!((whole.1.main, parts.1.main), (20, 20));
    assert_eq!(
        (whole.1.sequential_calls, parts.1.sequential_calls),
        (4, 12)
    );
}

/// A rule that asks in every way there is.
struct Curious;

impl Guidance for Curious {
    fn guide(&mut self, _: &StepCx, net: &mut Evaluator) -> Result<Denoised> {
        let both = [
            Query::main(CondRole::Positive),
            Query::main(CondRole::Negative),
            Query::main(CondRole::Null).of(Role::Weak),
            Query::main(CondRole::Null).rows(vec![2, 0]),
        ];
        let answers = net.ask(&both)?;
        assert_eq!(answers[3].x0.dims()[0], 2);
        // Known already, all of it and in parts.
        let again = net.one(Query::main(CondRole::Positive).rows(vec![1]))?;
        assert_eq!(bits(&again.x0), bits(&answers[0].select(&[1])?.x0));
        let given = Condition::classes(&[2], &Device::Cpu)?;
        net.one(Query::main(CondRole::Given(given)).rows(vec![0]))?;
        net.conditional()
    }
}

#[test]
fn every_evaluation_is_counted_once() {
    let seen = Cell::new((0, 0));
    let mixture = mixture(DType::F64);
    let counting = Closure::new(Prediction::X0, |x, levels, c| {
        let (calls, rows) = seen.get();
        seen.set((calls + 1, rows + x.dims()[0]));
        mixture.raw(x, levels, c)
    });
    let weak = elementwise();
    let class = |k| Condition::classes(&[k], &Device::Cpu).unwrap();
    let out = Sampler::new(&counting, vp_grid(3))
        .guidance(Curious)
        .weak(&weak)
        .null(class(3))
        .sample(
            &normal(1, &[3, 3], DType::F64),
            &class(0),
            Some(&class(1)),
            &RandomStream::new(0),
        )
        .unwrap();
    // Three rows wanted, three unwanted, two of the null class in one call, one more by itself.
    assert_eq!(seen.get(), (3 * 2, 3 * (3 + 3 + 2 + 1)));
    assert_eq!(out.nfe.main, seen.get().1);
    assert_eq!((out.nfe.weak, out.nfe.sequential_calls), (9, 9));
    assert_eq!(out.nfe.per_sample(3), f64::from(27 + 9) / 3.0);
}

#[test]
fn clipping_and_hooks_are_applied() {
    struct Halve;
    impl Hook for Halve {
        fn after_step(&mut self, _: &StepCx, x: Tensor) -> Result<Tensor> {
            Ok((x * 0.5)?)
        }
    }
    let large = Closure::new(Prediction::X0, |x, _, _| Ok(x.affine(0.0, 3.0)?));
    let clean = Grid::with_clean_end(vec![Level::new(0.1, 1.0, 0.0).unwrap()]).unwrap();
    let noise = normal(1, &[2, 3], DType::F64);
    let run = |clip, hook: bool| {
        let mut sampler = Sampler::new(&large, clean.clone()).clip(clip);
        if hook {
            sampler = sampler.hook(Halve);
        }
        let rng = RandomStream::new(0);
        values(
            &sampler
                .sample(&noise, &Condition::Null, None, &rng)
                .unwrap()
                .x,
        )
    };
    assert_eq!(run(Clip::None, false), vec![3.0; 6]);
    assert_eq!(run(Clip::Static(0.5), false), vec![0.5; 6]);
    assert_eq!(run(Clip::Dynamic { p: 0.9 }, true), vec![0.5; 6]);
}

#[test]
fn a_run_can_be_watched_and_stopped() {
    let denoiser = elementwise();
    let mut sampler = Sampler::new(&denoiser, vp_grid(6));
    let noise = normal(1, &[1, 2], DType::F64);
    let rng = RandomStream::new(0);
    let mut run = sampler.iter(&noise, &Condition::Null, None, &rng).unwrap();
    let third = run.nth(2).unwrap().unwrap();
    assert_eq!((third.step, run.nfe().main), (2, 3));
    assert_eq!(bits(run.x()), bits(&third.x));
    assert_eq!(run.count(), 3);
}

#[test]
fn preconditioning_and_flows_are_denoisers_on_any_schedule() {
    let mixture = mixture(DType::F64);
    let x = normal(2, &[4, 3], DType::F64);
    let level = VpSde::default().level(0.4).unwrap();
    let exact = mixture
        .denoise(&x, &level.into(), &Condition::Null)
        .unwrap();
    let flow = FromVelocity(mixture.clone());
    let through = flow.denoise(&x, &level.into(), &Condition::Null).unwrap();
    assert!(distance(&exact.x0, &through.x0) < 1e-12);
    // The network that makes the preconditioned model exact.
    let s = 0.5;
    let net = |input: &Tensor, c_noise: &Tensor, c: &Condition| {
        let sigma = (4.0 * values(c_noise)[0]).exp();
        let norm = sigma.hypot(s);
        let x = (input * norm)?;
        let clean = mixture.raw(&x, &Edm::at_sigma(sigma)?.into(), c)?;
        let skip = (x * (s / norm).powi(2))?;
        Ok(((clean - skip)? * (norm / (sigma * s)))?)
    };
    let wrapped = EdmPrecond::new(net, s).unwrap();
    let again = wrapped
        .denoise(&x, &level.into(), &Condition::Null)
        .unwrap();
    assert!(distance(&exact.x0, &again.x0) < 1e-10);
    assert!(EdmPrecond::new(net, 0.0).is_err());
}

#[test]
fn a_graph_that_is_cut_is_found() {
    let x = normal(2, &[4, 3], DType::F32);
    let level = Levels::Same(Level::new(0.6, 0.8, 0.0).unwrap());
    let mut rng = RandomStream::new(0);
    let good = elementwise();
    denoiser::grad_check(&good, &x, &level, &Condition::Null, &mut rng).unwrap();
    let cut = Closure::new(Prediction::X0, |x, _, _| {
        Ok((x + candle_nn::ops::softmax_last_dim(&(x * 3.0)?)?)?)
    });
    let found = denoiser::grad_check(&cut, &x, &level, &Condition::Null, &mut rng);
    assert!(
        matches!(found, Err(Error::WrongGradient { .. })),
        "{found:?}"
    );
}

#[test]
fn discrete_grids_count_like_their_field() {
    let ddpm = Ddpm::new(Beta::STABLE_DIFFUSION, 1000).unwrap();
    let times = |spacing, steps| -> Vec<f64> {
        let grid = Grid::discrete(&ddpm, spacing, steps).unwrap();
        grid.levels()[..steps]
            .iter()
            .map(|l| l.model_time)
            .collect()
    };
    let leading = times(grid::Spacing::Leading { offset: 1 }, 4);
    assert_eq!(leading, [751.0, 501.0, 251.0, 1.0]);
    assert_eq!(
        times(grid::Spacing::Trailing, 4),
        [999.0, 749.0, 499.0, 249.0]
    );
    assert_eq!(
        times(grid::Spacing::Linspace, 4),
        [999.0, 666.0, 333.0, 0.0]
    );
    let image = vp_grid(10).truncate(0.35).unwrap();
    assert_eq!(
        (image.steps(), image.levels()),
        (3, &vp_grid(10).levels()[7..])
    );
}

#[test]
fn bad_input_is_a_named_error() {
    let mixture = mixture(DType::F64);
    let noise = normal(1, &[2, 3], DType::F64);
    let rng = RandomStream::new(0);
    let fails = |result: Result<Sampled>, words: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    let levels = vp_grid(4).levels().to_vec();
    let mut turned = levels.clone();
    turned.swap(1, 2);
    assert!(Grid::custom(turned)
        .unwrap_err()
        .to_string()
        .contains("step 1"));
    assert!(Grid::custom(levels[..1].to_vec()).is_err());
    assert!(Grid::uniform_time(&VpSde::default(), 0).is_err());
    assert!(vp_grid(4).truncate(0.1).is_err());
    assert!(VpSde::default().level(1.5).is_err());
    assert!(Level::new(0.0, 0.0, 0.0).is_err() && Level::new(1.0, f64::NAN, 0.0).is_err());

    let classes = Condition::classes(&[0, 1, 2], &Device::Cpu).unwrap();
    let run = |denoiser: &dyn Denoiser, noise: &Tensor, c: &Condition| {
        Sampler::new(denoiser, vp_grid(4)).sample(noise, c, None, &rng)
    };
    fails(run(&mixture, &noise, &classes), "classes");
    fails(
        run(&mixture, &normal(1, &[2, 4], DType::F64), &Condition::Null),
        "3 numbers",
    );
    let nan = Tensor::full(f64::NAN, (2, 3), &Device::Cpu).unwrap();
    fails(run(&mixture, &nan, &Condition::Null), "first sample");
    let broken = Closure::new(Prediction::X0, |x, levels, _| {
        levels.scale(x, |l| if l.sigma < 0.5 { f64::NAN } else { 1.0 })
    });
    fails(run(&broken, &noise, &Condition::Null), "step 3");
    let wrong = Closure::new(Prediction::X0, |x, _, _| Ok(x.narrow(1, 0, 1)?));
    fails(run(&wrong, &noise, &Condition::Null), "network's output");

    let pure = Levels::Same(Level::new(0.0, 1.0, 0.0).unwrap());
    for form in [Prediction::Eps, Prediction::Score] {
        let error = Denoised::from_raw(&noise, form, &noise, &pure).unwrap_err();
        assert!(matches!(error, Error::Undetermined { .. }), "{error}");
    }
    let edm = Levels::Same(Level::new(1.0, 3.0, 0.0).unwrap());
    assert!(Denoised::from_raw(&noise, Prediction::V, &noise, &edm).is_err());
    let clean = Levels::Same(Level::new(1.0, 0.0, 0.0).unwrap());
    let d = Denoised::from_raw(&noise, Prediction::X0, &noise, &clean).unwrap();
    assert!(d.eps().is_err() && d.score().is_err() && d.v().is_err());
    // An empty batch is a result.
    let none = Tensor::zeros((0, 3), DType::F64, &Device::Cpu).unwrap();
    let out = Sampler::new(&elementwise(), vp_grid(4))
        .guidance(Unguided)
        .sample(&none, &Condition::Null, None, &rng)
        .unwrap();
    assert_eq!((out.x.dims(), out.nfe.main), (&[0, 3][..], 0));
}

/// The grid matters as much as the order; medians over 100 samples of the exact model of 400 digits.
#[test]
fn second_order_wins_on_even_lambdas() {
    let digits = datasets::digits()
        .unwrap()
        .inputs
        .narrow(0, 0, 400)
        .unwrap();
    let data = digits.affine(2.0, -1.0).unwrap();
    let model = AnalyticMixture::kernel_density(&data, 0.2).unwrap();
    let noise = normal(1, &[100, 64], DType::F32);
    let run_on = |stepper: Box<dyn Stepper>, grid: Grid| {
        let mut sampler = Sampler::new(&model, grid).stepper(stepper);
        let rng = RandomStream::new(0);
        sampler
            .sample(&noise, &Condition::Null, None, &rng)
            .unwrap()
            .x
    };
    let run = |stepper, steps| run_on(stepper, vp_grid(steps));
    let fine = run(Box::<DpmSolverPP2M>::default(), 500);
    let error = |x: Tensor| {
        let squares = (x - &fine).unwrap().sqr().unwrap().sum(1).unwrap();
        let mut rows = values(&squares);
        rows.sort_by(f64::total_cmp);
        rows[50].sqrt()
    };
    for (steps, factor) in [(10, 0.4), (20, 0.2), (40, 0.12)] {
        let ddim = error(run(Box::<Ddim>::default(), steps));
        let second = error(run(Box::<DpmSolverPP2M>::default(), steps));
        assert!(second <= factor * ddim, "{steps}: {second} against {ddim}");
    }
    // On even times it wins nothing at so few steps.
    let even = || Grid::uniform_time_between(&VpSde::default(), 1.0, 0.005, 10).unwrap();
    let ddim = error(run_on(Box::<Ddim>::default(), even()));
    let second = error(run_on(Box::<DpmSolverPP2M>::default(), even()));
    assert!(second > 0.9 * ddim, "{second} against {ddim}");
}
