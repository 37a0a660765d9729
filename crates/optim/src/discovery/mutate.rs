//! Random changes of programs that stay well typed.

use super::check::{result_type, typecheck, Signature, Ty};
use super::ops::Op;
use super::program::{Arg, Program, Stmt};
use crate::error::check;
use crate::{RandomStream, Result};

/// What a constant in a new statement is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FreshConst {
    /// A standard normal number.
    #[default]
    Normal,
    /// 1, as in the official code, which leaves it to later mutations.
    One,
}

/// Draws mutations: insert a statement, delete one, modify an argument, with these weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Mutator {
    /// Weight of insertions.
    pub insert: f64,
    /// Weight of deletions.
    pub delete: f64,
    /// Weight of modifications.
    pub modify: f64,
    /// What new constants are.
    pub fresh_const: FreshConst,
    /// Tries until a well-typed child, at most.
    pub max_tries: usize,
    /// What children are checked against.
    pub signature: Signature,
}

impl Default for Mutator {
    fn default() -> Self {
        Self {
            insert: 1.0,
            delete: 1.0,
            modify: 1.0,
            fresh_const: FreshConst::Normal,
            max_tries: 50,
            signature: Signature::optimizer(),
        }
    }
}

/// Bound on the magnitude of mutated constants.
const LARGEST: f64 = 1e10;

impl Mutator {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::non_negative("Mutator::insert", self.insert)?;
        check::non_negative("Mutator::delete", self.delete)?;
        check::non_negative("Mutator::modify", self.modify)?;
        let total = self.insert + self.delete + self.modify;
        check::positive("Mutator::insert + delete + modify", total)?;
        check::at_least_one("Mutator::max_tries", self.max_tries)
    }

    /// A well-typed child; `None` when no try gave one. The second number counts the tries that were
    /// not well typed.
    ///
    /// # Errors
    /// Those of [`validate`](Self::validate).
    pub fn mutate(
        &self,
        program: &Program,
        rng: &mut RandomStream,
    ) -> Result<(Option<Program>, usize)> {
        self.validate()?;
        let full = program.body.len() >= self.signature.max_len;
        let insert = if full { 0.0 } else { self.insert };
        for tries in 0..self.max_tries {
            let mut child = program.clone();
            let total = insert + self.delete + self.modify;
            let draw = rng.next_uniform() * total;
            let changed = if draw < insert {
                self.insert_statement(&mut child, rng)?
            } else if draw < insert + self.delete {
                delete_statement(&mut child, rng)?
            } else {
                modify_argument(&mut child, &self.signature, rng)?
            };
            if changed && typecheck(&child, &self.signature).is_ok() {
                child.tidy();
                return Ok((Some(child), tries));
            }
        }
        Ok((None, self.max_tries))
    }

    /// A child with one constant changed; `None` for a program without constants.
    ///
    /// # Errors
    /// Those of [`validate`](Self::validate).
    pub fn tune(&self, program: &Program, rng: &mut RandomStream) -> Result<Option<Program>> {
        self.validate()?;
        let mut places = Vec::new();
        for (i, stmt) in program.body.iter().enumerate() {
            for (j, arg) in stmt.args.iter().enumerate() {
                if matches!(arg, Arg::Const(_)) {
                    places.push((i, j));
                }
            }
        }
        if places.is_empty() {
            return Ok(None);
        }
        for _ in 0..self.max_tries {
            let mut child = program.clone();
            let (i, j) = places[rng.below(places.len())?];
            scale(&mut child.body[i].args[j], rng);
            if typecheck(&child, &self.signature).is_ok() {
                return Ok(Some(child));
            }
        }
        Ok(None)
    }

    fn insert_statement(&self, program: &mut Program, rng: &mut RandomStream) -> Result<bool> {
        let ops = self.signature.ops.ops();
        if ops.is_empty() {
            return Ok(false);
        }
        let at = rng.below(program.body.len() + 1)?;
        let op = ops[rng.below(ops.len())?];
        let visible = visible_at(program, &self.signature, at);
        let (mut args, mut types) = (Vec::new(), Vec::new());
        for place in 0..op.arity() {
            let fits: Vec<&(usize, Ty)> = visible
                .iter()
                .filter(|(_, ty)| !op.wants_scalar(place) || *ty == Ty::Scalar)
                .collect();
            // One more choice than names: a new constant.
            let choice = rng.below(fits.len() + 1)?;
            let (arg, ty) = match fits.get(choice) {
                Some((id, ty)) => (Arg::Var(*id), *ty),
                None => (self.constant(rng), Ty::Scalar),
            };
            args.push(arg);
            types.push(ty);
        }
        let ty = result_type(op, &types);
        let same: Vec<usize> = visible
            .iter()
            .filter(|(_, t)| *t == ty)
            .map(|(id, _)| *id)
            .collect();
        let choice = rng.below(same.len() + 1)?;
        let dst = match same.get(choice) {
            Some(id) => *id,
            None => program.fresh(),
        };
        program.body.insert(at, Stmt { dst, op, args });
        Ok(true)
    }

    fn constant(&self, rng: &mut RandomStream) -> Arg {
        Arg::Const(match self.fresh_const {
            FreshConst::Normal => rng.next_normal(),
            FreshConst::One => 1.0,
        })
    }
}

