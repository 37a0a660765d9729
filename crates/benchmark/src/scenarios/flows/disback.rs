//! DisBack on handwritten digits: one-step distillation along a backtracked path.

use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    Suite, TrialContext, TrialOutcome,
};
use crate::scenarios::generation::{digits, frechet, image_grid, trained_once, Cloud};
use crate::Result;
use candle_core::{Tensor, Var};
use candle_nn::ModuleT;
use flows::coupling::{Examples, Source};
use flows::distillation::{
    fake_loss, DegradationRecorder, DenoiserGenerator, DisBack, KarrasSigmas, OneStepGenerator,
    Path, Player, ScoreDistill, ScoreDistillConfig,
};
use flows::schedule::Edm;
use flows::train::{TrainConfig, Trainer};
use flows::{Condition, Denoiser, EdmPrecond, Levels, RandomStream};
use nn::init::SeededVars;
use nn::models::{Activation, Mlp, MlpConfig};
use optim::{AdamW, AdamWConfig};

const SIGMA_DATA: f64 = 0.75;
pub(crate) const STUDENT_SIGMA: f64 = 5.0;
const BATCH: usize = 128;
const TEACHER_BATCH: usize = 256;
const SAMPLES: usize = 2000;
/// Where the distance is measured, as fifteenths of the iterations.
const MARKS: [usize; 7] = [1, 3, 5, 7, 10, 13, 15];

pub(in crate::scenarios) struct DisBackScenario;

/// How long is trained.
struct Budget {
    teacher: usize,
    iterations: usize,
    /// Fake steps between two checkpoints of the path.
    interval: usize,
    /// Iterations between two targets.
    switch_every: usize,
}

impl Budget {
    fn of(suite: Suite) -> Self {
        match suite {
            Suite::Quick => Self {
                teacher: 1000,
                iterations: 600,
                interval: 24,
                switch_every: 40,
            },
            _ => Self {
                teacher: 3000,
                iterations: 1500,
                interval: 60,
                switch_every: 100,
            },
        }
    }
}

impl Scenario for DisBackScenario {
    fn definition(&self) -> Definition {
        let number = |name, label, better| Metric {
            name,
            label,
            better,
        };
        Definition {
            slug: "disback",
            title: "DisBack",
            paper: Paper {
                title: "Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation",
                venue: "ICLR 2025",
                arxiv: "2408.15991",
            },
            krate: "flows",
            module: "distillation",
            tags: &["diffusion", "distillation", "generation"],
            version: 1,
            summary: "Handwritten digits in [-1, 1]; a perceptron with three hidden layers of 256 SiLU units over the \
                      image and nine features of the noise level, inside EDM's preconditioning. The teacher is \
                      trained for 3000 steps; the student starts from its weights and makes D(5 z, 5). Both arms \
                      distil it for 1500 iterations of distribution matching (Adam, 2e-4 for the student, 1e-3 for \
                      the fake denoiser, batch 128). DisBack first records five checkpoints, 60 fake steps apart, \
                      and moves its target back every 100 iterations; the baseline's target is the teacher \
                      throughout. Distances are Fréchet distances of 2000 samples to all digits, on pixels. The \
                      quick suite trains the teacher for 1000 steps and distils for 600 iterations, with checkpoints and \
                      switches in proportion.",
            notes: "Both arms of a seed share the teacher, which is trained once per process. The 300 fake steps of \
                    the recording are not counted as iterations.",
            data: Data { embedded: "digits", real: None },
            arms: vec![
                Arm::new("base", "score distillation (DMD)", Role::Baseline).fixed(&[("checkpoints", 0.0)]),
                Arm::new("disback", "DisBack", Role::Method).fixed(&[("checkpoints", 5.0)]),
            ],
            metrics: vec![
                number("fd", "Fréchet distance at the end", Better::Lower),
                number("fd_two_thirds", "Fréchet distance after two thirds", Better::Lower),
                number("fd_third", "Fréchet distance after one third", Better::Lower),
                number("fd_start", "Fréchet distance of the untrained student", Better::Neither),
            ],
            claims: vec![
                Claim::every_seed(
                    "end",
                    "at the end DisBack is at least 5 % nearer to the data",
                    metric("disback", "fd").at_most(metric("base", "fd") * 0.95),
                ),
                Claim::every_seed(
                    "two-thirds",
                    "and no farther after two thirds of the iterations",
                    metric("disback", "fd_two_thirds").at_most(metric("base", "fd_two_thirds")),
                ),
                Claim::every_seed(
                    "quality",
                    "it ends within 2.0 of the data",
                    metric("disback", "fd").below(2.0),
                ),
            ],
            full: None,
        }
    }

