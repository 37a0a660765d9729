//! Abstract execution: types, dependence and certain failures, without touching a tensor.

use super::ops::Op;
use super::program::{Arg, Program};
use crate::{Error, Result};
use std::collections::BTreeSet;

/// The type of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ty {
    /// One number.
    Scalar,
    /// One tensor for each parameter.
    Tree,
}

/// Which operations a program may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpSet(BTreeSet<Op>);

impl OpSet {
    /// All operations.
    pub fn all() -> Self {
        Self(Op::all().collect())
    }

    /// These operations.
    pub fn of(ops: impl IntoIterator<Item = Op>) -> Self {
        Self(ops.into_iter().collect())
    }

    /// Without these.
    #[must_use]
    pub fn without(mut self, ops: &[Op]) -> Self {
        ops.iter().for_each(|op| {
            self.0.remove(op);
        });
        self
    }

    /// Whether an operation is allowed; copies always are.
    pub fn allows(&self, op: Op) -> bool {
        op == Op::Copy || self.0.contains(&op)
    }

    /// The operations, in a fixed order.
    pub fn ops(&self) -> Vec<Op> {
        self.0.iter().copied().collect()
    }
}

/// What goes into a program and what comes out of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Signature {
    /// Inputs in order, with their types.
    pub inputs: Vec<(String, Ty)>,
    /// Outputs in order; all are trees.
    pub outputs: Vec<String>,
    /// Outputs that are the inputs of the same name in the next step, zero at first.
    pub carried: Vec<String>,
    /// The first output must depend on one of these.
    pub driven_by: Vec<String>,
    /// Operations that are allowed.
    pub ops: OpSet,
    /// Statements, at most.
    pub max_len: usize,
}

impl Signature {
    /// An update rule: weights `w`, gradients `g`, two carried trees `m` and `v`, and the value `lr`
    /// of a schedule in `[0, 1]`; `(update, m, v)` comes out.
    pub fn optimizer() -> Self {
        let names = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<Vec<_>>();
        let tree = |name: &&str| (name.to_string(), Ty::Tree);
        let mut inputs: Vec<_> = ["w", "g", "m", "v"].iter().map(tree).collect();
        inputs.push(("lr".to_string(), Ty::Scalar));
        Self {
            inputs,
            outputs: names(&["update", "m", "v"]),
            carried: names(&["m", "v"]),
            driven_by: names(&["g", "m", "v"]),
            ops: OpSet::all(),
            max_len: 60,
        }
    }

    /// Places of the carried inputs, with the outputs that feed them.
    pub(super) fn feeds(&self) -> Vec<(usize, usize)> {
        let place = |names: &[String], name: &String| names.iter().position(|n| n == name);
        let inputs: Vec<String> = self.inputs.iter().map(|(name, _)| name.clone()).collect();
        let feed = |name| Some((place(&inputs, name)?, place(&self.outputs, name)?));
        self.carried.iter().filter_map(feed).collect()
    }
}

/// Types of a program's values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeMap {
    /// The type that each statement sets its name to.
    pub statements: Vec<Ty>,
    /// The type of each name at the end; `None` for one that is never set.
    pub names: Vec<Option<Ty>>,
}

/// What is known of a name.
#[derive(Debug, Clone)]
struct Known {
    ty: Ty,
    /// Whether it depends on an input that drives the program.
    driven: bool,
    value: Option<f64>,
}

/// The type of an operation's result.
pub(super) fn result_type(op: Op, args: &[Ty]) -> Ty {
    if op.is_reduction() || !args.contains(&Ty::Tree) {
        Ty::Scalar
    } else {
        Ty::Tree
    }
}

