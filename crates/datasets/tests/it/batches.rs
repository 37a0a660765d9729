use candle_core::{Device, Tensor};
use proptest::prelude::*;
use thalweg_datasets::{
    digits, BatchConfig, BatchState, Batches, Classification, Error, Order, RandomStream,
};

fn config(size: usize, order: Order, drop_last: bool) -> BatchConfig {
    BatchConfig {
        size,
        order,
        drop_last,
    }
}

fn epoch(batches: &mut Batches) -> Vec<Vec<u32>> {
    let mut all = Vec::new();
    while let Some(batch) = batches.next_indices().unwrap() {
        all.push(batch);
    }
    all
}

#[test]
fn shuffled_epochs_are_permutations_that_differ() {
    let mut batches = Batches::new(
        10,
        config(4, Order::Shuffled, false),
        &mut RandomStream::new(0),
    )
    .unwrap();
    let (first, second) = (epoch(&mut batches), epoch(&mut batches));
    assert_eq!(first.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2]);
    assert_ne!(first, second);
    for epoch in [first, second] {
        let mut all = epoch.concat();
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<u32>>());
    }
    assert_eq!(batches.epochs_done(), 2);
}

#[test]
fn sequential_keeps_the_order_and_drop_last_drops() {
    let mut rng = RandomStream::new(0);
    let mut batches = Batches::new(7, config(3, Order::Sequential, true), &mut rng).unwrap();
    assert_eq!(epoch(&mut batches), [[0, 1, 2], [3, 4, 5]]);
    assert_eq!(batches.batches_per_epoch(), 2);
    let mut batches = Batches::new(7, BatchConfig::sequential(3), &mut rng).unwrap();
    assert_eq!(epoch(&mut batches).concat(), (0..7).collect::<Vec<u32>>());
    assert_eq!(batches.batches_per_epoch(), 3);
}

#[test]
fn two_sources_from_one_stream_differ_and_one_seed_repeats() {
    let mut rng = RandomStream::new(4);
    let mut a = Batches::new(50, BatchConfig::shuffled(50), &mut rng).unwrap();
    let mut b = Batches::new(50, BatchConfig::shuffled(50), &mut rng).unwrap();
    let mut c = Batches::new(50, BatchConfig::shuffled(50), &mut RandomStream::new(4)).unwrap();
    let first = epoch(&mut a);
    assert_ne!(first, epoch(&mut b));
    assert_eq!(first, epoch(&mut c));
}

/// With replacement the number of distinct indices of n draws is n (1 - 1/e) on average.
#[test]
fn with_replacement_repeats_indices() {
    let n = 2000;
    let mut batches = Batches::new(
        n,
        BatchConfig::with_replacement(n),
        &mut RandomStream::new(8),
    )
    .unwrap();
    let mut all = epoch(&mut batches).concat();
    all.sort_unstable();
    all.dedup();
    let share = all.len() as f64 / n as f64;
    assert!(
        (share - (1.0 - 1.0 / std::f64::consts::E)).abs() < 0.03,
        "{share}"
    );
}

#[test]
fn batches_carry_the_rows_that_their_indices_name() {
    let data = digits().unwrap();
    let mut rng = RandomStream::new(2);
    let mut batches = Batches::new(data.len(), BatchConfig::shuffled(100), &mut rng).unwrap();
    let mut twin = batches.clone();
    let mut count = 0;
    for batch in batches.epoch(&data) {
        let (inputs, labels) = batch.unwrap();
        let expected = data.select(&twin.next_indices().unwrap().unwrap()).unwrap();
        assert_eq!(
            inputs.to_vec2::<f32>().unwrap(),
            expected.inputs.to_vec2::<f32>().unwrap()
        );
        assert_eq!(
            labels.to_vec1::<u32>().unwrap(),
            expected.label_vec().unwrap()
        );
        count += 1;
    }
    assert_eq!(count, 17);
    assert_eq!(batches.epochs_done(), 1);
    assert_eq!(batches.epoch(&data).count(), 17);
    assert_eq!(batches.epochs_done(), 2);
}