    fn run(&self, _: &Arm, setting: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        let budget = Budget::of(trial.suite);
        let data = digits(trial)?.inputs;
        let teacher = Net::new(&trial.stream("weights"), &data)?;
        trained_once(
            ("disback", trial.seed, budget.teacher),
            &teacher.vars,
            || train_teacher(trial, &teacher, &data, budget.teacher),
        )?;
        let recorder = DegradationRecorder {
            interval: budget.interval,
            n_checkpoints: setting.get("checkpoints")? as usize,
        };
        distil(trial, &teacher, &data, recorder, &budget)
    }
}

/// A perceptron over the image and features of the noise level, with its variables.
pub(crate) struct Net {
    mlp: Mlp,
    vars: Vec<(String, Var)>,
}

impl Net {
    pub(crate) fn new(stream: &RandomStream, data: &Tensor) -> Result<Self> {
        let d = data.dims()[1];
        let config = MlpConfig {
            widths: vec![d + 9, 256, 256, 256, d],
            activation: Activation::Silu,
            ..MlpConfig::default()
        };
        let seeded = SeededVars::new(stream);
        let mlp = Mlp::new(&config, seeded.builder(data.dtype(), data.device()))?;
        Ok(Self {
            mlp,
            vars: seeded.trainable(),
        })
    }

    /// Another network with the same weights.
    fn copy(&self, data: &Tensor) -> Result<Self> {
        let other = Self::new(&RandomStream::new(0), data)?;
        Path::of(&self.vars)?.load_into(0, &other.vars)?;
        Ok(other)
    }

    pub(crate) fn denoiser(&self) -> Result<impl Denoiser + '_> {
        let net = |x: &Tensor, c: &Tensor, _: &Condition| -> flows::Result<Tensor> {
            let input = Tensor::cat(&[x, &noise_features(c)?], 1)?;
            Ok(self.mlp.forward_t(&input, true)?)
        };
        Ok(EdmPrecond::new(net, SIGMA_DATA)?)
    }

    fn adam(&self, lr: f64, beta1: f64, beta2: f64) -> Result<AdamW> {
        let config = AdamWConfig {
            lr,
            beta1,
            beta2,
            weight_decay: 0.0,
            ..AdamWConfig::default()
        };
        let vars = self.vars.iter().map(|(_, v)| v.clone()).collect();
        Ok(<AdamW as candle_nn::Optimizer>::new(vars, config)?)
    }
}

/// `[c, sin k c, cos k c]` for `k = 1, 2, 4, 8`, `[rows, 9]`.
fn noise_features(c: &Tensor) -> candle_core::Result<Tensor> {
    let c = c.unsqueeze(1)?;
    let mut columns = vec![c.clone()];
    for k in [1.0, 2.0, 4.0, 8.0] {
        let angle = c.affine(k, 0.0)?;
        columns.extend([angle.sin()?, angle.cos()?]);
    }
    Tensor::cat(&columns, 1)
}

/// Trains the teacher at `ln sigma = -1.2 + 1.2 n`, `n` standard normal.
fn train_teacher(trial: &TrialContext, net: &Net, data: &Tensor, steps: usize) -> Result<()> {
    let config = TrainConfig {
        lr: 1e-3,
        warmup: 0,
        ema_decay: 0.0,
        grad_clip: None,
    };
    let mut trainer = Trainer::new(net.vars.clone(), net.adam(1e-3, 0.9, 0.999)?, config)?;
    let denoiser = net.denoiser()?;
    let mut rng = trial.stream("teacher");
    let mut examples = Examples(data.clone());
    for step in 0..steps {
        trial.step(step, steps)?;
        trainer.set_learning_rate(1e-3 * (1.0 - step as f64 / steps as f64));
        let x = examples.draw(TEACHER_BATCH, &mut rng)?;
        let sigma = |_| Edm::at_sigma((-1.2 + 1.2 * rng.next_normal()).exp());
        let levels = Levels::PerRow(
            (0..TEACHER_BATCH)
                .map(sigma)
                .collect::<flows::Result<_>>()?,
        );
        let noise = rng.normal(0.0, 1.0, x.shape(), x.dtype(), x.device())?;
        let loss = fake_loss(&denoiser, &x, &noise, &levels, SIGMA_DATA, &Condition::Null)?;
        trainer.step(&loss)?;
    }
    Ok(())
}

