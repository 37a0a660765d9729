//! The reference of `op-gfn`: losses and gradients of tabular policies on given trajectories of a
//! grid.

use crate::gflownet::loss::{self, SubTrajectoryWeights};
use crate::gflownet::order::{compare_pairs, pair_order_loss, set_order_loss};
use crate::gflownet::pareto::{hypervolume, pareto_mask};
use crate::gflownet::{EdgeFlows, Evaluated, Heads, HyperGrid, PolicyNet, Tabular, Trajectories};
use crate::Result;
use candle_core::{DType, Device, Tensor, Var};
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-10);

/// Tables with a row a state, in the file's order, and the rows in ours.
struct Tables {
    forward: Var,
    backward: Var,
    flow: Var,
    log_z: Var,
    rows: Tensor,
}

impl PolicyNet for Tables {
    fn heads(&self, features: &Tensor) -> Result<Heads> {
        let table = |var: &Var| -> Result<Tensor> {
            Ok(features.matmul(&var.as_tensor().index_select(&self.rows, 0)?)?)
        };
        let flow = self
            .flow
            .as_tensor()
            .unsqueeze(1)?
            .index_select(&self.rows, 0)?;
        Ok(Heads {
            forward: table(&self.forward)?,
            backward: Some(table(&self.backward)?),
            log_flow: Some(features.matmul(&flow)?.squeeze(1)?),
        })
    }

    fn log_z(&self) -> Option<&Tensor> {
        Some(self.log_z.as_tensor())
    }

    fn place(&self) -> (DType, Device) {
        (DType::F64, Device::Cpu)
    }
}

/// Checks every case of the file (a prefix before `actions`).
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn op_gfn(reference: &mut Reference) -> Result<()> {
    for prefix in reference.cases("actions") {
        case(reference, &prefix)?;
    }
    Ok(())
}

fn case(reference: &mut Reference, prefix: &str) -> Result<()> {
    let name = |part: &str| format!("{prefix}{part}");
    let mut grid = HyperGrid::new(reference.number("D")?, reference.number("H")?)?;
    grid.r0 = reference.number("R0")?;
    grid.r1 = reference.number("R1")?;
    grid.r2 = reference.number("R2")?;
    let tabular = Tabular::new(grid.clone(), 1 << 24)?;
    let states = tabular.enumeration().states();
    let rows: Vec<u32> = states.iter().map(|s| grid.index(s) as u32).collect();
    let rows = Tensor::from_vec(rows, states.len(), &Device::Cpu)?;
    let trajectories = trajectories(reference, &grid, &name("actions"))?;
    let var = |reference: &mut Reference, part: &str| -> Result<Var> {
        Ok(Var::from_tensor(
            &reference.input(&name(part))?.tensor(DType::F64)?,
        )?)
    };
    let mut tables = Tables {
        forward: var(reference, "logits_pf")?,
        backward: var(reference, "logits_pb")?,
        flow: var(reference, "log_flow")?,
        log_z: var(reference, "log_z")?,
        rows,
    };
    let e = Evaluated::new(&tabular, &tables, &trajectories)?;
    let log_reward = objects(reference, prefix, &grid, &trajectories)?;
    let perm = reference.input(&name("perm"))?.indices()?;
    let orders = compare_pairs(&log_reward.to_vec1::<f64>()?, &perm);
    reference.compare_tensor(&name("sum_log_pf"), &e.sum_log_pf()?, TOLERANCE)?;
    reference.compare_tensor(&name("sum_log_pb"), &e.sum_log_pb()?, TOLERANCE)?;
    let l = loss::trajectory_log_reward(&e)?;
    reference.compare_tensor(&name("pred_log_reward"), &l, TOLERANCE)?;
    let l_flow = loss::flow_log_reward(&e)?;
    reference.compare_tensor(&name("pred_log_reward_db"), &l_flow, TOLERANCE)?;

    let lambda = SubTrajectoryWeights::Lambda(reference.number("subtb_lambda")?);
    let tb = loss::trajectory_balance(&e, &log_reward)?;
    let sub = loss::sub_trajectory_balance(&e, Some(&log_reward), lambda)?;
    let order = pair_order_loss(&l, &perm, &orders, None)?;
    let losses = [
        ("loss_db", loss::detailed_balance(&e, Some(&log_reward))?),
        ("loss_db_nonterminal", loss::detailed_balance(&e, None)?),
        (
            "loss_op_db",
            pair_order_loss(&l_flow, &perm, &orders, None)?,
        ),
    ];
    for (part, loss) in losses {
        reference.compare_tensor(&name(part), &loss, TOLERANCE)?;
    }
    let pareto = pareto(reference, prefix, &l)?;
    for (part, loss) in [
        ("tb", tb),
        ("subtb", sub),
        ("op_tb", order),
        ("op_pareto", pareto),
    ] {
        reference.compare_tensor(&name(&format!("loss_{part}")), &loss, TOLERANCE)?;
        gradients(reference, &name(&format!("grad_{part}")), &loss, &tables)?;
    }

    tables.forward = var(reference, "edge_log_flow")?;
    let e = Evaluated::new(&tabular, &tables, &trajectories)?;
    let flows = EdgeFlows::new(&tabular, &tables, &trajectories, &e)?;
    let losses = [
        ("loss_fm", loss::flow_matching(&flows)?),
        (
            "loss_fm_reward",
            loss::flow_matching_reward(&flows, &log_reward)?,
        ),
        (
            "loss_op_fm",
            pair_order_loss(&flows.stop, &perm, &orders, None)?,
        ),
    ];
    for (part, loss) in losses {
        reference.compare_tensor(&name(part), &loss, TOLERANCE)?;
    }
    Ok(())
}

