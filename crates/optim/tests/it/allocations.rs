//! A step makes no allocation per parameter beyond what the engine itself makes.

use crate::support::*;
use candle_core::backprop::GradStore;
use candle_core::{DType, Var};
use candle_nn::Optimizer;
use optim::perp_grad::{PerpGrad, PerpGradConfig};
use optim::spam::Spam;
use optim::transform::{Accumulate, Chain, ClipByGlobalNorm, SpikeClip, SpikeClipConfig};
use optim::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use tensor_core::kernels::{moments, FusedUpdate, GradMap, Real, Rule, StateDType, Updated, Work};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Counts the allocations of the present thread.
struct Counting;

// SAFETY: everything is the system allocator's; the counter does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // The counter may be gone when a thread ends.
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn many(count: usize) -> Vec<(String, Var)> {
    let mut rng = RandomStream::new(1);
    (0..count)
        .map(|i| (format!("p{i}"), normal_var(&mut rng, &[3, 4], DType::F32)))
        .collect()
}

/// Allocations of one call.
fn counted(call: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.with(Cell::get);
    call();
    ALLOCATIONS.with(Cell::get) - before
}

/// Allocations of the fifth step, so that everything that happens once has happened.
fn of_a_step<O: Optimizer>(params: &[(String, Var)], mut optimizer: O) -> u64 {
    let grads: Vec<GradStore> = (0..5).map(|t| gradients(params, 2, t)).collect();
    let steps = grads
        .iter()
        .map(|grads| counted(|| optimizer.step(grads).unwrap()));
    steps.last().unwrap()
}

/// `p <- p - g`, to see what the engine itself allocates.
#[derive(Clone, Copy)]
struct Plain;

impl Rule<0, 0> for Plain {
    const NAME: &'static str = "plain";
    const DEVICE_BODY: Option<&'static str> = None;

    fn scalars(&self) -> [f64; 0] {
        []
    }

    fn update<T: Real>(_: &[T; 0], param: T, grad: T, _: [T; 0]) -> Updated<T, 0> {
        Updated {
            param: param - grad,
            state: [],
            event: false,
        }
    }
}

/// What the engine's pass over these tensors allocates (checks, and candle's in-place access).
fn of_the_engine(params: &[(String, Var)]) -> u64 {
    let mut update = FusedUpdate::<0>::new(params.to_vec(), StateDType::Compute).unwrap();
    let grads = gradients(params, 2, 0);
    counted(|| {
        let work = |i: usize| {
            let grad = grads.get(&params[i].1);
            Ok(grad.map(|grad| Work {
                grad,
                rule: Plain,
                map: GradMap::default(),
            }))
        };
        update.step(true, work).unwrap();
    })
}

/// What a reduction over these tensors allocates.
fn of_a_reduction(params: &[(String, Var)]) -> u64 {
    let items: Vec<_> = params
        .iter()
        .map(|(_, var)| (Some(var.as_tensor()), var.as_tensor(), GradMap::default()))
        .collect();
    counted(|| drop(moments(&items).unwrap()))
}

/// How much more two hundred tensors allocate than ten.
fn growth(of: impl Fn(&[(String, Var)]) -> u64) -> u64 {
    let [few, lots] = [10, 200].map(|count| of(&many(count)));
    assert!(few > 0, "nothing was counted");
    lots - few
}

fn group<C>(params: &[(String, Var)], config: C) -> Vec<ParamGroup<C>> {
    vec![ParamGroup::named(params.to_vec(), config)]
}

#[test]
fn optimizers_add_nothing_per_parameter_to_the_engine() {
    let engine = growth(of_the_engine);
    let lion = growth(|params| {
        let lion = Lion::with_groups(group(params, LionConfig::default())).unwrap();
        of_a_step(params, lion)
    });
    let adamw = growth(|params| {
        let adamw = AdamW::with_groups(group(params, AdamWConfig::default())).unwrap();
        of_a_step(params, adamw)
    });
    let sgd = growth(|params| {
        let sgd = SgdMomentum::with_groups(group(params, SgdConfig::default())).unwrap();
        of_a_step(params, sgd)
    });
    let spam = |density| {
        growth(|params| {
            let config = SpamConfig {
                density,
                ..SpamConfig::default()
            };
            let stream = RandomStream::new(1);
            let spam = Spam::with_groups(group(params, config), &stream).unwrap();
            of_a_step(params, spam)
        })
    };
    let all = [lion, adamw, sgd, spam(None), spam(Some(0.5))];
    assert_eq!(all, [engine; 5]);
}

#[test]
fn transforms_add_nothing_per_parameter_either() {
    let (engine, reduction) = (growth(of_the_engine), growth(of_a_reduction));
    let adamw = |params: &[(String, Var)]| {
        AdamW::with_groups(group(params, AdamWConfig::default())).unwrap()
    };
    // Two passes of the engine, and reductions for projection and clip.
    let chained = growth(|params| {
        let chain = Chain::new()
            .then(SpikeClip::new(params, SpikeClipConfig::default()).unwrap())
            .then(ClipByGlobalNorm::new(0.1).unwrap());
        let inner = adamw(params);
        let perp = PerpGrad::wrap(PerpGradConfig::default(), inner).unwrap();
        of_a_step(params, perp.with_transforms(chain))
    });
    assert!(
        chained <= 2 * engine + 2 * reduction,
        "{chained} against {engine} and {reduction}"
    );
    let accumulated = growth(|params| {
        let chain = Chain::new().then(Accumulate::new(params, 5).unwrap());
        of_a_step(params, adamw(params).with_transforms(chain))
    });
    assert_eq!(accumulated, 2 * engine);
}
