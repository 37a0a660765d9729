use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use nn::init::SeededVars;
use proptest::prelude::*;
use sequence_design::bidirectional::*;
use sequence_design::RandomStream;
use tensor_core::autograd::{check_gradients, CheckConfig};

#[test]
fn reference() {
    let report = FILES.verify("bib", sequence_design::verify::bib);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 7 + 6 + 25);
}

#[test]
fn reference_with_another_prefix_and_without_measurements() {
    let report = FILES.verify_variant(
        "bib",
        |tensors, _| {
            let kept = tensors.iter().filter(|(n, _)| !n.starts_with("tfbind8"));
            *tensors = kept.map(|(n, t)| (format!("b.{n}"), t.clone())).collect();
        },
        sequence_design::verify::bib,
    );
    assert_passed(&report, |_| false);
}

const LETTERS: Encoding = Encoding::Residues { alphabet: 4 };
const TRIPLES: Encoding = Encoding::Kmers { k: 3, alphabet: 4 };

fn transformer(encoding: Encoding, tokens: usize) -> KmerTransformer {
    let config = EncoderConfig {
        tokens,
        alphabet: encoding.vocabulary(),
        width: 12,
        heads: 2,
        feed: 16,
        layers: 2,
    };
    let vars = SeededVars::new(&RandomStream::new(3));
    KmerTransformer::new(&config, vars.builder(DType::F64, &Device::Cpu)).unwrap()
}

fn strings(count: usize, length: usize, seed: u64) -> Vec<Vec<u8>> {
    let mut rng = RandomStream::new(seed);
    let mut one = || (0..length).map(|_| rng.below(4).unwrap() as u8).collect();
    (0..count).map(|_| one()).collect()
}

fn scores(strings: &[Vec<u8>]) -> Vec<f64> {
    let one = |s: &Vec<u8>| s.iter().filter(|c| **c == 3).count() as f64 + 0.1 * f64::from(s[0]);
    strings.iter().map(one).collect()
}

fn table(model: &KmerTransformer, encoding: Encoding) -> (Vec<Vec<u8>>, OfflineTable) {
    let all = strings(80, 7, 5);
    let phi = encoding.features_of(model, &all).unwrap();
    let fitted = OfflineTable::fit(&phi, &scores(&all), RidgeConfig::default()).unwrap();
    (all, fitted)
}

fn config(mode: Mode) -> DesignConfig {
    DesignConfig {
        mode,
        steps: 12,
        target: 4.0,
        ..DesignConfig::default()
    }
}

#[test]
fn kmers_are_products_of_letters() {
    let logits = normal(1, &[2, 5, 4], DType::F64);
    let p = nn::softmax::softmax(&logits, 2).unwrap();
    let p3 = p.to_vec3::<f64>().unwrap();
    let tokens = TRIPLES.products(&p).unwrap().to_vec3::<f64>().unwrap();
    assert_eq!((tokens[0].len(), tokens[0][0].len()), (3, 64));
    for (b, rows) in tokens.iter().enumerate() {
        for (l, row) in rows.iter().enumerate() {
            for (index, value) in row.iter().enumerate() {
                let (i, j, k) = (index / 16, index / 4 % 4, index % 4);
                let expected = p3[b][l][i] * p3[b][l + 1][j] * p3[b][l + 2][k];
                assert!((value - expected).abs() < 1e-15);
            }
        }
    }
    let hard = TRIPLES
        .one_hot(&[vec![0, 1, 2, 3]], DType::F64, &Device::Cpu)
        .unwrap();
    assert_eq!(values(&hard.argmax(2).unwrap()), [6.0, 27.0]);
    assert!(TRIPLES
        .one_hot(&[vec![0, 1]], DType::F64, &Device::Cpu)
        .is_err());
    assert!(TRIPLES
        .one_hot(&[vec![0, 1, 2], vec![0, 1, 2, 3]], DType::F64, &Device::Cpu)
        .is_err());
    assert!(TRIPLES
        .one_hot(&[vec![0, 1, 4]], DType::F64, &Device::Cpu)
        .is_err());
    assert!(TRIPLES.one_hot(&[], DType::F64, &Device::Cpu).is_err());
}

