//! The pickles of the Planetoid files: numbers, text, lists, dictionaries, and the two classes of
//! arrays. Everything else is refused; nothing is ever called.

use std::collections::HashMap;

/// Text of an error; the caller adds the file.
pub(super) type Fallible<T> = Result<T, String>;

type Id = usize;

/// A value; parts are indices into the arena.
#[derive(Debug, Clone)]
enum Value {
    None,
    Bool(bool),
    Int(i64),
    Bytes(Vec<u8>),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Known),
    Object {
        class: Known,
        args: Id,
        state: Option<Id>,
    },
}

/// The classes and functions that may occur.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    CsrMatrix,
    Ndarray,
    Dtype,
    Reconstruct,
    DefaultDict,
    List,
}

fn known(module: &str, name: &str) -> Fallible<Known> {
    let module = module.replace("numpy._core", "numpy.core");
    Ok(match (module.as_str(), name) {
        ("scipy.sparse.csr" | "scipy.sparse._csr", "csr_matrix") => Known::CsrMatrix,
        ("numpy", "ndarray") => Known::Ndarray,
        ("numpy", "dtype") => Known::Dtype,
        ("numpy.core.multiarray", "_reconstruct") => Known::Reconstruct,
        ("collections", "defaultdict") => Known::DefaultDict,
        ("__builtin__" | "builtins", "list") => Known::List,
        _ => {
            return Err(format!(
                "the pickle asks for `{module}.{name}`, which is refused"
            ))
        }
    })
}

/// A finished pickle.
pub(super) struct Pickle {
    arena: Vec<Value>,
    root: Id,
}

/// A numeric array.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Array {
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
}

