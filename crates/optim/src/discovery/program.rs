//! Programs as data and as text.

use super::ops::Op;
use crate::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// A name's place in [`Program::names`].
pub type VarId = usize;

/// An argument of a statement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// What a name stands for at this place.
    Var(VarId),
    /// A number.
    Const(f64),
}

/// `dst = op(args)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Stmt {
    /// The name that is set.
    pub dst: VarId,
    /// The operation.
    pub op: Op,
    /// Its arguments.
    pub args: Vec<Arg>,
}

/// A straight-line function: inputs, statements one after the other, outputs.
///
/// ```
/// use thalweg_optim::discovery::Program;
///
/// let text = "def train(w, g, m, v, lr):\n  m = interpolate(g, m, 0.9)\n  update = m * lr\n  return (update, m, v)\n";
/// let program: Program = text.parse()?;
/// assert_eq!(program.to_string(), text);
/// // Nested expressions are taken apart.
/// let nested: Program = "def f(w, g, m, v, lr):\n  update = sign(0.1 * g + 0.9 * m) * lr\n  return (update, g, v)".parse()?;
/// assert_eq!(nested.body.len(), 5);
/// # Ok::<(), thalweg_optim::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Program {
    /// The function's name.
    pub name: String,
    /// All names; the inputs come first.
    pub names: Vec<String>,
    /// How many of the names are inputs.
    pub inputs: usize,
    /// The statements.
    pub body: Vec<Stmt>,
    /// What is returned.
    pub outputs: Vec<VarId>,
}

/// AdamW without bias correction and epsilon: where searches begin.
const ADAMW: &str = "def train(w, g, m, v, lr):
  g2 = square(g)
  m = interpolate(g, m, 0.9)
  v = interpolate(g2, v, 0.999)
  sqrt_v = sqrt(v)
  update = m / sqrt_v
  wd = w * 0.01
  update = update + wd
  lr = lr * 0.001
  update = update * lr
  return (update, m, v)
";

const LION: &str = "def train(w, g, m, v, lr):
  update = interpolate(g, m, 0.9)
  update = sign(update)
  m = interpolate(g, m, 0.99)
  wd = w * 0.1
  update = update + wd
  lr = lr * 0.0001
  update = update * lr
  return (update, m, v)
";

const RAW_LION: &str = "def train(w, g, m, v, lr):
  g = clip(g, lr)
  g = arcsin(g)
  m = interpolate(g, v, 0.899)
  m2 = m * m
  v = interpolate(g, m, 1.109)
  abs_m = sqrt(m2)
  update = m / abs_m
  wd = w * 0.4602
  update = update + wd
  lr = lr * 0.0002
  m = cosh(update)
  update = update * lr
  return (update, m, v)
";

impl Program {
    /// The simplified AdamW that the paper's search began from.
    ///
    /// # Errors
    /// None.
    pub fn adamw() -> Result<Self> {
        ADAMW.parse()
    }

    /// Lion as the paper wrote it down.
    ///
    /// # Errors
    /// None.
    pub fn lion() -> Result<Self> {
        LION.parse()
    }

    /// The program that the paper's search ended with, before it was simplified to Lion.
    ///
    /// # Errors
    /// None.
    pub fn raw_lion() -> Result<Self> {
        RAW_LION.parse()
    }

    /// Reads program text.
    ///
    /// # Errors
    /// [`Error::Program`] with the line and the reason.
    pub fn parse(text: &str) -> Result<Self> {
        Parser::new(text).program()
    }

    /// The place of a name, which is added if it is new.
    pub(super) fn intern(&mut self, name: &str) -> VarId {
        if let Some(i) = self.names.iter().position(|n| n == name) {
            return i;
        }
        self.names.push(name.to_string());
        self.names.len() - 1
    }

    /// A name that no other is.
    pub(super) fn fresh(&mut self) -> VarId {
        let mut i = 0;
        while self.names.contains(&format!("v{i}")) {
            i += 1;
        }
        self.intern(&format!("v{i}"))
    }

