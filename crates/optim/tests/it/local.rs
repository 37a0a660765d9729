use candle_core::{DType, Device, Tensor, Var};
use optim::local::{held_bytes, LocalLayer};
use optim::{AdamW, AdamWConfig, ParamGroup};

struct Layer {
    weight: Var,
    adam: AdamW,
}

impl Layer {
    fn new(weight: &[[f64; 2]; 2]) -> Self {
        let weight = Var::from_tensor(&Tensor::new(weight, &Device::Cpu).unwrap()).unwrap();
        let group = ParamGroup::named(
            vec![("weight".into(), weight.clone())],
            AdamWConfig::adam(0.1),
        );
        let adam = AdamW::with_groups(vec![group]).unwrap();
        Self { weight, adam }
    }
}

impl LocalLayer<Tensor> for Layer {
    type Error = optim::Error;
    type Optimizer = AdamW;

    fn forward(&self, input: &Tensor) -> optim::Result<Tensor> {
        Ok(input.matmul(&self.weight)?.relu()?)
    }

    fn local_loss(&self, _: &Tensor, output: &Tensor) -> optim::Result<Tensor> {
        Ok(output.sqr()?.sum_all()?)
    }

    fn optimizer(&mut self) -> &mut AdamW {
        &mut self.adam
    }
}

/// The second layer's loss has no gradient for the first, whose output it got.
#[test]
fn no_gradient_crosses_a_layer() {
    let (mut first, mut second) = (
        Layer::new(&[[1.0, -0.5], [0.25, 2.0]]),
        Layer::new(&[[0.5, 1.0], [1.0, 0.5]]),
    );
    let x = Tensor::new(&[[1.0f64, 2.0]], &Device::Cpu).unwrap();
    let before = first.weight.to_vec2::<f64>().unwrap();
    let h = first.step(&x).unwrap().output;
    assert_ne!(first.weight.to_vec2::<f64>().unwrap(), before);
    let output = second.forward(&h).unwrap();
    let grads = second.local_loss(&h, &output).unwrap().backward().unwrap();
    assert!(grads.get(&first.weight).is_none() && grads.get(&second.weight).is_some());
    let losses: Vec<f64> = (0..5).map(|_| second.step(&h).unwrap().loss).collect();
    assert!(losses.windows(2).all(|w| w[1] < w[0]), "{losses:?}");
}

/// Product, ReLU, square: three times four numbers; the sum, and the view that makes it a scalar.
#[test]
fn what_is_held_is_counted_once() {
    let w = Var::from_tensor(&Tensor::ones((2, 2), DType::F32, &Device::Cpu).unwrap()).unwrap();
    let x = Tensor::ones((2, 2), DType::F32, &Device::Cpu).unwrap();
    let h = x.matmul(&w).unwrap().relu().unwrap();
    let loss = (&h * &h).unwrap().sum_all().unwrap();
    assert_eq!(held_bytes(&loss), 4 * (3 * 4 + 2));
    assert_eq!(held_bytes(&x), 0);
}
