//! Implementations against files of reference numbers.
//!
//! A folder holds `SLUG.safetensors` files. For each, the adaptors of the crates that implement
//! the method read inputs and hyper-parameters from the file, compute, and compare.

use crate::{Error, Result};
use std::collections::BTreeSet;
use std::path::Path;
use tensor_core::verify::{Reference, Report};

/// Computes from a file's inputs and compares with its outputs.
type Adaptor = fn(&mut Reference) -> Result<()>;

/// All adaptors of this build by slug; a method that two crates implement has one in each.
pub fn adaptors() -> Vec<(&'static str, Vec<Adaptor>)> {
    vec![
        ("lion", vec![|r| Ok(optim::verify::lion(r)?)]),
        ("spam", vec![|r| Ok(optim::verify::spam(r)?)]),
        (
            "perp-grad",
            vec![|r| Ok(nn::verify::stablemax(r)?), |r| {
                Ok(optim::verify::perp_grad(r)?)
            }],
        ),
        (
            "large-batch",
            vec![|r| Ok(nn::verify::ghost_batch_norm(r)?), |r| {
                Ok(optim::verify::large_batch(r)?)
            }],
        ),
        ("sso", vec![|r| Ok(optim::verify::sso(r)?)]),
        ("bo-rep", vec![|r| Ok(optim::verify::bo_rep(r)?)]),
        ("cbo", vec![|r| Ok(optim::verify::cbo(r)?)]),
        ("gradsign", vec![|r| Ok(optim::verify::gradsign(r)?)]),
        (
            "opposing-signals",
            vec![|r| Ok(optim::verify::opposing_signals(r)?)],
        ),
        ("power-norm", vec![|r| Ok(nn::verify::power_norm(r)?)]),
        #[cfg(feature = "convex")]
        ("sparse-ot", vec![|r| Ok(convex::verify::sparse_ot(r)?)]),
        #[cfg(feature = "convex")]
        ("bcd", vec![|r| Ok(convex::verify::bcd(r)?)]),
        #[cfg(feature = "convex")]
        ("convex-relu", vec![|r| Ok(convex::verify::convex_relu(r)?)]),
        #[cfg(feature = "convex")]
        (
            "attention-svm",
            vec![|r| Ok(convex::verify::attention_svm(r)?)],
        ),
        #[cfg(feature = "graph-learning")]
        (
            "graph-core",
            vec![|r| Ok(graph_learning::verify::graph_core(r)?)],
        ),
        #[cfg(feature = "graph-learning")]
        (
            "forward-gnn",
            vec![|r| Ok(graph_learning::verify::forward_gnn(r)?)],
        ),
        #[cfg(feature = "graph-learning")]
        ("w2pgnn", vec![|r| Ok(graph_learning::verify::w2pgnn(r)?)]),
        #[cfg(feature = "graph-learning")]
        ("graphfm", vec![|r| Ok(graph_learning::verify::graphfm(r)?)]),
        #[cfg(feature = "graph-learning")]
        ("cgs", vec![|r| Ok(graph_learning::verify::cgs(r)?)]),
        #[cfg(feature = "graph-learning")]
        ("pot", vec![|r| Ok(graph_learning::verify::pot(r)?)]),
        #[cfg(feature = "guidance")]
        (
            "guidance-core",
            vec![|r| Ok(flows::verify::guidance_core(r)?), |r| {
                Ok(guidance::verify::guidance_core(r)?)
            }],
        ),
        #[cfg(feature = "flows")]
        (
            "rectified-flow",
            vec![|r| Ok(flows::verify::rectified_flow(r)?)],
        ),
        #[cfg(feature = "flows")]
        ("disback", vec![|r| Ok(flows::verify::disback(r)?)]),
        #[cfg(feature = "flows")]
        ("adjoint-dpm", vec![|r| Ok(flows::verify::adjoint_dpm(r)?)]),
        #[cfg(feature = "guidance")]
        ("apg", vec![|r| Ok(guidance::verify::apg(r)?)]),
        #[cfg(feature = "guidance")]
        (
            "adaptive-guidance",
            vec![|r| Ok(guidance::verify::adaptive_guidance(r)?)],
        ),
        #[cfg(feature = "guidance")]
        ("flowchef", vec![|r| Ok(guidance::verify::flowchef(r)?)]),
        #[cfg(feature = "guidance")]
        ("reno", vec![|r| Ok(guidance::verify::reno(r)?)]),
        #[cfg(feature = "guidance")]
        ("ppap", vec![|r| Ok(guidance::verify::ppap(r)?)]),
        #[cfg(feature = "guidance")]
        ("gfcg", vec![|r| Ok(guidance::verify::gfcg(r)?)]),
        #[cfg(feature = "sequence-design")]
        ("op-gfn", vec![|r| Ok(sequence_design::verify::op_gfn(r)?)]),
        #[cfg(feature = "sequence-design")]
        ("drakes", vec![|r| Ok(sequence_design::verify::drakes(r)?)]),
        #[cfg(feature = "sequence-design")]
        ("bib", vec![|r| Ok(sequence_design::verify::bib(r)?)]),
        #[cfg(feature = "guidance")]
        (
            "svdd",
            vec![
                |r| Ok(guidance::verify::svdd(r)?),
                #[cfg(feature = "sequence-design")]
                |r| Ok(sequence_design::verify::svdd(r)?),
                #[cfg(not(feature = "sequence-design"))]
                |r| Ok(guidance::verify::svdd_without_tokens(r)?),
            ],
        ),
    ]
}

