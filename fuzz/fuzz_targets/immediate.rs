//! Immediates: each value is one slot and one part.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvpush::fuzzing::immediate(bytes));