/// Checks a program against a signature: names, numbers of arguments, types, allowed operations,
/// length, that the outputs are trees, that the first one depends on what should drive it, and that
/// no constant expression is NaN or infinite.
///
/// # Errors
/// [`Error::ProgramType`] with the statement and the reason.
pub fn typecheck(program: &Program, signature: &Signature) -> Result<TypeMap> {
    let fail = |statement: usize, reason: String| Err(Error::ProgramType { statement, reason });
    let wanted: Vec<&String> = signature.inputs.iter().map(|(name, _)| name).collect();
    let given: Vec<&String> = program.names.iter().take(program.inputs).collect();
    if wanted != given {
        return fail(0, format!("inputs are {given:?}, expected {wanted:?}"));
    }
    if program.body.len() > signature.max_len {
        let (got, most) = (program.body.len(), signature.max_len);
        return fail(0, format!("{got} statements, at most {most} are allowed"));
    }
    let mut known: Vec<Option<Known>> = vec![None; program.names.len()];
    for (slot, (name, ty)) in known.iter_mut().zip(&signature.inputs) {
        *slot = Some(Known {
            ty: *ty,
            driven: signature.driven_by.contains(name),
            value: None,
        });
    }
    let mut statements = Vec::with_capacity(program.body.len());
    for (i, stmt) in program.body.iter().enumerate() {
        if !signature.ops.allows(stmt.op) {
            return fail(i, format!("`{}` is not allowed here", stmt.op.name()));
        }
        match judge(program, &known, i) {
            Ok(found) => {
                statements.push(found.ty);
                known[stmt.dst] = Some(found);
            }
            Err(reason) => return fail(i, reason),
        }
    }
    let end = program.body.len();
    if program.outputs.len() != signature.outputs.len() {
        let (got, wanted) = (program.outputs.len(), signature.outputs.len());
        return fail(end, format!("{got} outputs, expected {wanted}"));
    }
    for (i, (id, name)) in program.outputs.iter().zip(&signature.outputs).enumerate() {
        match known.get(*id).and_then(Option::as_ref) {
            None => return fail(end, format!("output {i} (`{name}`) is never set")),
            Some(found) if found.ty != Ty::Tree => {
                return fail(end, format!("output {i} (`{name}`) is not a tree"));
            }
            Some(found) if i == 0 && !found.driven => {
                let drivers = signature.driven_by.join(", ");
                return fail(end, format!("`{name}` depends on none of {drivers}"));
            }
            Some(_) => {}
        }
    }
    Ok(TypeMap {
        statements,
        names: known.iter().map(|k| k.as_ref().map(|k| k.ty)).collect(),
    })
}

/// What statement `i` sets its name to, or why it is wrong.
fn judge(
    program: &Program,
    known: &[Option<Known>],
    i: usize,
) -> std::result::Result<Known, String> {
    let stmt = &program.body[i];
    let name = stmt.op.name();
    if stmt.args.len() != stmt.op.arity() {
        let (got, wanted) = (stmt.args.len(), stmt.op.arity());
        return Err(format!("`{name}` takes {wanted} arguments, got {got}"));
    }
    let (mut types, mut driven, mut values) = (Vec::new(), false, Vec::new());
    for (place, arg) in stmt.args.iter().enumerate() {
        let (ty, value) = match arg {
            Arg::Const(x) if !x.is_finite() => return Err(format!("the constant {x}")),
            Arg::Const(x) => (Ty::Scalar, Some(*x)),
            Arg::Var(id) => match known.get(*id).and_then(Option::as_ref) {
                None => {
                    let unset = program.names.get(*id).map_or("?", String::as_str);
                    return Err(format!("`{unset}` is used before it is set"));
                }
                Some(found) => {
                    driven |= found.driven;
                    (found.ty, found.value)
                }
            },
        };
        if stmt.op.wants_scalar(place) && ty == Ty::Tree {
            return Err(format!("argument {place} of `{name}` must be a scalar"));
        }
        types.push(ty);
        values.push(value);
    }
    let value = fold(stmt.op, &values);
    if let Some(x) = value.filter(|x| !x.is_finite()) {
        return Err(format!("`{name}` of constants is {x}"));
    }
    Ok(Known {
        ty: result_type(stmt.op, &types),
        driven,
        value,
    })
}

/// The value of an operation on constants.
pub(super) fn fold(op: Op, args: &[Option<f64>]) -> Option<f64> {
    let get = |i: usize| match args.get(i) {
        Some(value) => *value,
        None => Some(0.0),
    };
    Some(op.apply(get(0)?, get(1)?, get(2)?))
}
