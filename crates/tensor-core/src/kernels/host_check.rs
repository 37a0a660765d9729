//! Running the text of a device kernel on the host, against the CPU kernel.
//!
//! The kernel's text is C below a prelude of a dozen names. With a prelude for the host, the
//! system's C compiler turns the same lines into a program, and its results can be compared with
//! the CPU kernel's bit for bit: index arithmetic, masks, rounding, counts.

use super::device::{device_source, CUDA_PRELUDE};
use super::rule::map_scalars;
use super::{FusedUpdate, GradMap, Mask, Rule, StateDType, Work};
use crate::random::RandomStream;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, Var};
use std::path::Path;
use std::process::Command;

const HOST_PRELUDE: &str = r"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static u64 block_index;
#define KERNEL static
#define BLOCK_INDEX block_index
#define THREAD_INDEX ((u64)0)
#define THREADS ((u64)1)
#define POPCOUNT(x) ((u64)__builtin_popcountll(x))
#define ATOMIC_ADD(at, n) (*(at) += (n))
#define INLINE static inline
static inline u32 float_bits(float f) { u32 b; memcpy(&b, &f, 4); return b; }
static inline float bits_float(u32 b) { float f; memcpy(&f, &b, 4); return f; }
#define FLOAT_BITS(x) float_bits(x)
#define BITS_FLOAT(x) bits_float(x)
";

/// Reads `n, state length, words, hold, scalars, parameter, gradient, mask, offsets, state` and
/// writes parameter, state and counts back.
const HOST_MAIN: &str = r#"
static void* take(FILE* f, u64 bytes) {
    void* data = malloc(bytes + 8);
    if (!data || fread(data, 1, bytes, f) != bytes) exit(2);
    return data;
}
int main(int argc, char** argv) {
    FILE* in = argc == 3 ? fopen(argv[1], "rb") : 0;
    if (!in) return 3;
    u64* head = take(in, 4 * 8);
    const u64 n = head[0], state_len = head[1], words = head[2];
    double* scalars = take(in, 8 * (SCALARS + 5));
    P* param = take(in, n * sizeof(P));
    P* grad = take(in, n * sizeof(P));
    u64* mask = take(in, words * 8);
    u32* offsets = take(in, words ? ((n + 1023) / 1024 + 1) * 4 : 0);
    Q* state[STATES + 1];
    for (int j = 0; j < STATES; j++) state[j] = take(in, state_len * sizeof(Q));
    u64 table[2 * ROW + 9];
    memset(table, 0, sizeof table);
    u64* row = table + ROW;
    row[0] = (u64)param; row[1] = (u64)grad;
    row[2] = words ? (u64)mask : 0; row[3] = words ? (u64)offsets : 0;
    for (int j = 0; j < STATES; j++) row[4 + j] = (u64)state[j];
    memcpy(row + 4 + STATES, scalars, 8 * (SCALARS + 5));
    u64 cuts[4] = {0, n < 1024 ? n : 1024, n < 3072 ? n : 3072, n};
    for (int s = 0; s < 3; s++) {
        u64* segment = table + 2 * ROW + 3 * s;
        segment[0] = 1; segment[1] = cuts[s]; segment[2] = cuts[s + 1] - cuts[s];
    }
    u32 counts[4] = {0, 0, 0, 0};
    for (block_index = 0; block_index < 3; block_index++) fused_update(table, 2 * ROW, counts, head[3]);
    FILE* out = fopen(argv[2], "wb");
    if (!out) return 4;
    fwrite(param, sizeof(P), n, out);
    for (int j = 0; j < STATES; j++) fwrite(state[j], sizeof(Q), state_len, out);
    fwrite(counts + 2, 4, 2, out);
    return fclose(out) ? 5 : 0;
}
"#;

const LEN: usize = 5003;

/// Compiles the device text of a rule for the host and compares it with the CPU kernel bit for
/// bit: `f32`, `f64` and mixed `bf16` dtypes, dense and masked, with and without holding
/// non-finite gradients, under a gradient map.
///
/// Where the environment variable `THALWEG_KERNEL_TEXTS` names a folder, the CUDA texts are written
/// there, for a CUDA compiler to look at.
///
/// # Errors
/// [`Error::Unsupported`] when the rule has no device text or the machine has no C compiler (`cc`),
/// [`Error::BadFile`] naming the first difference.
pub fn check_on_host<R: Rule<S, K>, const S: usize, const K: usize>(rule: R) -> Result<()> {
    let dir = tempfile::tempdir().map_err(|e| Error::io(Path::new("temporary folder"), e))?;
    for (param, state) in [
        (DType::F32, DType::F32),
        (DType::F64, DType::F64),
        (DType::BF16, DType::F32),
        (DType::F32, DType::BF16),
    ] {
        if let Some(folder) = std::env::var_os("THALWEG_KERNEL_TEXTS") {
            let name = format!("{}-{param:?}-{state:?}.cu", R::NAME);
            let text = device_source::<R, S, K>(CUDA_PRELUDE, param, state)?;
            let path = Path::new(&folder).join(name);
            std::fs::write(&path, text).map_err(|e| Error::io(&path, e))?;
        }
        let program = compile::<R, S, K>(dir.path(), param, state)?;
        for masked in [false, true] {
            for hold in [false, true] {
                let case = Case::<S>::new(param, state, masked, hold)?;
                let cpu = case.on_cpu::<R, K>(rule)?;
                let host = case.on_host(dir.path(), &program, &rule.scalars())?;
                if let Some(at) =
                    (0..cpu.len().max(host.len())).find(|i| cpu.get(*i) != host.get(*i))
                {
                    return Err(Error::BadFile {
                        path: format!("device text of `{}`", R::NAME),
                        reason: format!("byte {at} differs for {param:?}/{state:?}, masked {masked}, hold {hold}"),
                    });
                }
            }
        }
    }
    Ok(())
}

