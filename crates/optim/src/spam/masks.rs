//! Drawing the masks of sparse momentum.

use crate::Result;
use tensor_core::kernels::Mask;
use tensor_core::random::RandomStream;

/// The mask of tensor `tensor` in period `period` (0 before the first change): exactly
/// `floor(d n)` entries without replacement in period 0, each entry with probability `d` later.
/// It is a function of (stream, tensor, period), so that replicas with one seed agree.
pub(super) fn draw(
    stream: &RandomStream,
    tensor: usize,
    period: u64,
    len: usize,
    density: f64,
    block: usize,
) -> Result<Mask> {
    let mut stream = stream.split_index(&format!("mask {tensor}"), period);
    let blocks = len.div_ceil(block);
    let mut set = vec![false; blocks];
    if density >= 1.0 {
        set.fill(true);
    } else if period == 0 {
        let count = (density * blocks as f64).floor() as usize;
        for index in &stream.permutation(blocks)?[..count] {
            set[*index as usize] = true;
        }
    } else {
        let mut uniforms = vec![0.0; blocks];
        stream.fill_uniform(&mut uniforms);
        for (set, u) in set.iter_mut().zip(&uniforms) {
            *set = *u < density;
        }
    }
    let flags: Vec<bool> = (0..len).map(|i| set[i / block]).collect();
    Ok(Mask::from_bools(&flags)?)
}
