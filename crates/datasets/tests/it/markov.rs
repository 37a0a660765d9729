use candle_core::{DType, Device, Tensor};
use thalweg_datasets::generate::{ChainChoice, MarkovChains};
use thalweg_datasets::{Error, RandomStream};

const CPU: &Device = &Device::Cpu;

#[test]
fn rows_are_distributions_and_concentration_controls_them() {
    let mut rng = RandomStream::new(0);
    let mut largest = Vec::new();
    for concentration in [1e-6, 0.15, 1.0, 1000.0] {
        let chains = MarkovChains::dirichlet(3, 10, concentration, &mut rng).unwrap();
        let rows = chains.transitions(DType::F64, CPU).unwrap();
        let rows = rows.reshape((30, 10)).unwrap().to_vec2::<f64>().unwrap();
        for row in &rows {
            assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            assert!(row.iter().all(|p| *p >= 0.0));
        }
        let max = |row: &Vec<f64>| row.iter().copied().fold(0.0, f64::max);
        largest.push(rows.iter().map(max).sum::<f64>() / 30.0);
    }
    assert!(largest[0] > 0.99 && largest[3] < 0.12, "{largest:?}");
    assert!(largest.is_sorted_by(|a, b| a > b), "{largest:?}");
}

/// The second moment of a symmetric Dirichlet entry is (a + 1) / (n (n a + 1)).
#[test]
fn rows_have_the_second_moment_of_the_dirichlet_distribution() {
    let (n, a) = (8, 0.15);
    let mut rng = RandomStream::new(1);
    let chains = MarkovChains::dirichlet(8, n, a, &mut rng).unwrap();
    let mut sum = chains.transitions(DType::F64, CPU).unwrap().sqr().unwrap();
    for seed in 0..50 {
        let more = MarkovChains::dirichlet(8, n, a, &mut RandomStream::new(seed)).unwrap();
        sum = (sum + more.transitions(DType::F64, CPU).unwrap().sqr().unwrap()).unwrap();
    }
    let mean = sum.mean_all().unwrap().to_scalar::<f64>().unwrap() / 51.0;
    let expected = (a + 1.0) / (n as f64 * (n as f64 * a + 1.0));
    assert!((mean / expected - 1.0).abs() < 0.03, "{mean} {expected}");
}

#[test]
fn sequences_start_with_their_chain_and_follow_it() {
    let mut rng = RandomStream::new(0);
    let chains = MarkovChains::dirichlet(8, 32, 0.15, &mut rng).unwrap();
    let one = chains
        .sample(6, 25, ChainChoice::OneAtRandom, &mut rng, CPU)
        .unwrap();
    let one = one.to_vec2::<u32>().unwrap();
    assert!(one.iter().all(|row| row.len() == 25 && row[0] == one[0][0]));
    let mixed = chains
        .sample(400, 2, ChainChoice::Mixed, &mut rng, CPU)
        .unwrap();
    let mut seen = [0; 8];
    for row in mixed.to_vec2::<u32>().unwrap() {
        seen[row[0] as usize] += 1;
    }
    assert!(seen.iter().all(|n| (25..80).contains(n)), "{seen:?}");
}

/// Counted transitions of a long sample against the table.
#[test]
fn empirical_transitions_match_the_table() {
    let table = Tensor::new(
        &[
            [[0.5f64, 0.5, 0.0], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]],
            [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]],
        ],
        CPU,
    )
    .unwrap();
    let chains = MarkovChains::from_transitions(&table).unwrap();
    let mut rng = RandomStream::new(2);
    let sample = chains
        .sample(100, 400, ChainChoice::One(0), &mut rng, CPU)
        .unwrap();
    let mut counts = [[0.0f64; 3]; 3];
    for row in sample.to_vec2::<u32>().unwrap() {
        for pair in row.windows(2) {
            counts[pair[0] as usize][pair[1] as usize] += 1.0;
        }
    }
    let expected = table.get(0).unwrap().to_vec2::<f64>().unwrap();
    for (row, want) in counts.iter().zip(&expected) {
        let total: f64 = row.iter().sum();
        for (n, p) in row.iter().zip(want) {
            assert!((n / total - p).abs() < 0.015, "{counts:?}");
        }
    }
    // The other chain is deterministic: 1 -> 2 -> 0 -> 1.
    let cycle = chains
        .sample(1, 7, ChainChoice::One(1), &mut rng, CPU)
        .unwrap();
    assert_eq!(cycle.to_vec2::<u32>().unwrap(), [[1, 2, 0, 1, 2, 0, 1]]);
}

/// The exact floor equals the mean of -log p of sampled transitions under their own chain.
#[test]
fn best_cross_entropy_is_what_the_true_model_scores() {
    let mut rng = RandomStream::new(3);
    let chains = MarkovChains::dirichlet(4, 6, 0.5, &mut rng).unwrap();
    let table = chains.transitions(DType::F64, CPU).unwrap();
    let table = table.reshape((24, 6)).unwrap().to_vec2::<f64>().unwrap();
    let length = 9;
    let sample = chains
        .sample(20_000, length, ChainChoice::Mixed, &mut rng, CPU)
        .unwrap();
    let mut loss = 0.0;
    for row in sample.to_vec2::<u32>().unwrap() {
        let chain = row[0] as usize;
        for pair in row.windows(2) {
            loss -= table[chain * 6 + pair[0] as usize][pair[1] as usize].ln();
        }
    }
    let measured = loss / (20_000 * (length - 1)) as f64;
    let exact = chains.best_cross_entropy(length).unwrap();
    assert!((measured - exact).abs() < 0.01, "{measured} {exact}");
}

#[test]
fn bad_arguments_are_refused() {
    let mut rng = RandomStream::new(0);
    for (chains, tokens, concentration) in [
        (0, 4, 1.0),
        (5, 4, 1.0),
        (2, 4, 0.0),
        (2, 4, 1e-310),
        (2, 4, f64::NAN),
        (2, 1 << 20, 1.0),
    ] {
        let refused = MarkovChains::dirichlet(chains, tokens, concentration, &mut rng);
        assert!(matches!(refused, Err(Error::InvalidArgument { .. })));
    }
    let chains = MarkovChains::dirichlet(2, 4, 1.0, &mut rng).unwrap();
    assert!(chains
        .sample(1, 0, ChainChoice::Mixed, &mut rng, CPU)
        .is_err());
    assert!(chains
        .sample(1, 3, ChainChoice::One(2), &mut rng, CPU)
        .is_err());
    assert!(chains.best_cross_entropy(1).is_err());
    let table = |rows: [[[f64; 2]; 2]; 1]| Tensor::new(&rows, CPU).unwrap();
    for bad in [
        table([[[0.0, 0.0], [1.0, 1.0]]]),
        table([[[-1.0, 2.0], [1.0, 1.0]]]),
        table([[[f64::NAN, 2.0], [1.0, 1.0]]]),
        Tensor::zeros((1, 2, 3), DType::F64, CPU).unwrap(),
        Tensor::zeros((2, 2), DType::F64, CPU).unwrap(),
    ] {
        assert!(MarkovChains::from_transitions(&bad).is_err());
    }
}
