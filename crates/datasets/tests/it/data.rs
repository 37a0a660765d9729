use candle_core::{DType, Device, Tensor};
use thalweg_datasets::standardize::{Axis, Standardizer};
use thalweg_datasets::{Classification, Error, Regression};

fn small() -> Classification {
    let inputs = Tensor::arange(0f32, 12.0, &Device::Cpu).unwrap();
    let labels = Tensor::new(&[0u32, 2, 1, 2], &Device::Cpu).unwrap();
    Classification::new(inputs.reshape((4, 3)).unwrap(), labels, 3).unwrap()
}

#[test]
fn select_reshape_and_counts() {
    let data = small();
    assert_eq!((data.len(), data.is_empty()), (4, false));
    assert_eq!(data.class_counts().unwrap(), [1, 1, 2]);
    let chosen = data.select(&[3, 0, 3]).unwrap();
    assert_eq!(chosen.label_vec().unwrap(), [2, 0, 2]);
    assert_eq!(
        chosen.inputs.to_vec2::<f32>().unwrap()[0],
        [9.0, 10.0, 11.0]
    );
    let none = data.select(&[]).unwrap();
    assert_eq!((none.len(), none.inputs.dims()), (0, &[0, 3][..]));
    assert_eq!(data.reshape(&[1, 3]).unwrap().inputs.dims(), &[4, 1, 3]);
    let image = data.reshape(&[3, 1, 1]).unwrap();
    assert_eq!(image.flatten().unwrap().inputs.dims(), &[4, 3]);
    assert_eq!(
        data.to_dtype(DType::F64).unwrap().inputs.dtype(),
        DType::F64
    );
    assert_eq!(
        data.one_hot_labels(DType::F32)
            .unwrap()
            .to_vec2::<f32>()
            .unwrap()[1],
        [0.0, 0.0, 1.0]
    );
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let data = small();
    let y = |labels: &[u32]| Tensor::new(labels, &Device::Cpu).unwrap();
    assert!(matches!(
        Classification::new(data.inputs.clone(), y(&[0, 1]), 3),
        Err(Error::LengthMismatch {
            inputs: 4,
            labels: 2
        })
    ));
    assert!(matches!(
        Classification::new(data.inputs.clone(), y(&[0, 1, 7, 0]), 3),
        Err(Error::LabelOutOfRange {
            label: 7,
            index: 2,
            classes: 3
        })
    ));
    let wrong = data.labels.to_dtype(DType::I64).unwrap();
    assert!(matches!(
        Classification::new(data.inputs.clone(), wrong, 3),
        Err(Error::BadTensor { name: "labels", .. })
    ));
    assert!(matches!(
        data.select(&[4]),
        Err(Error::InvalidArgument { name: "index", .. })
    ));
    let scalar = Tensor::new(1f32, &Device::Cpu).unwrap();
    assert!(Regression::new(scalar, data.inputs.clone()).is_err());
    let regression = Regression::new(data.inputs.clone(), data.inputs.clone()).unwrap();
    assert_eq!(regression.select(&[2]).unwrap().len(), 1);
    assert!(data.map_inputs(|x| Ok(x.narrow(0, 0, 2)?)).is_err());
}

#[test]
fn standardizer_fits_on_the_training_part_only() {
    let train = small();
    let test = train.select(&[0]).unwrap();
    let (train_s, others) = train.standardize(Axis::Feature, &[&test]).unwrap();
    let mean = train_s.inputs.mean(0).unwrap().to_vec1::<f32>().unwrap();
    let square = train_s.inputs.sqr().unwrap().mean(0).unwrap();
    assert!(mean.iter().all(|m| m.abs() < 1e-6));
    assert!(square
        .to_vec1::<f32>()
        .unwrap()
        .iter()
        .all(|v| (v - 1.0).abs() < 1e-5));
    // The test example keeps the training moments: it is row 0 of the standardized training part.
    assert_eq!(
        others[0].inputs.to_vec2::<f32>().unwrap()[0],
        train_s.inputs.to_vec2::<f32>().unwrap()[0]
    );
}

#[test]
fn standardizer_axes_constants_and_inverse() {
    let x = Tensor::arange(0f64, 48.0, &Device::Cpu).unwrap();
    let x = x.reshape((2, 3, 2, 4)).unwrap();
    let fitted = Standardizer::fit(&x, Axis::Channel).unwrap();
    assert_eq!(fitted.mean.dims(), &[1, 3, 1, 1]);
    let back = fitted.invert(&fitted.apply(&x).unwrap()).unwrap();
    let error = (back - &x).unwrap().abs().unwrap().max_all().unwrap();
    assert!(error.to_scalar::<f64>().unwrap() < 1e-12);
    let whole = Standardizer::fit(&x, Axis::Whole).unwrap();
    assert_eq!(whole.mean.elem_count(), 1);

    let constant = Tensor::full(0.1f32, (5, 2), &Device::Cpu).unwrap();
    let fitted = Standardizer::fit(&constant, Axis::Feature).unwrap();
    let zero = fitted.apply(&constant).unwrap().to_vec2::<f32>().unwrap();
    assert!(zero.iter().flatten().all(|v| *v == 0.0));
}

#[test]
fn standardizer_refuses_nan_and_nothing() {
    let x = Tensor::new(&[[1f32, f32::NAN]], &Device::Cpu).unwrap();
    assert!(matches!(
        Standardizer::fit(&x, Axis::Feature),
        Err(Error::NonFinite { count: 1, .. })
    ));
    let none = Tensor::zeros((0, 2), DType::F32, &Device::Cpu).unwrap();
    assert!(Standardizer::fit(&none, Axis::Feature).is_err());
    let row = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
    assert!(Standardizer::fit(&row, Axis::Channel).is_err());
}
