//! Building and loading the double of libibverbs, before the library looks for the real one.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

/// Says where the double is, so that nothing is built: set by whoever has built it already.
const PATH: &str = "KVPUSH_VERBS_DOUBLE";

/// What the double can be asked, beside verbs. Of the whole process.
pub(crate) struct Double {
    library: Library,
}

/// Loads the double, once for each process. From then on the library finds it where it looks for libibverbs.
pub(crate) fn load() -> &'static Double {
    static LOADED: OnceLock<Double> = OnceLock::new();
    LOADED.get_or_init(|| {
        let path = env::var_os(PATH).map_or_else(build, PathBuf::from);
        // SAFETY: the double's constructors do nothing. It is kept for the life of the process.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL) };
        let library = library.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Double { library }
    })
}

/// Builds the double as this program was built; cargo does nothing where it is up to date.
fn build() -> PathBuf {
    let (profile, folder): (&[&str], _) = match cfg!(debug_assertions) {
        true => (&[], "debug"),
        false => (&["--release"], "release"),
    };
    // A folder of its own: the cargo that runs this program may hold the lock of its own folder.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("verbs-double");
    let output = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--package", "kvpush-verbs-double"])
        .args(profile)
        .arg("--manifest-path")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .output()
        .expect("cargo starts");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the double: {errors}");
    target.join(folder).join("libkvpush_verbs_double.so")
}

#[allow(dead_code, reason = "not every program asks for everything")]
impl Double {
    fn number(&self, name: &str) -> u64 {
        // SAFETY: the type is that of the double's functions that count.
        let count = unsafe { self.library.get::<extern "C" fn() -> u64>(name) };
        count.expect("a function of the double")()
    }

    /// Requests posted so far.
    pub(crate) fn posted(&self) -> u64 {
        self.number("double_posted")
    }

    /// Calls of `ibv_post_send` so far.
    pub(crate) fn doorbells(&self) -> u64 {
        self.number("double_doorbells")
    }

    /// Completions made so far.
    pub(crate) fn completions(&self) -> u64 {
        self.number("double_completions")
    }

    /// From now on payload is moved and keys are checked, or not.
    pub(crate) fn move_bytes(&self, moves: bool) {
        // SAFETY: the type is that of the double's function.
        let set = unsafe { self.library.get::<extern "C" fn(bool)>("double_move_bytes") };
        set.expect("a function of the double")(moves);
    }

    /// How many devices there are for endpoints that are bound from now on.
    pub(crate) fn devices(&self, count: u32) {
        // SAFETY: the type is that of the double's function.
        let set = unsafe { self.library.get::<extern "C" fn(u32)>("double_devices") };
        set.expect("a function of the double")(count);
    }
}
