//! Constant folding, removal of dead statements, canonical hashes.

use super::check::{fold, result_type, Signature, Ty};
use super::interpret::CompiledProgram;
use super::ops::Op;
use super::program::{Arg, Program, Stmt};
use crate::{RandomStream, Result};

/// Folds and forwards constants and removes statements that no output needs, now or in a later step.
/// A carried output that no later step reads before it is overwritten is dead; another tree is then
/// returned in its place: the name's earlier value where that is one. What the live outputs compute
/// does not change.
pub fn simplify(program: &Program, signature: &Signature) -> Program {
    let mut out = program.clone();
    fold_constants(&mut out);
    let live = live_at_the_end(&out, signature);
    remove_dead(&mut out, &live);
    replace_dead_outputs(&mut out, &live, signature);
    out.tidy();
    out
}

fn fold_constants(program: &mut Program) {
    // What a name is known to stand for.
    let mut known: Vec<Option<f64>> = vec![None; program.names.len()];
    for stmt in &mut program.body {
        for arg in &mut stmt.args {
            if let Arg::Var(id) = arg {
                if let Some(x) = known[*id] {
                    *arg = Arg::Const(x);
                }
            }
        }
        let constant = |arg: &Arg| match arg {
            Arg::Const(x) => Some(*x),
            Arg::Var(_) => None,
        };
        let values: Vec<Option<f64>> = stmt.args.iter().map(constant).collect();
        let value = fold(stmt.op, &values).filter(|x| x.is_finite());
        if let Some(x) = value {
            (stmt.op, stmt.args) = (Op::Copy, vec![Arg::Const(x)]);
        }
        known[stmt.dst] = value;
    }
}

/// The names whose values at the end matter: the outputs that are not carried, and the carried ones
/// that a later step reads.
fn live_at_the_end(program: &Program, signature: &Signature) -> Vec<bool> {
    let feeds = signature.feeds();
    let carried = |output: usize| feeds.iter().any(|(_, o)| *o == output);
    let mut live = vec![false; program.names.len()];
    for (i, id) in program.outputs.iter().enumerate() {
        live[*id] |= !carried(i);
    }
    loop {
        let at_top = live_before(program, live.clone());
        let mut grown = false;
        for (input, output) in &feeds {
            let id = program.outputs[*output];
            if at_top[*input] && !live[id] {
                live[id] = true;
                grown = true;
            }
        }
        if !grown {
            return live;
        }
    }
}

/// Liveness at the top from liveness at the end.
fn live_before(program: &Program, mut live: Vec<bool>) -> Vec<bool> {
    for stmt in program.body.iter().rev() {
        if std::mem::take(&mut live[stmt.dst]) {
            mark(&mut live, stmt);
        }
    }
    live
}

fn mark(live: &mut [bool], stmt: &Stmt) {
    for arg in &stmt.args {
        if let Arg::Var(id) = arg {
            live[*id] = true;
        }
    }
}

fn remove_dead(program: &mut Program, at_end: &[bool]) {
    let mut live = at_end.to_vec();
    let mut kept = Vec::with_capacity(program.body.len());
    for stmt in program.body.drain(..).rev() {
        if std::mem::take(&mut live[stmt.dst]) {
            mark(&mut live, &stmt);
            kept.push(stmt);
        }
    }
    kept.reverse();
    program.body = kept;
}

/// A dead output's name may now be set by nobody, or hold a scalar.
fn replace_dead_outputs(program: &mut Program, live: &[bool], signature: &Signature) {
    let types = types_at_the_end(program, signature);
    let is_tree = |id: usize| types[id] == Some(Ty::Tree);
    let feeds = signature.feeds();
    for (i, id) in program.outputs.clone().into_iter().enumerate() {
        if is_tree(id) {
            continue;
        }
        let own = feeds.iter().find(|(_, output)| *output == i);
        let own = own.map(|(input, _)| *input).filter(|id| is_tree(*id));
        // Live outputs keep their types, so there is a tree unless nothing lives.
        let other = program.outputs.iter().copied().find(|id| live[*id]);
        program.outputs[i] = own.or(other).unwrap_or(id);
    }
}

