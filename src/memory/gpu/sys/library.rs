//! Opening a library and finding its functions, the same for the three runtimes.
//!
//! Libraries are never unloaded: all three start threads and register handlers for the end of the process.

use std::path::Path;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::super::{Attempt, GpuError, Runtime};

/// A function of a table.
#[derive(Clone, Copy, Debug)]
pub struct Symbol {
    /// The exported name.
    pub name: &'static str,
    /// Whether opening fails without it.
    pub required: bool,
    /// Types of the arguments, as written here.
    pub arguments: &'static [&'static str],
    /// Type of the result.
    pub result: &'static str,
}

/// Defines constants, and a list of them to compare with the header.
macro_rules! constants {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $value:expr;)*) => {
        $($(#[$doc])* pub const $name: $type = $value;)*
        /// Every constant that has its name from the header.
        pub const CONSTANTS: &[(&str, i64)] = &[$((stringify!($name), $name as i64),)*];
    };
}
pub(super) use constants;

/// Defines a table of functions: a field for each, and how to fill it from a library.
macro_rules! table {
    (
        $(#[$doc:meta])*
        $table:ident of $runtime:expr;
        required { $($rname:ident: fn($($rarg:ident : $rty:ty),* $(,)?) -> $rret:ty;)* }
        optional { $($oname:ident: fn($($oarg:ident : $oty:ty),* $(,)?) -> $oret:ty;)* }
    ) => {
        $(#[$doc])*
        pub struct $table {
            $(pub $rname: unsafe extern "C" fn($($rarg: $rty),*) -> $rret,)*
            $(pub $oname: Option<unsafe extern "C" fn($($oarg: $oty),*) -> $oret>,)*
            /// The name under which the library was opened.
            pub name: String,
            /// Keeps the functions mapped; declared last so that it is dropped last.
            _library: libloading::os::unix::Library,
        }

        impl $table {
            /// Every function of the table.
            pub const SYMBOLS: &'static [crate::memory::gpu::sys::library::Symbol] = &[
                $(crate::memory::gpu::sys::library::Symbol {
                    name: stringify!($rname),
                    required: true,
                    arguments: &[$(stringify!($rty)),*],
                    result: stringify!($rret),
                },)*
                $(crate::memory::gpu::sys::library::Symbol {
                    name: stringify!($oname),
                    required: false,
                    arguments: &[$(stringify!($oty)),*],
                    result: stringify!($oret),
                },)*
            ];

            /// Opens the library at `path`, or under the first of the usual names that the loader finds.
            pub fn open(path: Option<&std::path::Path>) -> Result<Self, crate::memory::gpu::GpuError> {
                use crate::memory::gpu::sys::library;
                let (library, name) = library::open($runtime, path, LIBRARY_NAMES)?;
                Ok(Self {
                    $($rname: {
                        // SAFETY: the type is the C declaration of this symbol; `headers_tests.rs` compares it with
                        // the header.
                        let found = unsafe { library.get(concat!(stringify!($rname), "\0")) };
                        *found.map_err(|error| {
                            library::no_symbol($runtime, &name, stringify!($rname), &error)
                        })?
                    },)*
                    $($oname: {
                        // SAFETY: as above.
                        let found = unsafe { library.get(concat!(stringify!($oname), "\0")) };
                        found.ok().map(|symbol| *symbol)
                    },)*
                    name,
                    _library: library,
                })
            }

            /// The address of a function of the table, to compare with the oracle's and to find the library's file.
            pub fn address(&self, symbol: &str) -> Option<*const std::ffi::c_void> {
                $(if symbol == stringify!($rname) {
                    return Some(self.$rname as *const std::ffi::c_void);
                })*
                $(if symbol == stringify!($oname) {
                    return self.$oname.map(|f| f as *const std::ffi::c_void);
                })*
                None
            }
        }

        impl std::fmt::Debug for $table {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($table)).field("library", &self.name).finish_non_exhaustive()
            }
        }
    };
}
pub(super) use table;