#[test]
fn a_loop_that_is_left_early_continues() {
    let pair = (
        Tensor::arange(0u32, 6, &Device::Cpu).unwrap(),
        Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap(),
    );
    let mut rng = RandomStream::new(2);
    let mut batches = Batches::new(6, BatchConfig::sequential(2), &mut rng).unwrap();
    assert!(batches.epoch(&pair).next().is_some());
    let rest: Vec<Vec<u32>> = batches
        .epoch(&pair)
        .map(|batch| batch.unwrap().0.to_vec1().unwrap())
        .collect();
    assert_eq!(rest, [[2, 3], [4, 5]]);
    // `draw` goes on with the next epoch by itself.
    assert_eq!(
        batches.draw(&pair).unwrap().1.to_vec1::<f32>().unwrap(),
        [0.0, 1.0]
    );
}

#[test]
fn bad_sizes_and_other_data_are_refused() {
    let mut rng = RandomStream::new(0);
    for (n, size, drop_last) in [(0, 1, false), (5, 0, false), (5, 6, true)] {
        let refused = Batches::new(n, config(size, Order::Shuffled, drop_last), &mut rng);
        assert!(matches!(refused, Err(Error::InvalidArgument { .. })));
    }
    let mut batches = Batches::new(5, BatchConfig::sequential(9), &mut rng).unwrap();
    assert_eq!(epoch(&mut batches), [[0, 1, 2, 3, 4]]);
    let data = digits().unwrap();
    assert!(batches.next_batch(&data).is_err());
    assert!(batches.draw(&data).is_err());
    assert!(batches.epoch(&data).next().unwrap().is_err());
    let uneven = (data.inputs.clone(), data.labels.narrow(0, 0, 5).unwrap());
    assert!(matches!(
        batches.next_batch(&uneven),
        Err(Error::LengthMismatch { .. })
    ));
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let mut rng = RandomStream::new(0);
    let batches = Batches::new(5, BatchConfig::shuffled(2), &mut rng).unwrap();
    let state = batches.state();
    let beyond = BatchState {
        position: 6,
        ..state
    };
    assert!(matches!(Batches::from_state(&beyond), Err(Error::State(_))));
    let tensor = state.to_tensor().unwrap();
    assert!(BatchState::from_tensor(&tensor.narrow(0, 0, 80).unwrap()).is_err());
    let mut bytes = tensor.to_vec1::<u8>().unwrap();
    bytes[72] = 9;
    let damaged = Tensor::from_vec(bytes, 88, &Device::Cpu).unwrap();
    let message = BatchState::from_tensor(&damaged).unwrap_err().to_string();
    assert!(message.contains("order 9"), "{message}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..Default::default() })]

    /// Saved at any moment and restored, the same batches follow.
    #[test]
    fn restored_batches_continue_with_the_same_bits(
        n in 1usize..40,
        size in 1usize..12,
        kind in 0u8..3,
        drop_last: bool,
        steps in 0usize..30,
        seed in 0u64..100,
    ) {
        let order = [Order::Sequential, Order::Shuffled, Order::WithReplacement][kind as usize];
        let config = config(size.min(n), order, drop_last);
        let mut batches = Batches::new(n, config, &mut RandomStream::new(seed)).unwrap();
        for _ in 0..steps {
            batches.next_indices().unwrap();
        }
        let saved = batches.state().to_tensor().unwrap();
        let state = BatchState::from_tensor(&saved).unwrap();
        prop_assert_eq!(state, batches.state());
        let mut restored = Batches::from_state(&state).unwrap();
        for _ in 0..30 {
            prop_assert_eq!(batches.next_indices().unwrap(), restored.next_indices().unwrap());
            prop_assert_eq!(batches.epochs_done(), restored.epochs_done());
        }
    }
}

#[test]
fn token_inputs_work_like_images() {
    let inputs = Tensor::arange(0u32, 12, &Device::Cpu).unwrap();
    let labels = Tensor::new(&[0u32, 1, 0], &Device::Cpu).unwrap();
    let data = Classification::new(inputs.reshape((3, 4)).unwrap(), labels, 2).unwrap();
    let mut rng = RandomStream::new(0);
    let mut batches = Batches::new(3, BatchConfig::sequential(2), &mut rng).unwrap();
    let (x, y) = batches.draw(&data).unwrap();
    assert_eq!(x.to_vec2::<u32>().unwrap(), [[0, 1, 2, 3], [4, 5, 6, 7]]);
    assert_eq!(y.to_vec1::<u32>().unwrap(), [0, 1]);
}
