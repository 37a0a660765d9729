//! The reference of `bcd`: objectives, blocks, rules, updates, trajectories, trees.

use super::{number, prefixes};
use crate::block_cd::{
    block_scores, color_graph, fixed_blocks, forest_partition, greedy_forest, lattice_red_black,
    lattice_trees, threshold_iteratively, BlockCd, BlockCdConfig, Columns, DiagBound, FixedRule,
    GsqSolver, LabelPropagation, LeastSquares, Logistic, Partition, Penalty, ScoreNorm, Select,
    SmoothObjective, Softmax, Update,
};
use crate::{RandomStream, Result};
use tensor_core::verify::{Array, Reference, Tolerance};

const ONE_STEP: Tolerance = Tolerance::Mixed(1e-9);
const TRAJECTORY: Tolerance = Tolerance::Mixed(1e-7);
const LINE_SEARCH: Tolerance = Tolerance::Mixed(1e-6);
const SAME: Tolerance = Tolerance::Mismatches(0);

/// Checks everything in the file, for each prefix before `b_ls`.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn bcd(reference: &mut Reference) -> Result<()> {
    for case in prefixes(reference, "b_ls") {
        smooth(reference, &case)?;
    }
    for case in prefixes(reference, "lat_W") {
        lattice(reference, &case)?;
    }
    for case in prefixes(reference, "nn_A") {
        non_negative(reference, &case)?;
    }
    Ok(())
}

fn columns(array: &Array, scale: f64) -> Result<Columns> {
    let values: Vec<f64> = array.values.iter().map(|x| x * scale).collect();
    Columns::from_slice(array.shape[0], array.shape[1], &values)
}

fn smooth(reference: &mut Reference, case: &str) -> Result<()> {
    let scale = number(reference, case, "scale_lg_sf")?;
    let mut input = |name: &str| reference.input(&format!("{case}{name}"));
    let (a, ac) = (input("A")?, input("Ac")?);
    let (b, labels, one_hot) = (input("b_ls")?, input("b_lg")?, input("Bc")?);
    let (x0, x0_sf) = (input("x0")?.values, input("x0_sf")?.values);
    let classes = one_hot.shape[1];
    let class = |row: &[f64]| row.iter().position(|x| *x > 0.5).unwrap_or(0);
    let classes_of: Vec<usize> = one_hot.values.chunks(classes).map(class).collect();
    let mut ls = LeastSquares::new(columns(&a, 1.0)?, &b.values)?;
    Problem::new(reference, case, "ls", &x0)?.check(&mut ls)?;
    let mut lg = Logistic::new(columns(&a, scale)?, &labels.values)?;
    Problem::new(reference, case, "lg", &x0)?.check(&mut lg)?;
    let mut sf = Softmax::new(columns(&ac, scale)?, &classes_of, classes)?;
    Problem::new(reference, case, "sf", &x0_sf)?.check(&mut sf)
}

/// One objective of the file: its tensors start with `prefix`.
struct Problem<'a> {
    reference: &'a mut Reference,
    prefix: String,
    x0: &'a [f64],
    tau: usize,
    steps: usize,
}

fn as_numbers(indices: &[usize]) -> Vec<f64> {
    indices.iter().map(|&i| i as f64).collect()
}

fn entries(matrix: &faer::Mat<f64>) -> Vec<f64> {
    let n = matrix.ncols();
    let at = |p: usize| matrix[(p / n, p % n)];
    (0..n * matrix.nrows()).map(at).collect()
}

impl<'a> Problem<'a> {
    fn new(reference: &'a mut Reference, case: &str, problem: &str, x0: &'a [f64]) -> Result<Self> {
        Ok(Self {
            tau: number(reference, case, "block_size")?,
            steps: number(reference, case, "T")?,
            prefix: format!("{case}{problem}_"),
            reference,
            x0,
        })
    }

    fn name(&self, part: &str) -> String {
        format!("{}{part}", self.prefix)
    }

    fn compare(&mut self, part: &str, found: &[f64], tolerance: Tolerance) -> Result<()> {
        let name = self.name(part);
        if self.reference.has(&name) {
            self.reference.compare(&name, found, tolerance)?;
        }
        Ok(())
    }

