use super::policy;
use candle_core::DType;
use sequence_design::gflownet::pareto::pareto_mask;
use sequence_design::gflownet::*;
use sequence_design::RandomStream;

#[test]
fn environments_are_graphs_with_a_way_back() {
    fn states<E: Environment>(env: &E) -> usize {
        let all = Enumeration::new(env, 20_000).unwrap();
        for k in all.objects() {
            assert!(env.is_terminal(&all.states()[k]));
        }
        let mut rng = RandomStream::new(1);
        let net = policy(
            env,
            1,
            &PolicyConfig {
                hidden: vec![],
                backward: true,
                ..PolicyConfig::default()
            },
            DType::F32,
        );
        let contexts = vec![vec![]; 8];
        let there = roll_out(
            env,
            &net.policy,
            &contexts,
            Exploration::default(),
            &mut rng,
        )
        .unwrap();
        let back = roll_back(env, &net.policy, &there.objects(), &contexts, &mut rng).unwrap();
        assert_eq!(back.objects(), there.objects());
        for i in 0..8 {
            assert_eq!(back.states()[back.offsets()[i]], env.initial());
            let again = Trajectories::from_actions(env, &[back.actions_of(i).to_vec()]).unwrap();
            assert_eq!(again.object(0), there.object(i));
        }
        all.states().len()
    }
    assert_eq!(states(&HyperGrid::new(3, 5).unwrap()), 125);
    assert_eq!(
        states(&AppendSequence::new(4, 3).unwrap()),
        1 + 3 + 9 + 27 + 81
    );
    assert_eq!(
        states(&AppendSequence::bits(6, 2).unwrap()),
        1 + 4 + 16 + 64
    );
    assert_eq!(
        states(&PrependAppend::new(4, 3).unwrap()),
        1 + 3 + 9 + 27 + 81
    );
    assert_eq!(states(&BagOfItems::new(3, 3).unwrap()), 20);
    assert_eq!(states(&BagOfItems::set(5, 2).unwrap()), 1 + 5 + 10);
    assert_eq!(states(&NasCell::new(3, 4).unwrap()), 125);
    assert_eq!(
        states(&SequenceEdit::new(&[0, 1, 2], 3, 2).unwrap()),
        1 + 6 + 12
    );
    // A block with two stems and one with none: a root, and trees on it.
    let blocks = [("fork", 2), ("end", 0)];
    let blocks = blocks.map(|(name, stems)| Fragment {
        name: name.into(),
        stems,
    });
    let trees = FragmentGraph::new(blocks.to_vec(), 1, 3).unwrap();
    // 1 empty, 2 of one block, 4 of two, and of three: 4 with both stems of the root, 8 chains.
    assert_eq!(states(&trees), 1 + 2 + 4 + 4 + 8);
    assert_eq!(
        AppendSequence::bits(6, 2).unwrap().to_bits(&[2, 1]),
        [true, false, false, true]
    );
}

/// A ring: adding wraps around.
#[derive(Debug)]
struct Ring;

impl Environment for Ring {
    type State = u8;
    fn actions(&self) -> usize {
        2
    }
    fn initial(&self) -> u8 {
        0
    }
    fn max_steps(&self) -> usize {
        2
    }
    fn forward_mask(&self, _: &u8, mask: &mut [bool]) {
        mask[0] = true;
    }
    fn backward_mask(&self, _: &u8, mask: &mut [bool]) {
        mask[0] = true;
    }
    fn step(&self, state: &mut u8, _: usize) {
        *state = (*state + 1) % 3;
    }
    fn undo(&self, state: &mut u8, _: usize) {
        *state = (*state + 2) % 3;
    }
    fn feature_width(&self) -> usize {
        1
    }
    fn write_features(&self, state: &u8, out: &mut [f32]) {
        out[0] = f32::from(*state);
    }
}

#[test]
fn broken_environments_are_named() {
    let error = Enumeration::new(&Ring, 10).unwrap_err().to_string();
    assert!(error.contains("cycle"), "{error}");
    let net = policy(&Ring, 1, &PolicyConfig::default(), DType::F32);
    let mut rng = RandomStream::new(0);
    let error = roll_out(
        &Ring,
        &net.policy,
        &[vec![]],
        Exploration::default(),
        &mut rng,
    )
    .unwrap_err();
    assert!(error.to_string().contains("beyond 2 steps"), "{error}");
    let error = Enumeration::new(&HyperGrid::new(2, 9).unwrap(), 80).unwrap_err();
    assert!(error.to_string().contains("more than 80"), "{error}");
    let env = AppendSequence::new(3, 2).unwrap();
    let net = policy(&env, 1, &PolicyConfig::default(), DType::F32);
    let error = roll_back(&env, &net.policy, &[vec![0, 1]], &[vec![]], &mut rng).unwrap_err();
    assert!(error.to_string().contains("no object"), "{error}");
    assert!(Trajectories::from_actions(&env, &[vec![0, 2, 1]]).is_err());
    assert!(Trajectories::from_actions(&env, &[vec![0, 1]]).is_err());
    assert!(HyperGrid::new(0, 4).is_err() && HyperGrid::new(2, 1).is_err());
    assert!(AppendSequence::new(0, 4).is_err() && AppendSequence::bits(7, 2).is_err());
    assert!(BagOfItems::set(2, 3).is_err() && SequenceEdit::new(&[3], 3, 1).is_err());
    assert!(TabularLandscape::normalized([(vec![0], 1.0), (vec![1], 1.0)]).is_err());
    assert!(TabularLandscape::normalized([(vec![0], f64::NAN)]).is_err());
    assert!(TabularLandscape::normalized([(vec![0], 1.0), (vec![0], 2.0)]).is_err());
    assert!(TabularLandscape::normalized([]).is_err());
}

/// The known front of two functions on the 32 x 32 grid.
#[test]
fn test_functions() {
    let grid = HyperGrid::new(2, 32).unwrap();
    let all = Enumeration::new(&grid, 2000).unwrap();
    let both = [TestFunction::Branin, TestFunction::Currin];
    let at = |s: &Vec<u16>| both.iter().map(|f| f.on(&grid, s).unwrap()).collect();
    let points: Vec<Vec<f64>> = all.states().iter().map(at).collect();
    assert_eq!(pareto_mask(&points).iter().filter(|m| **m).count(), 36);
    for f in [TestFunction::Shubert, TestFunction::Sphere] {
        let values = all.states().iter().map(|s| f.on(&grid, s).unwrap());
        assert!(values.into_iter().all(|v| (-0.01..1.01).contains(&v)));
    }
    // Beale's function has its zero at (3, 1/2).
    assert!(TestFunction::Beale.at(3.0, 0.5) < 1e-20);
    let cube = HyperGrid::new(3, 4).unwrap();
    assert!(TestFunction::Branin.on(&cube, &[0, 0, 0]).is_err());
}
