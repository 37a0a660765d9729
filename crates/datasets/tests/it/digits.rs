use candle_core::DType;
use sha2::{Digest, Sha256};
use thalweg_datasets::digits::{raw, EXAMPLES, MAX_VALUE, PIXELS};
use thalweg_datasets::{digits, split::split, RandomStream, Sizes};

/// SHA-256 of the uncompressed bytes, computed from scikit-learn's copy.
const SHA256: &str = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826";

#[test]
fn embedded_bytes_are_the_published_ones() {
    let (pixels, labels) = raw().unwrap();
    assert_eq!((pixels.len(), labels.len()), (EXAMPLES * PIXELS, EXAMPLES));
    assert_eq!(pixels.iter().max(), Some(&MAX_VALUE));
    let mut hash = Sha256::new();
    hash.update(&pixels);
    hash.update(&labels);
    let hex: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hex, SHA256);
}

#[test]
fn digits_are_scaled_and_in_order() {
    let data = digits().unwrap();
    assert_eq!(data.inputs.dims(), &[1797, 64]);
    assert_eq!(data.inputs.dtype(), DType::F32);
    assert_eq!(data.labels.dims(), &[1797]);
    assert_eq!(
        data.class_counts().unwrap(),
        [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    );
    let first: Vec<f32> = data.inputs.get(0).unwrap().to_vec1().unwrap();
    let expected = [0, 0, 5, 13, 9, 1, 0, 0].map(|p| p as f32 / 16.0);
    assert_eq!(first[..8], expected);
    assert_eq!(
        data.label_vec().unwrap()[..12],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    );
    let sum = data.inputs.to_dtype(DType::F64).unwrap().sum_all().unwrap();
    assert_eq!(sum.to_scalar::<f64>().unwrap() * 16.0, 561_718.0);
}

/// Nearest neighbor reaches the accuracy that is known for this data, so images and labels belong
/// together.
#[test]
fn nearest_neighbor_reads_the_digits() {
    let data = digits().unwrap();
    let mut rng = RandomStream::new(3);
    let parts = split(data.len(), Sizes::Counts(&[1297, 500]), &mut rng).unwrap();
    let (train, test) = (
        data.select(&parts[0]).unwrap(),
        data.select(&parts[1]).unwrap(),
    );
    let norms = train.inputs.sqr().unwrap().sum(1).unwrap();
    let scores = test.inputs.matmul(&train.inputs.t().unwrap()).unwrap();
    let distance = scores
        .affine(-2.0, 0.0)
        .unwrap()
        .broadcast_add(&norms)
        .unwrap();
    let nearest = distance.argmin(1).unwrap();
    let predicted = train.labels.index_select(&nearest, 0).unwrap();
    let right = predicted.eq(&test.labels).unwrap().to_dtype(DType::F32);
    let accuracy = right.unwrap().mean_all().unwrap().to_scalar::<f32>();
    assert!(accuracy.unwrap() > 0.97);
}
