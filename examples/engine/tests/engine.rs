//! The engine with its thread, through its handle only.

use std::time::{Duration, Instant};

use kvpush_engine::{
    engine::{
        Config, Engine, Handle, KvChange,
        fake::{FakeModel, Shape},
    },
    model::{Chunk, KvShard, Logits, Model, ModelConfig, ModelError, Observer},
    request::{Event, Leg, Request, RequestError, SamplingParams, Usage},
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

fn start(shape: Shape, config: Config) -> Engine {
    let model = FakeModel::new(shape).expect("a model");
    Engine::start(Box::new(model), None, config).expect("a thread")
}

fn request(id: &str, prompt: usize, max_tokens: usize) -> (Request, UnboundedReceiver<Event>) {
    let (events, receiver) = unbounded_channel();
    let request = Request {
        id: id.to_owned(),
        prompt: (0..prompt as u32).collect(),
        sampling: SamplingParams {
            max_tokens,
            temperature: 0.0,
            ignore_eos: true,
            ..SamplingParams::default()
        },
        deadline: Instant::now() + Duration::from_secs(60),
        leg: Leg::Both,
        traceparent: None,
        cache_salt: None,
        events,
    };
    (request, receiver)
}

/// The end, and how many tokens came before.
fn end(receiver: &mut UnboundedReceiver<Event>) -> (usize, Result<Usage, RequestError>) {
    let mut tokens = 0;
    loop {
        match receiver.blocking_recv().expect("an end") {
            Event::Token(_) => tokens += 1,
            Event::Done(usage) => return (tokens, Ok(usage)),
            Event::Failed(error) => return (tokens, Err(error)),
            _ => {}
        }
    }
}

/// Waits for what the engine thread shows after a step.
fn wait(handle: &Handle, what: impl Fn(&Handle) -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !what(handle) {
        assert!(Instant::now() < until, "{:?}", handle.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn is_back(handle: &Handle) -> bool {
    let blocks = handle.stats().blocks;
    blocks.available() == blocks.total
}

/// Steps take so long that what is asked for comes in the middle of a request.
fn slow() -> Shape {
    Shape {
        layer_time: Duration::from_millis(2),
        ..Shape::default()
    }
}

#[test]
fn many_requests_from_many_threads() {
    let engine = start(Shape::default(), Config::default());
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let handle = engine.handle();
            scope.spawn(move || {
                for n in 0..10 {
                    let (request, mut events) = request(&format!("{thread}-{n}"), 20 + n, 5);
                    handle.submit(request).expect("taken");
                    let (tokens, usage) = end(&mut events);
                    assert_eq!((tokens, usage.expect("success").completion_tokens), (5, 5));
                }
            });
        }
    });
    let handle = engine.handle();
    wait(&handle, |handle| handle.stats().succeeded == 40);
    assert!(is_back(&handle));
    assert!(handle.stats().cached_tokens > 0);
}

#[test]
fn impossible_requests_are_refused_with_what_is_wrong() {
    let engine = start(Shape::default(), Config::default());
    let handle = engine.handle();
    let refused = |change: &dyn Fn(&mut Request)| {
        let (mut request, _events) = request("a", 10, 4);
        change(&mut request);
        match handle.submit(request).expect_err("refused") {
            RequestError::Invalid { param, .. } => param,
            other => panic!("{other}"),
        }
    };
    assert_eq!(refused(&|r| r.prompt.clear()), Some("prompt"));
    assert_eq!(refused(&|r| r.prompt.push(256)), Some("prompt"));
    assert_eq!(refused(&|r| r.leg = Leg::PrefillHeld), Some("leg"));
    type Change = fn(&mut SamplingParams);
    let changes: [(&str, Change); 14] = [
        ("max_tokens", |s| s.max_tokens = 0),
        ("min_tokens", |s| s.min_tokens = 5),
        ("temperature", |s| s.temperature = -1.0),
        ("temperature", |s| s.temperature = f32::NAN),
        ("top_p", |s| s.top_p = 0.0),
        ("min_p", |s| s.min_p = 1.5),
        ("presence_penalty", |s| s.presence_penalty = f32::INFINITY),
        ("frequency_penalty", |s| s.frequency_penalty = f32::NAN),
        ("repetition_penalty", |s| s.repetition_penalty = 0.0),
        ("n", |s| s.n = 0),
        ("logprobs", |s| s.logprobs = Some(21)),
        ("prompt_logprobs", |s| s.prompt_logprobs = Some(21)),
        ("stop_token_ids", |s| s.stop_token_ids = vec![256]),
        ("logit_bias", |s| s.logit_bias = vec![(1, f32::NAN)]),
    ];
    for (param, change) in changes {
        assert_eq!(refused(&|r| change(&mut r.sampling)), Some(param));
    }
    let (long, _events) = request("a", 200, 313);
    assert_eq!(
        handle.submit(long),
        Err(RequestError::ContextLength {
            context: 512,
            prompt: 200,
            max_tokens: 313
        })
    );
    assert_eq!(handle.stats().refused, 18);
}

#[test]
fn what_can_never_fit_is_refused() {
    let shape = Shape {
        blocks: 4,
        ..Shape::default()
    };
    let engine = start(shape, Config::default());
    // 4 blocks of 16 tokens; the last token needs none.
    let (fits, mut events) = request("a", 60, 5);
    engine.handle().submit(fits).expect("taken");
    assert_eq!(end(&mut events).0, 5);
    let (too_long, _events) = request("b", 60, 6);
    let refused = engine.handle().submit(too_long);
    assert!(matches!(refused, Err(RequestError::Invalid { .. })));
}

#[test]
fn a_full_queue_is_busy_and_an_id_is_used_once_at_a_time() {
    let config = Config {
        max_running: 1,
        max_waiting: 2,
        ..Config::default()
    };
    let engine = start(slow(), config);
    let handle = engine.handle();
    let mut events = Vec::new();
    let mut submit = |id: &str| {
        let (request, receiver) = request(id, 10, 50);
        events.push(receiver);
        handle.submit(request)
    };
    submit("a").expect("taken");
    wait(&handle, |handle| handle.stats().running == 1);
    submit("b").expect("taken");
    assert!(matches!(submit("b"), Err(RequestError::Invalid { .. })));
    submit("c").expect("taken");
    match submit("d") {
        Err(error @ RequestError::Busy { retry_after, .. }) => {
            assert!(error.is_retryable() && !retry_after.is_zero());
        }
        other => panic!("{other:?}"),
    }
    for id in ["a", "b", "c"] {
        handle.abort(id);
    }
    wait(&handle, |handle| handle.stats().aborted == 3);
    assert!(is_back(&handle));
}

#[test]
fn receivers_that_are_closed_are_noticed() {
    let engine = start(slow(), Config::default());
    let handle = engine.handle();
    let (request, events) = request("a", 10, 400);
    handle.submit(request).expect("taken");
    wait(&handle, |handle| handle.stats().generated_tokens > 0);
    drop(events);
    wait(&handle, |handle| handle.stats().aborted == 1);
    assert!(is_back(&handle) && handle.stats().generated_tokens < 400);
}

#[test]
fn draining_ends_what_runs_and_takes_nothing_new() {
    let engine = start(slow(), Config::default());
    let handle = engine.handle();
    let (first, mut events) = request("a", 10, 20);
    handle.submit(first).expect("taken");
    handle.start_drain();
    let (second, _events) = request("b", 10, 20);
    assert_eq!(handle.submit(second), Err(RequestError::Draining));
    assert!(!handle.is_drained());
    assert_eq!(end(&mut events).0, 20);
    wait(&handle, Handle::is_drained);
    engine.shutdown();
    assert!(!handle.is_alive());
}

#[test]
fn a_shutdown_ends_every_request() {
    let engine = start(slow(), Config::default());
    let handle = engine.handle();
    let (first, mut events) = request("a", 10, 400);
    handle.submit(first).expect("taken");
    engine.shutdown();
    assert_eq!(end(&mut events).1, Err(RequestError::Draining));
    let (second, _events) = request("b", 10, 20);
    assert!(handle.submit(second).is_err());
}

#[test]
fn changes_of_the_prefix_cache_are_told_and_can_be_read_again() {
    let engine = start(Shape::default(), Config::default());
    let handle = engine.handle();
    let mut listener = handle.subscribe_kv_events();
    let (request, mut events) = request("a", 40, 2);
    handle.submit(request).expect("taken");
    end(&mut events).1.expect("success");
    let first = listener.blocking_recv().expect("an event");
    let KvChange::Stored {
        hashes,
        parent: None,
        tokens,
        block_size: 16,
    } = &first.change
    else {
        panic!("{first:?}");
    };
    assert_eq!((hashes.len(), tokens.len()), (2, 32));
    assert_eq!(
        handle.replay_kv_events(1).events,
        std::slice::from_ref(&first)
    );
    let snapshot = handle.kv_snapshot();
    assert_eq!(snapshot.sequence, 1);
    assert_eq!(snapshot.blocks.len(), 2);

    handle.clear_prefix_cache();
    let second = listener.blocking_recv().expect("an event");
    assert_eq!((second.sequence, second.change), (2, KvChange::Cleared));
    assert!(handle.kv_snapshot().blocks.is_empty());
}

/// A model that does not live long.
struct Doomed(FakeModel, u32);

impl Model for Doomed {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }

    fn block_tokens(&self) -> usize {
        self.0.block_tokens()
    }

    fn blocks(&self) -> u32 {
        self.0.blocks()
    }

    fn shards(&self) -> &[KvShard] {
        self.0.shards()
    }

    fn forward(
        &mut self,
        batch: &[Chunk<'_>],
        observer: &mut dyn Observer,
    ) -> Result<Logits, ModelError> {
        self.1 -= 1;
        match self.1 {
            3 => Err(ModelError::Batch("a rank has failed".to_owned())),
            0 => panic!("doomed"),
            _ => self.0.forward(batch, observer),
        }
    }
}

#[test]
fn a_model_that_fails_or_panics_fails_its_requests() {
    let model = FakeModel::new(Shape::default()).expect("a model");
    let engine = Engine::start(Box::new(Doomed(model, 5)), None, Config::default());
    let engine = engine.expect("a thread");
    let handle = engine.handle();
    for id in ["a", "b"] {
        let (request, mut events) = request(id, 10, 10);
        handle.submit(request).expect("taken");
        assert!(matches!(end(&mut events).1, Err(RequestError::Internal(_))));
        // Only after the panic.
        assert_eq!(handle.is_alive(), id == "a");
        assert!(id == "b" || is_back(&handle));
    }
    let (late, _events) = request("c", 10, 10);
    assert!(matches!(
        handle.submit(late),
        Err(RequestError::Internal(_))
    ));
    assert!(handle.is_drained());
}

#[test]
fn an_id_may_be_used_again_as_soon_as_its_request_has_ended() {
    let engine = start(Shape::default(), Config::default());
    for _ in 0..50 {
        let (request, mut events) = request("a", 10, 1);
        engine.handle().submit(request).expect("the id is free");
        end(&mut events).1.expect("success");
    }
}
