//! Words for people. Unlike `println!` these do not panic when whoever listened has gone (`kvpush-bench devices | head`).

use std::{
    fmt::Display,
    io::{Write, stderr, stdout},
};

/// A line of the result, at once.
pub(crate) fn say(line: impl Display) {
    let mut out = stdout().lock();
    // There is nobody left to tell.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// A line beside the result.
pub(crate) fn note(line: impl Display) {
    let _ = writeln!(stderr().lock(), "{line}");
}
