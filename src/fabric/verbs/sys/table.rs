//! The table of functions found in libibverbs at run time.
//!
//! The library exports most names twice: a hidden `IBVERBS_1.0` for binaries of 2006 and a default `IBVERBS_1.1`
//! with today's layouts. `dlsym` returns the default version, as the dynamic linker does; the tests compare every
//! entry with `dlvsym` of the version written here.
//!
//! The library is never unloaded: providers register themselves in it and it keeps state for `fork`, so a
//! `dlclose` would leave dangling pointers behind. [`Verbs`] is immutable and may be shared by all threads.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Arc;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::*;

/// File names under which [`Verbs::open`] looks for the library; the first carries its ABI version.
pub const LIBRARY_NAMES: &[&str] = &["libibverbs.so.1", "libibverbs.so"];

/// A function of the table, as the library names it.
#[derive(Clone, Copy, Debug)]
pub struct Symbol {
    /// The exported name.
    pub name: &'static str,
    /// The version of the default definition (`libibverbs.map` of rdma-core).
    pub version: &'static CStr,
    /// Whether [`Verbs::open`] fails without it.
    pub required: bool,
}

macro_rules! table {
    (
        required { $($rname:ident @ $rver:literal : fn($($rarg:ident : $rty:ty),* $(,)?) $(-> $rret:ty)?;)* }
        optional { $($oname:ident @ $over:literal : fn($($oarg:ident : $oty:ty),* $(,)?) $(-> $oret:ty)?;)* }
    ) => {
        /// libibverbs, opened. The fields are the raw functions; prefer the methods, which return [`Errno`]s.
        pub struct Verbs {
            $(pub $rname: unsafe extern "C" fn($($rarg: $rty),*) $(-> $rret)?,)*
            $(pub $oname: Option<unsafe extern "C" fn($($oarg: $oty),*) $(-> $oret)?>,)*
            name: String,
            /// Keeps the functions above mapped; declared last so that it is dropped last.
            _library: Library,
        }

        impl Verbs {
            /// Every function of the table.
            pub const SYMBOLS: &'static [Symbol] = &[
                $(Symbol { name: stringify!($rname), version: $rver, required: true },)*
                $(Symbol { name: stringify!($oname), version: $over, required: false },)*
            ];

            fn resolve(library: Library, name: &str) -> Result<Self, OpenError> {
                Ok(Self {
                    $($rname: {
                        // SAFETY: the type is the C declaration of this symbol, compared with the header by the oracle.
                        let found = unsafe { library.get(concat!(stringify!($rname), "\0")) };
                        *found.map_err(|error: libloading::Error| OpenError::MissingSymbol {
                            library: name.to_owned(),
                            symbol: stringify!($rname),
                            reason: reason(&error),
                        })?
                    },)*
                    $($oname: {
                        // SAFETY: as above.
                        let found = unsafe { library.get(concat!(stringify!($oname), "\0")) };
                        found.ok().map(|symbol| *symbol)
                    },)*
                    name: name.to_owned(),
                    _library: library,
                })
            }

            /// The address of a function of the table; `None` when it has no such function or the library lacks it.
            #[must_use]
            pub fn address(&self, symbol: &str) -> Option<*const c_void> {
                $(if symbol == stringify!($rname) {
                    return Some(self.$rname as *const c_void);
                })*
                $(if symbol == stringify!($oname) {
                    return self.$oname.map(|f| f as *const c_void);
                })*
                None
            }
        }
    };
}

