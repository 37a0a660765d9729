use crate::support::*;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::Conv2dConfig;
use optim::diagnostics::gradsign::*;
use optim::{Error, RandomStream};
use proptest::prelude::*;

#[test]
fn reference() {
    let report = FILES.verify("gradsign", optim::verify::gradsign);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 4 + 4 + 2);
}

/// A perceptron with tape layers, data and half squared error.
struct Net {
    tape: SignTape,
    layers: Vec<SignLinear>,
    params: Vec<(String, Var)>,
    x: Tensor,
    y: Tensor,
}

impl Net {
    fn new(seed: u64, widths: &[usize], n: usize) -> Self {
        let mut rng = RandomStream::new(seed);
        let tape = SignTape::new();
        let (mut layers, mut params) = (Vec::new(), Vec::new());
        for (i, pair) in widths.windows(2).enumerate() {
            let w = normal_var(&mut rng, &[pair[1], pair[0]], DType::F64);
            let b = normal_var(&mut rng, &[pair[1]], DType::F64);
            layers.push(tape.linear(&w, Some(b.as_tensor())).unwrap());
            params.push((format!("{i}.w"), w));
            params.push((format!("{i}.b"), b));
        }
        let last = *widths.last().unwrap();
        Self {
            tape,
            layers,
            params,
            x: normal(&mut rng, &[n, widths[0]], DType::F64),
            y: normal(&mut rng, &[n, last], DType::F64),
        }
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut h = x.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            h = layer.forward(&h)?;
            if i + 1 < self.layers.len() {
                h = h.relu()?;
            }
        }
        Ok(h)
    }

    fn report(&self, method: Method, x: &Tensor, y: &Tensor, scale: f64) -> GradSignReport {
        let config = GradSignConfig {
            method,
            tape: Some(self.tape.clone()),
            ..GradSignConfig::default()
        };
        let loss = |out: &Tensor, y: &Tensor| (out - y)?.sqr()?.mean_all()? * scale;
        gradsign(
            |x: &Tensor| self.forward(x),
            &self.params,
            x,
            y,
            loss,
            &config,
        )
        .unwrap()
    }

    fn score(&self, method: Method) -> f64 {
        self.report(method, &self.x, &self.y, 1.0).score
    }
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn both_methods_and_all_symmetries(seed in 0u64..10_000, hidden in 1usize..8, n in 1usize..9) {
        let net = Net::new(seed, &[4, hidden, 3], n);
        let tau = net.score(Method::PerExample);
        prop_assert_eq!(net.score(Method::Factored), tau);
        prop_assert_eq!(net.score(Method::Auto), tau);
        let order = RandomStream::new(seed).permutation(n).unwrap();
        let order = Tensor::new(order, &Device::Cpu).unwrap();
        let (x, y) = (net.x.index_select(&order, 0).unwrap(), net.y.index_select(&order, 0).unwrap());
        prop_assert_eq!(net.report(Method::Factored, &x, &y, 1.0).score, tau);
        prop_assert_eq!(net.report(Method::Factored, &net.x, &net.y, 37.5).score, tau);
        let twice = |t: &Tensor| Tensor::cat(&[t, t], 0).unwrap();
        let double = net.report(Method::PerExample, &twice(&net.x), &twice(&net.y), 1.0);
        prop_assert_eq!(double.score, 2.0 * tau);
        let report = net.report(Method::Factored, &net.x, &net.y, 1.0);
        prop_assert_eq!(report.params, 4 * hidden + 3 * hidden);
        prop_assert_eq!(report.multiplications, Some((7 * hidden) as u64));
        prop_assert!((0.0..=1.0).contains(&report.agreement));
        let parts: f64 = report.per_tensor.iter().map(|p| p.1).sum();
        prop_assert_eq!(parts, tau);
        // Hidden units in another order.
        let order = RandomStream::new(seed).permutation(hidden).unwrap();
        let order = Tensor::new(order, &Device::Cpu).unwrap();
        for (i, dim) in [(0, 0), (1, 0), (2, 1)] {
            let var = &net.params[i].1;
            var.set(&var.index_select(&order, dim).unwrap()).unwrap();
        }
        prop_assert_eq!(net.score(Method::Factored), tau);
    }
}

