//! What attention holds while it runs, counted by the allocator in a process of its own.

use crate::support::{normal, CPU};
use candle_core::{DType, Tensor, Var};
use nn::attention::{multi_head_attention, AttentionConfig};
use std::alloc::{GlobalAlloc, Layout, System};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: everything is handed to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(held, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

const SWITCH: &str = "THALWEG_TEST_ATTENTION_MEMORY";

/// The other tests of this program would be counted too, so the check runs in a child.
#[test]
fn attention_never_holds_the_matrix_of_scores() {
    if std::env::var(SWITCH).is_ok() {
        return check();
    }
    let this = std::env::current_exe().unwrap();
    let output = Command::new(this)
        .args([
            "--exact",
            "memory::attention_never_holds_the_matrix_of_scores",
        ])
        .env(SWITCH, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

fn check() {
    let n = 4096;
    let draw = |seed| Var::from_tensor(&normal(seed, &[1, n, 64], DType::F32)).unwrap();
    let (q, k, v) = (draw(1), draw(2), draw(3));
    let c = Tensor::ones((1, n, 64), DType::F32, &CPU).unwrap();
    let before = HELD.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let y = multi_head_attention(&q, &k, &v, 1, &AttentionConfig::default()).unwrap();
    (y * c).unwrap().sum_all().unwrap().backward().unwrap();
    let peak = PEAK.load(Ordering::Relaxed) - before;
    assert!(peak < n * n * size_of::<f32>() / 2, "{peak} bytes");
}
