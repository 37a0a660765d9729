use crate::support::*;
use candle_core::DType;
use optim::gradients::finite_or_zero;
use optim::Gradients;

#[test]
fn absent_gradients_stay_absent() {
    let params = named_params(1, DType::F64);
    let mut store = gradients(&params, 1, 0);
    store.remove(&params[1].1);
    let set = Gradients::collect(&params, &store);
    assert_eq!(set.len(), 4);
    assert!(set.get(1).is_none() && set.materialized(1).unwrap().is_none());
    let out = set.to_store().unwrap();
    assert!(out.get(&params[1].1).is_none());
    let moments = set.moments().unwrap();
    assert_eq!(moments[1].gg, 0.0);
    assert!(moments[0].gg > 0.0 && moments[0].pp > 0.0);
    assert!(set.find(0, &params[2].1).is_some());
}

#[test]
fn sums_over_finite_entries() {
    let w = var(&[1.0, 2.0, 3.0]);
    let params = [("w".to_string(), w.clone())];
    let grads = store(&w, &tensor(&[2.0, f64::NAN, f64::NEG_INFINITY]));
    let mut set = Gradients::collect(&params, &grads);
    set.scale(0, 0.5);
    let finite = set.finite_moments().unwrap()[0];
    assert_eq!((finite.gg, finite.pg, finite.nonfinite), (1.0, 1.0, 2));
    assert_eq!(finite.pp, 14.0);
    assert_eq!(set.finite_squares().unwrap()[0].gg, 1.0);
    assert_eq!(set.nonfinite().unwrap(), [("w", 2)]);
    let cleaned = finite_or_zero(&tensor(&[1.0, f64::NAN, f64::INFINITY])).unwrap();
    assert_eq!(values(&cleaned), [1.0, 0.0, 0.0]);
}