fn compile<R: Rule<S, K>, const S: usize, const K: usize>(
    dir: &Path,
    param: DType,
    state: DType,
) -> Result<std::path::PathBuf> {
    let text = device_source::<R, S, K>(HOST_PRELUDE, param, state)? + HOST_MAIN;
    let source = dir.join(format!("{param:?}-{state:?}.c"));
    let program = source.with_extension("bin");
    std::fs::write(&source, text).map_err(|e| Error::io(&source, e))?;
    let output = Command::new("cc")
        .args(["-std=c11", "-O1", "-ffp-contract=off", "-w", "-o"])
        .args([&program, &source])
        .arg("-lm")
        .output()
        .map_err(|_| Error::unsupported("checking device kernels", "without a C compiler"))?;
    if !output.status.success() {
        return Err(Error::BadFile {
            path: format!("device text of `{}`", R::NAME),
            reason: String::from_utf8_lossy(&output.stderr).into_owned(),
        });
    }
    Ok(program)
}

/// Inputs of one comparison.
struct Case<const S: usize> {
    param: Tensor,
    grad: Tensor,
    state: Vec<Tensor>,
    mask: Option<Mask>,
    hold: bool,
    map: GradMap,
}

impl<const S: usize> Case<S> {
    fn new(param: DType, state: DType, masked: bool, hold: bool) -> Result<Self> {
        let root = RandomStream::new(5);
        let normal = |label: &str, n: usize, dtype| {
            root.split(label).normal(0.0, 1.0, n, dtype, &Device::Cpu)
        };
        let mut flags = vec![0.0; LEN];
        root.split("mask").fill_uniform(&mut flags);
        let flags: Vec<bool> = flags.iter().map(|u| *u < 0.3).collect();
        let mask = masked.then(|| Mask::from_bools(&flags)).transpose()?;
        let len = mask.as_ref().map_or(LEN, Mask::count);
        let mut grad = normal("grad", LEN, DType::F64)?.to_vec1::<f64>()?;
        for (i, special) in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0]
            .iter()
            .enumerate()
        {
            grad[i * 700] = *special;
        }
        Ok(Self {
            param: normal("param", LEN, param)?,
            grad: Tensor::from_vec(grad, LEN, &Device::Cpu)?.to_dtype(param)?,
            state: (0..S)
                .map(|j| Ok(normal(&format!("state{j}"), len, state)?.abs()?))
                .collect::<Result<_>>()?,
            mask,
            hold,
            map: GradMap {
                scale: 0.75,
                clip: if masked { f64::INFINITY } else { 1.5 },
                outer: -1.25,
                along: 0.125,
            },
        })
    }

    fn on_cpu<R: Rule<S, K>, const K: usize>(&self, rule: R) -> Result<Vec<u8>> {
        let var = Var::from_tensor(&self.param)?;
        let dtype = self.state.first().map_or(DType::F32, Tensor::dtype);
        let wanted = match S {
            0 => StateDType::Compute,
            _ => StateDType::Fixed(dtype),
        };
        let mut fused = FusedUpdate::<S>::new(vec![("p".into(), var.clone())], wanted)?;
        fused.set_mask(0, self.mask.clone())?;
        for (slot, state) in self.state.iter().enumerate() {
            fused.load_state(0, slot, state)?;
        }
        fused.step(self.hold, |_| {
            Ok(Some(Work {
                grad: &self.grad,
                rule,
                map: self.map,
            }))
        })?;
        let mut bytes = bytes_of(&var)?;
        for slot in 0..S {
            bytes.extend(bytes_of(&fused.state(0, slot)?)?);
        }
        for count in [fused.events(0), fused.held(0)] {
            bytes.extend((count as u32).to_le_bytes());
        }
        Ok(bytes)
    }

    fn on_host(&self, dir: &Path, program: &Path, scalars: &[f64]) -> Result<Vec<u8>> {
        let words = self.mask.as_ref().map_or(&[][..], Mask::words);
        let state_len = self.state.first().map_or(0, Tensor::elem_count);
        let mut input = vec![];
        for head in [LEN, state_len, words.len(), usize::from(self.hold)] {
            input.extend((head as u64).to_le_bytes());
        }
        let map = map_scalars(&self.map, self.param.dtype());
        input.extend(scalars.iter().chain(&map).flat_map(|x| x.to_le_bytes()));
        input.extend(bytes_of(&self.param)?);
        input.extend(bytes_of(&self.grad)?);
        input.extend(words.iter().flat_map(|w| w.to_le_bytes()));
        let offsets = self.mask.as_ref().map_or(&[][..], Mask::offsets);
        input.extend(offsets.iter().flat_map(|w| w.to_le_bytes()));
        for state in &self.state {
            input.extend(bytes_of(state)?);
        }
        let (from, to) = (dir.join("in"), dir.join("out"));
        std::fs::write(&from, input).map_err(|e| Error::io(&from, e))?;
        let status = Command::new(program).args([&from, &to]).status();
        match status {
            Ok(status) if status.success() => std::fs::read(&to).map_err(|e| Error::io(&to, e)),
            other => Err(Error::BadFile {
                path: program.display().to_string(),
                reason: format!("{other:?}"),
            }),
        }
    }
}

fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>> {
    Ok(match tensor.dtype() {
        DType::F32 => tensor
            .to_vec1::<f32>()?
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect(),
        DType::F64 => tensor
            .to_vec1::<f64>()?
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect(),
        _ => tensor
            .to_vec1::<half::bf16>()?
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect(),
    })
}
