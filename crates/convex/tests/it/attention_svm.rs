use crate::support::*;
use candle_core::{DType, Device, Tensor};
use convex::attention_svm::*;
use convex::Error;
use proptest::prelude::*;
use std::collections::HashMap;

#[test]
fn reference() {
    let report = FILES.verify("attention-svm", convex::verify::attention_svm);
    assert_passed(&report, |_| false);
    assert!(report.comparisons.len() >= 28);
    assert!(report.uncovered.is_empty());
}

/// Cases are found by their prefix, in any number.
#[test]
fn every_case_of_a_file_is_checked() {
    let once = FILES
        .verify("attention-svm", convex::verify::attention_svm)
        .comparisons;
    let report = verify_twice("attention-svm", convex::verify::attention_svm);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 2 * once.len());
}

fn random(seed: u64, n: usize, t: usize, d: usize) -> (Tensor, Tensor) {
    let x = tensor(&normals(seed, n * t * d), (n, t, d));
    let z = tensor(&normals(seed + 1, n * d), (n, d));
    (x, z)
}

fn data(seed: u64, n: usize, t: usize, d: usize) -> AttentionData {
    let (x, z) = random(seed, n, t, d);
    AttentionData::new(&x, &z, None).unwrap()
}

fn picks(seed: u64, n: usize, t: usize) -> Selection {
    Selection(
        uniforms(seed, n)
            .iter()
            .map(|u| (u * t as f64) as usize)
            .collect(),
    )
}

fn solve(data: &AttentionData, selection: &Selection) -> SvmSolution {
    AttSvm::default().solve(data, selection).unwrap()
}

fn nuclear(data: &AttentionData, selection: &Selection) -> SvmSolution {
    let norm = SvmNorm::Nuclear { rank_cap: None };
    AttSvm {
        norm,
        ..Default::default()
    }
    .solve(data, selection)
    .unwrap()
}

fn sum_of_singular_values(w: &Tensor) -> f64 {
    let (d, e) = w.dims2().unwrap();
    let v = values(w);
    faer::Mat::from_fn(d, e, |i, j| v[i * e + j])
        .singular_values()
        .unwrap()
        .iter()
        .sum()
}

fn frobenius(w: &Tensor) -> f64 {
    values(w).iter().map(|x| x * x).sum::<f64>().sqrt()
}