/// What came of one file.
#[derive(Debug)]
pub enum Outcome {
    /// It was compared.
    Compared(Report),
    /// No crate of this build knows the method.
    NoAdaptor,
    /// The file could not be read or the computation failed.
    Error(String),
}

/// One file.
#[derive(Debug)]
pub struct Check {
    /// The method: the file's name without its ending.
    pub slug: String,
    /// What came of it.
    pub result: Outcome,
}

impl Check {
    /// Whether something is wrong.
    pub fn failed(&self) -> bool {
        match &self.result {
            Outcome::Compared(report) => !report.passed(),
            Outcome::NoAdaptor => false,
            Outcome::Error(_) => true,
        }
    }

    /// Whether the file was compared or should have been.
    pub fn covered(&self) -> bool {
        !matches!(self.result, Outcome::NoAdaptor)
    }

    /// Failures, and tensors that are not covered, by name.
    pub fn lines(&self) -> Vec<String> {
        match &self.result {
            Outcome::NoAdaptor => Vec::new(),
            Outcome::Error(message) => vec![message.clone()],
            Outcome::Compared(report) => {
                let mut lines = report.failures();
                let one =
                    |(name, reason): &(String, String)| format!("{name}: not covered ({reason})");
                lines.extend(report.uncovered.iter().map(one));
                lines
            }
        }
    }
}

/// Checks every file of `folder`, or those of `only`.
///
/// # Errors
/// [`Error::Io`] when the folder cannot be read or holds no file; [`Error::Unknown`] for a slug
/// in `only` without adaptor; [`Error::BadFile`] for one without file.
pub fn verify(folder: &Path, only: &[String]) -> Result<Vec<Check>> {
    let adaptors = adaptors();
    let known: Vec<String> = adaptors.iter().map(|(slug, _)| slug.to_string()).collect();
    for slug in only {
        if !known.contains(slug) {
            return Err(Error::Unknown {
                kind: "method",
                name: slug.clone(),
                known,
            });
        }
    }
    let present = files(folder)?;
    let bad = |reason: String| Error::BadFile {
        path: folder.display().to_string(),
        reason,
    };
    if let Some(missing) = only.iter().find(|s| !present.contains(*s)) {
        return Err(bad(format!("there is no {missing}.safetensors")));
    }
    if present.is_empty() {
        return Err(bad("holds no .safetensors file".into()));
    }
    let wanted = present
        .iter()
        .filter(|s| only.is_empty() || only.contains(s));
    Ok(wanted
        .map(|slug| {
            let parts = adaptors
                .iter()
                .find(|(s, _)| s == slug)
                .map(|(_, parts)| parts.as_slice());
            let path = folder.join(format!("{slug}.safetensors"));
            let result = match parts.map(|parts| compare(&path, parts)) {
                None => Outcome::NoAdaptor,
                Some(Ok(report)) => Outcome::Compared(report),
                Some(Err(error)) => Outcome::Error(error.to_string()),
            };
            Check {
                slug: slug.clone(),
                result,
            }
        })
        .collect())
}

fn compare(path: &Path, parts: &[Adaptor]) -> Result<Report> {
    let mut reference = Reference::open(path)?;
    for part in parts {
        part(&mut reference)?;
    }
    Ok(reference.finish())
}

/// Names of the reference files, sorted.
fn files(folder: &Path) -> Result<BTreeSet<String>> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    let mut names = BTreeSet::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            names.extend(path.file_stem().map(|s| s.to_string_lossy().into_owned()));
        }
    }
    Ok(names)
}
