//! Chat templates: Jinja, as model files carry them.
//!
//! A template comes with the model's file, so it is not trusted: it runs with bounded fuel and depth, and reaches nothing
//! but its arguments.

use std::{collections::HashMap, path::Path};

use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};

use crate::model::ModelError;

/// Steps that a template may take.
const FUEL: u64 = 1_000_000;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A compiled template.
pub(crate) struct Template {
    environment: Environment<'static>,
    /// `bos_token` and the like.
    tokens: HashMap<String, String>,
}

impl Template {
    pub(crate) fn new(source: &str, tokens: HashMap<String, String>) -> Result<Self, ModelError> {
        let mut environment = Environment::new();
        // As the reference implementation sets it up.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment
            .add_template_owned("chat", source.to_owned())
            .map_err(ModelError::template)?;
        Ok(Self {
            environment,
            tokens,
        })
    }

    pub(super) fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, ModelError> {
        let tokens = |name: &str| self.tokens.get(name).cloned().unwrap_or_default();
        self.environment
            .get_template("chat")
            .and_then(|template| {
                template.render(context! {
                    messages,
                    add_generation_prompt,
                    bos_token => tokens("bos_token"),
                    eos_token => tokens("eos_token"),
                })
            })
            .map_err(ModelError::template)
    }
}

/// The template of a folder as the hub has it, if there is one.
pub(super) fn from_folder(folder: &Path) -> Result<Option<Template>, ModelError> {
    let path = folder.join("tokenizer_config.json");
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(ModelError::Open { path, source }),
    };
    let config: serde_json::Value =
        serde_json::from_slice(&bytes).map_err(|error| ModelError::Format {
            path,
            what: error.to_string(),
        })?;
    let Some(source) = config["chat_template"].as_str() else {
        return Ok(None);
    };
    let tokens = ["bos_token", "eos_token"]
        .into_iter()
        .filter_map(|name| {
            let value = &config[name];
            let text = value.as_str().or_else(|| value["content"].as_str())?;
            Some((name.to_owned(), text.to_owned()))
        })
        .collect();
    Template::new(source, tokens).map(Some)
}
