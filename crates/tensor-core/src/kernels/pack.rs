//! Packing the set entries of a tile together, and spreading them back.

use super::mask::TILE;
use super::Element;

/// Entries that a packed tile may be overwritten beyond its end.
pub(super) const PAD: usize = 16;

/// Copies the entries of `from` that `words` sets to the front of `to`, in order, and returns
/// their number. What lies behind them in `to` is left undefined.
pub(super) fn pack<P: Element>(from: &[P], words: &[u64], to: &mut [P; TILE + PAD]) -> usize {
    #[cfg(target_arch = "x86_64")]
    if size_of::<P>() == 4 && wide::available() {
        // SAFETY: the processor has the instructions, and `P` is four plain bytes.
        return unsafe { wide::pack32(from, words, to) };
    }
    let mut count = 0;
    for (chunk, &word) in from.chunks(64).zip(words) {
        for (bit, &value) in chunk.iter().enumerate() {
            // Written always, kept when the bit is set: no branch to mispredict.
            to[count.min(TILE)] = value;
            count += ((word >> bit) & 1) as usize;
        }
    }
    count
}

/// The inverse of [`pack`]: overwrites the entries of `to` that `words` sets.
pub(super) fn spread<P: Element>(from: &[P; TILE + PAD], words: &[u64], to: &mut [P]) {
    #[cfg(target_arch = "x86_64")]
    if size_of::<P>() == 4 && wide::available() {
        // SAFETY: the processor has the instructions, and `P` is four plain bytes.
        unsafe { wide::spread32(from, words, to) };
        return;
    }
    let mut count = 0;
    for (chunk, &word) in to.chunks_mut(64).zip(words) {
        for (bit, value) in chunk.iter_mut().enumerate() {
            let set = (word >> bit) & 1 == 1;
            *value = if set { from[count.min(TILE)] } else { *value };
            count += usize::from(set);
        }
    }
}

/// Sixteen 32-bit entries at a time with AVX-512's compress and expand.
#[cfg(target_arch = "x86_64")]
mod wide {
    use super::{PAD, TILE};
    use std::arch::x86_64::{
        _mm512_loadu_si512, _mm512_mask_expand_epi32, _mm512_mask_storeu_epi32,
        _mm512_maskz_compress_epi32, _mm512_maskz_loadu_epi32, _mm512_storeu_si512,
    };

    const LANES: usize = 16;

    pub(super) fn available() -> bool {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("popcnt")
    }

    /// The bits of the entries `start..start + 16` that exist, out of `len`.
    #[inline(always)]
    fn existing(start: usize, len: usize) -> u16 {
        match len - start {
            n if n >= LANES => u16::MAX,
            n => (1 << n) - 1,
        }
    }

    /// # Safety
    /// Needs AVX-512F and popcnt, a `P` of four bytes without padding, and a word for every 64
    /// entries of `from`, without set bits beyond its end.
    #[target_feature(enable = "avx512f,popcnt")]
    pub(super) unsafe fn pack32<P>(from: &[P], words: &[u64], to: &mut [P; TILE + PAD]) -> usize {
        let (mut from_at, mut to_at) = (from.as_ptr().cast::<i32>(), to.as_mut_ptr().cast::<i32>());
        let (begin, mut start) = (to_at, 0);
        for &word in words {
            for part in 0..4 {
                let set = (word >> (LANES * part)) as u16;
                // A mask in blocks leaves whole lines of memory alone.
                if set != 0 {
                    // SAFETY: lanes beyond the end are not read; at most TILE entries are packed,
                    // and the whole vector is stored inside the padding.
                    unsafe {
                        let values = _mm512_maskz_loadu_epi32(existing(start, from.len()), from_at);
                        let packed = _mm512_maskz_compress_epi32(set, values);
                        _mm512_storeu_si512(to_at.cast(), packed);
                        to_at = to_at.add(set.count_ones() as usize);
                    }
                }
                // Only compared or read where a word says that there are entries.
                from_at = from_at.wrapping_add(LANES);
                start += LANES;
            }
        }
        // SAFETY: both pointers lie in `to`.
        unsafe { to_at.offset_from(begin) as usize }
    }

    /// # Safety
    /// As [`pack32`], for `to`.
    #[target_feature(enable = "avx512f,popcnt")]
    pub(super) unsafe fn spread32<P>(from: &[P; TILE + PAD], words: &[u64], to: &mut [P]) {
        let (mut from_at, mut to_at) = (from.as_ptr().cast::<i32>(), to.as_mut_ptr().cast::<i32>());
        let mut start = 0;
        for &word in words {
            for part in 0..4 {
                let set = (word >> (LANES * part)) as u16;
                if set != 0 {
                    let exist = existing(start, to.len());
                    // SAFETY: lanes beyond the end are neither read nor written; reads of packed
                    // entries end inside the padding.
                    unsafe {
                        let old = _mm512_maskz_loadu_epi32(exist, to_at);
                        let packed = _mm512_loadu_si512(from_at.cast());
                        let new = _mm512_mask_expand_epi32(old, set, packed);
                        _mm512_mask_storeu_epi32(to_at, exist, new);
                        from_at = from_at.add(set.count_ones() as usize);
                    }
                }
                to_at = to_at.wrapping_add(LANES);
                start += LANES;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip<P: Element + PartialEq + std::fmt::Debug>(
        len: usize,
        value: impl Fn(usize) -> P,
    ) {
        let from: Vec<P> = (0..len).map(&value).collect();
        for pattern in [0, u64::MAX, 0x8000_0000_0000_0001, 0x1234_5678_9abc_def1] {
            let mut words = vec![pattern; len.div_ceil(64)];
            if let Some(last) = words.last_mut().filter(|_| !len.is_multiple_of(64)) {
                *last &= (1 << (len % 64)) - 1;
            }
            let set = |i: usize| (words[i / 64] >> (i % 64)) & 1 == 1;
            let expected: Vec<P> = (0..len).filter(|i| set(*i)).map(&value).collect();
            let mut packed = [P::default(); TILE + PAD];
            let count = pack(&from, &words, &mut packed);
            assert_eq!(packed[..count], expected[..]);
            let mut back = vec![value(len); len];
            spread(&packed, &words, &mut back);
            for (i, got) in back.iter().enumerate() {
                assert_eq!(*got, if set(i) { value(i) } else { value(len) });
            }
        }
    }

    #[test]
    fn packs_and_spreads_every_width() {
        for len in [1, 15, 16, 17, 64, 100, TILE - 1, TILE] {
            round_trip::<f32>(len, |i| i as f32 + 1.0);
            round_trip::<f64>(len, |i| i as f64 + 1.0);
            round_trip::<half::bf16>(len, |i| half::bf16::from_f32((i % 200) as f32));
        }
    }
}