#[test]
fn one_example_counts_its_nonzero_entries_and_opposites_cancel() {
    let w = var(&[1.0, 2.0, 3.0]).reshape((1, 3)).unwrap();
    let w = Var::from_tensor(&w).unwrap();
    let params = vec![("w".to_string(), w.clone())];
    let model = |x: &Tensor| x.matmul(&w.t()?);
    let loss = |out: &Tensor, y: &Tensor| (out * y)?.mean_all();
    let config = GradSignConfig::default();
    let row = |values: [f64; 3]| tensor(&values).reshape((1, 3)).unwrap();
    let one = Tensor::ones((1, 1), DType::F64, &Device::Cpu).unwrap();
    let x = row([1.0, 0.0, -2.0]);
    let report = gradsign(model, &params, &x, &one, loss, &config).unwrap();
    assert_eq!(report.score, 2.0);
    let both = Tensor::cat(&[&x, &x.neg().unwrap()], 0).unwrap();
    let ones = Tensor::ones((2, 1), DType::F64, &Device::Cpu).unwrap();
    let report = gradsign(model, &params, &both, &ones, loss, &config).unwrap();
    assert_eq!(report.score, 0.0);
    let bad = row([1.0, f64::NAN, 1.0]);
    let report = gradsign(model, &params, &bad, &one, loss, &config).unwrap();
    assert_eq!((report.score, report.nan_params), (2.0, 1));
    let strict = GradSignConfig {
        skip_nan: false,
        ..config.clone()
    };
    let error = gradsign(model, &params, &bad, &one, loss, &strict).unwrap_err();
    assert!(matches!(error, Error::NonFiniteGradient(_)), "{error}");
    let error = gradsign(model, &params, &both, &one, loss, &config).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }));
    let only_bias = vec![("b".to_string(), var(&[1.0]))];
    assert!(gradsign(model, &only_bias, &x, &one, loss, &config).is_err());
    let factored = GradSignConfig {
        method: Method::Factored,
        ..config.clone()
    };
    assert!(gradsign(model, &params, &x, &one, loss, &factored).is_err());
    let uncovered = GradSignConfig {
        tape: Some(SignTape::new()),
        ..factored
    };
    let error = gradsign(model, &params, &x, &one, loss, &uncovered).unwrap_err();
    assert!(error.to_string().contains("`w`"), "{error}");
}

/// Strides, dilation, a weight that is used twice, sequences, NaN: against one example at a time.
#[test]
fn the_factored_form_of_everything_else() {
    let mut rng = RandomStream::new(3);
    let tape = SignTape::new();
    let conv = Conv2dConfig {
        padding: 2,
        stride: 2,
        dilation: 2,
        ..Conv2dConfig::default()
    };
    let kernel = normal_var(&mut rng, &[4, 2, 3, 3], DType::F64);
    let shared = normal_var(&mut rng, &[4, 4], DType::F64);
    let first = tape.conv2d(&kernel, None, conv).unwrap();
    let token = tape.linear(&shared, None).unwrap();
    let params = vec![
        ("kernel".to_string(), kernel),
        ("shared".to_string(), shared),
    ];
    let x = normal(&mut rng, &[5, 2, 7, 7], DType::F64);
    let y = normal(&mut rng, &[5, 4], DType::F64);
    let model = |x: &Tensor| {
        let h = first.forward(x)?.tanh()?;
        let tokens = h.flatten_from(2)?.transpose(1, 2)?;
        token.forward(&token.forward(&tokens)?.relu()?)?.mean(1)
    };
    let loss = |out: &Tensor, y: &Tensor| (out - y)?.sqr()?.sum_all();
    let with = |method, x: &Tensor| {
        let config = GradSignConfig {
            method,
            chunk: Some(2),
            tape: Some(tape.clone()),
            ..GradSignConfig::default()
        };
        gradsign(model, &params, x, &y, loss, &config).unwrap()
    };
    let (slow, fast) = (with(Method::PerExample, &x), with(Method::Factored, &x));
    assert_eq!(slow.per_tensor, fast.per_tensor);
    // 4 x 18 weights at 4 x 4 places, 16 at 16 places twice.
    assert_eq!(fast.multiplications, Some(72 * 16 + 2 * 16 * 16));
    let grouped = Conv2dConfig {
        groups: 2,
        ..Conv2dConfig::default()
    };
    assert!(tape.conv2d(&params[0].1, None, grouped).is_err());
    assert!(token.sign_sums(&Default::default()).is_err());
}