/// Opens `path` if there is one, else the first of `names` that works.
pub(super) fn open(
    runtime: Runtime,
    path: Option<&Path>,
    names: &[&str],
) -> Result<(Library, String), GpuError> {
    let mut tried = Vec::new();
    let given = path.map(|path| path.display().to_string());
    let names = match &given {
        Some(given) => vec![given.as_str()],
        None => names.to_vec(),
    };
    let flags = RTLD_NOW | RTLD_LOCAL | libc::RTLD_NODELETE;
    // An engine's memory belongs to the runtime that the engine has loaded, so that one goes first, whatever release it
    // is: two in one process do not know each other's pointers.
    for &name in &names {
        // SAFETY: runs no code; only takes a reference to what is loaded.
        if let Ok(library) = unsafe { Library::open(Some(name), flags | libc::RTLD_NOLOAD) } {
            return Ok((library, name.to_owned()));
        }
    }
    for name in names {
        // SAFETY: the constructors of these libraries touch only their own state and need no setup by the caller; a
        // path of the user's is the user's promise that it holds such a library.
        match unsafe { Library::open(Some(name), flags) } {
            Ok(library) => return Ok((library, name.to_owned())),
            Err(error) => tried.push(Attempt {
                name: name.to_owned(),
                reason: reason(&error),
            }),
        }
    }
    Err(GpuError::NoLibrary { runtime, tried })
}

pub(super) fn no_symbol(
    runtime: Runtime,
    library: &str,
    symbol: &'static str,
    error: &libloading::Error,
) -> GpuError {
    GpuError::NoSymbol {
        runtime,
        library: library.to_owned(),
        symbol,
        reason: reason(error),
    }
}

/// The loader's own text, which `libloading` keeps as the source of its error.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// The file that holds the function at `address`, with all links resolved: its name carries the release.
pub fn file_of(address: *const std::ffi::c_void) -> Option<std::path::PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: all-zero is a valid `Dl_info`: pointers only.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: dladdr(3) accepts any address and fills in `info` if it knows it.
    if unsafe { libc::dladdr(address, &mut info) } == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: after success `dli_fname` is a C string that lives as long as the library, which is never unloaded.
    let name = unsafe { std::ffi::CStr::from_ptr(info.dli_fname) };
    std::fs::canonicalize(Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()))).ok()
}

#[cfg(test)]
mod tests {
    use super::super::{cuda::Cuda, hip::Hip, hsa::Hsa};
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_names_it() {
        let path = Path::new("/nonexistent/libamdhip64.so.9");
        let Err(GpuError::NoLibrary { runtime, tried }) = Hip::open(Some(path)) else {
            panic!("opened, or another error")
        };
        assert_eq!(runtime, Runtime::Hip);
        assert_eq!(tried.len(), 1);
        assert_eq!(tried[0].name, "/nonexistent/libamdhip64.so.9");
        assert!(tried[0].reason.contains("No such file"), "{tried:?}");
    }

    #[test]
    fn what_is_loaded_already_goes_first() {
        let (_, name) = open(Runtime::Hip, None, &["libdl.so.2", "libc.so.6"]).unwrap();
        assert_eq!(name, "libc.so.6", "libdl.so.2 is not loaded, libc.so.6 is");
    }

    #[test]
    fn every_usual_name_is_tried() {
        let names = ["libkvpush-none.so.7", "libkvpush-none.so"];
        let Err(error) = open(Runtime::Hip, None, &names) else {
            panic!("opened")
        };
        let text = error.to_string();
        assert!(names.iter().all(|name| text.contains(name)), "{text}");
        assert!(text.contains("ROCm"), "{text}");
    }

    #[test]
    fn another_library_is_refused_by_symbol() {
        let libc = Some(Path::new("libc.so.6"));
        let errors = [
            (Hip::open(libc).err(), Hip::SYMBOLS[0].name),
            (Hsa::open(libc).err(), Hsa::SYMBOLS[0].name),
            (Cuda::open(libc).err(), Cuda::SYMBOLS[0].name),
        ];
        for (error, first) in errors {
            let Some(GpuError::NoSymbol {
                library, symbol, ..
            }) = error
            else {
                panic!("{error:?}")
            };
            assert_eq!((library.as_str(), symbol), ("libc.so.6", first));
        }
    }

    #[test]
    fn the_file_of_a_function_is_found() {
        let file = file_of(libc::malloc as *const std::ffi::c_void).unwrap();
        assert!(file.display().to_string().contains("libc"), "{file:?}");
        assert_eq!(file_of(std::ptr::null()), None);
    }
}
