//! Weights where they come from: GGUF and safetensors files, mapped, and the built-in generator.
//!
//! Invariant: nothing of a file is used before its bounds are checked; a hostile file ends in a typed error.

pub(crate) mod gguf;
pub(crate) mod mapping;
pub(crate) mod safetensors;
pub(crate) mod tensor;

pub(crate) use tensor::{Block, Kind, Tensor};

use super::{ModelConfig, ModelError};

/// Where a model comes from. Names are those of GGUF (`blk.0.attn_q.weight`).
pub(crate) trait Source {
    /// What the model is. The digest is that of the source alone.
    fn config(&self) -> Result<ModelConfig, ModelError>;
    /// A tensor, or nothing if there is none.
    fn find(&self, name: &str) -> Result<Option<Tensor<'_>>, ModelError>;
    /// Whether queries and keys have rotary pairs side by side (GGUF) instead of half a head apart.
    fn has_adjacent_pairs(&self) -> bool;

    /// A tensor that must be there, with this shape.
    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Tensor<'_>, ModelError> {
        let tensor = self
            .find(name)?
            .ok_or_else(|| ModelError::Shape(format!("there is no tensor {name}")))?;
        if (tensor.rows(), tensor.columns()) != (rows, columns) {
            return Err(ModelError::Shape(format!(
                "{name} is {} x {}, not {rows} x {columns}",
                tensor.rows(),
                tensor.columns()
            )));
        }
        Ok(tensor)
    }

    /// A vector that must be there, with this length.
    fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, ModelError> {
        let mut values = vec![0.0; length];
        self.matrix(name, 1, length)?.row(0, &mut values)?;
        Ok(values)
    }
}
