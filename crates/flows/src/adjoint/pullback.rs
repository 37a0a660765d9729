//! Forward solve, and gradients backwards along its states.

use super::RhoOde;
use crate::denoiser::GradientCheck;
use crate::error::{check, Error, Result};
use crate::grid::Grid;
use crate::ode::{
    adams_order, adams_weights, add_scaled, evaluate, runge_kutta, step, History, Method, OdeField,
    Tableau, Times, RK38,
};
use crate::watch::{FiniteCheck, Watch};
use candle_core::{DType, Device, Tensor, Var};
use tensor_core::kernels::dot;
use tensor_core::random::RandomStream;

/// Where the continuous adjoint takes the states from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum States {
    /// From the forward solve: one sample per step is kept. What torchdiffeq does.
    #[default]
    Stored,
    /// Integrated backwards too: nothing is kept, and errors grow.
    Reconstructed,
}

/// How the gradient is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GradientMode {
    /// The exact gradient of the discretised solver, by differentiating one step at a time.
    #[default]
    Discrete,
    /// The same numbers, one stage of a step at a time: the graph of a single network evaluation.
    /// Runge-Kutta methods only.
    Symplectic,
    /// The adjoint equation of the paper, solved with the forward method (Adams: with the 3/8 rule).
    Continuous(States),
    /// The adjoint equation in `mu = rho a` over `ln rho`, by Euler: the stiff part is exact, one
    /// vector-Jacobian product per step.
    Scaled,
    /// Differentiation through all steps at once: memory grows with the steps. For comparison; with
    /// `checkpoint` it is [`Discrete`](Self::Discrete).
    Backprop {
        /// Whether only states are kept and every step is computed again.
        checkpoint: bool,
    },
}

/// A solver of [`RhoOde`] on a grid that can be differentiated.
#[derive(Debug, Clone)]
pub struct AdjointSolver {
    grid: Grid,
    /// How steps are made.
    pub method: Method,
    /// How gradients are computed.
    pub mode: GradientMode,
    /// Whether the states are kept in the host's memory; each is copied back when its turn comes.
    pub offload: bool,
    /// When states are looked at for NaN.
    pub check: FiniteCheck,
    /// The comparison of the first gradients, of the model and of the loss, with differences.
    pub gradient_check: GradientCheck,
}

/// The states of a forward solve, without a graph.
#[derive(Debug, Clone)]
pub struct Tape {
    /// One per level; the last one alone for [`States::Reconstructed`].
    states: Vec<Tensor>,
}

impl Tape {
    /// The states of the equation: at every level, or at the last one alone.
    pub fn states(&self) -> &[Tensor] {
        &self.states
    }

    fn last(&self, device: &Device) -> Result<Tensor> {
        self.at(self.states.len().wrapping_sub(1), device)
    }

    /// A state where the gradient lives.
    fn at(&self, level: usize, device: &Device) -> Result<Tensor> {
        let state = self.states.get(level);
        let state =
            state.ok_or_else(|| Error::argument("tape", self.states.len(), "more states"))?;
        Ok(state.to_device(device)?)
    }
}

/// A forward solve.
#[derive(Debug, Clone)]
pub struct Forward {
    /// The sample at the last level.
    pub x_end: Tensor,
    /// What the way back needs.
    pub tape: Tape,
}

/// What the loss depends on.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// With respect to the sample at the first level.
    pub start: Tensor,
    /// With respect to the variables, in their order.
    pub vars: Vec<Tensor>,
}

/// Gradients of variables that have been collected so far.
struct Sums<'v> {
    vars: &'v [Var],
    sums: Vec<Option<Tensor>>,
}

impl<'v> Sums<'v> {
    fn new(vars: &'v [Var]) -> Self {
        Self {
            vars,
            sums: vec![None; vars.len()],
        }
    }

