//! One tensor of a file: its type, its shape, its bytes.

use std::borrow::Cow;

use half::{bf16, f16};

use crate::model::{ModelError, WeightMode, kernels::matrix::Format};

/// How a tensor's elements are encoded. Block formats are ggml's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    F32,
    F16,
    Bf16,
    /// 32 elements: scale, 32 signed bytes.
    Q8_0,
    /// 32 elements: scale, 32 halves of bytes, from which 8 is subtracted.
    Q4_0,
    /// 32 elements: scale, offset, 32 halves of bytes.
    Q4_1,
    /// 256 elements: 6 bits each, 16 scales of 8 bits, one scale.
    Q6K,
}

impl Kind {
    /// Elements and bytes of a block.
    pub(crate) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q6K => (256, 210),
        }
    }

    /// How the weights run. [`WeightMode::AsIs`] keeps 4 and 8 bits; 6 bits become 8, and floats f32.
    pub(crate) fn format(self, mode: WeightMode) -> Format {
        match (mode, self) {
            (WeightMode::F32, _) => Format::F32,
            (WeightMode::Q8_0, _) => Format::Q8,
            (WeightMode::AsIs, Self::Q4_0 | Self::Q4_1) => Format::Q4,
            (WeightMode::AsIs, Self::Q8_0 | Self::Q6K) => Format::Q8,
            (WeightMode::AsIs, Self::F32 | Self::F16 | Self::Bf16) => Format::F32,
        }
    }
}

/// 32 quantised elements: `scale * value + offset`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Block {
    pub(crate) scale: f16,
    pub(crate) offset: f16,
    pub(crate) values: [i8; 32],
}

/// A tensor of one or two dimensions. Invariant: `data` has exactly the bytes of all rows.
#[derive(Debug)]
pub(crate) struct Tensor<'a> {
    pub(crate) name: String,
    kind: Kind,
    rows: usize,
    columns: usize,
    data: Cow<'a, [u8]>,
}

impl<'a> Tensor<'a> {
    /// # Errors
    ///
    /// A row is not whole blocks, or `data` is not the bytes of all rows.
    pub(crate) fn new(
        name: &str,
        kind: Kind,
        (rows, columns): (usize, usize),
        data: Cow<'a, [u8]>,
    ) -> Result<Self, ModelError> {
        let (elements, bytes) = kind.block();
        let expected = (columns.is_multiple_of(elements))
            .then(|| (columns / elements).checked_mul(bytes)?.checked_mul(rows))
            .flatten();
        if columns == 0 || rows == 0 || expected != Some(data.len()) {
            return Err(ModelError::Shape(format!(
                "{name}: {} bytes are not {rows} x {columns} of {kind:?}",
                data.len()
            )));
        }
        Ok(Self {
            name: name.into(),
            kind,
            rows,
            columns,
            data,
        })
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    fn row_bytes(&self, row: usize) -> Result<&[u8], ModelError> {
        let length = self.data.len() / self.rows;
        self.data.chunks_exact(length).nth(row).ok_or_else(|| {
            ModelError::Shape(format!("{} has {} rows, not {row}", self.name, self.rows))
        })
    }

    /// One row as floats. `out` has [`Tensor::columns`] elements.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) -> Result<(), ModelError> {
        let (elements, bytes) = self.kind.block();
        let blocks = self.row_bytes(row)?.chunks_exact(bytes);
        for (block, out) in blocks.zip(out.chunks_mut(elements)) {
            dequantise(self.kind, block, out);
        }
        Ok(())
    }

    /// Elements `32 * index ..` of a row, quantised to 4 or 8 bits: as they are, if they are; otherwise with the
    /// largest magnitude at 127. Only tensors of 4 bits can be had in 4 bits.
    pub(crate) fn block(&self, row: usize, index: usize, is_q4: bool) -> Result<Block, ModelError> {
        let (elements, bytes) = self.kind.block();
        let row = self.row_bytes(row)?;
        let out_of_range =
            || ModelError::Shape(format!("{} has no block {index} in a row", self.name));
        if elements != 32 || !is_q4 && self.kind != Kind::Q8_0 {
            let mut values = [0.0; 256];
            let count = elements.max(32);
            let first = index * 32 / count * count / elements * bytes;
            let from = row
                .get(first..first + count / elements * bytes)
                .ok_or_else(out_of_range)?;
            for (block, out) in from.chunks_exact(bytes).zip(values.chunks_mut(elements)) {
                dequantise(self.kind, block, out);
            }
            return Ok(quantise(&values[index * 32 % count..][..32]));
        }
        let from = row
            .get(index * bytes..(index + 1) * bytes)
            .ok_or_else(out_of_range)?;
        let scale = float16(from, 0);
        let mut block = Block {
            scale,
            ..Block::default()
        };
        match self.kind {
            Kind::Q8_0 => {
                for (to, byte) in block.values.iter_mut().zip(&from[2..]) {
                    *to = *byte as i8;
                }
            }
            Kind::Q4_1 => {
                block.offset = float16(from, 2);
                nibbles(&from[4..], &mut block.values);
            }
            _ => {
                block.offset = f16::from_f32(scale.to_f32() * -8.0);
                nibbles(&from[2..], &mut block.values);
            }
        }
        Ok(block)
    }
}

