//! From a FASTA file of measured sequences to ranked candidates.
//!
//! ```text
//! cargo run -p thalweg-sequence-design --example design_from_fasta -- measured.fa > candidates.fa
//! ```
//!
//! The file holds DNA of one length, with `score=NUMBER` in each header. Without a file, made-up
//! binding sites take its place.
#![allow(clippy::print_stdout)]

use candle_core::{DType, Device};
use nn::init::SeededVars;
use std::collections::{BTreeMap, HashSet};
use thalweg_sequence_design::bidirectional::{
    Bidirectional, DesignConfig, EncoderConfig, Encoding, KmerTransformer, OfflineTable,
    RidgeConfig,
};
use thalweg_sequence_design::sequences::{read_fastx, write_fasta, Alphabet, Ambiguous, Record};
use thalweg_sequence_design::RandomStream;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dna = Alphabet::dna();
    let mut rng = RandomStream::new(7);
    let text = match std::env::args().nth(1) {
        Some(path) => std::fs::read(path)?,
        None => made_up(&dna, &mut rng)?,
    };

    // 1. Sequences as codes, scores from the headers, best first.
    let mut measured = vec![];
    for record in read_fastx(&text[..], &dna, Ambiguous::Refuse)? {
        let score = record
            .description
            .split("score=")
            .nth(1)
            .and_then(|s| s.split(' ').next());
        let score: f64 = score
            .ok_or_else(|| format!("{} has no score=", record.name))?
            .parse()?;
        measured.push((score, record.codes));
    }
    measured.sort_by(|a, b| b.0.total_cmp(&a.0));
    let (scores, sequences): (Vec<f64>, Vec<Vec<u8>>) = measured.into_iter().unzip();

    // 2. Features of 3-mers. A random transformer here; SafetensorsBert reads a trained one.
    let encoding = Encoding::Kmers {
        k: 3,
        alphabet: dna.len(),
    };
    let length = sequences.first().map_or(0, Vec::len);
    let config = EncoderConfig::small(encoding, length);
    let vars = SeededVars::new(&rng.split("model"));
    KmerTransformer::new(&config, vars.builder(DType::F64, &Device::Cpu))?;
    let model = KmerTransformer::new(&config, vars.frozen(DType::F64, &Device::Cpu)?)?;
    let table = OfflineTable::fit(
        &encoding.features_of(&model, &sequences)?,
        &scores,
        RidgeConfig::default(),
    )?;
    let heads = table.bootstrap_heads(5, &mut rng)?;

    // 3. Designs from the best 32, at most three letters away from where they began.
    let config = DesignConfig {
        max_edits: Some(3),
        ..DesignConfig::default()
    };
    let designer = Bidirectional::new(&model, table, encoding, heads, config)?;
    let starts = &sequences[..sequences.len().min(32)];
    let report = designer.optimize(starts, &mut rng)?;

    // 4. New ones, each once, ranked by what the heads say of them.
    let known: HashSet<&Vec<u8>> = sequences.iter().collect();
    let distances = report.sequences.iter().zip(&report.distances);
    let fresh: BTreeMap<Vec<u8>, usize> = distances
        .filter(|(s, _)| !known.contains(s))
        .map(|(s, d)| (s.clone(), *d))
        .collect();
    let designs: Vec<Vec<u8>> = fresh.keys().cloned().collect();
    if designs.is_empty() {
        return Err("every design is in the table already: allow more edits".into());
    }
    let judged = designer.scores(&encoding.features_of(&model, &designs)?)?;
    let mut ranked: Vec<(f64, &Vec<u8>, usize)> = judged
        .into_iter()
        .zip(&fresh)
        .map(|(score, (codes, edits))| (score, codes, *edits))
        .collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    let candidate = |(k, (score, codes, edits)): (usize, &(f64, &Vec<u8>, usize))| Record {
        name: format!("candidate_{}", k + 1),
        description: format!("predicted={score:.3} edits={edits}"),
        codes: (*codes).clone(),
        quality: None,
    };
    let candidates: Vec<Record> = ranked.iter().enumerate().map(candidate).collect();
    write_fasta(&mut std::io::stdout().lock(), &dna, &candidates)?;
    Ok(())
}

/// 600 sequences of 10 letters whose score is how many letters of GATTAC their best place has.
fn made_up(
    dna: &Alphabet,
    rng: &mut RandomStream,
) -> Result<Vec<u8>, thalweg_sequence_design::Error> {
    let motif = dna.encode("GATTAC", "the motif", Ambiguous::Refuse)?;
    let mut records = vec![];
    for k in 0..600 {
        let codes: Vec<u8> = (0..10)
            .map(|_| Ok(rng.below(4)? as u8))
            .collect::<Result<_, thalweg_sequence_design::Error>>()?;
        let hits = |w: &[u8]| w.iter().zip(&motif).filter(|(a, b)| a == b).count();
        let best = codes.windows(6).map(hits).max().unwrap_or(0) as f64;
        records.push(Record {
            name: format!("site_{k}"),
            description: format!("score={:.3}", best / 6.0 + 0.05 * rng.next_normal()),
            codes,
            quality: None,
        });
    }
    let mut text = vec![];
    write_fasta(&mut text, dna, &records)?;
    Ok(text)
}
