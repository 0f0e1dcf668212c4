//! GGUF, versions 2 and 3: metadata, then tensors.
//!
//! Little-endian. Header: magic, version, counts; then key-value pairs; then a description of each tensor; then, aligned,
//! the tensors' bytes. Everything is checked against the file's length before it is used, and what is allocated is
//! bounded by it.

use std::{
    borrow::Cow,
    collections::HashMap,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{Kind, Source, Tensor, mapping};
use crate::model::{ModelConfig, ModelError};

/// Arrays inside of arrays, at most.
const MAX_DEPTH: usize = 4;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Integer(i64),
    Float(f64),
    Boolean(bool),
    Text(String),
    Array(Vec<Value>),
}

/// The key-value pairs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metadata(HashMap<String, Value>, HashMap<String, Vec<String>>);

impl Metadata {
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        match self.0.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn integer(&self, key: &str) -> Option<i64> {
        match self.0.get(key)? {
            Value::Integer(value) => Some(*value),
            _ => None,
        }
    }

    pub(crate) fn boolean(&self, key: &str) -> Option<bool> {
        match self.0.get(key)? {
            Value::Boolean(value) => Some(*value),
            _ => None,
        }
    }

    fn float(&self, key: &str) -> Option<f64> {
        match self.0.get(key)? {
            Value::Float(value) => Some(*value),
            _ => None,
        }
    }

    pub(crate) fn integers(&self, key: &str) -> Option<Vec<i64>> {
        let Value::Array(values) = self.0.get(key)? else {
            return None;
        };
        let integer = |value: &Value| match value {
            Value::Integer(value) => Some(*value),
            _ => None,
        };
        values.iter().map(integer).collect()
    }

    /// An array of texts that must be there.
    pub(crate) fn texts(&self, key: &str) -> Result<&[String], ModelError> {
        let texts = self.1.get(key).map(Vec::as_slice);
        texts.ok_or_else(|| ModelError::Tokenizer(format!("there is no {key}")))
    }
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
struct Entry {
    kind: u32,
    rows: usize,
    columns: usize,
    /// In the file.
    offset: usize,
}

/// A file.
pub(crate) struct Gguf<D> {
    path: PathBuf,
    data: D,
    metadata: Metadata,
    tensors: HashMap<String, Entry>,
}

impl Gguf<memmap2::Mmap> {
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        Self::parse(path, mapping::map(path)?)
    }
}

impl<D: AsRef<[u8]>> Gguf<D> {
    pub(crate) fn parse(path: &Path, data: D) -> Result<Self, ModelError> {
        let (metadata, tensors) = Reader::new(data.as_ref())
            .file()
            .map_err(|what| ModelError::Format {
                path: path.into(),
                what,
            })?;
        Ok(Self {
            path: path.into(),
            data,
            metadata,
            tensors,
        })
    }

    pub(crate) fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    fn number(&self, key: &str) -> Result<usize, ModelError> {
        let number = self.metadata.integer(key);
        number
            // Larger ones are nonsense, and would overflow in products.
            .and_then(|number| usize::try_from(number).ok().filter(|n| *n < 1 << 28))
            .ok_or_else(|| ModelError::Format {
                path: self.path.clone(),
                what: format!("{key} is {number:?}"),
            })
    }
}

impl<D: AsRef<[u8]>> Source for Gguf<D> {
    fn config(&self) -> Result<ModelConfig, ModelError> {
        let metadata = &self.metadata;
        let architecture = metadata.text("general.architecture").unwrap_or_default();
        if architecture != "llama" {
            return Err(ModelError::Unsupported(format!(
                "architecture {architecture:?}; known: llama"
            )));
        }
        if let Some(scaling) = metadata.text("llama.rope.scaling.type")
            && scaling != "none"
        {
            return Err(ModelError::Unsupported(format!("rope scaling {scaling:?}")));
        }
        let number = |key: &str| self.number(&format!("llama.{key}"));
        let float = |key: &str, default: f64| {
            let value = metadata.float(&format!("llama.{key}"));
            value.unwrap_or(default) as f32
        };
        let heads = number("attention.head_count")?;
        let hidden = number("embedding_length")?;
        let head_dim = number("attention.key_length").unwrap_or(hidden / heads.max(1));
        let rotated = number("rope.dimension_count").unwrap_or(head_dim);
        if rotated != head_dim {
            return Err(ModelError::Unsupported(format!(
                "{rotated} of {head_dim} elements of a head rotated"
            )));
        }
        let name = metadata.text("general.name").or(metadata.text("general.basename"));
        let stem = self.path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let tokenizer = crate::model::tokenizer::from_gguf::tokenizer(metadata)?;
        let embedding = self.tensors.get("token_embd.weight");
        Ok(ModelConfig {
            name: stem.or(name.map(str::to_owned)).unwrap_or_default(),
            digest: Sha256::digest(self.data.as_ref()).into(),
            vocab: embedding.map_or(0, |tensor| tensor.rows),
            layers: number("block_count")?,
            heads,
            kv_heads: number("attention.head_count_kv").unwrap_or(heads),
            head_dim,
            hidden,
            intermediate: number("feed_forward_length")?,
            rope_theta: float("rope.freq_base", 10_000.0),
            norm_epsilon: float("attention.layer_norm_rms_epsilon", 1e-5),
            context: number("context_length")?,
            eos: tokenizer.eos().to_vec(),
        })
    }

