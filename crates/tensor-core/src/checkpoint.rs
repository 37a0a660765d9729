//! Named state in safetensors files that are written whole or not at all.
//!
//! A [`Checkpoint`] is what an optimizer, a model or a run needs to continue: named tensors, text
//! metadata (hyper-parameters), and the kind of thing that it is a state of. [`Checkpoint::save`]
//! writes a temporary file in the same folder, syncs it, renames it over the target and syncs the
//! folder: after a crash the target is the old file or the new one, never half of one. The file
//! carries a format version, the version of this crate and a SHA-256 of everything in it.
//!
//! Loading is two steps: [`Checkpoint::load`] refuses files that are damaged or newer than this
//! version, [`Checkpoint::check`] compares kind, names, shapes and dtypes with what is expected and
//! lists everything that differs.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use thalweg_tensor_core::checkpoint::{Checkpoint, State};
//!
//! let mut state = State::new();
//! state.insert("momentum.0".into(), Tensor::zeros((4, 3), DType::F32, &Device::Cpu)?);
//! let path = std::env::temp_dir().join(format!("thalweg-doc-{}.safetensors", std::process::id()));
//! Checkpoint::new("sgd", state).with("momentum", 0.9).save(&path)?;
//!
//! let loaded = Checkpoint::load(&path, &Device::Cpu)?;
//! loaded.check("sgd", [("momentum.0", (4, 3), DType::F32)])?;
//! assert_eq!(loaded.number::<f64>("momentum")?, 0.9);
//! let refused = loaded.check("sgd", [("momentum.0", (4, 4), DType::F32)]);
//! assert!(refused.unwrap_err().to_string().contains("[4, 3]"));
//! # std::fs::remove_file(&path).ok();
//! # Ok::<(), thalweg_tensor_core::Error>(())
//! ```

use crate::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor, WithDType};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Named tensors, sorted by name.
pub type State = BTreeMap<String, Tensor>;

/// The version of the file format that this crate writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;

/// Metadata keys that start so belong to the format.
const RESERVED: &str = "thalweg.";
const FORMAT: &str = "thalweg.format";
const WRITER: &str = "thalweg.version";
const KIND: &str = "thalweg.kind";
const DIGEST: &str = "thalweg.sha256";

/// A state with its metadata; see the [module](self) page.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// What this is a state of: `adamw`, `trainer`, ...
    pub kind: String,
    /// The tensors; U8, U32, I64, BF16, F16, F32 or F64.
    pub tensors: State,
    /// Hyper-parameters and whatever else is text. Keys starting with `thalweg.` are refused.
    pub metadata: BTreeMap<String, String>,
    /// The version of this crate that wrote the file.
    pub written_by: String,
}

/// Name, shape and dtype that a tensor of a state should have. Made from a tuple
/// `(name, shape, dtype)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name.
    pub name: String,
    /// The shape.
    pub shape: Vec<usize>,
    /// The dtype.
    pub dtype: DType,
}

impl<N: Into<String>, S: Into<Shape>> From<(N, S, DType)> for TensorSpec {
    fn from((name, shape, dtype): (N, S, DType)) -> Self {
        Self {
            name: name.into(),
            shape: shape.into().into_dims(),
            dtype,
        }
    }
}

/// The specification that `state` itself meets.
pub fn spec_of(state: &State) -> Vec<TensorSpec> {
    let spec = |(name, tensor): (&String, &Tensor)| {
        TensorSpec::from((name, tensor.shape(), tensor.dtype()))
    };
    state.iter().map(spec).collect()
}

/// Compares a state with what is expected of it: the check of every `load_state`.
///
/// # Errors
/// [`Error::CheckpointMismatch`] that lists every missing tensor, unexpected tensor, wrong shape
/// and wrong dtype.
pub fn expect_state(
    state: &State,
    expected: impl IntoIterator<Item = impl Into<TensorSpec>>,
) -> Result<()> {
    refuse(differences(state, expected))
}

fn refuse(differences: Vec<String>) -> Result<()> {
    if differences.is_empty() {
        Ok(())
    } else {
        Err(Error::CheckpointMismatch(differences))
    }
}