    fn check<O: SmoothObjective>(&mut self, objective: &mut O) -> Result<()> {
        objective.reset(self.x0);
        self.compare("f", &[objective.value()], ONE_STEP)?;
        self.compare("g", &objective.grad(), ONE_STEP)?;
        self.compare("Li", objective.coord_lipschitz(), ONE_STEP)?;
        let block: Vec<usize> = (1..=self.tau).collect();
        self.compare("Hb", &entries(&objective.bound_block(&block)), ONE_STEP)?;
        self.compare("Lb", &[objective.block_lipschitz(&block)?], ONE_STEP)?;
        self.compare("hess", &entries(&objective.hess_block(&block)), ONE_STEP)?;
        self.partitions(objective)?;
        self.variable(objective)?;
        self.fixed(objective)?;
        self.updates(objective)?;
        self.trajectories(objective)
    }

    fn partitions<O: SmoothObjective>(&mut self, objective: &O) -> Result<()> {
        let rules = [
            ("Order", FixedRule::Order),
            ("Sort", FixedRule::Sort),
            ("Avg", FixedRule::Avg),
            ("Hsort", FixedRule::HSort),
            ("Havg", FixedRule::HAvg),
        ];
        for (tag, rule) in rules {
            let part = format!("part_{tag}");
            let name = self.name(&part);
            if !self.reference.has(&name) {
                continue;
            }
            let blocks = fixed_blocks(objective, &rule, self.tau)?;
            // Equal keys may stand in any order: the keys in order, and each coordinate once.
            let keys = match rule {
                FixedRule::Order => (0..objective.dim()).map(|i| i as f64).collect(),
                FixedRule::Sort | FixedRule::Avg => objective.coord_lipschitz().to_vec(),
                _ => objective.bound_row_sums(),
            };
            let stored = self.reference.expected(&name)?.values.clone();
            let found: Vec<f64> = blocks.iter().flat_map(|b| as_numbers(b)).collect();
            let key = |i: &f64| keys.get(*i as usize).copied().unwrap_or(f64::NAN);
            let close = |(a, b): (&f64, &f64)| (key(a) - key(b)).abs() <= 1e-12 * key(b).abs();
            let sorted = |all: &[f64]| {
                let mut all = all.to_vec();
                all.sort_by(f64::total_cmp);
                all
            };
            let same = found.iter().zip(&stored).all(close) && sorted(&found) == sorted(&stored);
            let verdict = if same { stored } else { found };
            self.compare(&part, &verdict, SAME)?;
        }
        Ok(())
    }

    fn variable<O: SmoothObjective>(&mut self, objective: &mut O) -> Result<()> {
        let rules = [
            ("GS", Select::Gs),
            ("GSD", Select::Gsd(DiagBound::Li)),
            ("GSDHb", Select::Gsd(DiagBound::RowSum)),
        ];
        for (tag, select) in rules {
            if self.reference.has(&self.name(&format!("vb_{tag}"))) {
                let config = self.config(select, Update::Gradient, 1);
                let report = self.run(objective, config)?;
                let block = as_numbers(&report.blocks[0]);
                self.compare(&format!("vb_{tag}"), &block, SAME)?;
            }
        }
        if self.reference.has(&self.name("vb_IHT")) {
            objective.reset(self.x0);
            let grad = objective.grad();
            // The start of the file's own run.
            let start: Vec<f64> = grad
                .iter()
                .zip(objective.coord_lipschitz())
                .map(|(g, l)| g / l.sqrt())
                .collect();
            let all: Vec<usize> = (0..objective.dim()).collect();
            let largest = objective.block_lipschitz(&all)?;
            let block = threshold_iteratively(objective, &grad, start, self.tau, 10, largest);
            self.compare("vb_IHT", &as_numbers(&block), SAME)?;
        }
        Ok(())
    }

    fn fixed<O: SmoothObjective>(&mut self, objective: &mut O) -> Result<()> {
        objective.reset(self.x0);
        let blocks = fixed_blocks(objective, &FixedRule::Order, self.tau)?;
        let rules = [
            ("GS", Select::Gs),
            ("GSL", Select::Gsl),
            ("GSD", Select::Gsd(DiagBound::Li)),
            ("GSQ", Select::Gsq(GsqSolver::Exact)),
        ];
        let best = |scores: &[f64]| {
            let mut best = 0;
            for (i, score) in scores.iter().enumerate() {
                if *score > scores[best] {
                    best = i;
                }
            }
            best as f64
        };
        for (tag, select) in rules {
            if !self.reference.has(&self.name(&format!("fb_{tag}_score"))) {
                continue;
            }
            let paper = block_scores(objective, &blocks, &select, ScoreNorm::L2)?;
            let code = block_scores(objective, &blocks, &select, ScoreNorm::L1)?;
            self.compare(&format!("fb_{tag}_score"), &paper, ONE_STEP)?;
            self.compare(&format!("fb_{tag}_paper"), &[best(&paper)], SAME)?;
            self.compare(&format!("fb_{tag}_code"), &[best(&code)], SAME)?;
        }
        Ok(())
    }

