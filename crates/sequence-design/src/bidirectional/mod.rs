//! BIB: bidirectional learning for offline design. From nothing but a table of sequences and scores
//! and a frozen language model, sequences are proposed that should score above everything in the
//! table.
//!
//! For whoever cannot ask for new scores: gradient ascent on a model fitted to the table leaves what
//! the table says anything about. *Bidirectional Learning for Offline Model-based Biological Sequence
//! Design*, Chen et al., ICML 2023, arXiv 2301.02931. A design `x` with a target `y_h` far above the
//! table must be predicted by the table (forward), and predict the table (backward); with a linear
//! head on frozen features `phi` both are closed forms, `w` being the ridge regression of the table:
//!
//! ```text
//! L_f = (phi(x) . w - y_h)^2
//! L_b = mean_n (Phi_n . phi(x) y_h / (|phi(x)|^2 (1 + rel)) - y_n)^2
//! L   = gamma L_f + (1 - gamma) L_b,        x <- x - eta Adam(grad L)
//! ```
//!
//! `gamma` is learned by unrolling one step towards a higher score of auxiliary heads,
//! `d score / d gamma = -lr grad score . (g_f - g_b)`, and `eta` may follow
//! `base - rate (grad score . D)` along the step's direction `D`. Everything is a function of `phi`
//! alone, so that a step is one forward pass and one product with the Jacobian for each gradient
//! that is needed.
//!
//! | symbol | field |
//! | --- | --- |
//! | `phi` | [`SequenceFeatures`] |
//! | `Phi`, `y`, `w` | [`OfflineTable`] |
//! | `y_h` | [`DesignConfig::target`], in standard deviations of the table |
//! | `gamma`, `eta` | [`DesignConfig::gamma`], [`DesignConfig::eta`] |
//!
//! ```
//! # extern crate nn as thalweg_nn;
//! use candle_core::{DType, Device, Tensor};
//! use thalweg_nn::init::SeededVars;
//! use thalweg_sequence_design::bidirectional::*;
//! use thalweg_sequence_design::RandomStream;
//!
//! // A table of 60 strings of 5 of the letters 0 to 3; the score counts threes.
//! let mut rng = RandomStream::new(1);
//! let mut strings: Vec<Vec<u8>> = vec![];
//! for _ in 0..60 {
//!     strings.push((0..5).map(|_| Ok(rng.below(4)? as u8)).collect::<Result<_, thalweg_sequence_design::Error>>()?);
//! }
//! let threes = |s: &Vec<u8>| s.iter().filter(|c| **c == 3).count() as f64;
//! let scores: Vec<f64> = strings.iter().map(threes).collect();
//! // A random transformer in the place of your language model.
//! let encoding = Encoding::Residues { alphabet: 4 };
//! let config = EncoderConfig { tokens: 5, alphabet: 4, width: 16, heads: 2, feed: 32, layers: 1 };
//! let vars = SeededVars::new(&rng.split("model"));
//! let model = KmerTransformer::new(&config, vars.builder(DType::F64, &Device::Cpu))?;
//!
//! let phi = encoding.features_of(&model, &strings)?;
//! let table = OfflineTable::fit(&phi, &scores, RidgeConfig::default())?;
//! let heads = table.bootstrap_heads(5, &mut rng)?;
//! let designer = Bidirectional::new(&model, table, encoding, heads, DesignConfig::default())?;
//! let report = designer.optimize(&strings[..4], &mut rng)?;
//! assert_eq!(report.sequences.len(), 4);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod design;
mod encode;
mod features;
mod table;

pub use design::{
    AdaptiveEta, Bidirectional, DesignConfig, DesignReport, Eta, Gamma, Losses, Mode, StartNoise,
};
pub use encode::Encoding;
pub use features::{BertConfig, EncoderConfig, KmerTransformer, SafetensorsBert, SequenceFeatures};
pub use table::{joint_backward_loss, LinearHead, OfflineTable, RidgeConfig};
