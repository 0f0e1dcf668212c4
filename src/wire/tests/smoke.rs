//! A short deterministic fuzz run for every test run; `fuzz/` has the same targets for cargo-fuzz.