proptest! {
    #![proptest_config(cases(16))]

    #[test]
    fn the_solution_satisfies_its_conditions(seed in 0u64..1000, n in 1usize..5, t in 2usize..6) {
        let (d, selection) = (8, picks(seed + 5, n, t));
        let data = data(seed, n, t, d);
        let found = solve(&data, &selection);
        prop_assert!(found.margins.iter().all(|m| *m >= 1.0 - 1e-9));
        for (l, m) in found.duals.iter().zip(&found.margins) {
            prop_assert!(*l >= 0.0 && l * (m - 1.0).abs() < 1e-8);
        }
        let sum: f64 = found.duals.iter().sum();
        prop_assert!((found.norm.powi(2) - sum).abs() < 1e-8 * sum.max(1.0));
        prop_assert!(found.gap.abs() < 1e-7 * sum.max(1.0) && found.rank <= n);
        let low = nuclear(&data, &selection);
        prop_assert!(low.margins.iter().all(|m| *m >= 1.0 - 1e-7));
        prop_assert!(low.norm <= sum_of_singular_values(&found.w) + 1e-6);
        prop_assert!(found.norm <= frobenius(&low.w) + 1e-7);
        prop_assert!(low.gap < 1e-4 * low.norm && low.gap > -1e-6 * low.norm, "{}", low.gap);
        let (k, q) = low.factors().unwrap();
        let product = k.t().unwrap().matmul(&q).unwrap();
        assert_close(&values(&product), &values(&low.low_rank), 1e-7);
    }

    #[test]
    fn scaling_rotation_and_order(seed in 0u64..1000) {
        let (n, t, d) = (3, 4, 6);
        let (x, z) = random(seed, n, t, d);
        let selection = picks(seed + 5, n, t);
        let w = solve(&AttentionData::new(&x, &z, None).unwrap(), &selection).w;
        let half = AttentionData::new(&(&x * 2.0).unwrap(), &z, None).unwrap();
        assert_close(&values(&solve(&half, &selection).w), &values(&(&w * 0.5).unwrap()), 1e-8);
        // A rotation of all vectors: a reflection will do.
        let axis = normals(seed + 9, d);
        let size: f64 = axis.iter().map(|a| a * a).sum();
        let r: Vec<f64> = (0..d * d).map(|p| f64::from(u8::from(p / d == p % d)) - 2.0 * axis[p / d] * axis[p % d] / size).collect();
        let r = tensor(&r, (d, d));
        let turn = |t: &Tensor| t.broadcast_matmul(&r.t().unwrap()).unwrap();
        let turned = AttentionData::new(&turn(&x), &turn(&z), None).unwrap();
        let expected = r.matmul(&w).unwrap().matmul(&r.t().unwrap()).unwrap();
        assert_close(&values(&solve(&turned, &selection).w), &values(&expected), 1e-8);
        let order = Tensor::new(&[2u32, 0, 3, 1], &CPU).unwrap();
        let moved = AttentionData::new(&x.index_select(&order, 1).unwrap(), &z, None).unwrap();
        let new = |t: &usize| [2usize, 0, 3, 1].iter().position(|o| o == t).unwrap();
        let same = Selection(selection.0.iter().map(new).collect());
        assert_close(&values(&solve(&moved, &same).w), &values(&w), 1e-8);
    }

    #[test]
    fn gradients_are_derivatives(seed in 0u64..1000) {
        let (n, t, d) = (3, 4, 3);
        let data = data(seed, n, t, d);
        let (v, y) = (normals(seed + 2, d), vec![1.0, -1.0, 1.0]);
        let w = normals(seed + 3, d * d);
        for loss in [HeadLoss::Logistic, HeadLoss::Exponential] {
            let at = |w: &[f64]| attention_gradient(&data, loss, &v, &y, &tensor(w, (d, d))).unwrap();
            let g = values(&at(&w).1);
            for i in 0..d * d {
                let h = 1e-6;
                let moved = |by: f64| {
                    let mut w = w.clone();
                    w[i] += by;
                    at(&w).0
                };
                prop_assert!(((moved(h) - moved(-h)) / (2.0 * h) - g[i]).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn one_kept_token_is_the_plain_problem(seed in 0u64..1000) {
        let (n, t, d) = (3, 4, 6);
        let data = data(seed, n, t, d);
        let selection = picks(seed + 5, n, t);
        let mut probs = vec![0.0; n * t];
        selection.0.iter().enumerate().for_each(|(i, &k)| probs[i * t + k] = 1.0);
        let found = generalized_svm(&data, &probs, 1e-3).unwrap();
        assert_close(&values(&found.w_dir), &values(&solve(&data, &selection).w), 1e-6);
        prop_assert!(values(&found.w_fin).iter().all(|w| *w == 0.0));
    }
}

#[test]
fn generalized_weights_reproduce_the_ratios() {
    let (n, t, d) = (2, 4, 8);
    let data = data(3, n, t, d);
    let probs = [0.6, 0.4, 0.0, 0.0, 0.0, 0.2, 0.0, 0.8];
    let found = generalized_svm(&data, &probs, 1e-3).unwrap();
    assert_eq!(
        found.selection,
        MultiSelection(vec![vec![0, 1], vec![1, 3]])
    );
    let w = (&found.w_fin + (&found.w_dir * 40.0).unwrap()).unwrap();
    assert_close(&data.probabilities(&w).unwrap(), &probs, 1e-6);
    let (ratio, cosine) = found.fit(&w).unwrap();
    assert!((ratio - 40.0).abs() < 1e-6 && cosine > 1.0 - 1e-9);
}

#[test]
fn contradictions_are_proven() {
    // Opposite demands on one direction.
    let x = tensor(&[1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0], (2, 2, 2));
    let z = tensor(&[1.0, 0.0, 1.0, 0.0], (2, 2));
    let data = AttentionData::new(&x, &z, None).unwrap();
    match AttSvm::default().solve(&data, &Selection(vec![0, 0])) {
        Err(Error::Infeasible { multipliers, .. }) => {
            assert!((multipliers[0] - multipliers[1]).abs() < 1e-5 * multipliers[0]);
        }
        other => panic!("{other:?}"),
    }
    // A soft margin has an answer all the same.
    let soft = AttSvm {
        soft: Some(3.0),
        ..Default::default()
    };
    let found = soft.solve(&data, &Selection(vec![0, 0])).unwrap();
    assert!(found.duals.iter().all(|l| *l <= 3.0) && found.gap.abs() < 1e-8);
    // Padding that equals the selected token; masked, it is no constraint.
    let x = tensor(&[1.0, 0.0, 0.0, 1.0, 1.0, 0.0], (1, 3, 2));
    let z = tensor(&[1.0, 1.0], (1, 2));
    let padded = AttentionData::new(&x, &z, None).unwrap();
    let error = AttSvm::default()
        .solve(&padded, &Selection(vec![0]))
        .unwrap_err();
    assert!(error.to_string().contains("token 2 of query 0"), "{error}");
    let masked = AttentionData::new(&x, &z, Some(&[2])).unwrap();
    assert_eq!(solve(&masked, &Selection(vec![0])).margins.len(), 1);
}

#[test]
fn a_rank_cap_is_kept_or_refused() {
    let data = data(11, 3, 4, 6);
    let selection = picks(12, 3, 4);
    let full = nuclear(&data, &selection);
    let capped = |cap| {
        let norm = SvmNorm::Nuclear {
            rank_cap: Some(cap),
        };
        AttSvm {
            norm,
            max_iter: 3000,
            ..Default::default()
        }
        .solve(&data, &selection)
    };
    assert!((capped(6).unwrap().norm - full.norm).abs() < 1e-9);
    match capped(1) {
        Ok(found) => assert_eq!(found.rank, 1),
        Err(error) => assert!(matches!(error, Error::NotConverged { .. }), "{error}"),
    }
}

#[test]
fn the_path_turns_to_the_margin_of_the_best_tokens() {
    let (n, t, d) = (2, 3, 8);
    let data = data(13, n, t, d);
    let (v, y) = (normals(14, d), vec![1.0; n]);
    let scores = token_scores(&data, &v, &y).unwrap();
    let best = optimal_tokens(&scores, t);
    for norm in [SvmNorm::Frobenius, SvmNorm::Nuclear { rank_cap: None }] {
        let path = RegularizationPath {
            radii: vec![1.0, 6.0],
            norm,
            step: 0.5,
            tol: 1e-6,
            max_iter: 200_000,
        };
        let found = path.solve(&data, HeadLoss::Logistic, &v, &y).unwrap();
        assert!(found[1].1 < found[0].1);
        let size = match norm {
            SvmNorm::Frobenius => frobenius(&found[1].0),
            _ => sum_of_singular_values(&found[1].0),
        };
        assert!(size <= 6.0 + 1e-9);
        let probs = data.probabilities(&found[1].0).unwrap();
        assert_eq!(Selection::of(&probs, t), best);
    }
    let bad = RegularizationPath {
        radii: vec![2.0, 1.0],
        ..Default::default()
    };
    assert!(bad.solve(&data, HeadLoss::Logistic, &v, &y).is_err());
}

#[test]
fn the_report_of_the_svm_itself_is_perfect() {
    let (n, t, d) = (3, 4, 6);
    let data = data(15, n, t, d);
    let selection = picks(16, n, t);
    let best = solve(&data, &selection);
    let w = (&best.w * 20.0).unwrap();
    let report = head_report(&data, &w, None).unwrap();
    assert_eq!(report.selection, selection);
    assert!(report.feasible && report.dropped == 0);
    assert!((report.cosine_to_fro.unwrap() - 1.0).abs() < 1e-9);
    assert!((report.relative_margin.unwrap() - 1.0).abs() < 1e-9);
    assert!((report.norm_growth.unwrap() - 20.0).abs() < 1e-6);
    assert!(report.cosine_to_nuc.unwrap() < 1.0);
    let scores: Vec<f64> = (0..n * t)
        .map(|p| f64::from(u8::from(selection.0[p / t] == p % t)))
        .collect();
    assert_eq!(local_optimality(&best, &scores).unwrap(), vec![true; n]);
    // A soft head has nothing to compare.
    let soft = head_report(&data, &(&best.w * 1e-3).unwrap(), None).unwrap();
    assert_eq!((soft.dropped, soft.feasible), (n, false));
}

#[test]
fn heads_come_from_files() {
    let (d, heads) = (4, 2);
    let named: HashMap<String, Tensor> = [
        (
            "k.weight".to_string(),
            tensor(&normals(1, 6 * d), (6, d))
                .to_dtype(DType::F32)
                .unwrap(),
        ),
        (
            "q.weight".to_string(),
            tensor(&normals(2, 6 * d), (6, d))
                .to_dtype(DType::F32)
                .unwrap(),
        ),
        (
            "k.bias".to_string(),
            tensor(&normals(3, 6), 6).to_dtype(DType::F32).unwrap(),
        ),
        (
            "q.bias".to_string(),
            tensor(&normals(4, 6), 6).to_dtype(DType::F32).unwrap(),
        ),
    ]
    .into();
    let folder = std::env::temp_dir().join(format!("thalweg-heads-{}", std::process::id()));
    candle_core::safetensors::save(&named, &folder).unwrap();
    let head = HeadWeights::load(&folder, "k", "q", 1, heads).unwrap();
    std::fs::remove_file(&folder).unwrap();
    let w = head.combined().unwrap();
    assert_eq!(w.dims(), &[d + 1, d + 1]);
    // The layer's own logits, biases included.
    let (x, z) = (tensor(&normals(5, d), d), tensor(&normals(6, d), d));
    let row = |name: &str, v: &Tensor| -> Vec<f64> {
        let w = named[&format!("{name}.weight")]
            .narrow(0, 3, 3)
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap();
        let b = named[&format!("{name}.bias")]
            .narrow(0, 3, 3)
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap();
        values(
            &(w.matmul(&v.unsqueeze(1).unwrap())
                .unwrap()
                .squeeze(1)
                .unwrap()
                + b)
                .unwrap(),
        )
    };
    let logit: f64 = row("k", &x)
        .iter()
        .zip(row("q", &z))
        .map(|(a, b)| a * b)
        .sum::<f64>()
        / 3f64.sqrt();
    let one = |v: &Tensor| {
        Tensor::cat(&[v, &Tensor::ones(1, DType::F64, &Device::Cpu).unwrap()], 0).unwrap()
    };
    let (x, z) = (one(&x).unsqueeze(0).unwrap(), one(&z).unsqueeze(1).unwrap());
    let product = x.matmul(&w).unwrap().matmul(&z).unwrap();
    assert!((values(&product)[0] - logit).abs() < 1e-6);
    assert!(HeadWeights::from_tensors(&named, "k", "missing", 0, 2)
        .unwrap_err()
        .to_string()
        .contains("missing.weight"));
    assert!(HeadWeights::from_tensors(&named, "k", "q", 0, 4).is_err());
    assert!(HeadWeights::from_tensors(&named, "k", "q", 2, 2).is_err());
}

#[test]
fn bad_input_is_named() {
    let named = |error: Error, word: &str| {
        let text = error.to_string();
        assert!(text.contains(word), "{text}");
    };
    let (x, z) = random(1, 2, 3, 4);
    named(AttentionData::new(&z, &z, None).unwrap_err(), "[n, T, d]");
    named(
        AttentionData::new(&x, &z, Some(&[3, 0])).unwrap_err(),
        "lengths = 0",
    );
    named(
        AttentionData::self_attention(&x, 3, None).unwrap_err(),
        "index",
    );
    named(
        AttentionData::new(&(&x * f64::NAN).unwrap(), &z, None).unwrap_err(),
        "NaN",
    );
    let data = AttentionData::new(&x, &z, None).unwrap();
    let svm = AttSvm::default();
    named(
        svm.solve(&data, &Selection(vec![0])).unwrap_err(),
        "selection",
    );
    named(
        svm.solve(&data, &Selection(vec![0, 3])).unwrap_err(),
        "selection = 3",
    );
    let alone = AttentionData::new(&x, &z, Some(&[1, 1])).unwrap();
    named(
        svm.solve(&alone, &Selection(vec![0, 0])).unwrap_err(),
        "constraints",
    );
    let soft = AttSvm {
        soft: Some(1.0),
        norm: SvmNorm::Nuclear { rank_cap: None },
        ..Default::default()
    };
    named(
        soft.solve(&data, &Selection(vec![0, 0])).unwrap_err(),
        "soft",
    );
    named(
        generalized_svm(&data, &[0.2; 6], 1e-3).unwrap_err(),
        "sum of a row",
    );
    named(
        generalized_svm(&data, &[1.0 / 3.0; 6], 0.9).unwrap_err(),
        "thr",
    );
    let gd = NormalizedGd {
        lr: 0.0,
        ..Default::default()
    };
    let start = GdParameters::W(Tensor::zeros((4, 4), DType::F64, &CPU).unwrap());
    named(
        gd.run(&data, &[0.0; 4], &[1.0; 2], &start, 1).unwrap_err(),
        "lr",
    );
    named(
        NormalizedGd::default()
            .run(&data, &[0.0; 3], &[1.0; 2], &start, 1)
            .unwrap_err(),
        "v has shape",
    );
}
