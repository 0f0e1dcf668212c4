//! The thread's script: what fails, what there is, and what was called.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    ffi::{CStr, c_char, c_int},
};

/// What a thread's calls go by.
pub(crate) struct Script {
    /// Codes to fail with, by call: after how many successes, and the code.
    failures: BTreeMap<String, (u64, c_int)>,
    /// Every call, in order.
    calls: Vec<String>,
    /// Numbers that tests set by name.
    values: BTreeMap<String, u64>,
    /// HIP's current device.
    pub(crate) device: c_int,
    /// CUDA's stack of contexts.
    pub(crate) contexts: Vec<usize>,
    /// Streams and events that have been made and not destroyed, and pinned addresses.
    pub(crate) live: BTreeSet<usize>,
    next: usize,
    /// HIP's last error.
    pub(crate) last_error: c_int,
}

impl Script {
    const fn new() -> Self {
        Self {
            failures: BTreeMap::new(),
            calls: Vec::new(),
            values: BTreeMap::new(),
            device: 0,
            contexts: Vec::new(),
            live: BTreeSet::new(),
            next: 0x1000,
            last_error: 0,
        }
    }

    pub(crate) fn value(&self, name: &str, default: u64) -> u64 {
        self.values.get(name).copied().unwrap_or(default)
    }

    pub(crate) fn make(&mut self) -> usize {
        self.next += 0x10;
        self.live.insert(self.next);
        self.next
    }
}

thread_local! {
    static SCRIPT: RefCell<Script> = const { RefCell::new(Script::new()) };
}

pub(crate) fn script<T>(with: impl FnOnce(&mut Script) -> T) -> T {
    SCRIPT.with_borrow_mut(with)
}

/// Logs a call, and returns the code to fail with, if it is to fail.
pub(crate) fn called(name: &str) -> c_int {
    script(|script| {
        script.calls.push(name.to_owned());
        match script.failures.get_mut(name) {
            Some((0, code)) => *code,
            Some((successes, _)) => {
                *successes -= 1;
                0
            }
            None => 0,
        }
    })
}

/// # Safety
///
/// `text` is a C string.
unsafe fn text<'a>(text: *const c_char) -> std::borrow::Cow<'a, str> {
    // SAFETY: by this function's contract.
    unsafe { CStr::from_ptr(text) }.to_string_lossy()
}

/// Forgets the thread's script and log.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn double_reset() {
    script(|script| *script = Script::new());
}

/// After `successes` more of them, calls of `name` fail with `code`; code 0 ends that.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn double_fail(name: *const c_char, successes: u64, code: c_int) {
    // SAFETY: the tests pass C strings; so below.
    let name = unsafe { text(name) }.into_owned();
    script(|script| script.failures.insert(name, (successes, code)));
}

/// Sets a number: `devices`, `version`, `lead`, `skew`, `kind`, `ordering`, …; see where they are asked for.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn double_set(name: *const c_char, value: u64) {
    // SAFETY: see `double_fail`.
    let name = unsafe { text(name) }.into_owned();
    script(|script| script.values.insert(name, value));
}

/// What a number is now: `device`, `contexts`, `live`, `last_error`, or one that was set.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn double_value(name: *const c_char) -> u64 {
    // SAFETY: see `double_fail`.
    let name = unsafe { text(name) };
    script(|script| match &*name {
        "device" => script.device as u64,
        "contexts" => script.contexts.len() as u64,
        "live" => script.live.len() as u64,
        "last_error" => script.last_error as u64,
        name => script.value(name, 0),
    })
}

/// How often `name` was called.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn double_calls(name: *const c_char) -> u64 {
    // SAFETY: see `double_fail`.
    let name = unsafe { text(name) };
    script(|script| script.calls.iter().filter(|call| **call == name).count() as u64)
}
