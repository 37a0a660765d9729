//! From statements to steps: every statement becomes elementwise steps and sums.

use super::{rank, Kind, Operand, Reduction, Step};
use crate::discovery::ops::Op;

#[derive(Default)]
pub(super) struct Builder {
    pub(super) steps: Vec<Step>,
    pub(super) reductions: Vec<Reduction>,
    pub(super) scalars: usize,
    pub(super) per_tensor: usize,
    pub(super) trees: usize,
    level_of: Vec<(Operand, usize)>,
}

impl Builder {
    fn level(&self, operand: Operand) -> usize {
        let known = self.level_of.iter().find(|(o, _)| *o == operand);
        known.map_or(0, |(_, level)| *level)
    }

    pub(super) fn fresh(&mut self, rank: u8) -> Operand {
        let (count, make): (&mut usize, fn(usize) -> Operand) = match rank {
            0 => (&mut self.scalars, Operand::Scalar),
            1 => (&mut self.per_tensor, Operand::PerTensor),
            _ => (&mut self.trees, Operand::Tree),
        };
        *count += 1;
        make(*count - 1)
    }

    fn step(&mut self, kind: Kind, args: &[Operand]) -> Operand {
        let rank = args.iter().map(|a| rank(*a)).max().unwrap_or(0);
        let level = args.iter().map(|a| self.level(*a)).max().unwrap_or(0);
        let dst = self.fresh(rank);
        let mut all = [Operand::Const(0.0); 3];
        all[..args.len()].copy_from_slice(args);
        self.level_of.push((dst, level));
        self.steps.push(Step {
            kind,
            args: all,
            dst,
            level,
        });
        dst
    }

    /// `sum a b` over everything, or of each tensor.
    fn reduce(&mut self, a: Operand, b: Operand, per_tensor: bool) -> Operand {
        if rank(a).max(rank(b)) == 0 || (per_tensor && rank(a).max(rank(b)) == 1) {
            return self.step(Kind::Op(Op::Mul), &[a, b]);
        }
        let dst = self.fresh(u8::from(per_tensor));
        let level = self.level(a).max(self.level(b));
        self.level_of.push((dst, level + 1));
        self.reductions.push(Reduction {
            args: [a, b],
            dst,
            level,
        });
        dst
    }

    pub(super) fn statement(&mut self, op: Op, args: &[Operand]) -> Operand {
        match (op, args) {
            (Op::Copy, [x]) => *x,
            (Op::Dot, [a, b]) => self.reduce(*a, *b, false),
            (Op::GlobalNorm, [x]) => {
                let squares = self.reduce(*x, *x, false);
                self.step(Kind::Root, &[squares])
            }
            (Op::Norm, [x]) => {
                let squares = self.reduce(*x, *x, true);
                self.step(Kind::Root, &[squares])
            }
            (Op::CosineSim, [a, b]) => {
                let dot = self.reduce(*a, *b, false);
                let (aa, bb) = (self.reduce(*a, *a, false), self.reduce(*b, *b, false));
                self.step(Kind::Cosine, &[dot, aa, bb])
            }
            (Op::ClipByGlobalNorm, [x, limit]) => {
                let squares = self.reduce(*x, *x, false);
                let norm = self.step(Kind::Root, &[squares]);
                let factor = self.step(Kind::Factor, &[*limit, norm]);
                self.step(Kind::Op(Op::Mul), &[*x, factor])
            }
            (op, args) => self.step(Kind::Op(op), args),
        }
    }
}
