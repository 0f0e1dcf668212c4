//! The bindings, compared with the C headers by the C compiler.
//!
//! The headers are found through `KVPUSH_HIP_INCLUDE`, `KVPUSH_HSA_INCLUDE` and `KVPUSH_CUDA_INCLUDE`, each a folder to
//! give to the compiler. `cargo xtask gpu-libs` sets the first two to Debian's, and the third if this machine has CUDA's.
//! Without, nothing is compared, and the tests say so.
//!
//! A C file is made of assertions about types, values and places, from the very definitions that the bindings use, and
//! is compiled, not run.

use std::{
    fs,
    mem::offset_of,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use super::{cuda, hip, hsa, library::Symbol};

/// One header and what is asserted about it.
struct Check {
    variable: &'static str,
    include: &'static str,
    /// A file that is searched for the names of optional functions, which old headers lack.
    header: &'static str,
    symbols: &'static [Symbol],
    constants: &'static [(&'static str, i64)],
    more: String,
}

/// The C type for one of the bindings'.
fn c_type(ours: &str) -> String {
    let ours = ours.trim();
    if let Some(inner) = ours.strip_prefix("*mut ") {
        return format!("{} *", c_type(inner));
    }
    if let Some(inner) = ours.strip_prefix("*const ") {
        // `T const *` and not `const T *`, so that pointers to pointers come out right.
        return format!("{} const *", c_type(inner));
    }
    let plain = match ours {
        "c_void" => "void",
        "c_char" => "char",
        "c_int" => "int",
        "c_uint" => "unsigned int",
        "c_ulonglong" => "unsigned long long",
        "usize" => "size_t",
        "u64" => "uint64_t",
        named => named,
    };
    plain.to_owned()
}

fn declaration(symbol: &Symbol) -> String {
    let arguments: Vec<_> = symbol.arguments.iter().map(|ours| c_type(ours)).collect();
    let arguments = if arguments.is_empty() {
        "void".to_owned()
    } else {
        arguments.join(", ")
    };
    format!(
        "_Static_assert(__builtin_types_compatible_p(__typeof__(&{0}), {1} (*)({arguments})), \"{0}\");\n",
        symbol.name,
        c_type(symbol.result)
    )
}

/// The compiler's complaints; empty if all is equal. `None` if there is no such header.
fn compare(check: &Check) -> Option<String> {
    let Some(folder) = std::env::var_os(check.variable) else {
        println!(
            "NOT COMPARED: {}: {} is not set",
            check.include, check.variable
        );
        return None;
    };
    let header = std::path::Path::new(&folder).join(check.header);
    let text = fs::read_to_string(&header).expect("the header is where the variable says");
    let mut source = format!(
        "#include <stddef.h>\n#include <stdint.h>\n#include <{}>\n",
        check.include
    );
    for symbol in check.symbols {
        if symbol.required || text.contains(symbol.name) {
            source += &declaration(symbol);
        } else {
            println!(
                "NOT COMPARED: {} is not in {}",
                symbol.name,
                header.display()
            );
        }
    }
    for (name, value) in check.constants {
        source += &format!("_Static_assert((long long)({name}) == {value}LL, \"{name}\");\n");
    }
    source += &check.more;
    // Each comparison has its own file: they may run side by side, in one process or in several.
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let file =
        std::env::temp_dir().join(format!("kvpush-headers-{}-{number}.c", std::process::id()));
    fs::write(&file, source).unwrap();
    let compiled = Command::new("cc")
        .args([
            "-std=gnu11",
            "-fsyntax-only",
            "-D__HIP_PLATFORM_AMD__",
            "-D__HIP_PLATFORM_HCC__",
            "-isystem",
        ])
        .arg(&folder)
        .arg(&file)
        .output()
        .expect("cc starts");
    fs::remove_file(&file).unwrap();
    let complaints = String::from_utf8_lossy(&compiled.stderr).into_owned();
    assert!(compiled.status.success() || !complaints.is_empty());
    Some(if compiled.status.success() {
        String::new()
    } else {
        complaints
    })
}

