//! The inner loops: one rule over one run of elements, dense or masked.

use super::mask::{Mask, TILE};
use super::pack::{pack, spread, PAD};
use super::rule::Map;
use super::{Element, Real, Rule};
use pulp::{Simd, WithSimd};
use std::marker::PhantomData;

/// Counts of one run of elements.
#[derive(Clone, Copy, Default)]
pub(super) struct Counts {
    pub events: u32,
    pub held: u32,
}

/// A rule bound to the memory of one run of `len` elements.
///
/// # Safety
/// `param`, `grad` and every `state` pointer are valid for `len` elements and do not overlap;
/// nobody else accesses `param` and `state` while the loop runs.
#[derive(Clone, Copy)]
pub(super) struct Run<P: Element, Q, const S: usize, const K: usize> {
    pub len: usize,
    pub param: *mut P,
    pub grad: *const P,
    pub state: [*mut Q; S],
    pub scalars: [P::Compute; K],
    pub map: Map<P::Compute>,
    pub hold: bool,
}

impl<P: Element, Q, const S: usize, const K: usize> Run<P, Q, S, K> {
    /// Updates every element.
    ///
    /// # Safety
    /// The contract of the type.
    pub(super) unsafe fn dense<R>(self) -> Counts
    where
        R: Rule<S, K>,
        Q: Element<Compute = P::Compute>,
    {
        pulp::Arch::new().dispatch(Dense::<R, P, Q, S, K> {
            run: self,
            rule: PhantomData,
        })
    }

    /// Updates the entries that `mask` sets. The run begins at tile `first_tile`, and `state`
    /// points at the beginning of the tensor's compact state.
    ///
    /// Tile by tile the set entries are packed, updated as a dense run, and spread back.
    ///
    /// # Safety
    /// The contract of the type, with `state` valid for `mask.count()` elements, and the run
    /// ending with the tensor or at a tile.
    pub(super) unsafe fn masked<R>(self, mask: &Mask, first_tile: usize) -> Counts
    where
        R: Rule<S, K>,
        Q: Element<Compute = P::Compute>,
    {
        let mut total = Counts::default();
        let mut params = [P::default(); TILE + PAD];
        let mut grads = [P::default(); TILE + PAD];
        for (t, start) in (0..self.len).step_by(TILE).enumerate() {
            let tile = first_tile + t;
            let len = TILE.min(self.len - start);
            let (words, offset) = (mask.tile(tile), mask.offset(tile));
            // SAFETY: the run covers these elements, and the compact state the packed ones.
            unsafe {
                let param = std::slice::from_raw_parts_mut(self.param.add(start), len);
                let grad = std::slice::from_raw_parts(self.grad.add(start), len);
                let count = pack(param, words, &mut params);
                pack(grad, words, &mut grads);
                let packed = Run {
                    len: count,
                    param: params.as_mut_ptr(),
                    grad: grads.as_ptr(),
                    state: std::array::from_fn(|j| self.state[j].add(offset)),
                    ..self
                };
                let counts = packed.dense::<R>();
                spread(&params, words, param);
                total.events += counts.events;
                total.held += counts.held;
            }
        }
        total
    }
}

/// A [`Run`] with the type of its rule, for dispatch to the processor's instruction set.
struct Dense<R, P: Element, Q, const S: usize, const K: usize> {
    run: Run<P, Q, S, K>,
    rule: PhantomData<R>,
}

impl<R, P, Q, const S: usize, const K: usize> WithSimd for Dense<R, P, Q, S, K>
where
    R: Rule<S, K>,
    P: Element,
    Q: Element<Compute = P::Compute>,
{
    type Output = Counts;

    #[inline(always)]
    fn with_simd<V: Simd>(self, _: V) -> Counts {
        let Run {
            len,
            param,
            grad,
            state,
            scalars,
            map,
            hold,
        } = self.run;
        let (mut events, mut held) = (0u32, 0u32);
        for i in 0..len {
            // SAFETY: `i < len`, and all pointers are valid for `len` elements.
            unsafe {
                let p = (*param.add(i)).load();
                let g = map.apply((*grad.add(i)).load(), p);
                let s: [P::Compute; S] = std::array::from_fn(|j| (*state[j].add(i)).load());
                let keep = hold & !g.is_finite();
                let new = R::update(&scalars, p, g, s);
                *param.add(i) = P::store(Real::select(keep, p, new.param));
                for j in 0..S {
                    *state[j].add(i) = Q::store(Real::select(keep, s[j], new.state[j]));
                }
                // Wrapping: an overflow check here would keep the loop from becoming vector code.
                events = events.wrapping_add(u32::from(new.event & !keep));
                held = held.wrapping_add(u32::from(keep));
            }
        }
        Counts { events, held }
    }
}