/// The iterations' settings.
pub(crate) fn settings() -> (ScoreDistillConfig, KarrasSigmas) {
    let config = ScoreDistillConfig {
        gen_lr: 2e-4,
        fake_lr: 1e-3,
        warmup: 0,
        sigma_data: SIGMA_DATA,
        ..ScoreDistillConfig::default()
    };
    let levels = KarrasSigmas {
        min: 0.02,
        max: 20.0,
        ..KarrasSigmas::default()
    };
    (config, levels)
}

/// A run of score distillation by these networks.
pub(crate) fn score_distill<'a>(
    (student, generator): (&Net, &'a dyn OneStepGenerator),
    (fake, denoiser): (&Net, &'a dyn Denoiser),
    target: &'a dyn Denoiser,
) -> Result<ScoreDistill<'a, AdamW, AdamW>> {
    let (config, levels) = settings();
    let generator = Player {
        model: generator,
        vars: student.vars.clone(),
        optimizer: student.adam(config.gen_lr, 0.0, 0.99)?,
    };
    let denoiser = Player {
        model: denoiser,
        vars: fake.vars.clone(),
        optimizer: fake.adam(config.fake_lr, 0.0, 0.99)?,
    };
    Ok(ScoreDistill::new(
        config,
        levels.levels()?,
        generator,
        denoiser,
        target,
    )?)
}

fn distil(
    trial: &TrialContext,
    teacher: &Net,
    data: &Tensor,
    recorder: DegradationRecorder,
    budget: &Budget,
) -> Result<TrialOutcome> {
    let iterations = budget.iterations;
    let [student, fake, target] = [
        teacher.copy(data)?,
        teacher.copy(data)?,
        teacher.copy(data)?,
    ];
    let generator = DenoiserGenerator::edm(student.denoiser()?, STUDENT_SIGMA)?;
    let (fake_denoiser, target_denoiser) = (fake.denoiser()?, target.denoiser()?);
    let base = score_distill(
        (&student, &generator),
        (&fake, &fake_denoiser),
        &target_denoiser,
    );
    let mut base = base?;
    let latents = |rows: usize, rng: &mut RandomStream| {
        let shape = (rows, data.dims()[1]);
        rng.normal(0.0, 1.0, shape, data.dtype(), data.device())
    };
    let draw = |rng: &mut RandomStream| Ok((latents(BATCH, rng)?, Condition::Null));
    let path = recorder.record(&mut base, draw, &mut trial.stream("recording"))?;
    let mut disback = DisBack::new(base, path, target.vars.clone(), budget.switch_every)?;
    let reference = Cloud::new(data)?;
    let z = latents(SAMPLES, &mut trial.stream("evaluation"))?;
    let measure = || -> Result<(f64, Tensor)> {
        let samples = generator.generate(&z, &Condition::Null)?.detach();
        Ok((frechet(&Cloud::new(&samples)?, &reference)?, samples))
    };
    let (start, _) = measure()?;
    let mut curve = Curve::new("Fréchet distance", "iteration").log_y();
    curve.push(0.0, start);
    let mut outcome = TrialOutcome::default().metric("fd_start", start);
    let mut rng = trial.stream("distillation");
    for mark in MARKS {
        let until = iterations * mark / 15;
        let mut stopped = None;
        disback.train(until, draw, &mut rng, |i, _| {
            stopped = trial.step(i, iterations).err();
            Ok(stopped.is_none())
        })?;
        if let Some(error) = stopped {
            return Err(error);
        }
        let (distance, samples) = measure()?;
        curve.push(until as f64, distance);
        let caption = format!("one step, after {until} iterations");
        let some = samples.narrow(0, 0, 40)?;
        outcome = match mark {
            5 => outcome
                .metric("fd_third", distance)
                .picture(image_grid(&caption, &some, 10)?),
            10 => outcome.metric("fd_two_thirds", distance),
            15 => outcome
                .metric("fd", distance)
                .picture(image_grid(&caption, &some, 10)?),
            _ => outcome,
        };
    }
    Ok(outcome.curve(curve))
}