    fn add(&mut self, factor: f64, grads: &[Option<Tensor>]) -> Result<()> {
        for (sum, grad) in self.sums.iter_mut().zip(grads) {
            if let Some(grad) = grad {
                let scaled = grad.affine(factor, 0.0)?;
                *sum = Some(match sum.take() {
                    Some(sum) => (sum + scaled)?,
                    None => scaled,
                });
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Vec<Tensor>> {
        let lost = |(i, sum): (usize, &Option<Tensor>)| sum.is_none().then(|| format!("vars[{i}]"));
        let lost: Vec<String> = self.sums.iter().enumerate().filter_map(lost).collect();
        match lost.is_empty() {
            true => Ok(self.sums.into_iter().flatten().collect()),
            false => Err(tensor_core::Error::LostGradient(lost).into()),
        }
    }
}

/// The value of `f` at `y`, and the gradients of `<value, cotangent>` at `y` and the variables.
struct Pulled {
    value: Tensor,
    grad: Tensor,
    vars: Vec<Option<Tensor>>,
}

/// `f` gives the value and what the gradient is of: the sum of all numbers of these products.
fn pull(
    gradient_check: &GradientCheck,
    y: &Tensor,
    vars: &[Var],
    f: impl Fn(&Tensor) -> Result<(Tensor, Vec<Tensor>)>,
) -> Result<Pulled> {
    let at = Var::from_tensor(y)?;
    let (value, products) = f(at.as_tensor())?;
    let mut scalar = value.zeros_like()?.sum_all()?;
    for product in products {
        scalar = (scalar + product.sum_all()?)?;
    }
    let grads = scalar.backward()?;
    let grad = grads.get(&at).map(Tensor::detach).ok_or_else(|| {
        Error::from(tensor_core::Error::LostGradient(vec![
            "the sample, through the denoiser".into(),
        ]))
    })?;
    let flat = |y: &Tensor| -> Result<Tensor> {
        let products = f(y)?.1.into_iter();
        let flat: Vec<Tensor> = products
            .map(|p| p.flatten_all())
            .collect::<candle_core::Result<_>>()?;
        Ok(Tensor::cat(&flat, 0)?)
    };
    gradient_check.run("the denoiser", flat, y, &grad)?;
    let one = |var: &Var| grads.get(var).map(Tensor::detach);
    Ok(Pulled {
        value: value.detach(),
        grad,
        vars: vars.iter().map(one).collect(),
    })
}

/// [`pull`] of one slope of the field.
fn pull_field(
    gradient_check: &GradientCheck,
    field: &dyn OdeField,
    (y, t): (&Tensor, f64),
    cotangent: &Tensor,
    vars: &[Var],
) -> Result<Pulled> {
    pull(gradient_check, y, vars, |y| {
        let value = evaluate(field, y, &Times::Same(t))?;
        let product = (&value * cotangent)?;
        Ok((value, vec![product]))
    })
}

impl AdjointSolver {
    /// Euler's method with the discrete gradient.
    pub fn new(grid: Grid) -> Self {
        Self {
            grid,
            method: Method::Euler,
            mode: GradientMode::Discrete,
            offload: false,
            check: FiniteCheck::Auto,
            gradient_check: GradientCheck::default(),
        }
    }

    /// Another method.
    #[must_use]
    pub fn method(self, method: Method) -> Self {
        Self { method, ..self }
    }

    /// Another way to the gradient.
    #[must_use]
    pub fn mode(self, mode: GradientMode) -> Self {
        Self { mode, ..self }
    }

    /// Keeps the states in the host's memory.
    #[must_use]
    pub fn offload(self, offload: bool) -> Self {
        Self { offload, ..self }
    }

    /// Another check of gradients: off, or one that is shared with other solvers.
    #[must_use]
    pub fn gradient_check(self, gradient_check: GradientCheck) -> Self {
        Self {
            gradient_check,
            ..self
        }
    }

    /// The levels.
    pub fn grid(&self) -> &Grid {
        &self.grid
    }

    /// The largest `rho_i / rho_{i+1}` of the grid: the continuous adjoint on Euler steps is
    /// unusable near 2.
    pub fn worst_ratio(&self) -> f64 {
        let pairs = self.grid.levels().windows(2);
        pairs.map(|w| w[0].rho() / w[1].rho()).fold(1.0, f64::max)
    }

    fn times(&self, ode: &RhoOde) -> Result<Vec<f64>> {
        self.grid.levels().iter().map(|l| ode.time(l)).collect()
    }

    /// The sample at the last level, from one at the first.
    ///
    /// # Errors
    /// [`Error::Undetermined`] for a grid with a level without noise or signal;
    /// [`Error::NonFinite`]; those of the denoiser.
    pub fn solve(&self, ode: &RhoOde, x_start: &Tensor) -> Result<Forward> {
        check::rows("x_start", x_start)?;
        let times = self.times(ode)?;
        let levels = self.grid.levels();
        let mut y = ode.state(x_start, &levels[0])?.detach();
        let keep_all = self.mode != GradientMode::Continuous(States::Reconstructed);
        let mut tape = Tape { states: Vec::new() };
        let mut history = History::new();
        let mut watch = Watch::new(self.check)?;
        for (i, pair) in times.windows(2).enumerate() {
            let h = pair[1] - pair[0];
            if keep_all {
                tape.states.push(self.kept(&y)?);
            }
            let (next, _) = step(self.method, ode, &y, pair[0], h, &mut history)?;
            for (_, slope) in &mut history {
                *slope = slope.detach();
            }
            watch.see(&next, i, || format!("the state after {:?}", self.method))?;
            y = next.detach();
        }
        watch.finish()?;
        tape.states.push(self.kept(&y)?);
        Ok(Forward {
            x_end: ode.sample(&y, &levels[levels.len() - 1])?,
            tape,
        })
    }

    fn kept(&self, y: &Tensor) -> Result<Tensor> {
        match self.offload {
            true => Ok(y.to_device(&Device::Cpu)?),
            false => Ok(y.clone()),
        }
    }

    /// From the gradient at the last sample to those at the first sample and the variables. The first step
    /// of the first call is evaluated twice more to check the model's gradient ([`GradientCheck`]).
    ///
    /// # Errors
    /// [`Error::WrongGradient`] for a model with a layer that loses its gradient; [`Error::Shape`] when tape, grid and gradient do not belong together;
    /// [`Error::Unsupported`] for a mode that the method or form has not; a lost gradient is named.
    pub fn pullback(
        &self,
        ode: &RhoOde,
        tape: &Tape,
        grad_end: &Tensor,
        vars: &[Var],
    ) -> Result<Gradients> {
        let levels = self.grid.levels();
        let needed = match self.mode {
            GradientMode::Continuous(States::Reconstructed) => 1,
            _ => levels.len(),
        };
        if ![needed, levels.len()].contains(&tape.states.len()) {
            let expected = format!("{needed} states, of a solve in this mode");
            return Err(Error::argument("tape", tape.states.len(), expected));
        }
        let last = levels.len() - 1;
        check::same_shape("grad_end", grad_end, &tape.states[tape.states.len() - 1])?;
        let a = grad_end.detach().affine(ode.scale(&levels[last]), 0.0)?;
        let mut sums = Sums::new(vars);
        let times = self.times(ode)?;
        let a = match self.mode {
            GradientMode::Discrete | GradientMode::Backprop { checkpoint: true } => {
                self.discrete(ode, &times, tape, a, &mut sums)?
            }
            GradientMode::Symplectic => self.stagewise(ode, &times, tape, a, &mut sums)?,
            GradientMode::Continuous(states) => {
                self.continuous(ode, &times, tape, (states, a), &mut sums)?
                    .0
            }
            GradientMode::Scaled => self.scaled(ode, tape, a, &mut sums)?,
            GradientMode::Backprop { checkpoint: false } => {
                self.backprop(ode, &times, &tape.at(0, a.device())?, &a, &mut sums)?
            }
        };
        Ok(Gradients {
            start: a.affine(1.0 / ode.scale(&levels[0]), 0.0)?,
            vars: sums.finish()?,
        })
    }

    /// The start that the continuous adjoint with [`States::Reconstructed`] comes back to: how far
    /// it is from the true one says how much its gradient can be trusted.
    ///
    /// # Errors
    /// As [`pullback`](Self::pullback).
    pub fn reconstruct_start(&self, ode: &RhoOde, tape: &Tape) -> Result<Tensor> {
        let times = self.times(ode)?;
        let a = match tape.states.last() {
            Some(state) => state.zeros_like()?,
            None => return Err(Error::argument("tape", 0, "a state")),
        };
        // Of nothing there is no gradient to check.
        let unchecked = self.clone().gradient_check(GradientCheck::off());
        let (_, y) = unchecked.continuous(
            ode,
            &times,
            tape,
            (States::Reconstructed, a),
            &mut Sums::new(&[]),
        )?;
        ode.sample(&y, &self.grid.levels()[0])
    }

    /// The loss of the final sample and its gradients. The loss is a sum over the rows (not a
    /// mean), or gradients depend on the size of the batch.
    ///
    /// # Errors
    /// As [`solve`](Self::solve) and [`pullback`](Self::pullback); [`Error::Shape`] for a loss that
    /// is no scalar; those of the loss.
    pub fn value_and_grad(
        &self,
        ode: &RhoOde,
        x_start: &Tensor,
        vars: &[Var],
        loss: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<(f64, Gradients)> {
        let forward = self.solve(ode, x_start)?;
        let end = Var::from_tensor(&forward.x_end)?;
        let value = loss(end.as_tensor())?;
        if value.elem_count() != 1 {
            return Err(Error::shape("the loss", value.dims(), "a scalar"));
        }
        let grads = value.backward()?;
        let grad_end = grads.get(&end).ok_or_else(|| {
            Error::from(tensor_core::Error::LostGradient(vec![
                "the final sample".into()
            ]))
        })?;
        let (x, g) = (&forward.x_end, &grad_end.detach());
        self.gradient_check.run("the loss", &loss, x, g)?;
        let number = value
            .flatten_all()?
            .to_dtype(DType::F64)?
            .to_vec1::<f64>()?[0];
        Ok((number, self.pullback(ode, &forward.tape, grad_end, vars)?))
    }

    /// Compares the gradient at the start along a random direction with central differences of the loss:
    /// the relative error. Small for the exact modes; what the continuous ones lose shows here.
    ///
    /// # Errors
    /// As [`value_and_grad`](Self::value_and_grad).
    pub fn check_gradient(
        &self,
        ode: &RhoOde,
        x_start: &Tensor,
        loss: impl Fn(&Tensor) -> Result<Tensor>,
        rng: &mut RandomStream,
    ) -> Result<f64> {
        let (dtype, device) = (x_start.dtype(), x_start.device());
        let direction = rng.normal(0.0, 1.0, x_start.shape(), dtype, device)?;
        let (_, gradients) = self.value_and_grad(ode, x_start, &[], &loss)?;
        let analytic = dot(&gradients.start, &direction)?;
        let h = match dtype {
            DType::F64 => 1e-5,
            _ => 1e-2,
        };
        let at = |sign: f64| -> Result<f64> {
            let x = (x_start + direction.affine(sign * h, 0.0)?)?;
            let value = loss(&self.solve(ode, &x)?.x_end)?;
            Ok(value.sum_all()?.to_dtype(DType::F64)?.to_scalar()?)
        };
        let numeric = (at(1.0)? - at(-1.0)?) / (2.0 * h);
        let size = numeric.abs().max(analytic.abs()).max(f64::MIN_POSITIVE);
        Ok((numeric - analytic).abs() / size)
    }

    /// Differentiates one step after the other.
    fn discrete(
        &self,
        ode: &RhoOde,
        times: &[f64],
        tape: &Tape,
        mut a: Tensor,
        sums: &mut Sums,
    ) -> Result<Tensor> {
        let order = adams_order(self.method)?;
        // What later Adams steps make of the slope at each state.
        let mut pending: Vec<Option<Tensor>> = vec![None; times.len()];
        for i in (0..times.len() - 1).rev() {
            let (t, h) = (times[i], times[i + 1] - times[i]);
            let adams = order.filter(|k| i + 1 >= *k);
            if let Some(k) = adams {
                let nodes: Vec<f64> = (0..k).map(|j| times[i - j]).collect();
                for (j, w) in adams_weights(&nodes, h).into_iter().enumerate() {
                    let part = a.affine(w, 0.0)?;
                    pending[i - j] = Some(match pending[i - j].take() {
                        Some(sum) => (sum + part)?,
                        None => part,
                    });
                }
            }
            let slope_cotangent = pending[i].take();
            let state = tape.at(i, a.device())?;
            let pulled = pull(&self.gradient_check, &state, sums.vars, |y| {
                let mut products = Vec::new();
                let slope = if adams.is_some() {
                    evaluate(ode, y, &Times::Same(t))?
                } else {
                    let (stages, next) = runge_kutta(&self.method.tableau(), ode, y, t, h)?;
                    products.push((&next * &a)?);
                    stages[0].clone()
                };
                if let Some(cotangent) = &slope_cotangent {
                    products.push((&slope * cotangent)?);
                }
                Ok((slope, products))
            })?;
            // An Adams step passes the state itself on.
            a = match adams {
                Some(_) => (a + pulled.grad)?,
                None => pulled.grad,
            };
            sums.add(1.0, &pulled.vars)?;
        }
        Ok(a)
    }

    /// The same stage by stage: `g_s = J_s^T h (b_s a + sum_{j > s} a_js g_j / h)`.
    fn stagewise(
        &self,
        ode: &RhoOde,
        times: &[f64],
        tape: &Tape,
        mut a: Tensor,
        sums: &mut Sums,
    ) -> Result<Tensor> {
        if adams_order(self.method)?.is_some() {
            return Err(Error::unsupported(
                "the symplectic adjoint of an Adams method",
                "take GradientMode::Discrete, or a Runge-Kutta method",
            ));
        }
        let tableau = self.method.tableau();
        for i in (0..times.len() - 1).rev() {
            let (t, h) = (times[i], times[i + 1] - times[i]);
            let y = &tape.at(i, a.device())?;
            let (stages, _) = runge_kutta(&tableau, ode, y, t, h)?;
            let stages: Vec<Tensor> = stages.iter().map(Tensor::detach).collect();
            let mut pulled: Vec<Option<Tensor>> = vec![None; stages.len()];
            for s in (0..stages.len()).rev() {
                let mut cotangent = a.affine(h * tableau.b[s], 0.0)?;
                for (row, later) in tableau.a.iter().zip(&pulled).skip(s + 1) {
                    if let Some(g) = later.as_ref().filter(|_| row[s] != 0.0) {
                        cotangent = (cotangent + g.affine(h * row[s], 0.0)?)?;
                    }
                }
                let at = stage_state(&tableau, y, &stages, s, h)?;
                let time = t + tableau.c[s] * h;
                let check = &self.gradient_check;
                let one = pull_field(check, ode, (&at, time), &cotangent, sums.vars)?;
                sums.add(1.0, &one.vars)?;
                pulled[s] = Some(one.grad);
            }
            for g in pulled.into_iter().flatten() {
                a = (a + g)?;
            }
        }
        Ok(a)
    }

    /// One step of the augmented equation per interval; also the state it came back to.
    fn continuous(
        &self,
        ode: &RhoOde,
        times: &[f64],
        tape: &Tape,
        (states, mut a): (States, Tensor),
        sums: &mut Sums,
    ) -> Result<(Tensor, Tensor)> {
        let ratio = self.worst_ratio();
        if self.method == Method::Euler && ratio > 1.5 && ode.noise_form() {
            tracing::warn!(
                ratio,
                "the continuous adjoint on Euler steps of this size loses the gradient; take the discrete or scaled one"
            );
        }
        let tableau = match adams_order(self.method)? {
            Some(_) => RK38,
            None => self.method.tableau(),
        };
        let mut y = tape.last(a.device())?;
        for i in (0..times.len() - 1).rev() {
            let (t, h) = (times[i + 1], times[i] - times[i + 1]);
            let (mut slopes, mut adjoints) = (Vec::new(), Vec::new());
            for s in 0..tableau.b.len() {
                let at = stage_state(&tableau, &y, &slopes, s, h)?;
                let cotangent = stage_state(&tableau, &a, &adjoints, s, h)?;
                let time = t + tableau.c[s] * h;
                let check = &self.gradient_check;
                let one = pull_field(check, ode, (&at, time), &cotangent, sums.vars)?;
                sums.add(-h * tableau.b[s], &one.vars)?;
                slopes.push(one.value);
                adjoints.push(one.grad.neg()?);
            }
            let advance = |from: &Tensor, slopes: &[Tensor]| {
                let terms: Vec<(f64, &Tensor)> =
                    tableau.b.iter().map(|b| h * b).zip(slopes).collect();
                add_scaled(from, &terms)
            };
            a = advance(&a, &adjoints)?;
            y = match states {
                States::Stored => tape.at(i, a.device())?,
                States::Reconstructed => advance(&y, &slopes)?,
            };
        }
        Ok((a, y))
    }

    /// `mu_i = mu_{i+1} + (ln rho_i - ln rho_{i+1}) mu_{i+1}^T dD/dy`.
    fn scaled(&self, ode: &RhoOde, tape: &Tape, a: Tensor, sums: &mut Sums) -> Result<Tensor> {
        if !ode.noise_form() {
            return Err(Error::unsupported(
                "the scaled adjoint in the data form",
                "it is the adjoint of the data form already; take Form::Noise",
            ));
        }
        let levels = self.grid.levels();
        let last = levels.len() - 1;
        let mut mu = a.affine(levels[last].rho(), 0.0)?;
        for i in (0..last).rev() {
            let level = &levels[i + 1];
            let dlog = levels[i].rho().ln() - level.rho().ln();
            let state = tape.at(i + 1, mu.device())?;
            let pulled = pull(&self.gradient_check, &state, sums.vars, |y| {
                let clean = ode.clean(y, level)?;
                let product = (&clean * &mu)?;
                Ok((clean, vec![product]))
            })?;
            // D depends on y through x = (dx/dy) y, as mu does on a: the anchor cancels.
            let factor = level.alpha / ode.scale(level);
            mu = (mu + pulled.grad.affine(dlog * factor, 0.0)?)?;
            sums.add(dlog * factor / level.rho(), &pulled.vars)?;
        }
        Ok(mu.affine(1.0 / levels[0].rho(), 0.0)?)
    }

    /// The graph of all steps at once.
    fn backprop(
        &self,
        ode: &RhoOde,
        times: &[f64],
        start: &Tensor,
        a: &Tensor,
        sums: &mut Sums,
    ) -> Result<Tensor> {
        let pulled = pull(&self.gradient_check, start, sums.vars, |y| {
            let mut y = y.clone();
            let mut history = History::new();
            for pair in times.windows(2) {
                let h = pair[1] - pair[0];
                y = step(self.method, ode, &y, pair[0], h, &mut history)?.0;
            }
            let product = (&y * a)?;
            Ok((y, vec![product]))
        })?;
        sums.add(1.0, &pulled.vars)?;
        Ok(pulled.grad)
    }
}

/// The state at which stage `s` of a step is evaluated.
fn stage_state(
    tableau: &Tableau,
    y: &Tensor,
    slopes: &[Tensor],
    s: usize,
    h: f64,
) -> Result<Tensor> {
    let terms: Vec<(f64, &Tensor)> = tableau.a[s].iter().map(|a| h * a).zip(slopes).collect();
    add_scaled(y, &terms)
}
