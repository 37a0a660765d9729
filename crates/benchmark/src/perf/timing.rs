//! Clocks and thread pools.

use anyhow::Result;
use std::time::Instant;

/// Seconds that one call takes.
///
/// # Errors
/// Those of the call.
pub fn seconds(call: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    call()?;
    Ok(start.elapsed().as_secs_f64())
}

/// The middle of some numbers; NaN of none.
pub fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    match numbers.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => numbers[n / 2],
        n => 0.5 * (numbers[n / 2 - 1] + numbers[n / 2]),
    }
}

/// Runs a closure in a pool of its own.
///
/// # Errors
/// When the threads cannot be started.
pub fn with_threads<T: Send>(threads: usize, call: impl FnOnce() -> T + Send) -> Result<T> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()?;
    Ok(pool.install(call))
}