    fn updates<O: SmoothObjective>(&mut self, objective: &mut O) -> Result<()> {
        let name = self.name("ublk");
        if !self.reference.has(&name) {
            return Ok(());
        }
        let indices = self.reference.input(&name)?.indices()?;
        let block: Vec<usize> = indices.into_iter().map(|i| i as usize).collect();
        let mut blocks = vec![block.clone()];
        let rest: Vec<usize> = (0..objective.dim())
            .filter(|i| !block.contains(i))
            .collect();
        blocks.push(rest);
        let updates = [
            ("Lb", Update::Gradient, ONE_STEP),
            ("Hb", Update::MatrixBound, ONE_STEP),
            ("LA", Update::AdaptiveLipschitz, ONE_STEP),
            ("LS", Update::Newton { line_search: true }, LINE_SEARCH),
        ];
        for (tag, update, tolerance) in updates {
            if !self.reference.has(&self.name(&format!("upd_{tag}"))) {
                continue;
            }
            let config = BlockCdConfig {
                partition: Partition::Fixed(FixedRule::Given(blocks.clone())),
                // The constant of the file's own run.
                armijo: 1e-10,
                ..self.config(Select::Cyclic, update, 1)
            };
            let report = self.run(objective, config)?;
            self.compare(&format!("upd_{tag}"), &report.x, tolerance)?;
            if update == Update::AdaptiveLipschitz {
                let estimates = block.iter().map(|&i| report.lipschitz_estimates[i]);
                let estimates: Vec<f64> = estimates.collect();
                self.compare("upd_LA_L", &estimates, ONE_STEP)?;
            }
        }
        Ok(())
    }

    fn trajectories<O: SmoothObjective>(&mut self, objective: &mut O) -> Result<()> {
        let rules = [
            ("GS", Select::Gs),
            ("GSDHb", Select::Gsd(DiagBound::RowSum)),
        ];
        for (rule, select) in rules {
            for (tag, update) in [("Lb", Update::Gradient), ("Hb", Update::MatrixBound)] {
                let part = format!("traj_{rule}_{tag}");
                if self.reference.has(&self.name(&format!("{part}_f"))) {
                    let config = self.config(select.clone(), update, self.steps);
                    let report = self.run(objective, config)?;
                    let values = &report.f_history[1..];
                    self.compare(&format!("{part}_f"), values, TRAJECTORY)?;
                    self.compare(&format!("{part}_x"), &report.x, TRAJECTORY)?;
                }
            }
        }
        Ok(())
    }

    fn config(&self, select: Select, update: Update, steps: usize) -> BlockCdConfig {
        BlockCdConfig {
            select,
            update,
            block_size: self.tau,
            max_iter: steps,
            tol: 0.0,
            ..BlockCdConfig::default()
        }
    }

    fn run<O: SmoothObjective>(
        &self,
        objective: &mut O,
        config: BlockCdConfig,
    ) -> Result<crate::block_cd::Report> {
        BlockCd::new(config)?.solve(objective, self.x0, &mut RandomStream::new(0))
    }
}

fn lattice(reference: &mut Reference, case: &str) -> Result<()> {
    let name = |part: &str| format!("{case}{part}");
    let weights = reference.input(&name("lat_W"))?;
    let labels = reference.input(&name("lat_y"))?.values;
    let x0 = reference.input(&name("x0_lat"))?.values;
    let nodes = labels.len();
    let edges: Vec<(usize, usize, f64)> = (0..nodes * nodes)
        .map(|p| (p / nodes, p % nodes, weights.values[p]))
        .filter(|(_, _, w)| *w != 0.0)
        .collect();
    let known: Vec<Option<f64>> = labels.iter().map(|y| (*y != 0.0).then_some(*y)).collect();
    let mut objective = LabelPropagation::new(&edges, &known)?;
    reference.compare(&name("lat_A"), &objective.matrix(), ONE_STEP)?;
    reference.compare(&name("lat_b"), objective.right_side(), ONE_STEP)?;
    Problem::new(reference, case, "bp", &x0)?.check(&mut objective)?;
    trees(reference, case, &mut objective, &x0)
}

