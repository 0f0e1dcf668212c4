//! Listeners, from the first request to the last.
//!
//! A drain (SIGTERM, SIGINT, `POST /drain`, gRPC `Drain`) takes no more requests and lets those under way end, for so
//! long as the settings say; then the listeners close. A second signal does not wait.

use std::{io, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::DefaultBodyLimit,
    routing::{get, post},
    serve::ListenerExt,
};
use tokio::{
    net::TcpListener,
    sync::mpsc,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    App, Phase, grpc, info, kv_events,
    openai::{chat::Chat, completion::Plain, handler::handle},
};

/// How often a drain looks whether all has ended.
const DRAIN_POLL: Duration = Duration::from_millis(10);
/// How long connections have to take the end of their answers.
const CLOSING: Duration = Duration::from_secs(2);

/// Where to listen.
pub struct Listeners {
    /// OpenAI's API and the rest.
    pub http: TcpListener,
    /// The same once more, at the port that SGLang's routers know prefill engines by.
    pub bootstrap: Option<TcpListener>,
    /// The gRPC service.
    pub grpc: Option<TcpListener>,
}

/// How serving has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Every request has ended.
    Drained,
    /// The time for that was over, or somebody was impatient; requests were cut off.
    Cut,
}

/// Why a server has failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// A listener has failed.
    #[error("listener: {0}")]
    Io(#[from] io::Error),
    /// gRPC has failed.
    #[error("gRPC: {0}")]
    Grpc(#[from] tonic::transport::Error),
    /// A server task has panicked.
    #[error("server task: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// All routes.
pub fn router(app: &Arc<App>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(handle::<Chat>))
        .route("/v1/completions", post(handle::<Plain>))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{*name}", get(info::model))
        .route("/tokenize", post(info::tokenize))
        .route("/detokenize", post(info::detokenize))
        .route("/health", get(info::health))
        .route("/ready", get(info::ready))
        .route("/metrics", get(info::metrics))
        .route("/server_info", get(info::server_info))
        .route("/get_server_info", get(info::server_info))
        .route("/get_model_info", get(info::model_info))
        .route("/model_info", get(info::model_info))
        .route("/version", get(info::version))
        .route("/kv_events", get(kv_events::kv_events))
        .route("/kvpush/tickets", post(info::ticket))
        .route("/abort_request", post(info::abort))
        .route("/drain", post(info::drain))
        .fallback(info::not_found)
        .method_not_allowed_fallback(info::wrong_method)
        .layer(DefaultBodyLimit::max(app.settings.max_body))
        .with_state(Arc::clone(app))
}

/// Serves until a drain has ended. Each message of `asked` asks for the end: the first drains, the second cuts.
///
/// # Errors
///
/// A listener fails.
pub async fn run(
    app: &Arc<App>,
    listeners: Listeners,
    mut asked: mpsc::Receiver<()>,
) -> Result<Ended, ServeError> {
    let _ = app.http_port.set(listeners.http.local_addr()?.port());
    let mut tasks = vec![spawn_http(app, listeners.http)];
    tasks.extend(
        listeners
            .bootstrap
            .map(|listener| spawn_http(app, listener)),
    );
    tasks.extend(listeners.grpc.map(|listener| spawn_grpc(app, listener)));

    let failed = async {
        loop {
            if let Some(position) = tasks.iter().position(JoinHandle::is_finished) {
                return tasks.swap_remove(position).await?;
            }
            sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        result = failed => result?,
        () = app.reached(Phase::Draining) => {}
        Some(()) = asked.recv() => {}
    }
    app.start_drain();
    let drained = async {
        while !app.handle.is_drained() {
            sleep(DRAIN_POLL).await;
        }
    };
    let ended = tokio::select! {
        result = timeout(app.settings.drain_timeout, drained) => {
            if result.is_ok() { Ended::Drained } else { Ended::Cut }
        }
        Some(()) = asked.recv() => Ended::Cut,
    };
    if ended == Ended::Cut {
        tracing::warn!("requests are cut off: they did not end in time");
        app.handle.shutdown();
    }
    app.advance(Phase::Ended);
    for task in tasks {
        let handle = task.abort_handle();
        match timeout(CLOSING, task).await {
            Ok(result) => result??,
            // A client does not read its answer.
            Err(_) => handle.abort(),
        }
    }
    Ok(ended)
}

fn spawn_http(app: &Arc<App>, listener: TcpListener) -> JoinHandle<Result<(), ServeError>> {
    let (router, app) = (router(app), Arc::clone(app));
    tokio::spawn(async move {
        // Tokens are small and must not wait for each other.
        let listener = listener.tap_io(|stream| {
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "TCP_NODELAY");
            }
        });
        axum::serve(listener, router)
            .with_graceful_shutdown(async move { app.ended().await })
            .await?;
        Ok(())
    })
}

fn spawn_grpc(app: &Arc<App>, listener: TcpListener) -> JoinHandle<Result<(), ServeError>> {
    let app = Arc::clone(app);
    tokio::spawn(async move { Ok(grpc::serve(&app, listener).await?) })
}
