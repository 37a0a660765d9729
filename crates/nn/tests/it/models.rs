use crate::support::{bits, check_directions, normal, values, with_threads, CPU};
use candle_core::{DType, ModuleT, Tensor, Var};
use candle_nn::Optimizer;
use nn::init::SeededVars;
use nn::loss::{accuracy, cross_entropy, Reduction};
use nn::models::*;
use nn::norm::ghost_batch::GhostBatchNormConfig;
use nn::norm::power::PowerNormConfig;
use nn::norm::LayerNormConfig;
use nn::{Error, RandomStream};
use tensor_core::autograd::grad_check;

fn vars() -> SeededVars {
    SeededVars::new(&RandomStream::new(4))
}

/// No variable of the network lacks a gradient.
fn all_get_gradients(vars: &SeededVars, logits: &Tensor) {
    let trainable = vars.trainable();
    assert!(!trainable.is_empty());
    grad_check(&[logits], &trainable).unwrap();
}

fn batch_norms() -> [BatchNormKind; 3] {
    let ghost = GhostBatchNormConfig {
        ghost_size: 2,
        ..Default::default()
    };
    [
        BatchNormKind::None,
        BatchNormKind::Batch,
        BatchNormKind::Ghost(ghost),
    ]
}

fn gradients_are_right(vars: &SeededVars, logits: impl Fn() -> Tensor) {
    let c = normal(9, logits().dims(), DType::F64);
    let loss = || (logits() * &c).unwrap().sum_all().unwrap();
    let trainable = vars.trainable();
    let vars: Vec<&Var> = trainable.iter().map(|(_, var)| var).collect();
    let error = check_directions(&vars, loss);
    assert!(error < 1e-6, "{error}");
}

#[test]
fn mlp_with_every_norm() {
    for norm in batch_norms() {
        for bias in [true, false] {
            let vars = vars();
            let config = MlpConfig {
                norm,
                bias,
                activation: Activation::Tanh,
                ..MlpConfig::new(&[3, 5, 4, 2])
            };
            let mlp = Mlp::new(&config, vars.builder(DType::F64, &CPU)).unwrap();
            let x = normal(1, &[6, 3], DType::F64);
            all_get_gradients(&vars, &mlp.forward_t(&x, true).unwrap());
            gradients_are_right(&vars, || mlp.forward_t(&x, true).unwrap());
            let count =
                3 * (1 + usize::from(bias)) + if norm == BatchNormKind::None { 0 } else { 4 };
            assert_eq!(vars.trainable().len(), count);
        }
    }
}

#[test]
fn conv_net_with_every_norm() {
    for norm in batch_norms() {
        let vars = vars();
        let config = ConvNetConfig {
            channels: vec![2, 3],
            classes: 3,
            norm,
            activation: Activation::Gelu,
            ..Default::default()
        };
        let net = ConvNet::new(&config, vars.builder(DType::F64, &CPU)).unwrap();
        let x = normal(1, &[4, 1, 5, 6], DType::F64);
        let logits = net.forward_t(&x, true).unwrap();
        assert_eq!(logits.dims(), &[4, 3]);
        all_get_gradients(&vars, &logits);
        gradients_are_right(&vars, || net.forward_t(&x, true).unwrap());
    }
}

#[test]
fn res_net_with_every_norm() {
    for norm in batch_norms() {
        let vars = vars();
        let config = ResNetConfig {
            input_channels: 1,
            width: 1,
            classes: 2,
            norm,
            ..Default::default()
        };
        let net = ResNet::new(&config, vars.builder(DType::F64, &CPU)).unwrap();
        for side in [8, 7] {
            let x = normal(1, &[4, 1, side, side], DType::F64);
            let logits = net.forward_t(&x, true).unwrap();
            assert_eq!(logits.dims(), &[4, 2]);
            gradients_are_right(&vars, || net.forward_t(&x, true).unwrap());
        }
    }
    let vars = vars();
    let config = ResNetConfig {
        blocks: 7,
        ..Default::default()
    };
    ResNet::new(&config, vars.builder(DType::F32, &CPU)).unwrap();
    let weights = vars.trainable().into_iter().filter(|(name, var)| {
        name.ends_with("weight") && var.rank() > 1 && !name.contains("shortcut")
    });
    assert_eq!(weights.count(), 44, "ResNet-44 has 44 layers with weights");
}

fn token_norms() -> Vec<TokenNorm> {
    let power = PowerNormConfig {
        groups: 2,
        ..Default::default()
    };
    vec![
        TokenNorm::Layer(LayerNormConfig::default()),
        TokenNorm::Rms(1e-6),
        TokenNorm::Batch(GhostBatchNormConfig::batch_norm()),
        TokenNorm::Power(power.clone()),
        TokenNorm::PowerV(power),
    ]
}