proptest! {
    #![proptest_config(cases(16))]

    /// The regression is the same whichever of its two forms is solved, and the loss of one design is
    /// that of the general solve.
    #[test]
    fn closed_forms_agree(seed in 0u64..1000, n in 3usize..12, d in 2usize..12) {
        let phi = normal(seed, &[n, d], DType::F64);
        let y: Vec<f64> = values(&normal(seed + 1, &[n], DType::F64));
        let fitted = OfflineTable::fit(&phi, &y, RidgeConfig { rel: 1e-3 }).unwrap();
        // (Phi' Phi + ridge) w = Phi' y holds for both forms.
        let w = Tensor::new(fitted.weights(), &Device::Cpu).unwrap().unsqueeze(1).unwrap();
        let y = Tensor::new(fitted.normalized(), &Device::Cpu).unwrap().unsqueeze(1).unwrap();
        let residue = (&y - phi.matmul(&w).unwrap()).unwrap();
        let left = phi.t().unwrap().matmul(&residue).unwrap();
        let right = w.affine(fitted.ridge(), 0.0).unwrap();
        for (a, b) in values(&left).iter().zip(values(&right)) {
            prop_assert!((a - b).abs() < 1e-9, "{} {}", a, b);
        }
        let design = normal(seed + 2, &[1, d], DType::F64);
        let joint = joint_backward_loss(&fitted, &design, 5.0).unwrap();
        let k = values(&design.sqr().unwrap().sum_all().unwrap())[0];
        let guess = phi.matmul(&design.t().unwrap()).unwrap().affine(5.0 / (k * 1.001), 0.0).unwrap();
        let direct = values(&(guess - y).unwrap().sqr().unwrap().mean_all().unwrap())[0];
        prop_assert!((joint - direct).abs() < 1e-9 * direct.max(1.0));
    }
}

/// Fixed gammas, forward and backward are points of one family; a batch of starts is the starts one
/// at a time; gamma stays in its interval.
#[test]
fn modes_and_batches_agree() {
    let model = transformer(TRIPLES, 5);
    let (all, fitted) = table(&model, TRIPLES);
    let heads = fitted
        .bootstrap_heads(3, &mut RandomStream::new(8))
        .unwrap();
    let run = |config: DesignConfig, starts: &[Vec<u8>]| {
        let designer =
            Bidirectional::new(&model, fitted.clone(), TRIPLES, heads.clone(), config).unwrap();
        designer
            .optimize(starts, &mut RandomStream::new(9))
            .unwrap()
    };
    let fixed = |gamma| DesignConfig {
        gamma: Gamma::Fixed(gamma),
        ..config(Mode::Bidirectional)
    };
    let same = |a: DesignReport, b: DesignReport| {
        for (x, y) in a
            .logits
            .concat()
            .concat()
            .iter()
            .zip(&b.logits.concat().concat())
        {
            assert!((x - y).abs() < 1e-6, "{x} {y}");
        }
        assert_eq!(a.sequences, b.sequences);
    };
    let starts = &all[..3];
    same(run(fixed(1.0), starts), run(config(Mode::Forward), starts));
    same(run(fixed(0.0), starts), run(config(Mode::Backward), starts));
    let eta = DesignConfig {
        eta: Eta::Adaptive(AdaptiveEta::default()),
        ..config(Mode::Bidirectional)
    };
    let together = run(eta.clone(), starts);
    assert!(together
        .gamma_history
        .iter()
        .flatten()
        .all(|g| (0.0..=1.0).contains(g)));
    assert!(together.gamma_history.iter().flatten().any(|g| *g != 0.5));
    assert!(together
        .eta_history
        .iter()
        .flatten()
        .all(|e| (1e-4..=0.5).contains(e)));
    for (i, start) in starts.iter().enumerate() {
        let alone = run(eta.clone(), std::slice::from_ref(start));
        assert_eq!(alone.sequences[0], together.sequences[i]);
        for (x, y) in alone.logits[0]
            .concat()
            .iter()
            .zip(together.logits[i].concat())
        {
            assert!((x - y).abs() < 1e-9);
        }
    }
    // Fewer edits, and none where the letters are fixed.
    let capped = run(
        DesignConfig {
            max_edits: Some(1),
            ..config(Mode::Forward)
        },
        starts,
    );
    assert!(capped.distances.iter().all(|d| *d <= 1));
    let mut keep = vec![false; 7];
    keep[..4].fill(true);
    let kept = run(
        DesignConfig {
            fixed: keep,
            ..config(Mode::Forward)
        },
        starts,
    );
    for (design, start) in kept.sequences.iter().zip(starts) {
        assert_eq!(design[..4], start[..4]);
    }
    let each = DesignConfig {
        noise: StartNoise::Each,
        ..config(Mode::Forward)
    };
    assert_ne!(
        run(each, starts).logits[1][0],
        run(config(Mode::Forward), starts).logits[1][0]
    );
    // The forward loss falls.
    let forward = run(config(Mode::Forward), starts);
    assert!(forward.losses.iter().all(|l| l[11].forward < l[0].forward));
}

/// The gradients of both losses in soft tokens, against central differences.
#[test]
fn losses_are_differentiated_right() {
    let model = transformer(LETTERS, 7);
    let (all, fitted) = table(&model, LETTERS);
    let p = Var::from_tensor(&nn::softmax::softmax(&normal(2, &[1, 7, 4], DType::F64), 2).unwrap())
        .unwrap();
    let w = Tensor::new(fitted.weights(), &Device::Cpu).unwrap();
    let phi = LETTERS.features_of(&model, &all).unwrap();
    let y = Tensor::new(fitted.normalized(), &Device::Cpu).unwrap();
    let wrap = candle_core::Error::wrap;
    let forward = || {
        let f = model.features(p.as_tensor()).map_err(wrap)?;
        (f.broadcast_mul(&w)?.sum_all()? - 4.0)?.sqr()
    };
    check_gradients(forward, &[("p".into(), p.clone())], CheckConfig::default()).unwrap();
    let backward = || {
        let f = model.features(p.as_tensor()).map_err(wrap)?;
        let k = f.sqr()?.sum_all()?;
        let guess = phi
            .matmul(&f.t()?)?
            .squeeze(1)?
            .affine(4.0 / (1.0 + 1e-6), 0.0)?;
        (guess.broadcast_div(&k)? - &y)?.sqr()?.mean_all()
    };
    check_gradients(backward, &[("p".into(), p.clone())], CheckConfig::default()).unwrap();
}

