//! Lane addresses of the verbs fabric.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvpush::fuzzing::verbs_address(bytes));