fn differences(
    state: &State,
    expected: impl IntoIterator<Item = impl Into<TensorSpec>>,
) -> Vec<String> {
    let mut found = Vec::new();
    let mut unexpected: BTreeMap<&str, &Tensor> = state
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    for spec in expected {
        let TensorSpec { name, shape, dtype } = spec.into();
        let Some(tensor) = state.get(&name) else {
            found.push(format!("missing tensor `{name}` {shape:?} {dtype:?}"));
            continue;
        };
        unexpected.remove(name.as_str());
        if tensor.dims() != shape {
            let got = tensor.dims();
            found.push(format!("`{name}` has shape {got:?}, expected {shape:?}"));
        }
        if tensor.dtype() != dtype {
            let got = tensor.dtype();
            found.push(format!("`{name}` has dtype {got:?}, expected {dtype:?}"));
        }
    }
    found.extend(unexpected.iter().map(|(name, tensor)| {
        format!(
            "unexpected tensor `{name}` {:?} {:?}",
            tensor.dims(),
            tensor.dtype()
        )
    }));
    found
}

impl Checkpoint {
    /// A checkpoint without metadata.
    pub fn new(kind: impl Into<String>, tensors: State) -> Self {
        Self {
            kind: kind.into(),
            tensors,
            metadata: BTreeMap::new(),
            written_by: env!("CARGO_PKG_VERSION").to_string(),
        }
    }

    /// Adds one line of metadata. Floats written by `to_string` read back with the same bits.
    #[must_use]
    pub fn with(mut self, key: impl Into<String>, value: impl ToString) -> Self {
        self.metadata.insert(key.into(), value.to_string());
        self
    }

    /// A metadata value as text.
    ///
    /// # Errors
    /// [`Error::CheckpointMismatch`] when it is missing.
    pub fn text(&self, key: &str) -> Result<&str> {
        let missing = || Error::CheckpointMismatch(vec![format!("metadata `{key}` is missing")]);
        self.metadata
            .get(key)
            .map(String::as_str)
            .ok_or_else(missing)
    }

    /// A metadata value parsed: a number, a `bool`, whatever has [`FromStr`].
    ///
    /// # Errors
    /// [`Error::CheckpointMismatch`] when it is missing or does not parse.
    pub fn number<T: FromStr>(&self, key: &str) -> Result<T> {
        let text = self.text(key)?;
        text.parse().map_err(|_| {
            let wanted = std::any::type_name::<T>();
            Error::CheckpointMismatch(vec![format!(
                "metadata `{key}` is `{text}`, expected {wanted}"
            )])
        })
    }

    /// Compares kind, names, shapes and dtypes with what is expected.
    ///
    /// # Errors
    /// [`Error::CheckpointMismatch`] that lists everything that differs.
    pub fn check(
        &self,
        kind: &str,
        expected: impl IntoIterator<Item = impl Into<TensorSpec>>,
    ) -> Result<()> {
        let mut found = Vec::new();
        if self.kind != kind {
            found.push(format!("state of `{}`, expected `{kind}`", self.kind));
        }
        found.extend(differences(&self.tensors, expected));
        refuse(found)
    }

