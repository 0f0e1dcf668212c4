//! The metrics as Prometheus text, and a listener that serves it. Needs the cargo feature `prometheus`.
//!
//! ```no_run
//! use kvpush::endpoint::telemetry::prometheus;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Before the first endpoint: handles of peers that exist already are not exported.
//! let metrics = prometheus::serve("127.0.0.1:9464")?;
//! println!("curl http://{}/metrics", metrics.address());
//! # Ok(())
//! # }
//! ```
//!
//! The listener is for a scraper on a trusted network: it has no encryption, and peers' names and counters are in the
//! text (but no secret). It serves one connection at a time, on a thread of its own that sleeps in between, and what a
//! client can make it hold or wait for is bounded.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// A client has this long for its request, and to take the answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Most bytes of a request.
const MAX_REQUEST: usize = 8 << 10;
/// Upper bounds of the histograms, in seconds.
const BUCKETS: [f64; 14] = [
    0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0,
];

/// Why metrics are not served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The program has installed a recorder already; use that one.
    #[error("a metrics recorder is installed already (hint: kvpush counts into that one)")]
    Installed,
    /// The listener or its thread could not be started.
    #[error("serve metrics: {0}")]
    Io(#[from] io::Error),
}

/// A recorder that renders the metrics of this process as Prometheus text.
#[derive(Clone)]
pub struct Metrics(PrometheusHandle);

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// Installs the recorder for the whole process. Endpoints started from now on are counted.
    ///
    /// # Errors
    ///
    /// [`ServeError::Installed`].
    pub fn install() -> Result<Self, ServeError> {
        let builder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &BUCKETS)
            .map_err(|error| io::Error::other(error.to_string()))?;
        let handle = builder.install_recorder();
        handle.map(Self).map_err(|_| ServeError::Installed)
    }

    /// The text.
    pub fn render(&self) -> String {
        // Histograms keep their samples until then.
        self.0.run_upkeep();
        self.0.render()
    }
}

/// A listener that serves the metrics until it is dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the thread. If that fails, so has its listener.
        let _ = TcpStream::connect_timeout(&self.address, PATIENCE);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the metrics thread had panicked");
        }
    }
}

/// Installs the recorder and serves its text on `address`, for any path.
///
/// # Errors
///
/// [`ServeError`]: there is a recorder already, or the address cannot be bound.
pub fn serve(address: impl ToSocketAddrs) -> Result<Server, ServeError> {
    let listener = TcpListener::bind(address)?;
    serve_on(listener, Metrics::install()?)
}

/// Serves the text of `metrics` on `listener`.
///
/// # Errors
///
/// [`ServeError::Io`].
pub fn serve_on(listener: TcpListener, metrics: Metrics) -> Result<Server, ServeError> {
    let address = listener.local_addr()?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let thread = std::thread::Builder::new()
        .name("kvpush-metrics".to_owned())
        .spawn(move || {
            for client in listener.incoming() {
                if stopped.load(Ordering::Acquire) {
                    return;
                }
                let answered = client.and_then(|client| answer(client, &metrics));
                if let Err(error) = answered {
                    tracing::debug!(%error, "a scrape failed");
                    // A listener out of descriptors would fail again at once.
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        })?;
    Ok(Server {
        address,
        stop,
        thread: Some(thread),
    })
}

fn answer(mut client: TcpStream, metrics: &Metrics) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    client.set_write_timeout(Some(PATIENCE))?;
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || request.len() > MAX_REQUEST {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        client.set_read_timeout(Some(left))?;
        match client.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => request.extend_from_slice(&buffer[..count]),
        }
    }
    let (status, text) = match request.starts_with(b"GET ") {
        true => ("200 OK", metrics.render()),
        false => ("405 Method Not Allowed", String::new()),
    };
    write!(
        client,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{text}",
        text.len()
    )?;
    client.shutdown(Shutdown::Write)
}
