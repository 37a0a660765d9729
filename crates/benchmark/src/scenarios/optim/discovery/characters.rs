//! A transformer on the characters of a text, trained by a program: the tasks T2 and T3.

use super::schedule;
use crate::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::Optimizer;
use nn::init::SeededVars;
use nn::loss::{cross_entropy, Reduction};
use nn::models::{TransformerConfig, TransformerLm};
use optim::discovery::{
    AbortRule, CompiledProgram, Fitness, ProgramConfig, ProgramOptimizer, ProxyTask,
};
use optim::NonFinite;
use tensor_core::random::RandomStream;

/// Predicts the next character; the fitness is the mean cross entropy on the last tenth of the text.
#[derive(Clone)]
pub(super) struct Characters {
    train: Vec<u32>,
    valid: Vec<u32>,
    config: TransformerConfig,
    pub(super) steps: usize,
    stream: RandomStream,
}

const BATCH: usize = 16;
const CONTEXT: usize = 64;
/// Batches of the validation part that the fitness is the mean of.
const VALID: usize = 20;

impl Characters {
    /// A causal transformer over 64 characters.
    pub(super) fn new(
        (width, layers, heads): (usize, usize, usize),
        steps: usize,
        stream: RandomStream,
    ) -> Result<Self> {
        let text = datasets::text::shakespeare()?;
        let kinds: std::collections::BTreeSet<u8> = text.bytes().collect();
        let mut numbers = [0; 256];
        for (number, byte) in kinds.iter().enumerate() {
            numbers[usize::from(*byte)] = number as u32;
        }
        let all: Vec<u32> = text.bytes().map(|b| numbers[usize::from(b)]).collect();
        let (train, valid) = all.split_at(all.len() - all.len() / 10);
        Ok(Self {
            train: train.to_vec(),
            valid: valid.to_vec(),
            config: TransformerConfig {
                vocabulary: kinds.len(),
                dim: width,
                layers,
                heads,
                feed_forward: 4 * width,
                max_length: CONTEXT,
                pre_norm: true,
                embedding_std: 0.02,
                ..TransformerConfig::default()
            },
            steps,
            stream,
        })
    }

    /// Inputs and targets that begin at random places.
    fn batch(&self, text: &[u32], places: &mut RandomStream) -> optim::Result<(Tensor, Tensor)> {
        let (mut x, mut y) = (Vec::new(), Vec::new());
        for _ in 0..BATCH {
            let from = places.below(text.len() - CONTEXT)?;
            x.extend_from_slice(&text[from..from + CONTEXT]);
            y.extend_from_slice(&text[from + 1..from + CONTEXT + 1]);
        }
        let tensor = |of| Tensor::from_vec(of, (BATCH, CONTEXT), &Device::Cpu);
        Ok((tensor(x)?, tensor(y)?))
    }

    fn loss(
        &self,
        model: &TransformerLm,
        (x, y): &(Tensor, Tensor),
        train: bool,
    ) -> candle_core::Result<Option<Tensor>> {
        match cross_entropy(&model.forward(x, train)?, y, Reduction::Mean) {
            Ok(loss) => Ok(Some(loss)),
            // The program has driven the weights away.
            Err(nn::Error::NonFinite { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn number(loss: &Tensor) -> candle_core::Result<f64> {
    loss.to_dtype(DType::F64)?.to_scalar()
}

impl ProxyTask for Characters {
    fn fitness(
        &self,
        program: &CompiledProgram,
        seed: u64,
        abort: &AbortRule,
    ) -> optim::Result<Fitness> {
        let stream = self.stream.split_index("task", seed);
        let vars = SeededVars::new(&stream.split("weights"));
        let model = TransformerLm::new(&self.config, vars.builder(DType::F32, &Device::Cpu))
            .map_err(candle_core::Error::from)?;
        let config = ProgramConfig {
            nonfinite: NonFinite::Propagate,
            ..ProgramConfig::new(program.program().clone())
        };
        let mut optimizer = ProgramOptimizer::named(vars.trainable(), config)?;
        let mut places = stream.split("batches");
        for step in 0..self.steps {
            let batch = self.batch(&self.train, &mut places)?;
            let Some(loss) = self.loss(&model, &batch, true)? else {
                return Ok(Fitness::aborted(step + 1));
            };
            if abort.stops::<f32>(step + 1, number(&loss)?, &[]) {
                return Ok(Fitness::aborted(step + 1));
            }
            optimizer.set_learning_rate(schedule(step, self.steps));
            optimizer.backward_step(&loss)?;
        }
        let mut places = self.stream.split("validation");
        let mut total = 0.0;
        for _ in 0..VALID {
            let batch = self.batch(&self.valid, &mut places)?;
            match self.loss(&model, &batch, false)? {
                Some(loss) => total += number(&loss)?,
                None => return Ok(Fitness::aborted(self.steps)),
            }
        }
        Ok(Fitness::of(total / VALID as f64))
    }

    fn abort(&self) -> AbortRule {
        AbortRule::for_classes(self.config.vocabulary)
    }

    fn cost(&self) -> f64 {
        let block = 12 * self.config.dim * self.config.dim;
        (block * self.config.layers * self.steps) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use optim::discovery::{Program, Signature};

    #[test]
    fn programs_learn_to_read() -> Result<()> {
        let task = Characters::new((16, 1, 2), 40, RandomStream::new(0))?;
        let of = |text: &str| -> Result<Fitness> {
            let program: Program = text.parse()?;
            let compiled = CompiledProgram::new(&program, &Signature::optimizer())?;
            Ok(task.fitness(&compiled, 0, &task.abort())?)
        };
        let adamw = Program::adamw()?.to_string().replace("0.001", "0.01");
        let (first, again) = (of(&adamw)?, of(&adamw)?);
        assert_eq!(first, again);
        // Better than knowing nothing.
        assert!(
            first.value < (task.config.vocabulary as f64).ln(),
            "{first:?}"
        );
        let wild = "def f(w, g, m, v, lr):\n  update = g * -1e30\n  return (update, m, v)";
        assert!(of(wild)?.aborted.is_some());
        Ok(())
    }
}
