//! Control messages: what is accepted survives another round.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvpush::fuzzing::message(bytes));