    /// Writes the file, whole or not at all; an older file of that name is replaced. Holds one
    /// copy of the state in host memory while it writes. A crash can leave a file
    /// `.NAME.*.tmp` behind, which nobody reads.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::InvalidArgument`] for a metadata key or tensor name that the format
    /// keeps for itself; [`Error::Unsupported`] for a dtype that is not in the list above.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        self.check_names()?;
        let mut blobs = Vec::with_capacity(self.tensors.len());
        for (name, tensor) in &self.tensors {
            let (dtype, bytes) = encode(name, tensor)?;
            blobs.push((name.as_str(), dtype, tensor.dims().to_vec(), bytes));
        }
        let mut digest = Content::new(&self.kind, &self.written_by, &self.metadata);
        let mut views = Vec::with_capacity(blobs.len());
        for (name, dtype, shape, bytes) in &blobs {
            digest.tensor(name, *dtype, shape, bytes);
            let view = TensorView::new(*dtype, shape.clone(), bytes);
            views.push((*name, view.map_err(|e| bad_file(path, e))?));
        }
        let mut header: HashMap<String, String> = self.metadata.clone().into_iter().collect();
        header.insert(FORMAT.into(), FORMAT_VERSION.to_string());
        header.insert(WRITER.into(), self.written_by.clone());
        header.insert(KIND.into(), self.kind.clone());
        header.insert(DIGEST.into(), digest.finish());
        write_atomically(path, |temporary| {
            use safetensors::SafeTensorError::IoError;
            safetensors::serialize_to_file(views, Some(header), temporary).map_err(|e| match e {
                IoError(e) => Error::io(path, e),
                other => bad_file(path, other),
            })
        })?;
        tracing::debug!(path = %path.display(), kind = self.kind, tensors = blobs.len(), "saved");
        Ok(())
    }

    fn check_names(&self) -> Result<()> {
        if let Some(key) = self.metadata.keys().find(|key| key.starts_with(RESERVED)) {
            return Err(Error::invalid(
                "metadata key",
                key,
                format!("no key in `{RESERVED}*`"),
            ));
        }
        // The one name that the header of a safetensors file keeps for itself.
        if self.tensors.contains_key("__metadata__") {
            return Err(Error::invalid(
                "tensor name",
                "__metadata__",
                "another name",
            ));
        }
        Ok(())
    }

    /// Reads a file and puts its tensors on `device`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::NewerFormat`]; [`Error::BadFile`] for a truncated or damaged file,
    /// one that is not a checkpoint, and one with a dtype that is not in the list above.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let buffer = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let (_, header) = SafeTensors::read_metadata(&buffer).map_err(|e| bad_file(path, e))?;
        let mut metadata: BTreeMap<String, String> = header
            .metadata()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect();
        let mut take = |key: &str| {
            let missing = || {
                bad_file(
                    path,
                    format!("not a checkpoint: metadata `{key}` is missing"),
                )
            };
            metadata.remove(key).ok_or_else(missing)
        };
        let format = take(FORMAT)?;
        let found: u32 = format.parse().map_err(|_| {
            bad_file(
                path,
                format!("checkpoint format `{format}` is not a number"),
            )
        })?;
        if found > FORMAT_VERSION {
            return Err(Error::NewerFormat {
                path: path.display().to_string(),
                found,
                supported: FORMAT_VERSION,
            });
        }
        let (written_by, kind, expected) = (take(WRITER)?, take(KIND)?, take(DIGEST)?);
        let mut digest = Content::new(&kind, &written_by, &metadata);
        let file = SafeTensors::deserialize(&buffer).map_err(|e| bad_file(path, e))?;
        let views: BTreeMap<String, TensorView> = file.tensors().into_iter().collect();
        let mut tensors = State::new();
        for (name, view) in views {
            digest.tensor(&name, view.dtype(), view.shape(), view.data());
            let tensor = decode(&view, device)?.ok_or_else(|| {
                bad_file(
                    path,
                    format!("`{name}` has dtype {:?}, which is not read", view.dtype()),
                )
            })?;
            tensors.insert(name, tensor);
        }
        if digest.finish() != expected {
            return Err(bad_file(
                path,
                "damaged: the contents do not match their SHA-256",
            ));
        }
        Ok(Self {
            kind,
            tensors,
            metadata,
            written_by,
        })
    }
}

/// SHA-256 over everything that a checkpoint says, each part preceded by its length.
struct Content(Sha256);

impl Content {
    fn new(kind: &str, written_by: &str, metadata: &BTreeMap<String, String>) -> Self {
        let mut content = Self(Sha256::new());
        content.part(kind.as_bytes());
        content.part(written_by.as_bytes());
        for (key, value) in metadata {
            content.part(key.as_bytes());
            content.part(value.as_bytes());
        }
        content
    }

