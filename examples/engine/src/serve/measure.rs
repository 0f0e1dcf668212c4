//! Metrics: vLLM's names where vLLM has them, so that its dashboards and autoscalers work; kvpush's own beside them.

use std::time::{Duration, Instant};

use kvpush::endpoint::telemetry::prometheus::Metrics;
use metrics::{Histogram, counter, gauge, histogram};

use crate::engine::{Handle, Stats};

/// What is counted here, under the name of the model.
#[derive(Clone)]
pub struct Meters {
    model: String,
    first_token: Histogram,
    between_tokens: Histogram,
    per_token: Histogram,
    end_to_end: Histogram,
    recorder: Option<Metrics>,
}

impl Meters {
    /// Without `recorder` nothing is counted, and `/metrics` says so.
    pub fn new(model: &str, recorder: Option<Metrics>) -> Self {
        let model = model.to_owned();
        let of = |name: &'static str| histogram!(name, "model_name" => model.clone());
        Self {
            first_token: of("vllm:time_to_first_token_seconds"),
            between_tokens: of("vllm:inter_token_latency_seconds"),
            per_token: of("vllm:time_per_output_token_seconds"),
            end_to_end: of("vllm:e2e_request_latency_seconds"),
            recorder,
            model,
        }
    }

    /// A request has ended with this status.
    pub fn answered(&self, route: &'static str, status: u16) {
        counter!(
            "kvpush_engine_answers_total",
            "model_name" => self.model.clone(), "route" => route, "status" => status.to_string()
        )
        .increment(1);
    }

    /// A completion has ended.
    pub fn finished(&self, reason: &'static str) {
        counter!(
            "vllm:request_success_total",
            "model_name" => self.model.clone(), "finished_reason" => reason
        )
        .increment(1);
    }

    /// All metrics as Prometheus text; `None` without a recorder.
    pub fn render(&self, handle: &Handle) -> Option<String> {
        let recorder = self.recorder.as_ref()?;
        self.show(&handle.stats());
        Some(recorder.render())
    }

    fn show(&self, stats: &Stats) {
        let model = &self.model;
        let gauges = [
            ("vllm:num_requests_running", stats.running as f64),
            ("vllm:num_requests_waiting", stats.waiting as f64),
            ("vllm:kv_cache_usage_perc", usage(stats)),
            ("vllm:gpu_cache_usage_perc", usage(stats)),
            ("kvpush_engine_requests_parked", stats.parked as f64),
        ];
        for (name, value) in gauges {
            gauge!(name, "model_name" => model.clone()).set(value);
        }
        let blocks = &stats.blocks;
        for (state, value) in [
            ("free", blocks.free),
            ("cached", blocks.cached),
            ("used", blocks.used),
            ("granted", blocks.granted),
            ("lost", blocks.lost),
        ] {
            gauge!("kvpush_engine_blocks", "model_name" => model.clone(), "state" => state)
                .set(value as f64);
        }
        for (name, value) in [
            ("vllm:prompt_tokens_total", stats.prompt_tokens),
            ("vllm:generation_tokens_total", stats.generated_tokens),
            ("vllm:prefix_cache_queries_total", stats.prompt_tokens),
            ("vllm:prefix_cache_hits_total", stats.cached_tokens),
            ("vllm:num_preemptions_total", stats.preemptions),
            ("kvpush_engine_steps_total", stats.steps),
            ("kvpush_engine_requests_total", stats.requests),
            ("kvpush_engine_requests_refused_total", stats.refused),
            ("kvpush_engine_requests_failed_total", stats.failed),
            ("kvpush_engine_requests_aborted_total", stats.aborted),
            ("kvpush_engine_tokens_pushed_total", stats.pushed_tokens),
            (
                "kvpush_engine_tokens_recomputed_total",
                stats.recomputed_tokens,
            ),
            (
                "kvpush_engine_tokens_preempted_total",
                stats.preempted_tokens,
            ),
            ("kvpush_engine_blocks_copied_total", stats.blocks_copied),
            ("kvpush_engine_blocks_evicted_total", stats.blocks_evicted),
            ("kvpush_engine_pushes_total", stats.pushes),
            ("kvpush_engine_pushes_failed_total", stats.pushes_failed),
            ("kvpush_engine_pushed_bytes_total", stats.bytes_pushed),
            ("kvpush_engine_reservations_total", stats.reservations),
            (
                "kvpush_engine_reservations_failed_total",
                stats.reservations_failed,
            ),
            ("kvpush_engine_arrived_bytes_total", stats.bytes_arrived),
        ] {
            counter!(name, "model_name" => model.clone()).absolute(value);
        }
    }
}

/// Part of the blocks that is in use, 0 to 1.
fn usage(stats: &Stats) -> f64 {
    let blocks = &stats.blocks;
    if blocks.total == 0 {
        0.0
    } else {
        (blocks.used + blocks.granted) as f64 / blocks.total as f64
    }
}

/// One request's times.
pub struct Timer {
    started: Instant,
    first: Option<Instant>,
    last: Instant,
    tokens: u32,
    meters: Meters,
}

impl Timer {
    /// Starts now.
    pub fn new(meters: &Meters) -> Self {
        let now = Instant::now();
        Self {
            started: now,
            first: None,
            last: now,
            tokens: 0,
            meters: meters.clone(),
        }
    }

    /// A token has come.
    pub fn token(&mut self) {
        let now = Instant::now();
        let since = now.duration_since(self.last).as_secs_f64();
        if self.first.is_none() {
            self.first = Some(now);
            self.meters.first_token.record(since);
        } else {
            self.meters.between_tokens.record(since);
        }
        self.last = now;
        self.tokens += 1;
    }

    /// It has ended well.
    pub fn done(&self) {
        self.meters
            .end_to_end
            .record(self.started.elapsed().as_secs_f64());
        if let Some(first) = self.first
            && self.tokens > 1
        {
            let decode: Duration = self.last.duration_since(first);
            self.meters
                .per_token
                .record(decode.as_secs_f64() / f64::from(self.tokens - 1));
        }
    }
}
