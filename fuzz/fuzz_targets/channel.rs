//! The authenticated stream: nothing is accepted that the peer did not send.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvpush::fuzzing::channel(bytes));