/// A sparse matrix.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct SparseMatrix {
    pub rows: usize,
    pub cols: usize,
    pub indptr: Vec<u32>,
    pub indices: Vec<u32>,
    pub values: Vec<f64>,
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    arena: Vec<Value>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl Pickle {
    /// Interprets a pickle of protocol 2 or 3.
    pub(super) fn parse(bytes: &[u8]) -> Fallible<Self> {
        let mut machine = Machine {
            bytes,
            at: 0,
            arena: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        while machine.step()? {}
        let root = machine.pop()?;
        Ok(Self {
            arena: machine.arena,
            root,
        })
    }

    fn value(&self, id: Id) -> &Value {
        &self.arena[id]
    }

    fn tuple(&self, id: Id, what: &str) -> Fallible<&[Id]> {
        match self.value(id) {
            Value::Tuple(items) => Ok(items),
            other => Err(format!("{what}: expected a tuple, found {}", kind(other))),
        }
    }

    fn size(&self, id: Id, what: &str) -> Fallible<usize> {
        match self.value(id) {
            Value::Int(v) if *v >= 0 => Ok(*v as usize),
            other => Err(format!("{what}: expected a size, found {}", kind(other))),
        }
    }

    fn text(&self, id: Id, what: &str) -> Fallible<&str> {
        let bytes = match self.value(id) {
            Value::Bytes(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        };
        bytes.ok_or_else(|| format!("{what}: expected text"))
    }

    /// The whole pickle as an array.
    pub(super) fn array(&self) -> Fallible<Array> {
        self.array_at(self.root)
    }

    fn array_at(&self, id: Id) -> Fallible<Array> {
        let state = match self.value(id) {
            Value::Object {
                class: Known::Reconstruct | Known::Ndarray,
                state: Some(state),
                ..
            } => *state,
            other => return Err(format!("expected an array, found {}", kind(other))),
        };
        let [_, shape, dtype, fortran, data] = self.tuple(state, "an array's state")?[..] else {
            return Err("an array's state has another form".into());
        };
        let shape = self.tuple(shape, "an array's shape")?;
        let shape: Vec<usize> = shape
            .iter()
            .map(|d| self.size(*d, "an array's shape"))
            .collect::<Fallible<_>>()?;
        if shape.len() > 1 && matches!(self.value(fortran), Value::Bool(true)) {
            return Err("an array in Fortran order".into());
        }
        let Value::Bytes(data) = self.value(data) else {
            return Err("an array without bytes".into());
        };
        let values = self.decode(dtype, data)?;
        let count = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        if count != Some(values.len()) {
            return Err(format!(
                "{} numbers for an array of shape {shape:?}",
                values.len()
            ));
        }
        Ok(Array { shape, values })
    }

    fn decode(&self, dtype: Id, data: &[u8]) -> Fallible<Vec<f64>> {
        let (args, state) = match self.value(dtype) {
            Value::Object {
                class: Known::Dtype,
                args,
                state,
            } => (*args, *state),
            other => return Err(format!("expected a dtype, found {}", kind(other))),
        };
        let first = |id: Id| self.tuple(id, "a dtype").map(|t| t.first().copied());
        let code = first(args)?.ok_or("a dtype without a code")?;
        let code = self.text(code, "a dtype")?;
        if let Some(state) = state {
            let order = self.tuple(state, "a dtype's state")?.get(1).copied();
            let order = order.map(|id| self.text(id, "a byte order")).transpose()?;
            if order == Some(">") {
                return Err("an array of big-endian numbers".into());
            }
        }
        macro_rules! numbers {
            ($t:ty) => {{
                let size = std::mem::size_of::<$t>();
                if data.len() % size != 0 {
                    return Err(format!("{} bytes of numbers of {size} bytes", data.len()));
                }
                let one = |b: &[u8]| {
                    let mut word = [0u8; std::mem::size_of::<$t>()];
                    word.copy_from_slice(b);
                    <$t>::from_le_bytes(word) as f64
                };
                data.chunks_exact(size).map(one).collect()
            }};
        }
        Ok(match code {
            "i4" => numbers!(i32),
            "i8" => numbers!(i64),
            "u4" => numbers!(u32),
            "i1" => numbers!(i8),
            "u1" | "b1" => numbers!(u8),
            "f4" => numbers!(f32),
            "f8" => numbers!(f64),
            other => {
                return Err(format!(
                    "an array of `{other}`: expected integers or floats"
                ))
            }
        })
    }

    /// The whole pickle as a sparse matrix.
    pub(super) fn sparse(&self) -> Fallible<SparseMatrix> {
        let state = match self.value(self.root) {
            Value::Object {
                class: Known::CsrMatrix,
                state: Some(state),
                ..
            } => *state,
            other => return Err(format!("expected a csr_matrix, found {}", kind(other))),
        };
        let Value::Dict(entries) = self.value(state) else {
            return Err("a csr_matrix without its fields".into());
        };
        let field = |name: &str| {
            let found = entries
                .iter()
                .find(|(k, _)| self.text(*k, "a field").is_ok_and(|t| t == name));
            found
                .map(|(_, v)| *v)
                .ok_or_else(|| format!("a csr_matrix without `{name}`"))
        };
        let [rows, cols] = self.tuple(field("_shape")?, "`_shape`")?[..] else {
            return Err("`_shape` is not two numbers".into());
        };
        let (rows, cols) = (self.size(rows, "`_shape`")?, self.size(cols, "`_shape`")?);
        let indices = |name: &str| -> Fallible<Vec<u32>> {
            let one = |v: &f64| match *v {
                v if v >= 0.0 && v <= f64::from(u32::MAX) => Ok(v as u32),
                v => Err(format!("`{name}` holds {v}")),
            };
            self.array_at(field(name)?)?
                .values
                .iter()
                .map(one)
                .collect()
        };
        let indptr = indices("indptr")?;
        if indptr.len() != rows.saturating_add(1) {
            return Err(format!("`indptr` of {} for {rows} rows", indptr.len()));
        }
        Ok(SparseMatrix {
            rows,
            cols,
            indptr,
            indices: indices("indices")?,
            values: self.array_at(field("data")?)?.values,
        })
    }

    /// The whole pickle as a dictionary from nodes to lists of neighbors.
    pub(super) fn adjacency(&self) -> Fallible<Vec<(u32, Vec<u32>)>> {
        let entries = match self.value(self.root) {
            Value::Dict(entries) => entries,
            other => return Err(format!("expected a dictionary, found {}", kind(other))),
        };
        let node = |id: Id| {
            let v = self.size(id, "a node")?;
            u32::try_from(v).map_err(|_| format!("node {v}"))
        };
        let one = |(k, v): &(Id, Id)| {
            let Value::List(items) = self.value(*v) else {
                return Err("a node without a list of neighbors".to_string());
            };
            let neighbors = items.iter().map(|id| node(*id)).collect::<Fallible<_>>()?;
            Ok((node(*k)?, neighbors))
        };
        entries.iter().map(one).collect()
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::None => "None",
        Value::Bool(_) => "a truth value",
        Value::Int(_) => "an integer",
        Value::Bytes(_) => "text",
        Value::Tuple(_) => "a tuple",
        Value::List(_) => "a list",
        Value::Dict(_) => "a dictionary",
        Value::Global(_) => "a class",
        Value::Object { .. } => "an object",
    }
}

impl<'a> Machine<'a> {
    fn take(&mut self, n: usize) -> Fallible<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|e| *e <= self.bytes.len());
        let end = end.ok_or_else(|| format!("the pickle ends after {} bytes", self.bytes.len()))?;
        let part = &self.bytes[self.at..end];
        self.at = end;
        Ok(part)
    }

    fn number(&mut self, bytes: usize) -> Fallible<u64> {
        let part = self.take(bytes)?;
        Ok(part.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    }

    fn line(&mut self) -> Fallible<&'a str> {
        let rest = &self.bytes[self.at..];
        let end = rest
            .iter()
            .position(|b| *b == b'\n')
            .ok_or("a name without an end")?;
        self.at += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|_| "a name that is not text".to_string())
    }

    fn push(&mut self, value: Value) {
        self.arena.push(value);
        self.stack.push(self.arena.len() - 1);
    }

    fn pop(&mut self) -> Fallible<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("an instruction without its operand".into());
        }
        self.stack.pop().ok_or_else(|| "an empty stack".to_string())
    }

    fn pop_mark(&mut self) -> Fallible<Vec<Id>> {
        let mark = self.marks.pop().ok_or("an instruction without its mark")?;
        Ok(self.stack.split_off(mark))
    }

    fn top(&self) -> Fallible<Id> {
        self.stack
            .last()
            .copied()
            .ok_or_else(|| "an empty stack".to_string())
    }

    /// One instruction; false after the last.
    fn step(&mut self) -> Fallible<bool> {
        let op = self.take(1)?[0];
        match op {
            0x80 => {
                self.take(1)?;
            }
            b'.' => return Ok(false),
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.push(Value::None),
            0x88 | 0x89 => self.push(Value::Bool(op == 0x88)),
            b'K' | b'M' | b'J' | 0x8a => self.integer(op)?,
            b'U' | b'T' | b'X' | b'C' | b'B' => {
                let length = self.number(if matches!(op, b'U' | b'C') { 1 } else { 4 })?;
                let bytes = self.take(length as usize)?.to_vec();
                self.push(Value::Bytes(bytes));
            }
            b')' | 0x85 | 0x86 | 0x87 | b't' => self.make_tuple(op)?,
            b']' => self.push(Value::List(Vec::new())),
            b'}' => self.push(Value::Dict(Vec::new())),
            b'a' | b'e' | b's' | b'u' => self.extend(op)?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Value::Global(known(module, name)?));
            }
            b'R' | 0x81 => self.construct()?,
            b'b' => self.build()?,
            b'q' | b'r' | b'h' | b'j' => self.memo(op)?,
            other => return Err(format!("instruction {other:#04x} is refused")),
        }
        Ok(true)
    }

    fn integer(&mut self, op: u8) -> Fallible<()> {
        let value = match op {
            b'K' => self.number(1)? as i64,
            b'M' => self.number(2)? as i64,
            b'J' => i64::from(self.number(4)? as u32 as i32),
            _ => {
                let length = self.number(1)? as usize;
                if length > 8 {
                    return Err(format!("an integer of {length} bytes"));
                }
                let unused = 64 - 8 * length as u32;
                let raw = self.number(length)?;
                // Sign-extended from its highest byte.
                if length == 0 {
                    0
                } else {
                    ((raw << unused) as i64) >> unused
                }
            }
        };
        self.push(Value::Int(value));
        Ok(())
    }

    fn make_tuple(&mut self, op: u8) -> Fallible<()> {
        let items = match op {
            b')' => Vec::new(),
            b't' => self.pop_mark()?,
            _ => {
                let count = usize::from(op - 0x84);
                let mut items = (0..count)
                    .map(|_| self.pop())
                    .collect::<Fallible<Vec<_>>>()?;
                items.reverse();
                items
            }
        };
        self.push(Value::Tuple(items));
        Ok(())
    }

    fn extend(&mut self, op: u8) -> Fallible<()> {
        let items = match op {
            b'a' => vec![self.pop()?],
            b's' => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => self.pop_mark()?,
        };
        let top = self.top()?;
        match (&mut self.arena[top], op) {
            (Value::List(list), b'a' | b'e') => list.extend(items),
            (Value::Dict(dict), b's' | b'u') if items.len() % 2 == 0 => {
                dict.extend(items.chunks_exact(2).map(|p| (p[0], p[1])));
            }
            (other, _) => return Err(format!("items for {}", kind(other))),
        }
        Ok(())
    }

    fn construct(&mut self) -> Fallible<()> {
        let args = self.pop()?;
        let class = self.pop()?;
        let class = match &self.arena[class] {
            Value::Global(class) => *class,
            other => return Err(format!("a call of {}", kind(other))),
        };
        match class {
            Known::DefaultDict => self.push(Value::Dict(Vec::new())),
            Known::List => self.push(Value::List(Vec::new())),
            class => self.push(Value::Object {
                class,
                args,
                state: None,
            }),
        }
        Ok(())
    }

    fn build(&mut self) -> Fallible<()> {
        let new = self.pop()?;
        let top = self.top()?;
        match &mut self.arena[top] {
            Value::Object { state, .. } => *state = Some(new),
            other => return Err(format!("a state for {}", kind(other))),
        }
        Ok(())
    }

    fn memo(&mut self, op: u8) -> Fallible<()> {
        let key = self.number(if matches!(op, b'q' | b'h') { 1 } else { 4 })? as u32;
        if matches!(op, b'q' | b'r') {
            let top = self.top()?;
            self.memo.insert(key, top);
        } else {
            let id = self.memo.get(&key).copied();
            self.stack
                .push(id.ok_or_else(|| format!("memo {key} is empty"))?);
        }
        Ok(())
    }
}