    /// Puts the names in the order in which they are first set, as reading the text does, and drops
    /// those that nothing uses: a program and what is read back from its text are then the same.
    pub(super) fn tidy(&mut self) {
        let mut place: Vec<Option<usize>> = vec![None; self.names.len()];
        let mut names = Vec::with_capacity(self.names.len());
        let set = self.body.iter().map(|stmt| stmt.dst);
        for id in (0..self.inputs).chain(set) {
            if place[id].is_none() {
                place[id] = Some(names.len());
                names.push(self.names[id].clone());
            }
        }
        self.names = names;
        // A well-typed program uses no name that is not set.
        let moved = |id: usize| place[id].unwrap_or(0);
        for stmt in &mut self.body {
            stmt.dst = moved(stmt.dst);
            for arg in &mut stmt.args {
                if let Arg::Var(id) = arg {
                    *id = moved(*id);
                }
            }
        }
        self.outputs.iter_mut().for_each(|id| *id = moved(*id));
    }

    fn write_arg(&self, f: &mut fmt::Formatter<'_>, arg: &Arg) -> fmt::Result {
        match arg {
            Arg::Var(id) => f.write_str(&self.names[*id]),
            // The shortest digits that read back as the same number.
            Arg::Const(x) => write!(f, "{x:?}"),
        }
    }
}

