//! The engine as a gRPC service: `proto/engine.proto`. Everything is what the HTTP handlers call, too.

mod convert;
#[allow(
    clippy::all,
    clippy::pedantic,
    missing_docs,
    unreachable_pub,
    rustdoc::all
)]
mod generated;
mod service;

use std::sync::Arc;

use futures_util::StreamExt;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;

use super::App;

pub use generated::*;

/// Serves until the server ends.
///
/// # Errors
///
/// The listener fails.
pub async fn serve(app: &Arc<App>, listener: TcpListener) -> Result<(), tonic::transport::Error> {
    let limit = app.settings.max_body;
    let service = worker_server::WorkerServer::new(service::Service::new(app))
        .max_decoding_message_size(limit)
        .max_encoding_message_size(usize::MAX);
    let incoming = TcpListenerStream::new(listener).map(|stream| {
        // Tokens are small and must not wait for each other.
        stream.and_then(|stream| stream.set_nodelay(true).map(|()| stream))
    });
    let ended = Arc::clone(app);
    tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, async move { ended.ended().await })
        .await
}

#[cfg(test)]
mod tests;
