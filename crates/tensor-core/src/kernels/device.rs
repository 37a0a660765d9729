//! The text of the device kernel for a rule.
//!
//! One kernel updates all tensors of a batch: a table of 64-bit words holds, per tensor, the
//! addresses of parameter, gradient, mask and state and the scalars of the step, followed by the
//! work list. The text is plain C but for a dozen names ([`CUDA_PRELUDE`]), so that the very same
//! lines can be compiled for the host and compared with the CPU kernel bit for bit
//! (`check_on_host`, feature `verify`).

use super::rule::MAP_SCALARS;
use super::Rule;
use crate::{Error, Result};
use candle_core::DType;

/// What the kernel text needs from CUDA.
pub const CUDA_PRELUDE: &str = r#"
#define KERNEL extern "C" __global__
#define BLOCK_INDEX ((u64)blockIdx.x)
#define THREAD_INDEX ((u64)threadIdx.x)
#define THREADS ((u64)blockDim.x)
#define POPCOUNT(x) ((u64)__popcll(x))
#define ATOMIC_ADD(at, n) atomicAdd(at, n)
#define INLINE static __device__ inline
#define FLOAT_BITS(x) __float_as_uint(x)
#define BITS_FLOAT(x) __uint_as_float(x)
INLINE float half_to_float(unsigned short h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
INLINE unsigned short float_to_half(float f) { unsigned short h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
"#;

const TYPES: &str = "typedef unsigned int u32;\ntypedef unsigned long long u64;\n";

const BODY: &str = r#"
INLINE float bfloat_to_float(unsigned short b) { return BITS_FLOAT((u32)b << 16); }
INLINE unsigned short float_to_bfloat(float f) {
    u32 bits = FLOAT_BITS(f);
    if (f != f) return (unsigned short)((bits >> 16) | 0x40);
    return (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE T sign(T x) { return x > 0 ? (T)1 : (x < 0 ? (T)-1 : ABS(x)); }

KERNEL void fused_update(const u64* table, u64 segments_at, u32* counts, u32 hold) {
    const u64* segment = table + segments_at + 3 * BLOCK_INDEX;
    const u64* row = table + segment[0] * ROW;
    P* param = (P*)row[0];
    const P* grad = (const P*)row[1];
    const u64* words = (const u64*)row[2];
    const u32* offsets = (const u32*)row[3];
    const double* scalars = (const double*)(row + 4 + STATES);
    T k[SCALARS + 1];
    for (int j = 0; j < SCALARS; j++) k[j] = (T)scalars[j];
    const T scale = (T)scalars[SCALARS], clip = (T)scalars[SCALARS + 1];
    const T outer = (T)scalars[SCALARS + 2], along = (T)scalars[SCALARS + 3];
    const T along_rest = (T)scalars[SCALARS + 4];
    u32 events = 0, held = 0;
    for (u64 i = segment[1] + THREAD_INDEX; i < segment[1] + segment[2]; i += THREADS) {
        u64 at = i;
        if (words) {
            const u64 word = words[i >> 6];
            if (!((word >> (i & 63)) & 1)) continue;
            at = offsets[i >> 10] + POPCOUNT(word & (((u64)1 << (i & 63)) - 1));
            for (u64 j = (i >> 10) << 4; j < (i >> 6); j++) at += POPCOUNT(words[j]);
        }
        T p = LOAD_P(param[i]);
        T g = LOAD_P(grad[i]) * scale;
        g = g > clip ? clip : g;
        g = g < -clip ? -clip : g;
        g = g * outer - along * p - along_rest * p;
        // g - g is 0 unless g is NaN or infinite.
        const u32 keep = hold && !(g - g == 0);
        u32 event = 0;
        const T p_old = p;
        READ_STATE
        {
            RULE
        }
        param[i] = STORE_P(keep ? p_old : p);
        WRITE_STATE
        events += event && !keep;
        held += keep;
    }
    if (events) ATOMIC_ADD(counts + 2 * segment[0], events);
    if (held) ATOMIC_ADD(counts + 2 * segment[0] + 1, held);
}
"#;

/// 64-bit words per tensor in the kernel's table.
pub const fn table_row(states: usize, scalars: usize) -> usize {
    4 + states + scalars + MAP_SCALARS
}

/// The kernel text for a rule, for parameters of dtype `param` and state of dtype `state`, below
/// the given prelude ([`CUDA_PRELUDE`] on a device).
///
/// # Errors
/// [`Error::Unsupported`] when the rule has no [`Rule::DEVICE_BODY`] or the dtypes have no device
/// form.
pub fn device_source<R: Rule<S, K>, const S: usize, const K: usize>(
    prelude: &str,
    param: DType,
    state: DType,
) -> Result<String> {
    let body = R::DEVICE_BODY
        .ok_or_else(|| Error::unsupported(format!("the rule `{}`", R::NAME), "on a device"))?;
    let (p, load_p, store_p) = storage(param)?;
    let (q, load_q, store_q) = storage(state)?;
    let (real, sqrt, abs) = match param {
        DType::F64 => ("double", "sqrt", "fabs"),
        _ => ("float", "sqrtf", "fabsf"),
    };
    let mut text = String::from(TYPES);
    text.push_str(prelude);
    for (name, value) in [
        ("T", real),
        ("P", p),
        ("Q", q),
        ("SQRT", sqrt),
        ("ABS", abs),
        ("LOAD_P(x)", &format!("{load_p}(x)")),
        ("STORE_P(x)", &format!("{store_p}(x)")),
        ("LOAD_Q(x)", &format!("{load_q}(x)")),
        ("STORE_Q(x)", &format!("{store_q}(x)")),
        ("STATES", &S.to_string()),
        ("SCALARS", &K.to_string()),
        ("ROW", &table_row(S, K).to_string()),
    ] {
        text.push_str(&format!("#define {name} {value}\n"));
    }
    let (mut read, mut write) = (String::new(), String::new());
    for j in 0..S {
        read.push_str(&format!(
            "T s{j} = LOAD_Q(((Q*)row[4 + {j}])[at]); const T s{j}_old = s{j};\n        "
        ));
        write.push_str(&format!(
            "((Q*)row[4 + {j}])[at] = STORE_Q(keep ? s{j}_old : s{j});\n        "
        ));
    }
    let body = BODY
        .replace("READ_STATE", read.trim_end())
        .replace("WRITE_STATE", write.trim_end())
        .replace("RULE", body.trim());
    text.push_str(&body);
    Ok(text)
}

/// The C type that a dtype is stored as, and the functions that load and store it.
fn storage(dtype: DType) -> Result<(&'static str, &'static str, &'static str)> {
    Ok(match dtype {
        DType::F64 => ("double", "(double)", "(double)"),
        DType::F32 => ("float", "(float)", "(float)"),
        DType::BF16 => ("unsigned short", "bfloat_to_float", "float_to_bfloat"),
        DType::F16 => ("unsigned short", "half_to_float", "float_to_half"),
        other => {
            return Err(Error::unsupported(
                "a fused update on a device",
                format!("for dtype {other:?}"),
            ))
        }
    })
}