fn delete_statement(program: &mut Program, rng: &mut RandomStream) -> Result<bool> {
    if program.body.is_empty() {
        return Ok(false);
    }
    program.body.remove(rng.below(program.body.len())?);
    Ok(true)
}

/// A constant times `2^a`, with a standard normal `a`.
fn scale(arg: &mut Arg, rng: &mut RandomStream) {
    if let Arg::Const(x) = arg {
        *x = (*x * rng.next_normal().exp2()).clamp(-LARGEST, LARGEST);
    }
}

fn modify_argument(
    program: &mut Program,
    signature: &Signature,
    rng: &mut RandomStream,
) -> Result<bool> {
    let with_args = |(_, stmt): &(usize, &Stmt)| !stmt.args.is_empty();
    let places = program.body.iter().enumerate().filter(with_args);
    let places: Vec<usize> = places.map(|(i, _)| i).collect();
    if places.is_empty() {
        return Ok(false);
    }
    let at = places[rng.below(places.len())?];
    let place = rng.below(program.body[at].args.len())?;
    let visible = visible_at(program, signature, at);
    match &mut program.body[at].args[place] {
        Arg::Var(id) => {
            let own = visible.iter().find(|(v, _)| v == id).map(|(_, ty)| *ty);
            let others: Vec<usize> = visible
                .iter()
                .filter(|(v, ty)| v != id && Some(*ty) == own)
                .map(|(v, _)| *v)
                .collect();
            if others.is_empty() {
                return Ok(false);
            }
            *id = others[rng.below(others.len())?];
        }
        constant => scale(constant, rng),
    }
    Ok(true)
}

/// Names that are set before statement `at`, with their types there.
fn visible_at(program: &Program, signature: &Signature, at: usize) -> Vec<(usize, Ty)> {
    let mut types: Vec<Option<Ty>> = vec![None; program.names.len()];
    for (slot, (_, ty)) in types.iter_mut().zip(&signature.inputs) {
        *slot = Some(*ty);
    }
    for stmt in &program.body[..at] {
        let ty = |arg: &Arg| match arg {
            Arg::Const(_) => Ty::Scalar,
            Arg::Var(id) => types[*id].unwrap_or(Ty::Scalar),
        };
        let args: Vec<Ty> = stmt.args.iter().map(ty).collect();
        types[stmt.dst] = Some(match stmt.op {
            Op::Copy => args[0],
            op => result_type(op, &args),
        });
    }
    let known = types.iter().enumerate();
    known.filter_map(|(id, ty)| Some((id, (*ty)?))).collect()
}
