//! Descriptions of pools: what is accepted survives another round, and its layout can be looked at.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvpush::fuzzing::pool(bytes));