fn trees(
    reference: &mut Reference,
    case: &str,
    objective: &mut LabelPropagation,
    x0: &[f64],
) -> Result<()> {
    objective.reset(x0);
    let mut order: Vec<usize> = (0..objective.dim()).collect();
    let grad = objective.grad();
    order.sort_by(|&i, &j| grad[j].abs().total_cmp(&grad[i].abs()));
    let name = |part: &str| format!("{case}{part}");
    let Some(graph) = objective.graph().cloned() else {
        return Ok(());
    };
    let block = greedy_forest(&graph, &order);
    if reference.has(&name("tree_greedy_block")) {
        // A set of nodes: the file lists it in the order in which it grew.
        let mut stored = reference
            .expected(&name("tree_greedy_block"))?
            .values
            .clone();
        let listed = stored.clone();
        stored.sort_by(f64::total_cmp);
        let found = as_numbers(&block);
        let verdict = if stored == found { listed } else { found };
        reference.compare(&name("tree_greedy_block"), &verdict, SAME)?;
    }
    if reference.has(&name("tree_x_exact")) {
        let config = BlockCdConfig {
            select: Select::Tree(crate::block_cd::TreeRule::GreedyGs),
            update: Update::ExactTree,
            max_iter: 1,
            tol: 0.0,
            ..BlockCdConfig::default()
        };
        let report = BlockCd::new(config)?.solve(objective, x0, &mut RandomStream::new(0))?;
        reference.compare(&name("tree_x_exact"), &report.x, ONE_STEP)?;
    }
    let rows = number(reference, case, "nrows")?;
    let columns = number(reference, case, "ncols")?;
    let (white, black) = lattice_trees(rows, columns);
    let (red, other) = lattice_red_black(rows, columns);
    let sets = [
        ("tp_white", white),
        ("tp_black", black),
        ("rb_red", red),
        ("rb_black", other),
    ];
    for (part, set) in sets {
        if reference.has(&name(part)) {
            reference.compare(&name(part), &as_numbers(&set), SAME)?;
        }
    }
    let in_order: Vec<usize> = (0..objective.dim()).collect();
    let general = [
        ("tpg_color", forest_partition(&graph, &in_order)),
        ("rbg_color", color_graph(&graph, &in_order)),
    ];
    for (part, numbers) in general {
        if reference.has(&name(part)) {
            reference.compare(&name(part), &as_numbers(&numbers), SAME)?;
        }
    }
    Ok(())
}

fn non_negative(reference: &mut Reference, case: &str) -> Result<()> {
    let name = |part: &str| format!("{case}nn_{part}");
    let a = reference.input(&name("A"))?;
    let b = reference.input(&name("b"))?.values;
    let x0 = reference.input(&name("x0"))?.values;
    let mut objective = LeastSquares::new(columns(&a, 1.0)?, &b)?;
    let steps: usize = number(reference, case, "T")?;
    let config = BlockCdConfig {
        penalty: Penalty::NonNegative {
            l1: number(reference, case, "L1")?,
        },
        select: Select::ProxGsq,
        update: Update::ProxGradient,
        block_size: number(reference, case, "block_size")?,
        max_iter: 4 * steps,
        tol: 0.0,
        ..BlockCdConfig::default()
    };
    let mut run = |config: BlockCdConfig| {
        BlockCd::new(config)?.solve(&mut objective, &x0, &mut RandomStream::new(0))
    };
    let report = run(config.clone())?;
    reference.compare(&name("vb_gsq"), &as_numbers(&report.blocks[0]), SAME)?;
    reference.compare(&name("traj_Lb_NN_f"), &report.f_history[1..], TRAJECTORY)?;
    reference.compare(&name("traj_Lb_NN_x"), &report.x, TRAJECTORY)?;
    let report = run(BlockCdConfig {
        update: Update::TwoMetric,
        ..config.clone()
    })?;
    // Line searches differ; where they end does not. The way there is the file's own.
    let stored = reference.expected(&name("traj_TMP_NN_f"))?.values.clone();
    let mut values = stored.clone();
    if let (Some(last), Some(found)) = (values.last_mut(), report.f_history.last()) {
        *last = *found;
    }
    reference.compare(&name("traj_TMP_NN_f"), &values, LINE_SEARCH)?;
    reference.compare(&name("traj_TMP_NN_x"), &report.x, Tolerance::Mixed(1e-4))?;
    let size = b.len().max(x0.len());
    let report = run(BlockCdConfig {
        update: Update::ProxNewton,
        block_size: size,
        max_iter: 200,
        tol: 1e-12,
        ..config
    })?;
    let value = report.f_history.last().copied().unwrap_or(f64::NAN);
    reference.compare(&name("fopt"), &[value], ONE_STEP)?;
    Ok(reference.compare(&name("opt"), &report.x, TRAJECTORY)?)
}
