//! Searches as files.

use super::evolve::{HistoryPoint, Individual, MetaBest, SearchState};
use super::program::Program;
use crate::fused::{part, State};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::path::Path;
use tensor_core::checkpoint::Checkpoint;

const KIND: &str = "program search";

impl SearchState {
    /// Writes the file whole or not at all. `identity` describes the search that it belongs to.
    pub(super) fn save(&self, path: &Path, identity: &str) -> Result<()> {
        let floats = |values: Vec<f64>| Tensor::new(values, &Device::Cpu);
        let integers = |values: Vec<i64>| Tensor::new(values, &Device::Cpu);
        let mut tensors = State::new();
        let fitness = self.population.iter().map(|i| i.fitness).collect();
        tensors.insert("fitness".into(), floats(fitness)?);
        tensors.insert("best_fitness".into(), floats(vec![self.best.fitness])?);
        // The halves of a 128-bit key.
        let halves = |key: &u128| [(*key >> 64) as i64, *key as i64];
        let keys = self.cache.keys().flat_map(halves).collect();
        tensors.insert("cache_keys".into(), integers(keys)?);
        let values = self.cache.values().copied().collect();
        tensors.insert("cache_values".into(), floats(values)?);
        let bests = self.history.iter().map(|h| h.best).collect();
        tensors.insert("history_best".into(), floats(bests)?);
        // NaN stands for none.
        let meta = self.history.iter().map(|h| h.meta.unwrap_or(f64::NAN));
        tensors.insert("history_meta".into(), floats(meta.collect())?);
        let places = |h: &HistoryPoint| [h.evaluated as i64, h.generated as i64];
        let places = self.history.iter().flat_map(places).collect();
        tensors.insert("history_places".into(), integers(places)?);
        let counts = [
            self.since_best,
            self.issued,
            self.generated,
            self.invalid,
            self.duplicates,
            self.evaluated,
            self.restarts,
        ];
        let counts = counts.iter().map(|c| *c as i64).collect();
        tensors.insert("counts".into(), integers(counts)?);
        let mut checkpoint = Checkpoint::new(KIND, tensors)
            .with("search", identity)
            .with("best", &self.best.program);
        if let Some(best) = &self.best_meta {
            let numbers = vec![best.individual.fitness, best.meta];
            checkpoint
                .tensors
                .insert("best_meta".into(), floats(numbers)?);
            checkpoint = checkpoint.with("best_meta", &best.individual.program);
        }
        for (i, individual) in self.population.iter().enumerate() {
            checkpoint = checkpoint.with(format!("program.{i}"), &individual.program);
        }
        Ok(checkpoint.save(path)?)
    }

    /// Reads a file of the same search.
    pub(super) fn load(path: &Path, identity: &str) -> Result<Self> {
        let checkpoint = Checkpoint::load(path, &Device::Cpu)?;
        let mismatch = |what: &str| {
            let line = format!("{}: {what}", path.display());
            Error::Core(tensor_core::Error::CheckpointMismatch(vec![line]))
        };
        if checkpoint.kind != KIND {
            return Err(mismatch("not a program search"));
        }
        if checkpoint.text("search")? != identity {
            return Err(mismatch(
                "of a search with other settings, start or streams",
            ));
        }
        let tensors = &checkpoint.tensors;
        let floats = |name: &str| -> Result<Vec<f64>> {
            Ok(part(tensors, name)?.to_dtype(DType::F64)?.to_vec1()?)
        };
        let integers = |name: &str| -> Result<Vec<i64>> {
            Ok(part(tensors, name)?.to_dtype(DType::I64)?.to_vec1()?)
        };
        let mut population = std::collections::VecDeque::new();
        for (i, fitness) in floats("fitness")?.into_iter().enumerate() {
            let program: Program = checkpoint.text(&format!("program.{i}"))?.parse()?;
            population.push_back(Individual { program, fitness });
        }
        let key =
            |halves: &[i64]| (u128::from(halves[0] as u64) << 64) | u128::from(halves[1] as u64);
        let keys = integers("cache_keys")?;
        let keys = keys.chunks_exact(2).map(key);
        let places = integers("history_places")?;
        let numbers = floats("history_best")?
            .into_iter()
            .zip(floats("history_meta")?);
        let history = places.chunks_exact(2).zip(numbers);
        let history = history.map(|(places, (best, meta))| HistoryPoint {
            evaluated: places[0] as usize,
            generated: places[1] as usize,
            best,
            meta: (!meta.is_nan()).then_some(meta),
        });
        let best_meta = match tensors.contains_key("best_meta") {
            true => Some((floats("best_meta")?, checkpoint.text("best_meta")?)),
            false => None,
        };
        let best_meta = match best_meta {
            Some((numbers, program)) => {
                let [fitness, meta] = numbers[..] else {
                    return Err(mismatch(
                        "has another number of values for the best program",
                    ));
                };
                let program = program.parse()?;
                let individual = Individual { program, fitness };
                Some(MetaBest { individual, meta })
            }
            None => None,
        };
        let counts = integers("counts")?;
        let [since_best, issued, generated, invalid, duplicates, evaluated, restarts] = counts[..]
        else {
            return Err(mismatch("has another number of counts"));
        };
        let best_fitness = floats("best_fitness")?;
        let best_fitness = best_fitness
            .first()
            .ok_or_else(|| mismatch("has no best fitness"))?;
        Ok(Self {
            best: Individual {
                program: checkpoint.text("best")?.parse()?,
                fitness: *best_fitness,
            },
            best_meta,
            population,
            cache: keys.zip(floats("cache_values")?).collect(),
            history: history.collect(),
            since_best: since_best as usize,
            issued: issued as usize,
            generated: generated as usize,
            invalid: invalid as usize,
            duplicates: duplicates as usize,
            evaluated: evaluated as usize,
            restarts: restarts as usize,
        })
    }
}
