//! A folder as the hub has it: `config.json`, `*.safetensors`, `tokenizer.json`.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{Kind, Source, Tensor, mapping};
use crate::{
    model::{ModelConfig, ModelError},
    request::TokenId,
};

/// `config.json`, as far as it is used.
#[derive(Deserialize)]
struct Config {
    model_type: String,
    #[serde(default)]
    num_key_value_heads: Option<usize>,
    num_attention_heads: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f32,
    #[serde(default)]
    rope_theta: Option<f32>,
    #[serde(default)]
    rope_scaling: Option<serde_json::Value>,
    #[serde(default)]
    head_dim: Option<usize>,
    #[serde(default)]
    eos_token_id: Option<OneOrMore>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(TokenId),
    More(Vec<TokenId>),
}

/// The folder.
pub(crate) struct Folder {
    path: PathBuf,
    config: Config,
    files: Vec<(PathBuf, Mmap)>,
}

impl Folder {
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let config_path = path.join("config.json");
        let bytes = std::fs::read(&config_path).map_err(|source| ModelError::Open {
            path: config_path.clone(),
            source,
        })?;
        let config = serde_json::from_slice(&bytes).map_err(|error| ModelError::Format {
            path: config_path,
            what: error.to_string(),
        })?;
        let open = |source| ModelError::Open {
            path: path.into(),
            source,
        };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(path).map_err(open)? {
            let file = entry.map_err(open)?.path();
            if file.extension().is_some_and(|extension| extension == "safetensors") {
                names.push(file);
            }
        }
        names.sort();
        let mut files = Vec::new();
        for name in names {
            let data = mapping::map(&name)?;
            files.push((name, data));
        }
        Ok(Self {
            path: path.into(),
            config,
            files,
        })
    }

    pub(crate) fn eos(&self) -> Vec<TokenId> {
        match &self.config.eos_token_id {
            Some(OneOrMore::One(token)) => vec![*token],
            Some(OneOrMore::More(tokens)) => tokens.clone(),
            None => Vec::new(),
        }
    }
}

impl Source for Folder {
    fn config(&self) -> Result<ModelConfig, ModelError> {
        let config = &self.config;
        if config.model_type != "llama" {
            return Err(ModelError::Unsupported(format!(
                "model type {:?}; known: llama",
                config.model_type
            )));
        }
        if let Some(scaling) = &config.rope_scaling
            && !scaling.is_null()
        {
            return Err(ModelError::Unsupported(format!("rope scaling {scaling}")));
        }
        let mut hasher = Sha256::new();
        for (_, data) in &self.files {
            hasher.update(data);
        }
        let name = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
        let name = name.file_name().map(|name| name.to_string_lossy().into_owned());
        let heads = config.num_attention_heads;
        let sizes = [config.hidden_size, config.intermediate_size, config.vocab_size];
        let sizes = sizes.into_iter().chain([
            heads,
            config.num_hidden_layers,
            config.max_position_embeddings,
        ]);
        for size in sizes {
            if size >= 1 << 28 {
                return Err(ModelError::Shape(format!("config.json has a size of {size}")));
            }
        }
        Ok(ModelConfig {
            name: name.unwrap_or_default(),
            digest: hasher.finalize().into(),
            vocab: config.vocab_size,
            layers: config.num_hidden_layers,
            heads,
            kv_heads: config.num_key_value_heads.unwrap_or(heads),
            head_dim: config.head_dim.unwrap_or(config.hidden_size / heads.max(1)),
            hidden: config.hidden_size,
            intermediate: config.intermediate_size,
            rope_theta: config.rope_theta.unwrap_or(10_000.0),
            norm_epsilon: config.rms_norm_eps,
            context: config.max_position_embeddings,
            eos: self.eos(),
        })
    }

    fn find(&self, name: &str) -> Result<Option<Tensor<'_>>, ModelError> {
        let Some(stored) = stored_name(name) else {
            return Ok(None);
        };
        for (path, data) in &self.files {
            let file = SafeTensors::deserialize(data).map_err(|error| ModelError::Format {
                path: path.clone(),
                what: error.to_string(),
            })?;
            let Ok(view) = file.tensor(&stored) else {
                continue;
            };
            let kind = match view.dtype() {
                Dtype::F32 => Kind::F32,
                Dtype::F16 => Kind::F16,
                Dtype::BF16 => Kind::Bf16,
                other => {
                    return Err(ModelError::Unsupported(format!(
                        "{stored}: {other:?}; known: F32, F16, BF16"
                    )));
                }
            };
            let shape = match view.shape() {
                [columns] => (1, *columns),
                [rows, columns] => (*rows, *columns),
                other => return Err(ModelError::Shape(format!("{stored} is {other:?}"))),
            };
            return Tensor::new(name, kind, shape, Cow::Borrowed(view.data())).map(Some);
        }
        Ok(None)
    }

    fn has_adjacent_pairs(&self) -> bool {
        false
    }
}

/// The name that transformers gives to what GGUF calls `name`.
fn stored_name(name: &str) -> Option<String> {
    let whole = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(whole) = whole {
        return Some(whole.into());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (what, end) = rest.split_once('.')?;
    let what = match what {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{what}.{end}"))
}
