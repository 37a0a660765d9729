//! GFlowNets: reference numbers, and what the parts share.

mod environments;
mod laws;
mod order;
mod pareto;
mod training;

use crate::support::*;
use candle_core::{DType, Device, Var};
use nn::init::SeededVars;
use optim::{AdamW, AdamWConfig, ParamGroup};
use sequence_design::gflownet::{Environment, Policy, PolicyConfig};
use sequence_design::RandomStream;

#[test]
fn reference() {
    let report = FILES.verify("op-gfn", sequence_design::verify::op_gfn);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 34);
}

#[test]
fn reference_with_another_prefix_and_fewer_trajectories() {
    let report = FILES.verify_variant(
        "op-gfn",
        |tensors, _| {
            let renamed = tensors
                .iter()
                .map(|(n, t)| (format!("other.{n}"), t.clone()));
            *tensors = renamed.collect();
        },
        sequence_design::verify::op_gfn,
    );
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 34);
}

struct Trained {
    vars: SeededVars,
    policy: Policy,
}

fn policy<E: Environment>(env: &E, seed: u64, config: &PolicyConfig, dtype: DType) -> Trained {
    let vars = SeededVars::new(&RandomStream::new(seed));
    let vb = vars.builder(dtype, &Device::Cpu);
    let policy = Policy::new(env.feature_width(), env.actions(), config, vb).unwrap();
    Trained { vars, policy }
}

fn adam(vars: &SeededVars, lr: f64, lr_z: f64) -> AdamW {
    let (z, net) = vars
        .trainable()
        .into_iter()
        .partition(|(n, _)| n == "log_z");
    let group = |vars: Vec<(String, Var)>, lr| ParamGroup::named(vars, AdamWConfig::adam(lr));
    AdamW::with_groups(vec![group(net, lr), group(z, lr_z)]).unwrap()
}
