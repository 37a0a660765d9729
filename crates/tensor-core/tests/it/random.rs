use candle_core::{DType, Device, Tensor};
use rand_core::Rng;
use thalweg_tensor_core::checkpoint::{Checkpoint, State};
use thalweg_tensor_core::random::{RandomState, RandomStream};
use thalweg_tensor_core::{Error, Result};

const CPU: Device = Device::Cpu;
const FLOATS: [DType; 4] = [DType::BF16, DType::F16, DType::F32, DType::F64];
/// More than three blocks of a parallel fill, and odd.
const LARGE: usize = 3 * 8192 + 5;

fn host(tensor: &Tensor) -> Vec<f64> {
    tensor
        .to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u64> {
    host(tensor).iter().map(|x| x.to_bits()).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The mean of `values` is `expected` within five standard errors for the given deviation.
fn assert_mean(values: impl IntoIterator<Item = f64>, expected: f64, deviation: f64) {
    let values: Vec<f64> = values.into_iter().collect();
    let error = (mean(&values) - expected) * (values.len() as f64).sqrt() / deviation;
    assert!(
        error.abs() < 5.0,
        "mean {} for {expected}: {error} standard errors",
        mean(&values)
    );
}

/// Largest distance between the empirical and the true distribution function, in units of its
/// standard size.
fn kolmogorov(mut values: Vec<f64>, distribution: impl Fn(f64) -> f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len() as f64;
    let gap = |(i, x): (usize, &f64)| {
        let f = distribution(*x);
        (f - i as f64 / n).abs().max((f - (i + 1) as f64 / n).abs())
    };
    values.iter().enumerate().map(gap).fold(0.0, f64::max) * n.sqrt()
}

/// Counts against expected counts: within five deviations of the chi-square distribution.
fn assert_counts(counts: &[usize], probabilities: &[f64]) {
    let n = counts.iter().sum::<usize>() as f64;
    let term = |(c, p): (&usize, &f64)| (*c as f64 - n * p).powi(2) / (n * p);
    let chi: f64 = counts.iter().zip(probabilities).map(term).sum();
    let freedom = (counts.len() - 1) as f64;
    assert!(
        chi < freedom + 5.0 * (2.0 * freedom).sqrt(),
        "{counts:?}: {chi}"
    );
}

/// The words of an independent implementation of SHA-256 and ChaCha8 (eight rounds, 64-bit counter,
/// zero nonce). A change here changes every number of every experiment.
#[test]
fn the_stream_is_chacha8_keyed_by_sha256() {
    let take = |mut stream: RandomStream| [stream.bits(), stream.bits(), stream.bits()];
    let root = RandomStream::new(7);
    assert_eq!(
        take(root.clone()),
        [
            0x80e2_80b6_a9a0_6269,
            0x9b4d_030b_b0df_96c5,
            0x66e8_2805_00e1_51be
        ]
    );
    assert_eq!(
        take(root.split("weights")),
        [
            0x59c4_327c_0981_365e,
            0xa4eb_7264_2194_6fd1,
            0x784b_6bfb_1a4d_a0cd
        ]
    );
    assert_eq!(root.split_index("step", 3).bits(), 0xd19b_1a2b_8baa_cfac);
    let far = RandomState {
        position: 100_000,
        ..root.state()
    };
    let mut far = RandomStream::from_state(&far);
    assert_eq!(
        [far.bits(), far.bits()],
        [0xda78_5c54_7f58_251f, 0x2729_2d58_ce9c_ca4f]
    );
    // What is made of the words: 53 bits; the sine and cosine of Box and Muller.
    let (a, b) = (0x80e2_80b6_a9a0_6269_u64, 0x9b4d_030b_b0df_96c5_u64);
    let unit = |w: u64| (w >> 11) as f64 / f64::exp2(53.0);
    assert_eq!(root.clone().next_uniform(), unit(a));
    let radius = (-2.0 * unit(a).ln()).sqrt();
    let expected = [
        radius * (std::f64::consts::TAU * unit(b)).cos(),
        radius * (std::f64::consts::TAU * unit(b)).sin(),
    ];
    let drawn = host(&root.clone().normal(0.0, 1.0, 2, DType::F64, &CPU).unwrap());
    assert!(
        drawn
            .iter()
            .zip(expected)
            .all(|(a, b)| (a - b).abs() < 1e-14),
        "{drawn:?} {expected:?}"
    );
}

#[test]
fn normal_numbers_have_the_moments_of_the_normal_distribution() {
    for dtype in [DType::F32, DType::F64] {
        let n = 200_001;
        let values = host(
            &RandomStream::new(1)
                .normal(2.0, 3.0, n, dtype, &CPU)
                .unwrap(),
        );
        let z: Vec<f64> = values.iter().map(|x| (x - 2.0) / 3.0).collect();
        // Deviations of the powers of a normal number: of z^k, sqrt((2k-1)!! - ((k-1)!!)^2).
        assert_mean(z.iter().copied(), 0.0, 1.0);
        assert_mean(z.iter().map(|x| x.powi(2)), 1.0, 2_f64.sqrt());
        assert_mean(z.iter().map(|x| x.powi(3)), 0.0, 15_f64.sqrt());
        assert_mean(z.iter().map(|x| x.powi(4)), 3.0, 96_f64.sqrt());
        // Neighbours (one pair of Box and Muller, or two) do not know of each other.
        assert_mean(z.windows(2).map(|w| w[0] * w[1]), 0.0, 1.0);
        assert_mean(
            z.windows(2).map(|w| (w[0] * w[1]).powi(2)),
            1.0,
            8_f64.sqrt(),
        );
        assert_mean(z.windows(3).map(|w| w[0] * w[2]), 0.0, 1.0);
        for (limit, p) in [
            (1.0, 0.682_689_49),
            (2.0, 0.954_499_74),
            (3.0, 0.997_300_20),
        ] {
            let inside = z.iter().map(|x| f64::from(u8::from(x.abs() < limit)));
            assert_mean(inside, p, (p * (1.0 - p)).sqrt());
        }
        assert!(z.iter().all(|x| x.is_finite()) && z.iter().any(|x| x.abs() > 4.0));
    }
    let mut stream = RandomStream::new(2);
    assert_mean((0..20_000).map(|_| stream.next_normal()), 0.0, 1.0);
    let constant = stream.normal(1.5, 0.0, 4, DType::F32, &CPU).unwrap();
    assert_eq!(host(&constant), [1.5; 4]);
}

#[test]
fn uniform_and_gumbel_numbers_follow_their_distribution() {
    let n = 100_000;
    let u = host(
        &RandomStream::new(3)
            .uniform(-2.0, 6.0, n, DType::F64, &CPU)
            .unwrap(),
    );
    assert!(kolmogorov(u.clone(), |x| (x + 2.0) / 8.0) < 2.2);
    assert_mean(
        u.windows(2).map(|w| (w[0] - 2.0) * (w[1] - 2.0)),
        0.0,
        16.0 / 3.0,
    );
    let g = host(&RandomStream::new(4).gumbel(n, DType::F64, &CPU).unwrap());
    assert!(kolmogorov(g.clone(), |x| (-(-x).exp()).exp()) < 2.2);
    let deviation = std::f64::consts::PI / 6_f64.sqrt();
    assert_mean(g, 0.577_215_664_9, deviation);
    // The test can fail.
    assert!(kolmogorov(u, |x| ((x + 2.0) / 8.0).powf(1.05)) > 2.2);
}

#[test]
fn bernoulli_numbers_come_with_their_probability() {
    for dtype in [DType::U8, DType::F32, DType::F64] {
        let mut stream = RandomStream::new(5);
        for p in [0.0, 0.07, 0.5, 1.0] {
            let drawn = stream.bernoulli(p, (100, 300), dtype, &CPU).unwrap();
            assert_eq!((drawn.dims(), drawn.dtype()), (&[100, 300][..], dtype));
            let drawn = host(&drawn);
            assert!(drawn.iter().all(|x| *x == 0.0 || *x == 1.0));
            assert_mean(drawn, p, (p * (1.0 - p)).sqrt().max(1e-12));
        }
    }
}

/// All kinds of large draws, as bits.
fn large_draws() -> Vec<Vec<u64>> {
    let mut stream = RandomStream::new(11);
    let mut out = Vec::new();
    for dtype in FLOATS {
        out.push(bits(&stream.normal(0.0, 1.0, LARGE, dtype, &CPU).unwrap()));
        out.push(bits(&stream.uniform(0.0, 1.0, LARGE, dtype, &CPU).unwrap()));
        out.push(bits(&stream.gumbel((5, LARGE), dtype, &CPU).unwrap()));
        out.push(bits(&stream.bernoulli(0.3, LARGE, dtype, &CPU).unwrap()));
    }
    let weights = stream
        .uniform(0.0, 1.0, (LARGE, 3), DType::F32, &CPU)
        .unwrap();
    out.push(bits(&stream.categorical(&weights).unwrap()));
    out.push(vec![stream.bits(), stream.state().position]);
    out
}

#[test]
fn the_number_of_threads_has_no_influence() {
    let in_pool = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(large_draws)
    };
    let one = in_pool(1);
    assert!(one == in_pool(2) && one == in_pool(7));
}

#[test]
fn a_large_draw_is_the_same_as_many_small_ones() {
    let mut whole = vec![0.0; LARGE];
    RandomStream::new(12).fill_uniform(&mut whole);
    let (mut pieces, mut stream) = (vec![0.0; LARGE], RandomStream::new(12));
    let (first, rest) = pieces.split_at_mut(1001);
    stream.fill_uniform(first);
    stream.fill_uniform(rest);
    assert_eq!(whole, pieces);
    RandomStream::new(12).fill_normal(&mut whole);
    let mut stream = RandomStream::new(12);
    for piece in pieces.chunks_mut(1000) {
        stream.fill_normal(piece);
    }
    assert_eq!(whole, pieces);
    // An odd number of normal numbers takes one word more.
    assert_eq!(stream.state().position, LARGE as u64 + 1);
}

#[test]
fn splits_depend_on_key_and_label_alone() {
    let mut root = RandomStream::new(20);
    let before = root.split("a").bits();
    root.normal(0.0, 1.0, 777, DType::F32, &CPU).unwrap();
    let position = root.state().position;
    assert_eq!(root.split("a").bits(), before);
    assert_eq!(root.state().position, position);
    let mut all = vec![
        root.split("a").bits(),
        root.split("b").bits(),
        root.split("").bits(),
        root.split("a").split("a").bits(),
        root.split("a1").bits(),
        root.split_index("a", 1).bits(),
        root.split_index("a", 11).bits(),
        root.split_index("a1", 1).bits(),
        RandomStream::new(21).split("a").bits(),
        RandomStream::new(20).bits(),
    ];
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 10);
}