table! {
    required {
        ibv_get_device_list @ c"IBVERBS_1.1": fn(num_devices: *mut c_int) -> *mut *mut ibv_device;
        ibv_free_device_list @ c"IBVERBS_1.1": fn(list: *mut *mut ibv_device);
        ibv_get_device_name @ c"IBVERBS_1.1": fn(device: *mut ibv_device) -> *const c_char;
        ibv_get_device_guid @ c"IBVERBS_1.1": fn(device: *mut ibv_device) -> u64;
        ibv_open_device @ c"IBVERBS_1.1": fn(device: *mut ibv_device) -> *mut ibv_context;
        ibv_close_device @ c"IBVERBS_1.1": fn(context: *mut ibv_context) -> c_int;
        ibv_get_async_event @ c"IBVERBS_1.1":
            fn(context: *mut ibv_context, event: *mut ibv_async_event) -> c_int;
        ibv_ack_async_event @ c"IBVERBS_1.1": fn(event: *mut ibv_async_event);
        ibv_query_device @ c"IBVERBS_1.1":
            fn(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int;
        ibv_query_port @ c"IBVERBS_1.1":
            fn(context: *mut ibv_context, port_num: u8, attr: *mut _compat_ibv_port_attr) -> c_int;
        ibv_query_gid @ c"IBVERBS_1.1":
            fn(context: *mut ibv_context, port_num: u8, index: c_int, gid: *mut ibv_gid) -> c_int;
        ibv_query_pkey @ c"IBVERBS_1.1":
            fn(context: *mut ibv_context, port_num: u8, index: c_int, pkey: *mut u16) -> c_int;
        ibv_alloc_pd @ c"IBVERBS_1.1": fn(context: *mut ibv_context) -> *mut ibv_pd;
        ibv_dealloc_pd @ c"IBVERBS_1.1": fn(pd: *mut ibv_pd) -> c_int;
        ibv_reg_mr @ c"IBVERBS_1.1":
            fn(pd: *mut ibv_pd, addr: *mut c_void, length: usize, access: c_int) -> *mut ibv_mr;
        ibv_dereg_mr @ c"IBVERBS_1.1": fn(mr: *mut ibv_mr) -> c_int;
        ibv_create_comp_channel @ c"IBVERBS_1.0": fn(context: *mut ibv_context) -> *mut ibv_comp_channel;
        ibv_destroy_comp_channel @ c"IBVERBS_1.0": fn(channel: *mut ibv_comp_channel) -> c_int;
        ibv_create_cq @ c"IBVERBS_1.1": fn(
            context: *mut ibv_context,
            cqe: c_int,
            cq_context: *mut c_void,
            channel: *mut ibv_comp_channel,
            comp_vector: c_int,
        ) -> *mut ibv_cq;
        ibv_destroy_cq @ c"IBVERBS_1.1": fn(cq: *mut ibv_cq) -> c_int;
        ibv_get_cq_event @ c"IBVERBS_1.1":
            fn(channel: *mut ibv_comp_channel, cq: *mut *mut ibv_cq, cq_context: *mut *mut c_void) -> c_int;
        ibv_ack_cq_events @ c"IBVERBS_1.1": fn(cq: *mut ibv_cq, nevents: c_uint);
        ibv_create_srq @ c"IBVERBS_1.1": fn(pd: *mut ibv_pd, attr: *mut ibv_srq_init_attr) -> *mut ibv_srq;
        ibv_modify_srq @ c"IBVERBS_1.1":
            fn(srq: *mut ibv_srq, attr: *mut ibv_srq_attr, attr_mask: c_int) -> c_int;
        ibv_query_srq @ c"IBVERBS_1.1": fn(srq: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int;
        ibv_destroy_srq @ c"IBVERBS_1.1": fn(srq: *mut ibv_srq) -> c_int;
        ibv_create_qp @ c"IBVERBS_1.1": fn(pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp;
        ibv_modify_qp @ c"IBVERBS_1.1":
            fn(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, attr_mask: c_int) -> c_int;
        ibv_query_qp @ c"IBVERBS_1.1": fn(
            qp: *mut ibv_qp,
            attr: *mut ibv_qp_attr,
            attr_mask: c_int,
            init_attr: *mut ibv_qp_init_attr,
        ) -> c_int;
        ibv_destroy_qp @ c"IBVERBS_1.1": fn(qp: *mut ibv_qp) -> c_int;
        ibv_fork_init @ c"IBVERBS_1.1": fn() -> c_int;
        ibv_wc_status_str @ c"IBVERBS_1.1": fn(status: ibv_wc_status) -> *const c_char;
        ibv_node_type_str @ c"IBVERBS_1.1": fn(node_type: ibv_node_type) -> *const c_char;
        ibv_port_state_str @ c"IBVERBS_1.1": fn(state: ibv_port_state) -> *const c_char;
        ibv_event_type_str @ c"IBVERBS_1.1": fn(event: ibv_event_type) -> *const c_char;
    }
    optional {
        ibv_get_device_index @ c"IBVERBS_1.9": fn(device: *mut ibv_device) -> c_int;
        _ibv_query_gid_ex @ c"IBVERBS_1.11": fn(
            context: *mut ibv_context,
            port_num: u32,
            gid_index: u32,
            entry: *mut ibv_gid_entry,
            flags: u32,
            entry_size: usize,
        ) -> c_int;
        _ibv_query_gid_table @ c"IBVERBS_1.11": fn(
            context: *mut ibv_context,
            entries: *mut ibv_gid_entry,
            max_entries: usize,
            flags: u32,
            entry_size: usize,
        ) -> isize;
        ibv_reg_mr_iova2 @ c"IBVERBS_1.8": fn(
            pd: *mut ibv_pd,
            addr: *mut c_void,
            length: usize,
            iova: u64,
            access: c_uint,
        ) -> *mut ibv_mr;
        ibv_reg_dmabuf_mr @ c"IBVERBS_1.12": fn(
            pd: *mut ibv_pd,
            offset: u64,
            length: usize,
            iova: u64,
            fd: c_int,
            access: c_int,
        ) -> *mut ibv_mr;
        ibv_is_fork_initialized @ c"IBVERBS_1.13": fn() -> ibv_fork_status;
        ibv_query_qp_data_in_order @ c"IBVERBS_1.14":
            fn(qp: *mut ibv_qp, op: ibv_wr_opcode, flags: u32) -> c_int;
    }
}

/// The loader's own text, which `libloading` keeps as the source of its error.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

impl Verbs {
    /// Opens the system's libibverbs. Takes a `dlopen` and some forty `dlsym`s; call once and share.
    ///
    /// # Errors
    ///
    /// [`OpenError::NotFound`] with every name tried, or [`OpenError::MissingSymbol`] for a library too old.
    pub fn open() -> Result<Arc<Self>, OpenError> {
        Self::open_any(LIBRARY_NAMES)
    }

    /// Like [`open`](Self::open), with the file names or paths to try, in order.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open). A library that opens but lacks a function ends the search: another name would be
    /// the same library or a second one in the same process.
    pub fn open_any(names: &[&str]) -> Result<Arc<Self>, OpenError> {
        let mut tried = Vec::new();
        for &name in names {
            // SAFETY: the constructors of libibverbs touch only its own state and need no setup by the caller.
            match unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL | libc::RTLD_NODELETE) }
            {
                Ok(library) => return Self::resolve(library, name).map(Arc::new),
                Err(error) => tried.push(Attempt {
                    name: name.to_owned(),
                    reason: reason(&error),
                }),
            }
        }
        Err(OpenError::NotFound { tried })
    }

    /// The name under which the library was opened.
    #[must_use]
    pub fn library_name(&self) -> &str {
        &self.name
    }
}

impl std::fmt::Debug for Verbs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verbs")
            .field("library", &self.name)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The real library, or `None` with the reason printed: a machine without it still has the other tests, and the
    /// guests that run this suite over soft-RoCE always have it.
    fn installed() -> Option<Arc<Verbs>> {
        match Verbs::open() {
            Ok(verbs) => Some(verbs),
            Err(error @ OpenError::NotFound { .. }) => {
                eprintln!("skipped: {error}");
                None
            }
            Err(error) => panic!("libibverbs is installed but unusable: {error}"),
        }
    }

    #[test]
    fn missing_library_names_everything_tried() {
        let names = [
            "libkvpush-no-such-verbs.so.1",
            "/nonexistent/libibverbs.so.9",
        ];
        let error = Verbs::open_any(&names).expect_err("no such library");
        let OpenError::NotFound { tried } = &error else {
            panic!("wrong error: {error}")
        };
        assert_eq!(
            tried
                .iter()
                .map(|attempt| attempt.name.as_str())
                .collect::<Vec<_>>(),
            names
        );
        let text = error.to_string();
        for attempt in tried {
            assert!(
                attempt.reason.contains("cannot open") || attempt.reason.contains("No such"),
                "{attempt}"
            );
            assert!(
                text.contains(&attempt.name) && text.contains(&attempt.reason),
                "{text}"
            );
        }
    }

    #[test]
    fn no_names_is_not_found() {
        assert!(
            matches!(Verbs::open_any(&[]), Err(OpenError::NotFound { tried }) if tried.is_empty())
        );
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn foreign_library_is_refused_by_symbol() {
        let error = Verbs::open_any(&["libc.so.6"]).expect_err("libc has no verbs");
        let OpenError::MissingSymbol {
            library,
            symbol,
            reason,
        } = error
        else {
            panic!("wrong error: {error}")
        };
        assert_eq!(library, "libc.so.6");
        assert_eq!(symbol, Verbs::SYMBOLS[0].name);
        assert!(reason.contains(symbol), "{reason}");
    }

    #[test]
    fn installed_library_opens() {
        let Some(verbs) = installed() else { return };
        assert!(LIBRARY_NAMES.contains(&verbs.library_name()));
        for symbol in Verbs::SYMBOLS.iter().filter(|symbol| symbol.required) {
            assert!(verbs.address(symbol.name).is_some(), "{}", symbol.name);
        }
        assert_eq!(verbs.address("ibv_no_such_verb"), None);
    }

    /// `dlsym` must not have picked a compatibility version, whose structs have other layouts.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn every_function_is_the_default_version() {
        let Some(verbs) = installed() else { return };
        let file = std::ffi::CString::new(verbs.library_name()).expect("no NUL");
        // SAFETY: the name is a C string; the library is mapped already, so this only takes a reference.
        let handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
        assert!(!handle.is_null());
        let mut twice = 0;
        for symbol in Verbs::SYMBOLS {
            let name = std::ffi::CString::new(symbol.name).expect("no NUL");
            // SAFETY: an open handle and two C strings.
            let (ours, old) = unsafe {
                (
                    libc::dlvsym(handle, name.as_ptr(), symbol.version.as_ptr()),
                    libc::dlvsym(handle, name.as_ptr(), c"IBVERBS_1.0".as_ptr()),
                )
            };
            let found = verbs.address(symbol.name).unwrap_or(std::ptr::null());
            assert_eq!(
                found,
                ours.cast_const(),
                "{} @ {:?}",
                symbol.name,
                symbol.version
            );
            if symbol.version != c"IBVERBS_1.0" && !old.is_null() {
                assert_ne!(
                    found,
                    old.cast_const(),
                    "{} is the 2006 version",
                    symbol.name
                );
                twice += 1;
            }
        }
        // The comparison above is only worth something where the library still has both versions.
        assert!(twice > 0, "no function with two versions was found");
    }
}