fn types_at_the_end(program: &Program, signature: &Signature) -> Vec<Option<Ty>> {
    let mut types = vec![None; program.names.len()];
    for (slot, (_, ty)) in types.iter_mut().zip(&signature.inputs) {
        *slot = Some(*ty);
    }
    for stmt in &program.body {
        let ty = |arg: &Arg| match arg {
            Arg::Const(_) => Ty::Scalar,
            Arg::Var(id) => types[*id].unwrap_or(Ty::Scalar),
        };
        let of: Vec<Ty> = stmt.args.iter().map(ty).collect();
        types[stmt.dst] = Some(result_type(stmt.op, &of));
    }
    types
}

/// How programs are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HashMode {
    /// Constants by 9 significant digits, arguments of `+`, `*`, `max` and `min` in any order, live
    /// outputs only.
    #[default]
    Exact,
    /// As `Exact`, with constants by 3 digits: the key of a search's cache.
    Search,
    /// As the official code: the order of arguments counts, and all outputs.
    Official,
}

/// A hash that does not depend on names, on the order of independent statements or on dead code.
pub fn hash(program: &Program, signature: &Signature, mode: HashMode) -> u128 {
    let digits = match mode {
        HashMode::Search => 3,
        _ => 9,
    };
    let live = live_at_the_end(program, signature);
    let mut names: Vec<u128> = (0..program.names.len())
        .map(|id| digest(&[1, id as u128]))
        .collect();
    for stmt in &program.body {
        let value = |arg: &Arg| match arg {
            Arg::Var(id) => names[*id],
            Arg::Const(x) => text(&format!("{x:.*e}", digits - 1)),
        };
        let mut args: Vec<u128> = stmt.args.iter().map(value).collect();
        if stmt.op.is_commutative() && mode != HashMode::Official {
            args.sort_unstable();
        }
        names[stmt.dst] = match stmt.op {
            Op::Copy => args[0],
            op => {
                args.insert(0, text(op.name()));
                digest(&args)
            }
        };
    }
    let counts = |id: &usize| mode == HashMode::Official || live[*id];
    let one = |id: &usize| if counts(id) { names[*id] } else { 0 };
    digest(&program.outputs.iter().map(one).collect::<Vec<_>>())
}

/// FNV-1a with 128 bits: the same everywhere, so that it can be stored.
fn bytes(hash: u128, bytes: &[u8]) -> u128 {
    let step = |hash: u128, byte: &u8| {
        (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    };
    bytes.iter().fold(hash, step)
}

const START: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;

fn text(text: &str) -> u128 {
    bytes(START, text.as_bytes())
}

fn digest(parts: &[u128]) -> u128 {
    let add = |hash, part: &u128| bytes(hash, &part.to_le_bytes());
    parts.iter().fold(START, add)
}

/// A hash of what the program computes: the live outputs of three steps on two fixed random inputs,
/// rounded to six digits. Finds duplicates that [`hash`](fn@hash) does not, such as `x * 1`.
///
/// # Errors
/// Those of [`CompiledProgram::new`].
pub fn fingerprint(program: &Program, signature: &Signature) -> Result<u128> {
    const SIZES: [usize; 2] = [5, 3];
    let compiled = CompiledProgram::new(program, signature)?;
    let at_end = live_at_the_end(program, signature);
    let live = |i: &usize| at_end[program.outputs[*i]];
    let live: Vec<usize> = (0..program.outputs.len()).filter(live).collect();
    let trees: Vec<usize> = (0..signature.inputs.len())
        .filter(|i| signature.inputs[*i].1 == Ty::Tree)
        .collect();
    let scalars = signature.inputs.len() - trees.len();
    let mut parts = Vec::new();
    for seed in 0..2 {
        let mut rng = RandomStream::new(seed).split("fingerprint");
        let mut carried = vec![vec![0.0; SIZES.iter().sum()]; signature.outputs.len()];
        for step in 0..3 {
            let input = |i: &usize| match signature.feeds().iter().find(|(input, _)| input == i) {
                Some((_, output)) => carried[*output].clone(),
                None => (0..SIZES.iter().sum()).map(|_| rng.next_normal()).collect(),
            };
            let inputs: Vec<Vec<f64>> = trees.iter().map(input).collect();
            let inputs: Vec<&[f64]> = inputs.iter().map(Vec::as_slice).collect();
            let schedule = vec![1.0 / f64::from(step + 1); scalars];
            carried = compiled.evaluate(&inputs, &schedule, &SIZES)?;
            // Both zeros are the same number.
            let rounded = |x: &f64| text(&format!("{:.5e}", x + 0.0));
            parts.extend(live.iter().flat_map(|i| &carried[*i]).map(rounded));
        }
    }
    Ok(digest(&parts))
}
