//! A perceptron on images, trained by a program: the tasks T0 and T1.

use super::schedule;
use optim::discovery::{AbortRule, CompiledProgram, Fitness, ProxyTask};
use tensor_core::random::RandomStream;

/// Examples in single precision, row by row.
pub(super) struct Part {
    pub(super) x: Vec<f32>,
    pub(super) y: Vec<usize>,
}

impl Part {
    fn len(&self) -> usize {
        self.y.len()
    }
}

/// A perceptron on the digits, trained by a program: warm-up and cosine, batches of 64; the fitness
/// is the mean validation loss. Forward and backward pass are written out, because a search trains
/// thousands of them.
#[derive(Clone)]
pub(super) struct Perceptron<'a> {
    pub(super) train: &'a Part,
    pub(super) valid: &'a Part,
    pub(super) widths: Vec<usize>,
    pub(super) steps: usize,
    /// Trainings with other initial weights and another order, whose fitness is averaged.
    pub(super) repeats: u64,
    pub(super) stream: RandomStream,
}

const BATCH: usize = 64;

impl Perceptron<'_> {
    /// Sizes of all tensors: a weight `[in, out]` and a bias for each layer.
    fn sizes(&self) -> Vec<usize> {
        let pairs = self.widths.windows(2);
        pairs.flat_map(|w| [w[0] * w[1], w[1]]).collect()
    }

    fn start(&self, stream: &mut RandomStream) -> Vec<f32> {
        let mut w = Vec::new();
        for pair in self.widths.windows(2) {
            // He's initial weights.
            let std = (2.0 / pair[0] as f64).sqrt();
            w.extend((0..pair[0] * pair[1]).map(|_| (std * stream.next_normal()) as f32));
            w.extend(std::iter::repeat_n(0.0, pair[1]));
        }
        w
    }

    /// Outputs of all layers for rows of inputs; the last are logits.
    #[inline(always)]
    fn forward(&self, w: &[f32], x: &[f32]) -> Vec<Vec<f32>> {
        let rows = x.len() / self.widths[0];
        let mut outputs: Vec<Vec<f32>> = Vec::new();
        let mut from = 0;
        for (l, pair) in self.widths.windows(2).enumerate() {
            let (n, m) = (pair[0], pair[1]);
            let (weight, bias) = (&w[from..from + n * m], &w[from + n * m..from + n * m + m]);
            from += n * m + m;
            let input: &[f32] = if l == 0 { x } else { &outputs[l - 1] };
            let mut out = vec![0.0; rows * m];
            for (out, input) in out.chunks_exact_mut(m).zip(input.chunks_exact(n)) {
                out.copy_from_slice(bias);
                for (a, row) in input.iter().zip(weight.chunks_exact(m)) {
                    if *a != 0.0 {
                        out.iter_mut().zip(row).for_each(|(o, w)| *o += a * w);
                    }
                }
                if l + 2 < self.widths.len() {
                    out.iter_mut().for_each(|o| *o = o.max(0.0));
                }
            }
            outputs.push(out);
        }
        outputs
    }

    /// Turns logits into `softmax - one hot`, over the number of rows, and gives the mean loss.
    #[inline(always)]
    fn loss(&self, logits: &mut [f32], y: &[usize]) -> f64 {
        let classes = self.widths[self.widths.len() - 1];
        let (mut total, rows) = (0.0, y.len() as f32);
        for (row, y) in logits.chunks_exact_mut(classes).zip(y) {
            let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let own = row[*y] - top;
            row.iter_mut().for_each(|z| *z = (*z - top).exp());
            let sum: f32 = row.iter().sum();
            total += f64::from(sum.ln() - own);
            row.iter_mut().for_each(|z| *z /= sum * rows);
            row[*y] -= 1.0 / rows;
        }
        total / f64::from(rows)
    }

    /// The gradient of the mean loss into `g`; gives the loss.
    #[inline(always)]
    fn gradient(&self, w: &[f32], x: &[f32], y: &[usize], g: &mut [f32]) -> f64 {
        let mut outputs = self.forward(w, x);
        let layers = self.widths.len() - 1;
        let loss = self.loss(&mut outputs[layers - 1], y);
        g.fill(0.0);
        let mut to = w.len();
        for l in (0..layers).rev() {
            let (n, m) = (self.widths[l], self.widths[l + 1]);
            let from = to - n * m - m;
            let (before, after) = outputs.split_at_mut(l);
            let delta = &after[0];
            let input: &[f32] = if l == 0 { x } else { &before[l - 1] };
            let (weight_grad, bias_grad) = g[from..to].split_at_mut(n * m);
            for (d, input) in delta.chunks_exact(m).zip(input.chunks_exact(n)) {
                bias_grad.iter_mut().zip(d).for_each(|(b, d)| *b += d);
                for (a, row) in input.iter().zip(weight_grad.chunks_exact_mut(m)) {
                    if *a != 0.0 {
                        row.iter_mut().zip(d).for_each(|(r, d)| *r += a * d);
                    }
                }
            }
            if l > 0 {
                let weight = &w[from..from + n * m];
                let below = &mut before[l - 1];
                for (d, h) in delta.chunks_exact(m).zip(below.chunks_exact_mut(n)) {
                    for (h, row) in h.iter_mut().zip(weight.chunks_exact(m)) {
                        // Where ReLU was open.
                        *h = if *h > 0.0 {
                            row.iter().zip(d).map(|(w, d)| w * d).sum()
                        } else {
                            0.0
                        };
                    }
                }
            }
            to = from;
        }
        loss
    }
}

