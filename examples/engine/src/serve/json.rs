//! Bodies: JSON that tolerates unknown fields and names the field that has the wrong type.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::error::ApiError;

/// The body as JSON. Depth is bounded by serde_json, length by the server.
///
/// # Errors
///
/// 400 if it is not a JSON object, 413 if it is too large.
pub fn object(body: Result<Bytes, BytesRejection>) -> Result<Value, ApiError> {
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "request_too_large",
            "the request body is larger than this server takes",
        ),
        _ => ApiError::new(
            StatusCode::BAD_REQUEST,
            "body_unreadable",
            rejection.body_text(),
        ),
    })?;
    let value: Value = serde_json::from_slice(&body).map_err(|error| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            "invalid_json",
            format!("the body is not JSON: {error}"),
        )
    })?;
    if !value.is_object() {
        return Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            "invalid_json",
            "the body must be a JSON object",
        ));
    }
    Ok(value)
}

/// Reads `T` out of a JSON value.
///
/// # Errors
///
/// 400 with the path of the field that is wrong.
pub fn read<T: DeserializeOwned>(value: &Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        // A missing field is reported at the object that lacks it.
        let missing = inner
            .to_string()
            .strip_prefix("missing field `")
            .and_then(|rest| rest.split('`').next())
            .map(str::to_owned);
        let param = match (path.as_str(), missing) {
            (".", Some(field)) => field,
            (_, Some(field)) => format!("{path}.{field}"),
            _ => path,
        };
        ApiError::new(
            StatusCode::BAD_REQUEST,
            "invalid_type",
            format!("{param}: {inner}"),
        )
        .with_param(param)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[derive(Debug, serde::Deserialize)]
    struct Body {
        #[allow(dead_code)]
        temperature: Option<f32>,
        #[allow(dead_code)]
        messages: Vec<Inner>,
    }
    #[derive(Debug, serde::Deserialize)]
    struct Inner {
        #[allow(dead_code)]
        role: String,
    }

    fn param(value: Value) -> String {
        read::<Body>(&value).unwrap_err().param.unwrap()
    }

    #[test]
    fn the_wrong_field_is_named() {
        assert_eq!(
            param(json!({"messages": [{"role": "user"}, {"role": 1}]})),
            "messages[1].role"
        );
        assert_eq!(param(json!({"messages": [{}]})), "messages[0].role");
        assert_eq!(param(json!({"temperature": 1})), "messages");
        assert_eq!(
            param(json!({"temperature": "hot", "messages": []})),
            "temperature"
        );
    }

    #[test]
    fn unknown_fields_are_tolerated() {
        read::<Body>(&json!({"messages": [], "new": {"field": [1]}})).unwrap();
    }

    #[test]
    fn other_bodies_are_refused() {
        for body in ["", "[]", "1", "{", "\u{0}"] {
            let error = object(Ok(Bytes::from(body))).unwrap_err();
            assert_eq!(error.status, StatusCode::BAD_REQUEST, "{body:?}");
        }
        let deep = "[".repeat(100_000);
        object(Ok(Bytes::from(deep))).unwrap_err();
    }
}
