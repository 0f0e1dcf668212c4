//! Gives the double the name under which libibverbs is opened: once it is loaded, whoever asks for that name gets it.

fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libibverbs.so.1");
    println!("cargo:rerun-if-changed=build.rs");
}