impl Perceptron<'_> {
    /// The validation loss after one training, or the step at which it was given up.
    fn train(
        &self,
        program: &CompiledProgram,
        stream: &RandomStream,
        abort: &AbortRule,
    ) -> optim::Result<Result<f64, usize>> {
        let mut w = self.start(&mut stream.split("weights"));
        let mut order = stream.split("order");
        let mut run = program.run::<f32>(&self.sizes());
        let (mut g, d) = (vec![0.0; w.len()], self.widths[0]);
        let (mut x, mut y) = (vec![0.0; BATCH * d], vec![0; BATCH]);
        for step in 0..self.steps {
            for k in 0..BATCH {
                let i = order.below(self.train.len())?;
                x[k * d..(k + 1) * d].copy_from_slice(&self.train.x[i * d..(i + 1) * d]);
                y[k] = self.train.y[i];
            }
            // For the widest vector unit of the processor: the search spends its time here.
            let loss = pulp::Arch::new().dispatch(
                #[inline(always)]
                || self.gradient(&w, &x, &y, &mut g),
            );
            if abort.stops(step + 1, loss, &w) {
                return Ok(Err(step + 1));
            }
            run.update(&mut w, &g, schedule(step, self.steps))?;
        }
        let mut outputs = self.forward(&w, &self.valid.x);
        let last = outputs.len() - 1;
        Ok(Ok(self.loss(&mut outputs[last], &self.valid.y)))
    }
}

impl ProxyTask for Perceptron<'_> {
    fn fitness(
        &self,
        program: &CompiledProgram,
        seed: u64,
        abort: &AbortRule,
    ) -> optim::Result<Fitness> {
        let mut total = 0.0;
        for repeat in 0..self.repeats {
            let stream = self
                .stream
                .split_index("task", seed * self.repeats + repeat);
            match self.train(program, &stream, abort)? {
                Ok(loss) => total += loss,
                Err(step) => return Ok(Fitness::aborted(step)),
            }
        }
        Ok(Fitness::of(total / self.repeats as f64))
    }

    fn abort(&self) -> AbortRule {
        AbortRule::for_classes(10)
    }

    fn cost(&self) -> f64 {
        (self.sizes().iter().sum::<usize>() * self.steps) as f64 * self.repeats as f64
    }
}
