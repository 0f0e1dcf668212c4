//! Grants and region tokens: what is accepted has one encoding.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvpush::fuzzing::grant(bytes));
