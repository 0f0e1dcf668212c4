//! The command line of kvpush-engine.

fn main() {}