fn float16(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// The low halves are the first 16 elements.
fn nibbles(bytes: &[u8], out: &mut [i8; 32]) {
    for (i, byte) in bytes.iter().enumerate().take(16) {
        out[i] = (byte & 15) as i8;
        out[i + 16] = (byte >> 4) as i8;
    }
}

/// Quantises 32 values to 8 bits.
fn quantise(values: &[f32]) -> Block {
    let largest = values.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let scale = f16::from_f32(largest / 127.0);
    let divisor = scale.to_f32();
    let inverse = if divisor > 0.0 { 1.0 / divisor } else { 0.0 };
    let mut block = Block {
        scale,
        ..Block::default()
    };
    for (to, value) in block.values.iter_mut().zip(values) {
        *to = (value * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
    }
    block
}

/// One block. `block` and `out` have the lengths of [`Kind::block`].
fn dequantise(kind: Kind, block: &[u8], out: &mut [f32]) {
    match kind {
        Kind::F32 => out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
        Kind::F16 => out[0] = float16(block, 0).to_f32(),
        Kind::Bf16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
        Kind::Q8_0 => {
            let scale = float16(block, 0).to_f32();
            for (out, byte) in out.iter_mut().zip(&block[2..]) {
                *out = scale * f32::from(*byte as i8);
            }
        }
        Kind::Q4_0 | Kind::Q4_1 => {
            let scale = float16(block, 0).to_f32();
            let (offset, from) = match kind {
                Kind::Q4_1 => (float16(block, 2).to_f32(), 4),
                _ => (-8.0 * scale, 2),
            };
            let mut bits = [0; 32];
            nibbles(&block[from..], &mut bits);
            for (out, bits) in out.iter_mut().zip(bits) {
                *out = scale * f32::from(bits) + offset;
            }
        }
        Kind::Q6K => {
            // 128 bytes of low bits, 64 of high bits, 16 scales, the scale of scales. Two halves of 128 elements, each
            // in four quarters of 32 that share bytes of high bits.
            let (low, rest) = block.split_at(128);
            let (high, rest) = rest.split_at(64);
            let scale = float16(rest, 16).to_f32();
            for (i, out) in out.iter_mut().enumerate() {
                let (half, quarter, l) = (i / 128, i % 128 / 32, i % 32);
                let low = low[half * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
                let high = high[half * 32 + l] >> (quarter * 2) & 3;
                let bits = i32::from(low | high << 4) - 32;
                *out = scale * f32::from(rest[i / 16] as i8) * bits as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(count: usize) -> Vec<u8> {
        let mut state = 3u32;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect()
    }

    /// Blocks with scales that are ordinary numbers.
    fn tensor(kind: Kind, columns: usize) -> Tensor<'static> {
        let (elements, length) = kind.block();
        let mut data = bytes(3 * columns / elements * length);
        for block in data.chunks_mut(length) {
            let at = if kind == Kind::Q6K { 208 } else { 0 };
            block[at..at + 2].copy_from_slice(&f16::from_f32(0.037).to_le_bytes());
            if kind == Kind::Q4_1 {
                block[2..4].copy_from_slice(&f16::from_f32(-0.3).to_le_bytes());
            }
        }
        Tensor::new("t", kind, (3, columns), Cow::Owned(data)).unwrap()
    }

    #[test]
    fn blocks_are_the_row() {
        for (kind, is_q4, bound) in [
            (Kind::Q8_0, false, 0.0),
            (Kind::Q4_0, true, 0.0),
            (Kind::Q4_1, true, 1e-6),
            (Kind::Q4_0, false, 0.002),
            (Kind::Q6K, false, 1.0),
        ] {
            let tensor = tensor(kind, 512);
            let mut row = vec![0.0; 512];
            tensor.row(2, &mut row).unwrap();
            for (index, expected) in row.chunks(32).enumerate() {
                let block = tensor.block(2, index, is_q4).unwrap();
                let largest = expected.iter().fold(0.0f32, |a, b| a.max(b.abs()));
                for (value, expected) in block.values.iter().zip(expected) {
                    let value = block.scale.to_f32() * f32::from(*value) + block.offset.to_f32();
                    let bound = bound.min(largest / 127.0);
                    assert!((value - expected).abs() <= bound, "{kind:?} {value} {expected}");
                }
            }
        }
    }

    #[test]
    fn six_bits_by_the_definition() {
        // One element at a time: its six bits are 33, everything else 32, which is zero.
        for i in [0usize, 31, 32, 64, 96, 127, 128, 200, 255] {
            let mut block = vec![0u8; 210];
            block[128..192].fill(0b1010_1010);
            block[192..208].fill(3);
            block[208..].copy_from_slice(&f16::from_f32(2.0).to_le_bytes());
            let (half, quarter, l) = (i / 128, i % 128 / 32, i % 32);
            let shift = if quarter >= 2 { 4 } else { 0 };
            block[half * 64 + (quarter & 1) * 32 + l] |= 1 << shift;
            let mut out = [0.0; 256];
            dequantise(Kind::Q6K, &block, &mut out);
            for (j, value) in out.iter().enumerate() {
                assert_eq!(*value, if i == j { 6.0 } else { 0.0 }, "{i} {j}");
            }
        }
    }

    #[test]
    fn wrong_lengths_are_refused() {
        for (rows, columns, length) in [(1, 33, 34), (2, 32, 34), (0, 32, 0), (1, 32, 33)] {
            let data = Cow::Owned(vec![0; length]);
            assert!(Tensor::new("t", Kind::Q8_0, (rows, columns), data).is_err());
        }
        let tensor = tensor(Kind::Q8_0, 64);
        assert!(tensor.row(3, &mut [0.0; 64]).is_err());
        assert!(tensor.block(0, 2, false).is_err());
    }
}
