use candle_core::{DType, Device, Tensor};
use thalweg_datasets::generate::{
    linear_regression, logistic_regression, spirals, two_moons, BitEncoding, ConditionedConfig,
    GaussianMixture, SparseParity, Spectrum,
};
use thalweg_datasets::{Classification, Error, RandomStream, Sizes};

const CPU: &Device = &Device::Cpu;

fn rows(data: &Classification) -> Vec<(Vec<f64>, u32)> {
    let x = data.inputs.to_dtype(DType::F64).unwrap().to_vec2().unwrap();
    x.into_iter().zip(data.label_vec().unwrap()).collect()
}

#[test]
fn mixture_components_have_their_weight_center_and_spread() {
    let mixture = GaussianMixture::new(
        vec![
            vec![0.0, 0.0, 5.0],
            vec![1.0, -1.0, 0.0],
            vec![9.0, 9.0, 9.0],
        ],
        vec![1.0, 3.0, 0.0],
        vec![0.5, 2.0, 1.0],
    )
    .unwrap();
    let mut rng = RandomStream::new(0);
    let data = mixture.sample(20_000, &mut rng, DType::F64, CPU).unwrap();
    let counts = data.class_counts().unwrap();
    assert_eq!(counts[2], 0);
    assert!((counts[0] as f64 / 20_000.0 - 0.25).abs() < 0.015);
    for (class, center, std) in [(0, [0.0, 0.0, 5.0], 0.5), (1, [1.0, -1.0, 0.0], 2.0)] {
        let points: Vec<Vec<f64>> = rows(&data)
            .into_iter()
            .filter(|(_, y)| *y == class)
            .map(|(x, _)| x)
            .collect();
        for d in 0..3 {
            let n = points.len() as f64;
            let mean = points.iter().map(|p| p[d]).sum::<f64>() / n;
            let variance = points.iter().map(|p| (p[d] - mean).powi(2)).sum::<f64>() / n;
            assert!((mean - center[d]).abs() < 5.0 * std / n.sqrt());
            assert!((variance.sqrt() / std - 1.0).abs() < 0.05);
        }
    }
}

#[test]
fn mixtures_check_their_parts() {
    let new = GaussianMixture::new;
    for bad in [
        new(vec![], vec![], vec![]),
        new(vec![vec![]], vec![1.0], vec![1.0]),
        new(vec![vec![0.0], vec![0.0, 1.0]], vec![1.0; 2], vec![1.0; 2]),
        new(vec![vec![f64::NAN]], vec![1.0], vec![1.0]),
        new(vec![vec![0.0]], vec![1.0; 2], vec![1.0]),
        new(vec![vec![0.0]], vec![0.0], vec![1.0]),
        new(vec![vec![0.0]], vec![-1.0], vec![1.0]),
        new(vec![vec![0.0]], vec![1.0], vec![f64::INFINITY]),
        GaussianMixture::ring(0, 1.0, 0.1),
        GaussianMixture::random(3, 0, 1.0, 0.1, &mut RandomStream::new(0)),
    ] {
        assert!(matches!(bad, Err(Error::InvalidArgument { .. })));
    }
    let ring = GaussianMixture::ring(4, 2.0, 0.0).unwrap();
    let none = ring.sample(0, &mut RandomStream::new(0), DType::F32, CPU);
    assert!(none.unwrap().is_empty());
    let data = ring.sample(50, &mut RandomStream::new(0), DType::F32, CPU);
    for (x, class) in rows(&data.unwrap()) {
        let angle = std::f64::consts::FRAC_PI_2 * f64::from(class);
        assert!((x[0] - 2.0 * angle.cos()).abs() < 1e-6);
        assert!((x[1] - 2.0 * angle.sin()).abs() < 1e-6);
    }
}

#[test]
fn moons_lie_on_their_half_circles() {
    let mut rng = RandomStream::new(1);
    let data = two_moons(101, 0.0, &mut rng, DType::F64, CPU).unwrap();
    assert_eq!(data.class_counts().unwrap(), [50, 51]);
    for (x, class) in rows(&data) {
        let (cx, cy, up) = [(0.0, 0.0, true), (1.0, 0.5, false)][class as usize];
        let radius = (x[0] - cx).hypot(x[1] - cy);
        assert!((radius - 1.0).abs() < 1e-12);
        assert!(if up {
            x[1] >= -1e-12
        } else {
            x[1] <= 0.5 + 1e-12
        });
    }
    let labels = data.label_vec().unwrap();
    assert!(labels[..40].contains(&1), "rows must be in random order");
    let noisy = two_moons(2000, 0.1, &mut rng, DType::F64, CPU).unwrap();
    let spread: f64 = rows(&noisy)
        .iter()
        .filter(|(_, class)| *class == 0)
        .map(|(x, _)| (x[0].hypot(x[1]) - 1.0).powi(2))
        .sum::<f64>()
        / 1000.0;
    assert!((spread.sqrt() - 0.1).abs() < 0.01);
}