impl FromStr for Program {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inputs = self.names[..self.inputs].join(", ");
        writeln!(f, "def {}({inputs}):", self.name)?;
        for stmt in &self.body {
            write!(f, "  {} = ", self.names[stmt.dst])?;
            match (stmt.op, stmt.args.as_slice()) {
                (Op::Copy, [x]) => self.write_arg(f, x)?,
                (op, [x, y]) if op.is_infix() => {
                    self.write_arg(f, x)?;
                    write!(f, " {} ", op.name())?;
                    self.write_arg(f, y)?;
                }
                (op, args) => {
                    write!(f, "{}(", op.name())?;
                    for (i, arg) in args.iter().enumerate() {
                        if i > 0 {
                            f.write_str(", ")?;
                        }
                        self.write_arg(f, arg)?;
                    }
                    f.write_str(")")?;
                }
            }
            writeln!(f)?;
        }
        let outputs: Vec<&str> = self
            .outputs
            .iter()
            .map(|i| self.names[*i].as_str())
            .collect();
        writeln!(f, "  return ({})", outputs.join(", "))
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Program {
    fn serialize<S: serde::Serializer>(&self, out: S) -> std::result::Result<S::Ok, S::Error> {
        out.collect_str(self)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for Program {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Name(String),
    Number(f64),
    Symbol(char),
}

struct Parser<'a> {
    lines: Vec<(usize, &'a str)>,
    line: usize,
    tokens: Vec<Token>,
    at: usize,
}

/// Words of the official language that this one does not have.
const UNSUPPORTED: [&str; 6] = ["if", "else", "elif", "for", "while", "lambda"];

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        let strip = |line: &'a str| line.split('#').next().unwrap_or("").trim();
        let lines = text
            .lines()
            .enumerate()
            .map(|(i, line)| (i + 1, strip(line)));
        Self {
            lines: lines.filter(|(_, line)| !line.is_empty()).collect(),
            line: 0,
            tokens: Vec::new(),
            at: 0,
        }
    }

    fn error<T>(&self, reason: impl ToString) -> Result<T> {
        Err(Error::Program {
            line: self.line,
            reason: reason.to_string(),
        })
    }

    fn program(mut self) -> Result<Program> {
        let lines = std::mem::take(&mut self.lines);
        let mut program = Program {
            name: String::new(),
            names: Vec::new(),
            inputs: 0,
            body: Vec::new(),
            outputs: Vec::new(),
        };
        let Some(((first, head), rest)) = lines.split_first() else {
            return self.error("no text");
        };
        self.load(*first, head)?;
        self.head(&mut program)?;
        for (i, (number, text)) in rest.iter().enumerate() {
            self.load(*number, text)?;
            match self.tokens.first() {
                Some(Token::Name(word)) if word == "return" => {
                    if i + 1 < rest.len() {
                        return self.error("a statement after `return`");
                    }
                    self.at = 1;
                    self.outputs(&mut program)?;
                    return Ok(program);
                }
                Some(Token::Name(word)) if word == "def" => {
                    return self.error("inner functions are not part of this language");
                }
                Some(Token::Name(word)) if UNSUPPORTED.contains(&word.as_str()) => {
                    return self.error(format!("`{word}` is not part of this language"));
                }
                _ => self.statement(&mut program)?,
            }
        }
        self.error("no `return`")
    }

    fn load(&mut self, number: usize, text: &str) -> Result<()> {
        self.line = number;
        self.at = 0;
        self.tokens = Vec::new();
        let mut rest = text.chars().peekable();
        while let Some(c) = rest.peek().copied() {
            let mut word = String::new();
            if c.is_whitespace() {
                rest.next();
            } else if c.is_alphabetic() || c == '_' {
                while let Some(c) = rest.next_if(|c| c.is_alphanumeric() || *c == '_') {
                    word.push(c);
                }
                self.tokens.push(Token::Name(word));
            } else if c.is_ascii_digit() || c == '.' {
                // A sign belongs to the number right after its exponent letter.
                let mut last = ' ';
                while let Some(c) = rest.next_if(|c| {
                    c.is_alphanumeric() || *c == '.' || ("+-".contains(*c) && "eE".contains(last))
                }) {
                    word.push(c);
                    last = c;
                }
                match word.parse::<f64>() {
                    Ok(x) if x.is_finite() => self.tokens.push(Token::Number(x)),
                    _ => return self.error(format!("`{word}` is not a finite number")),
                }
            } else {
                self.tokens.push(Token::Symbol(c));
                rest.next();
            }
        }
        Ok(())
    }

    fn next(&mut self) -> Option<Token> {
        let token = self.tokens.get(self.at).cloned();
        self.at += 1;
        token
    }

    fn peek(&self, symbol: char) -> bool {
        self.tokens.get(self.at) == Some(&Token::Symbol(symbol))
    }

    fn demand(&mut self, symbol: char) -> Result<()> {
        match self.next() {
            Some(Token::Symbol(c)) if c == symbol => Ok(()),
            other => self.error(format!("expected `{symbol}`, found {}", describe(&other))),
        }
    }

    fn name(&mut self) -> Result<String> {
        match self.next() {
            Some(Token::Name(name)) => Ok(name),
            other => self.error(format!("expected a name, found {}", describe(&other))),
        }
    }

    fn end(&mut self) -> Result<()> {
        match self.next() {
            None => Ok(()),
            more => self.error(format!("unexpected {}", describe(&more))),
        }
    }

    fn head(&mut self, program: &mut Program) -> Result<()> {
        if self.name()? != "def" {
            return self.error("expected `def NAME(..):`");
        }
        program.name = self.name()?;
        self.demand('(')?;
        loop {
            let name = self.name()?;
            if program.names.contains(&name) {
                return self.error(format!("`{name}` is an input twice"));
            }
            program.names.push(name);
            if !self.peek(',') {
                break;
            }
            self.at += 1;
        }
        program.inputs = program.names.len();
        self.demand(')')?;
        self.demand(':')?;
        self.end()
    }

    fn outputs(&mut self, program: &mut Program) -> Result<()> {
        let parenthesized = self.peek('(');
        self.at += usize::from(parenthesized);
        loop {
            let name = self.name()?;
            match program.names.iter().position(|n| *n == name) {
                Some(id) => program.outputs.push(id),
                None => return self.error(format!("`{name}` is returned but never set")),
            }
            if !self.peek(',') {
                break;
            }
            self.at += 1;
        }
        if parenthesized {
            self.demand(')')?;
        }
        self.end()
    }

    fn statement(&mut self, program: &mut Program) -> Result<()> {
        let name = self.name()?;
        self.demand('=')?;
        let value = self.sum(program)?;
        self.end()?;
        // The last operation of the expression, if it is one, sets the name itself.
        let own = match (value, program.body.last()) {
            (Arg::Var(id), Some(last)) => last.dst == id && id + 1 == program.names.len(),
            _ => false,
        };
        let temporary = own && program.names.last().is_some_and(|n| n.starts_with('%'));
        if temporary {
            program.names.pop();
            let dst = program.intern(&name);
            if let Some(last) = program.body.last_mut() {
                last.dst = dst;
            }
        } else {
            let dst = program.intern(&name);
            program.body.push(Stmt {
                dst,
                op: Op::Copy,
                args: vec![value],
            });
        }
        // What is left of the expression gets names of its own.
        for i in 0..program.names.len() {
            if program.names[i].starts_with('%') {
                let mut k = 0;
                while program.names.contains(&format!("v{k}")) {
                    k += 1;
                }
                program.names[i] = format!("v{k}");
            }
        }
        Ok(())
    }

    /// Adds `op(args)` under a temporary name.
    fn emit(&mut self, program: &mut Program, op: Op, args: Vec<Arg>) -> Arg {
        let name = format!("%{}", program.names.len());
        let dst = program.intern(&name);
        program.body.push(Stmt { dst, op, args });
        Arg::Var(dst)
    }

    fn sum(&mut self, program: &mut Program) -> Result<Arg> {
        let mut left = self.term(program)?;
        while self.peek('+') || self.peek('-') {
            let op = if self.peek('+') { Op::Add } else { Op::Sub };
            self.at += 1;
            let right = self.term(program)?;
            left = self.emit(program, op, vec![left, right]);
        }
        Ok(left)
    }

    fn term(&mut self, program: &mut Program) -> Result<Arg> {
        let mut left = self.factor(program)?;
        while self.peek('*') || self.peek('/') {
            let op = if self.peek('*') { Op::Mul } else { Op::Div };
            self.at += 1;
            let right = self.factor(program)?;
            left = self.emit(program, op, vec![left, right]);
        }
        Ok(left)
    }

    fn factor(&mut self, program: &mut Program) -> Result<Arg> {
        match self.next() {
            Some(Token::Number(x)) => Ok(Arg::Const(x)),
            Some(Token::Symbol('-')) => match self.factor(program)? {
                Arg::Const(x) => Ok(Arg::Const(-x)),
                value => Ok(self.emit(program, Op::Negative, vec![value])),
            },
            Some(Token::Symbol('(')) => {
                let value = self.sum(program)?;
                self.demand(')')?;
                Ok(value)
            }
            Some(Token::Name(name)) if self.peek('(') => self.call(program, &name),
            Some(Token::Name(name)) => match program.names.iter().position(|n| *n == name) {
                Some(id) => Ok(Arg::Var(id)),
                None => self.error(format!("`{name}` is used before it is set")),
            },
            other => self.error(format!("expected a value, found {}", describe(&other))),
        }
    }

    fn call(&mut self, program: &mut Program, name: &str) -> Result<Arg> {
        let Some(op) = Op::from_name(name) else {
            return self.error(format!("there is no operation `{name}`"));
        };
        self.demand('(')?;
        let mut args = Vec::new();
        while !self.peek(')') {
            args.push(self.sum(program)?);
            if !self.peek(',') {
                break;
            }
            self.at += 1;
        }
        self.demand(')')?;
        if args.len() != op.arity() {
            let (wanted, got) = (op.arity(), args.len());
            return self.error(format!("`{name}` takes {wanted} arguments, got {got}"));
        }
        Ok(self.emit(program, op, args))
    }
}

fn describe(token: &Option<Token>) -> String {
    match token {
        None => "the end of the line".to_string(),
        Some(Token::Name(name)) => format!("`{name}`"),
        Some(Token::Number(x)) => format!("`{x}`"),
        Some(Token::Symbol(c)) => format!("`{c}`"),
    }
}
