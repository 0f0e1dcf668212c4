//! An engine without work sleeps. The only test of its process: it looks at the process's threads.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use kvpush_engine::{
    engine::{
        Config, Engine,
        fake::{FakeModel, Shape},
    },
    request::{Event, Leg, Request, SamplingParams},
};

/// The engine thread's folder in `/proc`.
fn engine_thread() -> PathBuf {
    fs::read_dir("/proc/self/task")
        .expect("threads")
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == "kvpush-engine")
        })
        .expect("an engine thread")
}

/// How often it has gone to sleep or was put aside.
fn switches(thread: &std::path::Path) -> Vec<String> {
    let status = fs::read_to_string(thread.join("status")).expect("its status");
    let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
    lines.map(str::to_owned).collect()
}

#[test]
fn an_engine_without_work_sleeps() {
    let model = FakeModel::new(Shape::default()).expect("a model");
    let engine = Engine::start(Box::new(model), None, Config::default()).expect("a thread");
    let (events, mut receiver) = tokio::sync::mpsc::unbounded_channel();
    let request = Request {
        id: "a".to_owned(),
        prompt: vec![1; 40],
        sampling: SamplingParams::default(),
        deadline: Instant::now() + Duration::from_secs(60),
        leg: Leg::Both,
        traceparent: None,
        cache_salt: None,
        events,
    };
    engine.handle().submit(request).expect("taken");
    while !matches!(receiver.blocking_recv(), Some(Event::Done(_))) {}

    let thread = engine_thread();
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let before = switches(&thread);
        assert!(!before.is_empty());
        // Several times what it would sleep at most if it had work to look for.
        std::thread::sleep(Duration::from_millis(200));
        if before == switches(&thread) {
            break;
        }
        assert!(Instant::now() < until, "it does not come to rest");
    }
}