fn small(norm: TokenNorm, pre_norm: bool) -> TransformerConfig {
    TransformerConfig {
        vocabulary: 5,
        dim: 4,
        layers: 1,
        heads: 2,
        feed_forward: 6,
        max_length: 4,
        norm,
        pre_norm,
        activation: Activation::Gelu,
        ..Default::default()
    }
}

#[test]
fn transformer_with_every_norm() {
    let tokens = Tensor::new(&[[0u32, 3, 1], [4, 4, 2]], &CPU).unwrap();
    for norm in token_norms() {
        for pre_norm in [true, false] {
            let vars = vars();
            let config = small(norm.clone(), pre_norm);
            let net = TransformerLm::new(&config, vars.builder(DType::F64, &CPU)).unwrap();
            let power = matches!(norm, TokenNorm::Power(_));
            assert_eq!(
                net.power_norms().len(),
                if power { 2 + usize::from(pre_norm) } else { 0 }
            );
            let logits = net.forward_t(&tokens, true).unwrap();
            assert_eq!(logits.dims(), &[2, 3, 5]);
            all_get_gradients(&vars, &logits);
            // The gradient of power norm is not the derivative in training, but is in evaluation.
            gradients_are_right(&vars, || net.forward_t(&tokens, !power).unwrap());
        }
    }
}

#[test]
fn transformer_does_not_look_ahead() {
    let net = TransformerLm::new(
        &small(TokenNorm::Layer(LayerNormConfig::default()), true),
        vars().builder(DType::F64, &CPU),
    )
    .unwrap();
    let logits = |tokens: &[u32]| {
        let tokens = Tensor::new(tokens, &CPU).unwrap().unsqueeze(0).unwrap();
        net.forward(&tokens, false).unwrap()
    };
    let (a, b) = (logits(&[1, 2, 3, 4]), logits(&[1, 2, 3, 0]));
    let first = |t: &Tensor| values(&t.narrow(1, 0, 3).unwrap());
    let last = |t: &Tensor| values(&t.narrow(1, 3, 1).unwrap());
    assert_eq!(first(&a), first(&b));
    assert_ne!(last(&a), last(&b));
}

#[test]
fn training_repeats_for_any_number_of_threads() {
    let run = |threads| {
        with_threads(threads, || {
            let vars = vars();
            let power = PowerNormConfig {
                groups: 4,
                warmup_iters: 3,
                ..Default::default()
            };
            let config = TransformerConfig {
                norm: TokenNorm::Power(power),
                ..Default::default()
            };
            let net = TransformerLm::new(&config, vars.builder(DType::F32, &CPU)).unwrap();
            let params = vars.trainable().into_iter().map(|(_, var)| var).collect();
            let mut adam = candle_nn::AdamW::new_lr(params, 3e-3).unwrap();
            let tokens: Vec<u32> = (0..8 * 65).map(|i| (i * i + i / 7) % 32).collect();
            let tokens = Tensor::from_vec(tokens, (8, 65), &CPU).unwrap();
            let (x, y) = (
                tokens.narrow(1, 0, 64).unwrap(),
                tokens.narrow(1, 1, 64).unwrap(),
            );
            let losses = (0..12).map(|_| {
                let logits = net.forward_t(&x, true).unwrap();
                let loss = cross_entropy(&logits, &y, Reduction::Mean).unwrap();
                adam.backward_step(&loss).unwrap();
                values(&loss)[0]
            });
            let losses: Vec<f64> = losses.collect();
            (losses, bits(&net.forward_t(&x, false).unwrap()))
        })
    };
    let one = run(1);
    assert!(one.0[11] < 0.95 * one.0[0], "{:?}", one.0);
    assert!(one == run(2));
}

#[test]
fn a_conv_net_learns_to_tell_stripes() {
    let vars = vars();
    let config = ConvNetConfig {
        channels: vec![4, 8],
        classes: 2,
        ..Default::default()
    };
    let net = ConvNet::new(&config, vars.builder(DType::F32, &CPU)).unwrap();
    let mut noise = normal(3, &[32, 1, 8, 8], DType::F32);
    let stripes: Vec<f32> = (0..32 * 64)
        .map(|i| {
            let (image, row, column) = (i / 64, i / 8 % 8, i % 8);
            let along = if image % 2 == 0 { row } else { column };
            if along % 2 == 0 {
                1.0
            } else {
                -1.0
            }
        })
        .collect();
    noise =
        ((noise * 0.5).unwrap() + Tensor::from_vec(stripes, (32, 1, 8, 8), &CPU).unwrap()).unwrap();
    let labels: Vec<u32> = (0..32).map(|i| i % 2).collect();
    let labels = Tensor::new(labels, &CPU).unwrap();
    let params = vars.trainable().into_iter().map(|(_, var)| var).collect();
    let mut adam = candle_nn::AdamW::new_lr(params, 1e-2).unwrap();
    for _ in 0..30 {
        let logits = net.forward_t(&noise, true).unwrap();
        adam.backward_step(&cross_entropy(&logits, &labels, Reduction::Mean).unwrap())
            .unwrap();
    }
    let logits = net.forward_t(&noise, false).unwrap();
    assert!(accuracy(&logits, &labels).unwrap() > 0.95);
}