#[test]
fn companions() {
    let w = var(&[3.0, -4.0]);
    let params = vec![("w".to_string(), w.clone())];
    let loss = w.sum_all().unwrap();
    assert!((grad_norm(&loss, &params).unwrap() - 2f64.sqrt()).abs() < 1e-12);
    // Gradients (1, 0) and (0, 1): 45 degrees from their mean.
    let angle = grad_angle(|i| w.narrow(0, i, 1)?.sum_all(), 2, &params).unwrap();
    assert!((angle - 0.5f64.sqrt()).abs() < 1e-12);
    assert!(grad_angle(|_| w.sum_all(), 0, &params).is_err());
    let before = bits(&w);
    let flow = synflow(|x: &Tensor| (x * w.as_tensor())?.sum_all(), &params, &[2]).unwrap();
    assert_eq!((flow, bits(&w)), (7.0, before));
}

#[test]
fn rank_correlations() {
    let a = [1.0, 2.0, 3.0, 4.0];
    assert!((spearman(&a, &[10.0, 20.0, 30.0, 40.0]).unwrap() - 1.0).abs() < 1e-12);
    assert!((spearman(&a, &[4.0, 3.0, 2.0, 1.0]).unwrap() + 1.0).abs() < 1e-12);
    // Ties: ranks 0, 1.5, 1.5, 3.
    let tied = spearman(&a, &[1.0, 2.0, 2.0, 3.0]).unwrap();
    assert!((tied - 0.948_683_298_050_513_8).abs() < 1e-12, "{tied}");
    let tau = kendall_tau_b(&a, &[1.0, 2.0, 2.0, 3.0]).unwrap();
    assert!((tau - 5.0 / 30f64.sqrt()).abs() < 1e-12, "{tau}");
    assert!(spearman(&a, &[1.0; 4]).is_err());
    assert!(spearman(&a, &[1.0, f64::NAN, 2.0, 3.0]).is_err());
    assert!(kendall_tau_b(&a, &[1.0]).is_err());
    assert!(kendall_tau_b(&[1.0], &[1.0]).is_err());
}

#[test]
fn architectures_in_order() {
    let net = Net::new(1, &[3, 2], 4);
    let make = |hidden: usize| -> Factory<'static> {
        Box::new(move |seed| {
            let net = std::rc::Rc::new(Net::new(seed, &[3, hidden, 2], 1));
            let inner = net.clone();
            Ok(Candidate {
                params: net.params.clone(),
                forward: Box::new(move |x: &Tensor| inner.forward(x)),
                tape: Some(net.tape.clone()),
            })
        })
    };
    let factories = [make(2), make(9), make(4)];
    let loss = |out: &Tensor, y: &Tensor| (out - y)?.sqr()?.mean_all();
    let rank = |score| {
        let data = (&net.x, &net.y);
        rank_architectures(&factories, data, &loss, score, &[0, 1]).unwrap()
    };
    let ranking = rank(ProxyScore::Parameters);
    assert_eq!(ranking.order, [1, 2, 0]);
    assert_eq!(ranking.parameters, [14, 56, 26]);
    assert_eq!(rank(ProxyScore::GradSign).order[0], 1);
    for score in [
        ProxyScore::GradNorm,
        ProxyScore::GradAngle,
        ProxyScore::SynFlow,
    ] {
        assert!(rank(score).scores.iter().all(|s| s.is_finite()));
    }
    let data = (&net.x, &net.y);
    assert!(rank_architectures(&factories, data, &loss, ProxyScore::GradNorm, &[]).is_err());
}