fn hip_check() -> Check {
    type Ours = hip::hipPointerAttribute_t;
    let size = size_of::<Ours>();
    let mut more = format!("_Static_assert(sizeof(hipPointerAttribute_t) == {size}, \"size\");\n");
    let kind = offset_of!(Ours, memoryType);
    for (name, place) in [
        ("device", offset_of!(Ours, device)),
        ("devicePointer", offset_of!(Ours, devicePointer)),
        ("hostPointer", offset_of!(Ours, hostPointer)),
        ("isManaged", offset_of!(Ours, isManaged)),
        ("allocationFlags", offset_of!(Ours, allocationFlags)),
    ] {
        more += &format!(
            "_Static_assert(offsetof(hipPointerAttribute_t, {name}) == {place}, \"{name}\");\n"
        );
    }
    use hip::memory_type::{DEVICE_5, DEVICE_6, HOST_5, HOST_6, MANAGED_6, UNREGISTERED_6};
    more += &format!(
        "#include <hip/hip_version.h>\n\
         #if HIP_VERSION_MAJOR >= 6\n\
         _Static_assert(offsetof(hipPointerAttribute_t, type) == {kind}, \"type\");\n\
         _Static_assert(hipMemoryTypeUnregistered == {UNREGISTERED_6} && hipMemoryTypeHost == {HOST_6}\n\
             && hipMemoryTypeDevice == {DEVICE_6} && hipMemoryTypeManaged == {MANAGED_6}, \"kinds\");\n\
         #else\n\
         _Static_assert(offsetof(hipPointerAttribute_t, memoryType) == {kind}, \"type\");\n\
         _Static_assert(hipMemoryTypeHost == {HOST_5} && hipMemoryTypeDevice == {DEVICE_5}, \"kinds\");\n\
         #endif\n"
    );
    Check {
        variable: "KVPUSH_HIP_INCLUDE",
        include: "hip/hip_runtime_api.h",
        header: "hip/hip_runtime_api.h",
        symbols: hip::Hip::SYMBOLS,
        constants: hip::CONSTANTS,
        more,
    }
}

fn hsa_check() -> Check {
    Check {
        variable: "KVPUSH_HSA_INCLUDE",
        include: "hsa/hsa_ext_amd.h",
        header: "hsa/hsa_ext_amd.h",
        symbols: hsa::Hsa::SYMBOLS,
        constants: hsa::CONSTANTS,
        more: String::new(),
    }
}

fn cuda_check() -> Check {
    Check {
        variable: "KVPUSH_CUDA_INCLUDE",
        include: "cuda.h",
        header: "cuda.h",
        symbols: cuda::Cuda::SYMBOLS,
        constants: cuda::CONSTANTS,
        more: String::new(),
    }
}

#[test]
fn hip_is_what_its_header_says() {
    assert_eq!(compare(&hip_check()).unwrap_or_default(), "");
}

#[test]
fn hsa_is_what_its_header_says() {
    assert_eq!(compare(&hsa_check()).unwrap_or_default(), "");
}

#[test]
fn cuda_is_what_its_header_says() {
    assert_eq!(compare(&cuda_check()).unwrap_or_default(), "");
}

/// The comparison can fail: a wrong value, a wrong place and a wrong type are each found.
#[test]
fn differences_are_found() {
    for (more, name) in [
        (
            "_Static_assert(hipErrorNotReady == 601, \"wrong value\");\n",
            "wrong value",
        ),
        (
            "_Static_assert(sizeof(hipPointerAttribute_t) == 24, \"wrong size\");\n",
            "wrong size",
        ),
        (
            &declaration(&Symbol {
                name: "hipMalloc",
                required: true,
                arguments: &["*mut c_void", "usize"],
                result: "hipError_t",
            }),
            "hipMalloc",
        ),
    ] {
        let mut check = hip_check();
        check.more += more;
        let Some(complaints) = compare(&check) else {
            return;
        };
        assert!(complaints.contains(name), "{complaints}");
    }
}