/// A tiny BERT in the layout of the real files.
#[test]
fn bert_files_are_read() {
    let config = BertConfig {
        vocabulary: 69,
        hidden: 12,
        layers: 2,
        heads: 3,
        intermediate: 20,
        positions: 16,
        ..BertConfig::default()
    };
    let vars = SeededVars::new(&RandomStream::new(1));
    let vb = vars.builder(DType::F64, &Device::Cpu);
    let model = SafetensorsBert::new(&config, vb.pp("bert")).unwrap();
    let names: Vec<String> = vars.trainable().into_iter().map(|(n, _)| n).collect();
    for name in [
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.LayerNorm.bias",
        "bert.encoder.layer.1.attention.self.query.weight",
        "bert.encoder.layer.0.attention.output.LayerNorm.weight",
        "bert.encoder.layer.1.intermediate.dense.bias",
        "bert.encoder.layer.1.output.dense.weight",
    ] {
        assert!(names.iter().any(|n| n == name), "{name}");
    }
    let tensors = vars
        .trainable()
        .into_iter()
        .map(|(n, v)| (n, v.as_tensor().clone()))
        .collect();
    let file = candle_nn::VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
    let read = SafetensorsBert::new(&config, file).unwrap();
    let tokens = TRIPLES
        .one_hot(&strings(3, 8, 1), DType::F64, &Device::Cpu)
        .unwrap();
    let (a, b) = (
        model.features(&tokens).unwrap(),
        read.features(&tokens).unwrap(),
    );
    assert_eq!(bits(&a), bits(&b));
    assert_eq!(a.dims(), [3, 12]);
    let soft = Var::from_tensor(&tokens).unwrap();
    let grads = model
        .features(soft.as_tensor())
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    assert!(grads.get(&soft).is_some());
    let long = TRIPLES
        .one_hot(&strings(1, 20, 1), DType::F64, &Device::Cpu)
        .unwrap();
    assert!(model.features(&long).is_err());
    let bad = BertConfig { heads: 5, ..config };
    assert!(SafetensorsBert::new(&bad, vars.builder(DType::F64, &Device::Cpu)).is_err());
}

#[test]
fn bad_tables_and_settings_are_named() {
    let phi = normal(1, &[4, 3], DType::F64);
    let fit = |phi: &Tensor, y: &[f64]| OfflineTable::fit(phi, y, RidgeConfig::default());
    let y = [1.0, 2.0, 3.0, 5.0];
    assert!(fit(&phi, &y[..3]).is_err());
    assert!(fit(&phi.narrow(0, 0, 1).unwrap(), &y[..1]).is_err());
    assert!(fit(&phi, &[1.0; 4]).is_err());
    assert!(fit(&phi, &[1.0, f64::NAN, 2.0, 3.0]).is_err());
    assert!(fit(&phi.zeros_like().unwrap(), &y).is_err());
    assert!(OfflineTable::fit(&phi, &y, RidgeConfig { rel: 0.0 }).is_err());
    let model = transformer(LETTERS, 7);
    let (all, fitted) = table(&model, LETTERS);
    let build = |config| Bidirectional::new(&model, fitted.clone(), LETTERS, vec![], config);
    assert!(build(config(Mode::Bidirectional)).is_err());
    assert!(build(DesignConfig {
        steps: 0,
        ..config(Mode::Forward)
    })
    .is_err());
    assert!(build(DesignConfig {
        gamma: Gamma::Fixed(2.0),
        ..config(Mode::Bidirectional)
    })
    .is_err());
    assert!(build(DesignConfig {
        eta: Eta::Fixed(0.0),
        ..config(Mode::Forward)
    })
    .is_err());
    assert!(build(DesignConfig {
        target: f64::NAN,
        ..config(Mode::Forward)
    })
    .is_err());
    let designer = build(config(Mode::Forward)).unwrap();
    let mut rng = RandomStream::new(1);
    assert!(designer.optimize(&[], &mut rng).is_err());
    assert!(designer
        .optimize(&[vec![0; 7], vec![0; 6]], &mut rng)
        .is_err());
    assert!(designer.optimize(&[vec![9; 7]], &mut rng).is_err());
    let short = DesignConfig {
        fixed: vec![true; 3],
        ..config(Mode::Forward)
    };
    assert!(build(short).unwrap().optimize(&all[..1], &mut rng).is_err());
}
