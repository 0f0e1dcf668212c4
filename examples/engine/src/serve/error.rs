//! What clients are told when something fails: OpenAI's error object, with the status that says what to do about it.
//!
//! | Status | When | Try again? |
//! |---|---|---|
//! | 400 | the request is wrong; `param` names the field | no |
//! | 404 | no such model, route, request or room | no |
//! | 408 | the deadline passed before any work was done | yes |
//! | 413 | the body is too large | no |
//! | 429 | queue or blocks are full | after `Retry-After` |
//! | 499 | the request was aborted | no |
//! | 500 | a fault of the engine | no |
//! | 502 | the other engine's pages did not come, and will not | no |
//! | 503 | draining, or a transfer that may work later | after `Retry-After`, elsewhere |
//! | 504 | the deadline passed during the work | no |

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::request::RequestError;

/// An error on its way to a client.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// What is wrong, for people.
    pub message: String,
    /// The field of the request, as a path.
    pub param: Option<String>,
    /// What is wrong, for programs.
    pub code: &'static str,
    /// When it is worth another try.
    pub retry_after: Option<Duration>,
}

impl ApiError {
    /// An error with a status and a code.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            param: None,
            code,
            retry_after: None,
        }
    }

    /// 400: a field is wrong.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_value", message).with_param(param)
    }

    /// 400: a field asks for something that this engine does not do.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "unsupported_value", message).with_param(param)
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// Names the field.
    #[must_use]
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Says when to try again.
    #[must_use]
    pub fn with_retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// OpenAI's name of the kind of error.
    pub fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
            StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => "timeout_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// OpenAI's error object.
    pub fn to_json(&self) -> Value {
        json!({
            "error": {
                "message": self.message,
                "type": self.kind(),
                "param": self.param,
                "code": self.code,
            }
        })
    }
}

/// What the engine says of a request on which no work has been done yet.
const BEFORE_WORK: &str = "waiting in the queue";

/// What is said to a client that went away; nobody reads it.
const CLIENT_CLOSED_REQUEST: u16 = 499;

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        let message = error.to_string();
        match error {
            RequestError::Invalid { param, .. } => Self {
                param: param.map(str::to_owned),
                ..Self::new(StatusCode::BAD_REQUEST, "invalid_value", message)
            },
            RequestError::ContextLength { .. } => {
                Self::new(StatusCode::BAD_REQUEST, "context_length_exceeded", message)
            }
            RequestError::Busy { retry_after, .. } => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "engine_busy", message)
                    .with_retry_after(retry_after)
            }
            RequestError::Draining => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "draining", message)
                    .with_retry_after(Duration::from_secs(1))
            }
            RequestError::Deadline { phase, .. } if phase == BEFORE_WORK => {
                Self::new(StatusCode::REQUEST_TIMEOUT, "deadline_exceeded", message)
            }
            RequestError::Deadline { .. } => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "deadline_exceeded", message)
            }
            RequestError::Transfer {
                is_retryable: true, ..
            } => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "kv_transfer_failed",
                message,
            )
            .with_retry_after(Duration::from_secs(1)),
            RequestError::Transfer { .. } => {
                Self::new(StatusCode::BAD_GATEWAY, "kv_transfer_failed", message)
            }
            RequestError::Aborted => Self::new(
                StatusCode::from_u16(CLIENT_CLOSED_REQUEST).unwrap_or(StatusCode::BAD_REQUEST),
                "aborted",
                message,
            ),
            _ => Self::internal(message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.to_json())).into_response();
        if let Some(after) = self.retry_after {
            // Whole seconds, rounded up: 0 would say "at once".
            let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(error: RequestError) -> (u16, &'static str) {
        let error = ApiError::from(error);
        (error.status.as_u16(), error.code)
    }

    #[test]
    fn each_failure_has_its_status() {
        let deadline = |phase| RequestError::Deadline {
            after: Duration::from_secs(1),
            phase,
        };
        let transfer = |is_retryable| RequestError::Transfer {
            message: "peer".into(),
            is_retryable,
        };
        let busy = RequestError::Busy {
            what: "queue",
            retry_after: Duration::from_millis(1200),
        };
        assert_eq!(status(busy), (429, "engine_busy"));
        assert_eq!(status(RequestError::Draining), (503, "draining"));
        assert_eq!(status(deadline(BEFORE_WORK)), (408, "deadline_exceeded"));
        assert_eq!(status(deadline("decoding")), (504, "deadline_exceeded"));
        assert_eq!(status(transfer(true)), (503, "kv_transfer_failed"));
        assert_eq!(status(transfer(false)), (502, "kv_transfer_failed"));
        assert_eq!(status(RequestError::Aborted), (499, "aborted"));
        assert_eq!(
            status(RequestError::Internal("x".into())),
            (500, "internal_error")
        );
        let context = RequestError::ContextLength {
            context: 8,
            prompt: 7,
            max_tokens: 2,
        };
        assert_eq!(status(context), (400, "context_length_exceeded"));
    }

    #[test]
    fn retry_after_is_rounded_up() {
        let busy = RequestError::Busy {
            what: "queue",
            retry_after: Duration::from_millis(1200),
        };
        let response = ApiError::from(busy).into_response();
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
    }

    #[test]
    fn the_object_is_openai_s() {
        let error = ApiError::invalid("messages[0].role", "not a role");
        assert_eq!(
            error.to_json(),
            json!({"error": {
                "message": "not a role",
                "type": "invalid_request_error",
                "param": "messages[0].role",
                "code": "invalid_value",
            }})
        );
    }
}