    fn part(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    fn tensor(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) {
        self.part(name.as_bytes());
        self.part(format!("{dtype:?} {shape:?}").as_bytes());
        self.part(bytes);
    }

    fn finish(self) -> String {
        self.0
            .finalize()
            .iter()
            .fold(String::new(), |mut hex, byte| {
                // Writing to a string cannot fail.
                let _ = write!(hex, "{byte:02x}");
                hex
            })
    }
}

fn bad_file(path: &Path, reason: impl ToString) -> Error {
    Error::BadFile {
        path: path.display().to_string(),
        reason: reason.to_string(),
    }
}

/// Lets `write` fill a temporary file beside `path`, then puts it in the place of `path`.
fn write_atomically(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let io = |e| Error::io(path, e);
    let no_name = || Error::invalid("path", path.display(), "the name of a file");
    let name = path.file_name().ok_or_else(no_name)?;
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let mut builder = tempfile::Builder::new();
    let prefix = format!(".{}.", name.to_string_lossy());
    builder.prefix(&prefix).suffix(".tmp");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // What a plain new file would get; a temporary file is private otherwise.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let temporary = builder.tempfile_in(&folder).map_err(io)?;
    let permissions = temporary.as_file().metadata().map_err(io)?.permissions();
    let temporary = temporary.into_temp_path();
    write(&temporary)?;
    // `write` may have replaced the file: what is synced is what lies there now.
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&temporary)
        .map_err(io)?;
    file.set_permissions(permissions).map_err(io)?;
    file.sync_all().map_err(io)?;
    drop(file);
    temporary.persist(path).map_err(|e| io(e.error))?;
    // The rename itself is durable once the folder is; Windows has no such call.
    #[cfg(unix)]
    std::fs::File::open(&folder)
        .and_then(|folder| folder.sync_all())
        .map_err(io)?;
    Ok(())
}

fn encode(name: &str, tensor: &Tensor) -> Result<(Dtype, Vec<u8>)> {
    fn bytes<T: WithDType, const N: usize>(
        tensor: &Tensor,
        write: impl Fn(T) -> [u8; N],
    ) -> Result<Vec<u8>> {
        let values = tensor.flatten_all()?.to_vec1::<T>()?;
        Ok(values.into_iter().flat_map(write).collect())
    }
    Ok(match tensor.dtype() {
        DType::U8 => (Dtype::U8, bytes(tensor, u8::to_le_bytes)?),
        DType::U32 => (Dtype::U32, bytes(tensor, u32::to_le_bytes)?),
        DType::I64 => (Dtype::I64, bytes(tensor, i64::to_le_bytes)?),
        DType::BF16 => (Dtype::BF16, bytes(tensor, half::bf16::to_le_bytes)?),
        DType::F16 => (Dtype::F16, bytes(tensor, half::f16::to_le_bytes)?),
        DType::F32 => (Dtype::F32, bytes(tensor, f32::to_le_bytes)?),
        DType::F64 => (Dtype::F64, bytes(tensor, f64::to_le_bytes)?),
        other => {
            let what = format!("saving tensor `{name}`");
            return Err(Error::unsupported(what, format!("for dtype {other:?}")));
        }
    })
}

fn decode(view: &TensorView, device: &Device) -> Result<Option<Tensor>> {
    fn tensor<T: WithDType, const N: usize>(
        view: &TensorView,
        device: &Device,
        read: impl Fn([u8; N]) -> T,
    ) -> Result<Option<Tensor>> {
        let one = |chunk: &[u8]| {
            let mut word = [0; N];
            word.copy_from_slice(chunk);
            read(word)
        };
        let values: Vec<T> = view.data().chunks_exact(N).map(one).collect();
        Ok(Some(Tensor::from_vec(values, view.shape(), device)?))
    }
    match view.dtype() {
        Dtype::U8 => tensor(view, device, u8::from_le_bytes),
        Dtype::U32 => tensor(view, device, u32::from_le_bytes),
        Dtype::I64 => tensor(view, device, i64::from_le_bytes),
        Dtype::BF16 => tensor(view, device, half::bf16::from_le_bytes),
        Dtype::F16 => tensor(view, device, half::f16::from_le_bytes),
        Dtype::F32 => tensor(view, device, f32::from_le_bytes),
        Dtype::F64 => tensor(view, device, f64::from_le_bytes),
        _ => Ok(None),
    }
}