#[test]
fn spirals_are_rotations_of_each_other() {
    let mut rng = RandomStream::new(1);
    let data = spirals(90, 3, 1.5, 0.0, &mut rng, DType::F64, CPU).unwrap();
    assert_eq!(data.class_counts().unwrap(), [30; 3]);
    for (x, class) in rows(&data) {
        let radius = x[0].hypot(x[1]);
        let angle = std::f64::consts::TAU * (1.5 * radius + f64::from(class) / 3.0);
        assert!((x[0] - radius * angle.cos()).abs() < 1e-12);
        assert!((x[1] - radius * angle.sin()).abs() < 1e-12);
    }
}

#[test]
fn curves_check_their_arguments() {
    let mut rng = RandomStream::new(0);
    assert!(two_moons(0, 0.1, &mut rng, DType::F32, CPU).is_err());
    assert!(two_moons(5, -0.1, &mut rng, DType::F32, CPU).is_err());
    assert!(two_moons(5, f64::NAN, &mut rng, DType::F32, CPU).is_err());
    assert!(spirals(5, 0, 1.0, 0.1, &mut rng, DType::F32, CPU).is_err());
    assert!(spirals(5, 2, f64::NAN, 0.1, &mut rng, DType::F32, CPU).is_err());
    // One point is enough.
    let one = two_moons(1, 0.0, &mut rng, DType::F32, CPU).unwrap();
    assert_eq!(one.len(), 1);
}

/// The powers of `X^T X / n` have the traces that the spectrum says, which determines it.
fn assert_spectrum(inputs: &Tensor, spectrum: &[f64]) {
    let n = inputs.dim(0).unwrap() as f64;
    let gram = inputs.t().unwrap().matmul(inputs).unwrap();
    let gram = (gram / n).unwrap();
    let d = spectrum.len();
    let mut power = Tensor::eye(d, DType::F64, CPU).unwrap();
    for k in 1..=2 * d as i32 {
        power = power.matmul(&gram).unwrap();
        let diagonal: f64 = (0..d)
            .map(|i| {
                power
                    .get(i)
                    .unwrap()
                    .get(i)
                    .unwrap()
                    .to_scalar::<f64>()
                    .unwrap()
            })
            .sum();
        let expected: f64 = spectrum.iter().map(|s| s.powi(k)).sum();
        assert!((diagonal / expected - 1.0).abs() < 1e-11, "power {k}");
    }
}

#[test]
fn conditioning_is_exact() {
    for (seed, condition) in [(0, 1.0), (1, 30.0), (2, 1e6)] {
        let config = ConditionedConfig {
            examples: 40,
            features: 6,
            spectrum: Spectrum::Condition(condition),
        };
        let mut rng = RandomStream::new(seed);
        let problem = linear_regression(&config, 0.0, &mut rng, DType::F64, CPU).unwrap();
        let spectrum = &problem.spectrum;
        assert!((spectrum[0] / spectrum[5] / condition - 1.0).abs() < 1e-12);
        assert_spectrum(&problem.data.inputs, spectrum);
        // The traces hardly see the smallest eigenvalues; the determinant does.
        let gram = problem.data.inputs.t().unwrap();
        let gram = (gram.matmul(&problem.data.inputs).unwrap() / 40.0).unwrap();
        let determinant = determinant(gram.to_vec2().unwrap());
        let expected: f64 = spectrum.iter().product();
        assert!((determinant / expected - 1.0).abs() < 1e-6, "{condition}");
    }
    let config = ConditionedConfig {
        examples: 5,
        features: 5,
        spectrum: Spectrum::Values(vec![3.0, 0.0, 1.0, 0.5, 0.1]),
    };
    let problem =
        linear_regression(&config, 0.0, &mut RandomStream::new(9), DType::F64, CPU).unwrap();
    assert_spectrum(&problem.data.inputs, &[3.0, 0.0, 1.0, 0.5, 0.1]);
}

/// By elimination; enough for positive definite matrices.
fn determinant(mut m: Vec<Vec<f64>>) -> f64 {
    let mut product = 1.0;
    while let Some(pivot) = m.pop() {
        let Some((last, rest)) = pivot.split_last() else {
            break;
        };
        product *= last;
        for row in &mut m {
            let factor = row.pop().unwrap() / last;
            row.iter_mut().zip(rest).for_each(|(x, y)| *x -= factor * y);
        }
    }
    product
}

#[test]
fn linear_targets_are_the_weights_plus_noise() {
    let config = ConditionedConfig {
        examples: 5000,
        ..Default::default()
    };
    let mut rng = RandomStream::new(0);
    let problem = linear_regression(&config, 0.3, &mut rng, DType::F64, CPU).unwrap();
    let parts = problem.data.split(Sizes::Counts(&[4000, 1000]), &mut rng);
    assert_eq!(parts.unwrap()[1].len(), 1000);
    let clean = problem
        .data
        .inputs
        .matmul(&problem.weights.unsqueeze(1).unwrap())
        .unwrap()
        .squeeze(1)
        .unwrap();
    let error = (&problem.data.targets - clean).unwrap();
    let rms = error.sqr().unwrap().mean_all().unwrap();
    let rms = rms.to_scalar::<f64>().unwrap().sqrt();
    assert!((rms - 0.3).abs() < 0.015, "{rms}");
}