#[test]
fn unet_keeps_sizes_and_is_told_level_and_class() {
    let vars = vars();
    let config = UNetConfig {
        channels: vec![2, 4],
        groups: 2,
        embedding: 4,
        classes: Some(3),
        ..Default::default()
    };
    let net = UNet::new(&config, vars.builder(DType::F64, &CPU)).unwrap();
    let x = normal(1, &[2, 1, 7, 6], DType::F64);
    let level = Tensor::new(&[0.1f64, 0.9], &CPU).unwrap();
    let labels = Tensor::new(&[2u32, 0], &CPU).unwrap();
    let run = |level: &Tensor, labels: Option<&Tensor>| net.forward(&x, level, labels).unwrap();
    let y = run(&level, Some(&labels));
    assert_eq!(y.dims(), x.dims());
    let sum = y.sum_all().unwrap().backward().unwrap();
    for (name, var) in vars.trainable() {
        assert!(sum.get(&var).is_some(), "{name}");
    }
    gradients_are_right(&vars, || {
        run(&level, Some(&labels)).flatten_from(1).unwrap()
    });
    assert_ne!(values(&y), values(&run(&level, None)));
    assert_ne!(
        values(&y),
        values(&run(&(&level * 0.5).unwrap(), Some(&labels)))
    );
    let none = Tensor::new(&[3u32, 3], &CPU).unwrap();
    assert_eq!(
        values(&run(&level, None)),
        values(&run(&level, Some(&none)))
    );

    let outside = Tensor::new(&[4u32, 0], &CPU).unwrap();
    assert!(net.forward(&x, &level, Some(&outside)).is_err());
    assert!(net.forward(&x, &level.get(0).unwrap(), None).is_err());
    let plain = UNetConfig {
        classes: None,
        ..config.clone()
    };
    let plain = UNet::new(&plain, self::vars().builder(DType::F64, &CPU)).unwrap();
    assert!(plain.forward(&x, &level, Some(&labels)).is_err());
    let bad = UNetConfig {
        channels: vec![3],
        ..config
    };
    let error = UNet::new(&bad, self::vars().builder(DType::F64, &CPU)).unwrap_err();
    assert!(matches!(error, Error::InvalidConfig { .. }));
}

#[test]
fn bad_configurations_and_inputs_are_named() {
    let vb = || vars().builder(DType::F32, &CPU);
    let refused =
        |result: nn::Result<()>| assert!(matches!(result, Err(Error::InvalidConfig { .. })));
    refused(
        ConvNet::new(
            &ConvNetConfig {
                channels: vec![],
                ..Default::default()
            },
            vb(),
        )
        .map(|_| ()),
    );
    refused(
        ConvNet::new(
            &ConvNetConfig {
                classes: 0,
                ..Default::default()
            },
            vb(),
        )
        .map(|_| ()),
    );
    refused(
        ResNet::new(
            &ResNetConfig {
                blocks: 0,
                ..Default::default()
            },
            vb(),
        )
        .map(|_| ()),
    );
    refused(
        TransformerLm::new(
            &TransformerConfig {
                heads: 3,
                ..Default::default()
            },
            vb(),
        )
        .map(|_| ()),
    );
    refused(
        TransformerLm::new(
            &TransformerConfig {
                layers: 0,
                ..Default::default()
            },
            vb(),
        )
        .map(|_| ()),
    );

    let net = TransformerLm::new(&TransformerConfig::default(), vb()).unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::U32, &CPU).unwrap();
    for shape in [&[3][..], &[2, 129], &[2, 0], &[0, 2]] {
        let error = net.forward(&zeros(shape), false).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Shape {
                    tensor: "tokens",
                    ..
                }
            ),
            "{error}"
        );
    }
    let outside = Tensor::new(&[[0u32, 32]], &CPU).unwrap();
    let error = net.forward(&outside, false).unwrap_err();
    assert!(
        matches!(
            error,
            Error::LabelOutOfRange {
                label: 32,
                position: 1,
                ..
            }
        ),
        "{error}"
    );
}
