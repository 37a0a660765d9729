use crate::support::*;
use proptest::prelude::*;
use sequence_design::gflownet::pareto::*;
use sequence_design::RandomStream;

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn fronts_are_those_of_brute_force(seed in 0u64..1000, d in 1usize..5, n in 1usize..20) {
        let mut rng = RandomStream::new(seed);
        let points: Vec<Vec<f64>> = (0..n).map(|_| (0..d).map(|_| rng.below(4).unwrap() as f64).collect()).collect();
        let brute: Vec<bool> = points.iter().map(|p| !points.iter().any(|q| dominates(q, p))).collect();
        prop_assert_eq!(pareto_mask(&points), brute);
    }

    /// Against inclusion and exclusion over all subsets; on a grid points tie and repeat.
    #[test]
    fn the_hypervolume_is_exact(seed in 0u64..1000, d in 1usize..7, n in 1usize..9, grid in prop::bool::ANY) {
        let mut rng = RandomStream::new(seed);
        let mut number = || if grid { rng.below(4).unwrap() as f64 / 4.0 } else { rng.next_uniform() - 0.2 };
        let points: Vec<Vec<f64>> = (0..n).map(|_| (0..d).map(|_| number()).collect()).collect();
        let reference = vec![0.1; d];
        let mut expected = 0.0;
        for subset in 1u32..1 << n {
            let members = || (0..n).filter(move |i| subset >> i & 1 == 1);
            let side = |k: usize| members().map(|i| points[i][k] - reference[k]).fold(f64::INFINITY, f64::min).max(0.0);
            let sign = if subset.count_ones() % 2 == 1 { 1.0 } else { -1.0 };
            expected += sign * (0..d).map(side).product::<f64>();
        }
        let found = hypervolume(&points, &reference).unwrap();
        prop_assert!((found - expected).abs() < 1e-12, "{} {}", found, expected);
    }

    /// Fronts too long for subsets, of points that tie and repeat: cells of a grid are counted.
    #[test]
    fn the_hypervolume_of_a_long_front_counts_cells(seed in 0u64..1000, d in 2usize..6, side in 3usize..7) {
        let mut rng = RandomStream::new(seed);
        let points: Vec<Vec<f64>> = (0..60)
            .map(|_| (0..d).map(|_| rng.below(side + 1).unwrap() as f64).collect())
            .collect();
        let inside = |cell: usize| {
            let corner = |k: usize| (cell / side.pow(k as u32) % side + 1) as f64;
            points.iter().any(|p| (0..d).all(|k| p[k] >= corner(k)))
        };
        let cells = (0..side.pow(d as u32)).filter(|c| inside(*c)).count();
        let found = hypervolume(&points, &vec![0.0; d]).unwrap();
        prop_assert!((found - cells as f64).abs() < 1e-9 * (1.0 + found), "{} {}", found, cells);
    }

    /// One coordinate the same for all: the volume is that of the others.
    #[test]
    fn a_flat_objective_is_a_factor(seed in 0u64..1000, d in 2usize..5, at in 0usize..5, n in 1usize..60) {
        let mut rng = RandomStream::new(seed);
        let points: Vec<Vec<f64>> = (0..n).map(|_| (0..d).map(|_| rng.next_uniform()).collect()).collect();
        let mut taller = points.clone();
        taller.iter_mut().for_each(|p| p.insert(at.min(d), 2.0));
        let (low, high) = (hypervolume(&points, &vec![0.0; d]), hypervolume(&taller, &vec![0.0; d + 1]));
        let (low, high) = (low.unwrap(), high.unwrap());
        prop_assert!((2.0 * low - high).abs() < 1e-12, "{} {}", low, high);
    }
}

#[test]
fn pareto_tools() {
    let front = vec![vec![0.0, 1.0], vec![0.5, 0.5], vec![1.0, 0.0]];
    assert_eq!(
        pareto_coverage(&front[..2], &front, 1e-9).unwrap(),
        2.0 / 3.0
    );
    assert_eq!(igd_plus(&front, &front).unwrap(), 0.0);
    let short = igd_plus(&[vec![0.5, 0.0]], &[vec![0.5, 0.5]]).unwrap();
    assert!((short - 0.5).abs() < 1e-15);
    let weights = vec![vec![0.5, 0.5], vec![1.0, 0.0]];
    assert!((r2(&front, &[1.0, 1.0], &weights).unwrap() - 0.125).abs() < 1e-15);
    assert!(hypervolume(&[], &[]).is_err() && hypervolume(&front, &[0.0]).is_err());
    assert!(hypervolume(&[vec![f64::NAN, 1.0]], &[0.0, 0.0]).is_err());
    assert!(hypervolume(&front, &[0.0, f64::NAN]).is_err());
    let endless = [vec![f64::INFINITY, 1.0], vec![f64::INFINITY, 2.0]];
    assert_eq!(hypervolume(&endless, &[0.0; 2]).unwrap(), f64::INFINITY);
    // Nothing of a point that does not lie above the reference everywhere counts.
    assert_eq!(hypervolume(&endless, &[0.0, 2.0]).unwrap(), 0.0);
    assert!(r2(&front, &[1.0], &weights).is_err());
    // A point with NaN is worst, and counts when there is nothing else.
    assert_eq!(
        pareto_mask(&[vec![f64::NAN, 9.0], vec![0.0, 0.0]]),
        [false, true]
    );
    let words = [b"ACGT".to_vec(), b"ACGA".to_vec(), b"TTTT".to_vec()];
    let distance = |a: &Vec<u8>, b: &Vec<u8>| edit_distance(a, b) as f64;
    assert_eq!(edit_distance(b"kitten", b"sitting"), 3);
    assert_eq!(diversity(&words, distance), (1.0 + 3.0 + 4.0) / 3.0);
    assert_eq!(modes(&words, &[0.9, 1.0, 0.8], 0.5, 1.0, distance), [1, 2]);
}