#[test]
fn splits_are_uncorrelated() {
    let n = 50_000;
    let root = RandomStream::new(30);
    let draw =
        |mut stream: RandomStream| host(&stream.normal(0.0, 1.0, n, DType::F64, &CPU).unwrap());
    let streams = [
        draw(root.clone()),
        draw(root.split("a")),
        draw(root.split("b")),
        draw(root.split_index("w", 0)),
        draw(root.split_index("w", 1)),
        draw(RandomStream::new(31)),
    ];
    for (i, a) in streams.iter().enumerate() {
        for b in &streams[..i] {
            assert_mean(a.iter().zip(b).map(|(a, b)| a * b), 0.0, 1.0);
        }
    }
}

#[test]
fn a_stream_continues_from_its_saved_state() {
    let mut stream = RandomStream::new(40).split("data");
    // After words, an odd normal draw, and a draw of several blocks.
    let interruptions: [fn(&mut RandomStream); 5] = [
        |_| {},
        |s| assert!(s.bits() != s.bits()),
        |s| assert!(s.normal(0.0, 1.0, 3, DType::F32, &CPU).is_ok()),
        |s| assert!(s.uniform(0.0, 1.0, LARGE, DType::F32, &CPU).is_ok()),
        |s| assert!(s.permutation(17).is_ok() && s.next_normal().is_finite()),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (i, interrupt) in interruptions.into_iter().enumerate() {
        interrupt(&mut stream);
        let path = folder.path().join(format!("{i}"));
        let state = State::from([("random".to_string(), stream.state().to_tensor().unwrap())]);
        Checkpoint::new("stream", state).save(&path).unwrap();
        let loaded = Checkpoint::load(&path, &CPU).unwrap();
        let mut resumed =
            RandomStream::from_state(&RandomState::from_tensor(&loaded.tensors["random"]).unwrap());
        assert_eq!(resumed, stream);
        assert_eq!(resumed.split("x").bits(), stream.split("x").bits());
        let tail = |s: &mut RandomStream| {
            let normal = bits(&s.normal(0.0, 1.0, LARGE, DType::F64, &CPU).unwrap());
            (
                normal,
                s.bits(),
                s.next_uniform().to_bits(),
                s.permutation(9).unwrap(),
            )
        };
        assert!(tail(&mut resumed) == tail(&mut stream));
    }
    let short = RandomState::from_tensor(&Tensor::zeros(39, DType::U8, &CPU).unwrap());
    assert!(matches!(short, Err(Error::ShapeMismatch { .. })));
    assert!(RandomState::from_tensor(&Tensor::zeros(40, DType::F32, &CPU).unwrap()).is_err());
}

#[test]
fn categorical_draws_have_the_frequencies_of_their_weights() {
    let weights = [1.0_f64, 0.0, 5.0, 2.0, 0.5];
    let n = 60_000;
    for dtype in [DType::F32, DType::F64] {
        let row = Tensor::new(&weights, &CPU)
            .unwrap()
            .to_dtype(dtype)
            .unwrap();
        let table = row.broadcast_as((n, 5)).unwrap();
        let drawn = RandomStream::new(50).categorical(&table).unwrap();
        assert_eq!((drawn.dims(), drawn.dtype()), (&[n][..], DType::U32));
        let drawn = drawn.to_vec1::<u32>().unwrap();
        let count = |k: u32| drawn.iter().filter(|x| **x == k).count();
        assert_eq!(count(1), 0);
        assert_counts(
            &[count(0), count(2), count(3), count(4)],
            &[1.0 / 8.5, 5.0 / 8.5, 2.0 / 8.5, 0.5 / 8.5],
        );
        // From logits, shifted: the same draws.
        let logits = (table.log().unwrap() + 500.0).unwrap();
        let again = RandomStream::new(50)
            .categorical_logits(&logits)
            .unwrap()
            .to_vec1::<u32>()
            .unwrap();
        let differ = again.iter().zip(&drawn).filter(|(a, b)| a != b).count();
        assert!(differ <= n / 1000, "{differ}");
    }
    let one = RandomStream::new(1)
        .categorical(&Tensor::new(&[[[3_f32]], [[1.0]]], &CPU).unwrap())
        .unwrap();
    assert_eq!((one.dims(), host(&one)), (&[2, 1][..], vec![0.0, 0.0]));
    let scalar = RandomStream::new(1)
        .categorical(&Tensor::new(&[0_f32, 2.0], &CPU).unwrap())
        .unwrap();
    assert_eq!(scalar.to_scalar::<u32>().unwrap(), 1);
}

#[test]
fn bad_weights_are_refused() {
    let run = |values: &[f64], logits: bool| {
        let tensor = Tensor::new(values, &CPU).unwrap();
        let mut stream = RandomStream::new(1);
        if logits {
            stream.categorical_logits(&tensor)
        } else {
            stream.categorical(&tensor)
        }
    };
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    for bad in [
        &[1.0, -1e-9][..],
        &[nan, 1.0],
        &[inf, 1.0],
        &[0.0, 0.0],
        &[],
    ] {
        assert!(
            matches!(run(bad, false), Err(Error::InvalidArgument { .. })),
            "{bad:?}"
        );
    }
    for bad in [&[nan, 1.0][..], &[inf, 1.0], &[-inf, -inf], &[]] {
        assert!(
            matches!(run(bad, true), Err(Error::InvalidArgument { .. })),
            "{bad:?}"
        );
    }
    assert_eq!(
        run(&[-inf, -1e4], true)
            .unwrap()
            .to_scalar::<u32>()
            .unwrap(),
        1
    );
    let scalar = RandomStream::new(1).categorical(&Tensor::new(1_f32, &CPU).unwrap());
    assert!(matches!(scalar, Err(Error::InvalidArgument { .. })));
}

#[test]
fn permutations_are_permutations_and_all_alike() {
    let mut stream = RandomStream::new(60);
    for n in [0, 1, 2, 17, 1000] {
        let mut order = stream.permutation(n).unwrap();
        order.sort_unstable();
        assert_eq!(order, (0..n as u32).collect::<Vec<_>>());
    }
    let mut counts = std::collections::BTreeMap::new();
    for _ in 0..24_000 {
        *counts
            .entry(stream.permutation(4).unwrap())
            .or_insert(0_usize) += 1;
    }
    let counts: Vec<usize> = counts.into_values().collect();
    assert_eq!(counts.len(), 24);
    assert_counts(&counts, &[1.0 / 24.0; 24]);
    let tensor = stream.permutation_tensor(5, &CPU).unwrap();
    assert_eq!((tensor.dims(), tensor.dtype()), (&[5][..], DType::U32));
    assert!(matches!(
        stream.permutation(usize::MAX),
        Err(Error::InvalidArgument { name: "n", .. })
    ));
}

#[test]
fn bounded_integers_are_even() {
    let mut stream = RandomStream::new(70);
    let mut counts = [0_usize; 6];
    for _ in 0..60_000 {
        counts[stream.below(6).unwrap()] += 1;
    }
    assert_counts(&counts, &[1.0 / 6.0; 6]);
    // With a range of two thirds of all words a division without rejection would give the lower
    // half twice as often.
    let range = (u64::MAX / 3 * 2) as usize;
    let low = (0..3000)
        .filter(|_| stream.below(range).unwrap() < range / 2)
        .count();
    assert_counts(&[low, 3000 - low], &[0.5, 0.5]);
    assert_eq!(stream.below(1).unwrap(), 0);
    assert!(matches!(
        stream.below(0),
        Err(Error::InvalidArgument { .. })
    ));
}

#[test]
fn the_open_end_is_never_reached() {
    let two = f64::exp2;
    // Ranges where a number just below `high` rounds to it, a few numbers of the dtype wide.
    let ranges = [
        (DType::BF16, 0.0, 1.0),
        (DType::BF16, 1.0, 2.0),
        (DType::BF16, -2.0, -1.0),
        (DType::BF16, 255.0, 260.0),
        (DType::BF16, -1.0, 0.001),
        (DType::F16, 0.0, 1.0),
        (DType::F16, 1.0, 2.0),
        (DType::F16, 2046.5, 2052.0),
        (DType::F16, -60_000.0, 65_504.0),
        (DType::F16, -1e-6, 0.0),
        (DType::F32, 1.0, 1.0 + 4.0 * f64::from(f32::EPSILON)),
        (DType::F32, two(24.0), two(24.0) + 4.0),
        (DType::F32, -two(24.0) - 4.0, -two(24.0)),
        (DType::F32, 0.1, 0.3),
        (DType::F64, two(53.0), two(53.0) + 4.0),
        (DType::F64, 1.0, 1.0 + 2.0 * f64::EPSILON),
    ];
    for (dtype, low, high) in ranges {
        let drawn = host(
            &RandomStream::new(80)
                .uniform(low, high, 20_000, dtype, &CPU)
                .unwrap(),
        );
        let (first, last) = drawn
            .iter()
            .fold((f64::INFINITY, -f64::INFINITY), |(a, b), x| {
                (a.min(*x), b.max(*x))
            });
        assert!(
            low <= first && last < high,
            "{dtype:?} [{low}, {high}): {first} to {last}"
        );
        assert!(first < last, "{dtype:?} [{low}, {high}): only {first}");
    }
    for dtype in FLOATS {
        // No number of the dtype between the ends: the lower one.
        let same = RandomStream::new(81)
            .uniform(3.0, 3.0, 5, dtype, &CPU)
            .unwrap();
        assert_eq!(host(&same), [3.0; 5]);
        let g = host(&RandomStream::new(82).gumbel(100_000, dtype, &CPU).unwrap());
        assert!(g.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn bad_parameters_are_refused() {
    let mut stream = RandomStream::new(1);
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    fn refused(result: Result<Tensor>) {
        assert!(
            matches!(result, Err(Error::InvalidArgument { .. })),
            "{result:?}"
        );
    }
    for (low, high) in [
        (1.0, 0.0),
        (nan, 1.0),
        (0.0, nan),
        (0.0, inf),
        (-inf, 0.0),
        (-f64::MAX, f64::MAX),
    ] {
        refused(stream.uniform(low, high, 3, DType::F32, &CPU));
    }
    for (mean, std) in [(nan, 1.0), (inf, 1.0), (0.0, -1.0), (0.0, nan), (0.0, inf)] {
        refused(stream.normal(mean, std, 3, DType::F32, &CPU));
    }
    for p in [-0.1, 1.1, nan] {
        refused(stream.bernoulli(p, 3, DType::F32, &CPU));
    }
    for dtype in [DType::U32, DType::I64] {
        assert!(matches!(
            stream.normal(0.0, 1.0, 3, dtype, &CPU),
            Err(Error::Unsupported { .. })
        ));
        assert!(matches!(
            stream.uniform(0.0, 1.0, 3, dtype, &CPU),
            Err(Error::Unsupported { .. })
        ));
    }
    let empty = stream.normal(0.0, 1.0, (0, 3), DType::F32, &CPU).unwrap();
    assert_eq!(empty.dims(), [0, 3]);
}

#[test]
fn the_stream_is_a_generator_for_other_libraries() {
    let mut stream = RandomStream::new(90);
    let mut words = RandomStream::new(90);
    assert_eq!(stream.next_u64(), words.bits());
    assert_eq!(stream.next_u32(), (words.bits() >> 32) as u32);
    let mut bytes = [0_u8; 11];
    stream.fill_bytes(&mut bytes);
    let expected = [words.bits().to_le_bytes(), words.bits().to_le_bytes()].concat();
    assert_eq!(bytes, expected[..11]);
    assert_eq!(stream.state(), words.state());
}