#[test]
fn logistic_labels_follow_their_logits() {
    let config = ConditionedConfig {
        examples: 4000,
        features: 5,
        spectrum: Spectrum::Condition(50.0),
    };
    let mut rng = RandomStream::new(0);
    let problem = logistic_regression(&config, 2.0, &mut rng, DType::F64, CPU).unwrap();
    let weights = problem.weights.unsqueeze(1).unwrap();
    let logits = problem.data.inputs.matmul(&weights).unwrap();
    let logits = logits.squeeze(1).unwrap().to_vec1::<f64>().unwrap();
    let square: f64 = logits.iter().map(|z| z * z).sum::<f64>() / 4000.0;
    assert!((square.sqrt() - 2.0).abs() < 1e-9);
    let labels = problem.data.label_vec().unwrap();
    // Calibration: the mean of y - sigmoid(z) over z > 0 is zero but for sampling.
    let gaps: Vec<f64> = logits
        .iter()
        .zip(&labels)
        .filter(|(z, _)| **z > 0.0)
        .map(|(z, y)| f64::from(*y) - 1.0 / (1.0 + (-z).exp()))
        .collect();
    let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
    assert!(mean.abs() < 0.03, "{mean}");
}

#[test]
fn conditioned_problems_check_their_configuration() {
    let mut rng = RandomStream::new(0);
    for (examples, features, spectrum) in [
        (4, 0, Spectrum::Condition(2.0)),
        (4, 5, Spectrum::Condition(2.0)),
        (4, 2, Spectrum::Condition(0.5)),
        (4, 2, Spectrum::Condition(f64::NAN)),
        (4, 2, Spectrum::Values(vec![1.0])),
        (4, 2, Spectrum::Values(vec![1.0, -1.0])),
    ] {
        let config = ConditionedConfig {
            examples,
            features,
            spectrum,
        };
        let refused = linear_regression(&config, 0.0, &mut rng, DType::F32, CPU);
        assert!(matches!(refused, Err(Error::InvalidArgument { .. })));
    }
    let config = ConditionedConfig::default();
    assert!(linear_regression(&config, -1.0, &mut rng, DType::F32, CPU).is_err());
    assert!(logistic_regression(&config, f64::NAN, &mut rng, DType::F32, CPU).is_err());
}

#[test]
fn parity_is_decided_by_its_subset() {
    let mut rng = RandomStream::new(0);
    let parity = SparseParity::random(43, 3, &mut rng).unwrap();
    assert_eq!((parity.bits(), parity.subset().len()), (43, 3));
    let mut twin = rng.clone();
    let signed = parity
        .sample(500, BitEncoding::Signed, &mut rng, DType::F32, CPU)
        .unwrap();
    for (x, label) in rows(&signed) {
        let product: f64 = parity.subset().iter().map(|i| x[*i]).product();
        assert_eq!(product, if label == 0 { 1.0 } else { -1.0 });
    }
    let counts = signed.class_counts().unwrap();
    assert!(counts[0].abs_diff(counts[1]) < 120, "{counts:?}");
    let zero_one = parity
        .sample(500, BitEncoding::ZeroOne, &mut twin, DType::F32, CPU)
        .unwrap();
    assert_eq!(zero_one.label_vec().unwrap(), signed.label_vec().unwrap());
    for ((bits, _), (signs, _)) in rows(&zero_one).iter().zip(rows(&signed)) {
        assert!(bits.iter().zip(signs).all(|(b, s)| 1.0 - 2.0 * b == s));
    }
    for subset in [vec![], vec![43], vec![1, 1]] {
        assert!(SparseParity::new(43, subset).is_err());
    }
    assert!(SparseParity::random(3, 4, &mut rng).is_err());
    assert!(SparseParity::random(3, 0, &mut rng).is_err());
}

#[test]
fn f32_and_f64_are_the_same_draw() {
    let config = ConditionedConfig::default();
    let draw = |dtype| {
        let mut rng = RandomStream::new(3);
        let moons = two_moons(20, 0.1, &mut rng, dtype, CPU).unwrap().inputs;
        let linear = linear_regression(&config, 0.1, &mut rng, dtype, CPU).unwrap();
        (moons, linear.data.targets)
    };
    let ((a, b), (c, d)) = (draw(DType::F32), draw(DType::F64));
    for (narrow, wide) in [(a, c), (b, d)] {
        let difference = (narrow.to_dtype(DType::F64).unwrap() - wide).unwrap();
        let worst = difference.abs().unwrap().flatten_all().unwrap();
        assert!(worst.max(0).unwrap().to_scalar::<f64>().unwrap() < 1e-5);
    }
}
