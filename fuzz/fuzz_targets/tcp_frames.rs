//! The tcp fabric: lane addresses, hellos and frame headers.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvpush::fuzzing::tcp_frames(bytes));