/// Rows of actions, padded by -1, stop at the end of each.
fn trajectories(
    reference: &mut Reference,
    grid: &HyperGrid,
    name: &str,
) -> Result<Trajectories<Vec<u16>>> {
    let table = reference.input(name)?;
    let width = table.shape.last().copied().unwrap_or(1).max(1);
    let list = |row: &[f64]| -> Vec<u32> {
        let taken = row.iter().filter(|a| **a >= 0.0 && **a < grid.ndim as f64);
        taken.map(|a| *a as u32).collect()
    };
    let lists: Vec<Vec<u32>> = table.values.chunks(width).map(list).collect();
    Trajectories::from_actions(grid, &lists)
}

/// Compares the objects and their rewards.
fn objects(
    reference: &mut Reference,
    prefix: &str,
    grid: &HyperGrid,
    trajectories: &Trajectories<Vec<u16>>,
) -> Result<Tensor> {
    let objects = trajectories.objects();
    let index: Vec<f64> = objects.iter().map(|x| grid.index(x) as f64).collect();
    reference.compare(
        &format!("{prefix}terminal"),
        &index,
        Tolerance::Mismatches(0),
    )?;
    let rewards: Vec<f64> = objects.iter().map(|x| grid.reward(x).ln()).collect();
    reference.compare(&format!("{prefix}log_reward"), &rewards, TOLERANCE)?;
    Ok(Tensor::from_vec(rewards, objects.len(), &Device::Cpu)?)
}

fn pareto(reference: &mut Reference, prefix: &str, l: &Tensor) -> Result<Tensor> {
    let table = reference.input(&format!("{prefix}objectives"))?;
    let width = table.shape.last().copied().unwrap_or(1).max(1);
    let points: Vec<Vec<f64>> = table.values.chunks(width).map(<[f64]>::to_vec).collect();
    let mask = pareto_mask(&points);
    let found: Vec<f64> = mask.iter().map(|m| f64::from(u8::from(*m))).collect();
    reference.compare(
        &format!("{prefix}is_pareto"),
        &found,
        Tolerance::Mismatches(0),
    )?;
    let volume = format!("{prefix}hypervolume_ref0");
    if reference.has(&volume) {
        let found = hypervolume(&points, &vec![0.0; width])?;
        reference.compare(&volume, &[found], TOLERANCE)?;
    }
    set_order_loss(l, &mask)
}

/// Gradients of all tables; zeros where a loss does not reach one.
fn gradients(reference: &mut Reference, name: &str, loss: &Tensor, tables: &Tables) -> Result<()> {
    let grads = loss.backward()?;
    let parts = [
        ("pf", &tables.forward),
        ("pb", &tables.backward),
        ("flow", &tables.flow),
        ("z", &tables.log_z),
    ];
    for (part, var) in parts {
        let grad = match grads.get(var) {
            Some(grad) => grad.clone(),
            None => var.zeros_like()?,
        };
        reference.compare_tensor(&format!("{name}_{part}"), &grad, TOLERANCE)?;
    }
    Ok(())
}