    fn find(&self, name: &str) -> Result<Option<Tensor<'_>>, ModelError> {
        let Some(entry) = self.tensors.get(name) else {
            return Ok(None);
        };
        let kind = match entry.kind {
            0 => Kind::F32,
            1 => Kind::F16,
            2 => Kind::Q4_0,
            3 => Kind::Q4_1,
            8 => Kind::Q8_0,
            14 => Kind::Q6K,
            30 => Kind::Bf16,
            other => {
                return Err(ModelError::Unsupported(format!(
                    "{name}: ggml type {other}; known: F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q6_K"
                )));
            }
        };
        let (elements, bytes) = kind.block();
        let length = (entry.columns / elements)
            .checked_mul(bytes)
            .and_then(|row| row.checked_mul(entry.rows));
        let data = length
            .and_then(|length| entry.offset.checked_add(length))
            .and_then(|end| self.data.as_ref().get(entry.offset..end))
            .ok_or_else(|| ModelError::Format {
                path: self.path.clone(),
                what: format!("{name} reaches beyond the file's end"),
            })?;
        Tensor::new(name, kind, (entry.rows, entry.columns), Cow::Borrowed(data)).map(Some)
    }

    fn has_adjacent_pairs(&self) -> bool {
        true
    }
}

/// Reads from the start on.
struct Reader<'a> {
    data: &'a [u8],
    at: usize,
}

type Parsed<T> = Result<T, String>;

impl<'a> Reader<'a> {
    fn new(data: &'a [u8]) -> Self {
        Self { data, at: 0 }
    }

    fn file(mut self) -> Parsed<(Metadata, HashMap<String, Entry>)> {
        if self.take(4)? != b"GGUF" {
            return Err("the magic is not GGUF".into());
        }
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            return Err(format!("version {version}; known: 2 and 3, little-endian"));
        }
        // A tensor takes at least 24 bytes, a pair at least 13.
        let tensors = self.count(24)?;
        let pairs = self.count(13)?;
        let mut metadata = Metadata::default();
        for _ in 0..pairs {
            let key = self.text()?;
            let kind = self.u32()?;
            // Vocabularies are large: texts are kept as such.
            if kind == 9 && self.peek_u32() == Some(8) {
                self.u32()?;
                let count = self.count(8)?;
                let texts = (0..count).map(|_| self.text()).collect::<Parsed<_>>()?;
                metadata.1.insert(key, texts);
            } else {
                let value = self.value(kind, 0)?;
                metadata.0.insert(key, value);
            }
        }
        let mut entries = HashMap::new();
        for _ in 0..tensors {
            let name = self.text()?;
            let dimensions = self.u32()?;
            if !(1..=4).contains(&dimensions) {
                return Err(format!("{name} has {dimensions} dimensions"));
            }
            let columns = self.size()?;
            let mut rows = 1usize;
            for _ in 1..dimensions {
                let size = self.size()?;
                rows = rows
                    .checked_mul(size)
                    .ok_or_else(|| format!("{name} is too large"))?;
            }
            let entry = Entry {
                kind: self.u32()?,
                rows,
                columns,
                offset: self.size()?,
            };
            entries.insert(name, entry);
        }
        let alignment = match metadata.integer("general.alignment") {
            None => 32,
            Some(bytes) => usize::try_from(bytes)
                .ok()
                .filter(|bytes| bytes.is_power_of_two() && *bytes <= 1 << 20)
                .ok_or_else(|| format!("an alignment of {bytes}"))?,
        };
        let start = self.at.next_multiple_of(alignment);
        for (name, entry) in &mut entries {
            entry.offset = entry
                .offset
                .checked_add(start)
                .ok_or_else(|| format!("{name} begins beyond the file's end"))?;
        }
        Ok((metadata, entries))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Parsed<Value> {
        Ok(match kind {
            0 => Value::Integer(i64::from(self.array::<1>()?[0])),
            1 => Value::Integer(i64::from(self.array::<1>()?[0] as i8)),
            2 => Value::Integer(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Boolean(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 if depth < MAX_DEPTH => {
                let kind = self.u32()?;
                let count = self.count(1)?;
                let value = |_| self.value(kind, depth + 1);
                Value::Array((0..count).map(value).collect::<Parsed<_>>()?)
            }
            10 => Value::Integer(
                i64::try_from(u64::from_le_bytes(self.array()?)).unwrap_or(i64::MAX),
            ),
            11 => Value::Integer(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("a value of type {other} at byte {}", self.at)),
        })
    }

    fn take(&mut self, length: usize) -> Parsed<&'a [u8]> {
        let end = self.at.checked_add(length);
        let bytes = end
            .and_then(|end| self.data.get(self.at..end))
            .ok_or_else(|| format!("it ends within {length} bytes at byte {}", self.at))?;
        self.at += length;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn peek_u32(&self) -> Option<u32> {
        let bytes = self.data.get(self.at..)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    }

    fn size(&mut self) -> Parsed<usize> {
        let size = u64::from_le_bytes(self.array()?);
        usize::try_from(size).map_err(|_| format!("a size of {size}"))
    }

    /// A number of things of at least `bytes` each, which must fit into the rest of the file.
    fn count(&mut self, bytes: usize) -> Parsed<usize> {
        let count = self.size()?;
        let rest = self.data.len() - self.at;
        if count.checked_mul(bytes).is_none_or(|length| length > rest) {
            return Err(format!(
                "{count} things at byte {}, with {rest} bytes left",
                self.at
            ));
        }
        Ok(count)
    }

    fn text(&mut self) -> Parsed<String> {
        let length = self.size()?;
        let bytes = self.take(length)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("no UTF-8 before byte {}", self.at))
    }
}
