//! The guest's kernel: Debian's, downloaded by apt and unpacked into a cache; never installed on this machine.
//!
//! Cache, below `target/rxe/kernel/`:
//!
//! - `current`: name and version of the package in use; kept until `--update-kernel` asks apt again
//! - `current-dmabuf`: the same for guests that need `/dev/udmabuf` and `/dev/dma_heap`
//! - `backports/`: package lists of backports, where the release's own kernel is too old for that
//! - `<package>_<version>/kernel`: what QEMU boots
//! - `<package>_<version>/modules-<key>/`: the needed modules, decompressed, and their load order in `order`
//!
//! Each of these appears by a rename once it is complete, so an interrupted run leaves nothing half-made behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::bzimage;
use super::modules::{ModuleTable, ROOTS};
use super::sources::Sources;
use crate::{process, workspace};

/// The package which always depends on Debian's current kernel.
const META_PACKAGE: &str = "linux-image-amd64";

/// Debian's kernels have had `/dev/udmabuf` and `/dev/dma_heap` since this release. The tests check for them.
const DMABUF_SINCE: (u32, u32) = (6, 12);

/// Which kernel a guest needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The release's own.
    Current,
    /// One that makes dmabufs of host memory; from backports where the release's own is too old.
    Dmabuf,
}

impl Choice {
    /// The file of the cache that names the package in use.
    fn file(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Dmabuf => "current-dmabuf",
        }
    }
}

/// A kernel ready to boot.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// An ELF `vmlinux`, or a bzImage where it could not be unpacked.
    pub(crate) image: PathBuf,
    /// `<package>_<version>`.
    pub(crate) version: String,
    /// Modules in load order.
    pub(crate) modules: Vec<PathBuf>,
    /// Folder of this kernel in the cache.
    pub(crate) dir: PathBuf,
}

/// Finds the kernel in the cache, or downloads it.
pub(crate) fn prepare(choice: Choice, update: bool) -> Result<Kernel> {
    if std::env::consts::ARCH != "x86_64" {
        bail!(
            "soft-RoCE guests are made for x86_64 only; this machine is {}",
            std::env::consts::ARCH
        );
    }
    let cache = workspace::cache("rxe/kernel")?;
    let current = cache.join(choice.file());
    let mut package = match fs::read_to_string(&current) {
        Ok(text) if !update => Package::from_line(&text)?,
        _ => resolve(choice, &cache)?.0,
    };
    if !Place::of(&package, &cache).is_complete() {
        package = fetch_and_unpack(choice, package, &cache)?;
    }
    fs::write(&current, package.to_line())?;

    let place = Place::of(&package, &cache);
    let order = fs::read_to_string(place.modules.join("order"))?;
    let modules = order.lines().map(|name| place.modules.join(name)).collect();
    Ok(Kernel {
        image: place.image,
        version: package.folder(),
        modules,
        dir: place.dir,
    })
}

/// Where a kernel's files are in the cache.
struct Place {
    dir: PathBuf,
    image: PathBuf,
    modules: PathBuf,
}

impl Place {
    fn of(package: &Package, cache: &Path) -> Self {
        let dir = cache.join(package.folder());
        Self {
            image: dir.join("kernel"),
            modules: dir.join(format!("modules-{}", roots_key())),
            dir,
        }
    }

    fn is_complete(&self) -> bool {
        self.image.exists() && self.modules.exists()
    }
}

/// Brings a kernel into the cache: `package`, or the current one when Debian no longer has that.
fn fetch_and_unpack(choice: Choice, mut package: Package, cache: &Path) -> Result<Package> {
    let work = Workbench::new(cache)?;
    let (found, sources) = resolve(choice, cache)?;
    let deb = match download(&package, &sources, &work.path) {
        Ok(deb) => deb,
        Err(_) if found != package => {
            // The kernel in the cache is incomplete and has been replaced since.
            package = found;
            download(&package, &sources, &work.path)?
        }
        Err(_) => {
            // The package lists are outdated.
            sources.update()?;
            let (found, sources) = resolve(choice, cache)?;
            package = found;
            download(&package, &sources, &work.path)?
        }
    };
    let place = Place::of(&package, cache);
    fs::create_dir_all(&place.dir)?;
    unpack(&deb, &work.path, &place).with_context(|| format!("unpacking {}", package.name))?;
    Ok(package)
}

#[derive(Debug, PartialEq, Eq)]
struct Package {
    name: String,
    version: String,
}

impl Package {
    fn from_line(line: &str) -> Result<Self> {
        let (name, version) = line
            .trim()
            .split_once(' ')
            .context("the kernel cache's file `current` is damaged")?;
        Ok(Self {
            name: name.to_owned(),
            version: version.to_owned(),
        })
    }

    fn to_line(&self) -> String {
        format!("{} {}\n", self.name, self.version)
    }

    /// Whether its version is `least` or newer. Debian's version begins with the kernel's.
    fn is_since(&self, least: (u32, u32)) -> bool {
        let mut numbers = self.version.split(|c: char| !c.is_ascii_digit());
        let mut next = || numbers.next()?.parse::<u32>().ok();
        next().zip(next()).is_some_and(|version| version >= least)
    }

    fn folder(&self) -> String {
        format!("{}_{}", self.name, self.version.replace([':', '/'], "-"))
    }
}

/// Asks apt which kernel to take, and from where. `KVPUSH_GUEST_KERNEL` names another package than the current one.
fn resolve(choice: Choice, cache: &Path) -> Result<(Package, Sources)> {
    let own = Sources::own();
    match choice {
        Choice::Current => {
            let asked = std::env::var("KVPUSH_GUEST_KERNEL").ok();
            let package = show(&own, asked.as_deref().unwrap_or(META_PACKAGE))?;
            Ok((package, own))
        }
        Choice::Dmabuf => {
            let package = show(&own, META_PACKAGE)?;
            if package.is_since(DMABUF_SINCE) {
                return Ok((package, own));
            }
            let (major, minor) = DMABUF_SINCE;
            let why = || {
                format!(
                    "tests with real dmabufs need a kernel {major}.{minor} or newer; this release has {}, and its \
                     backports were asked next",
                    package.version
                )
            };
            let backports = Sources::backports(&cache.join("backports")).with_context(why)?;
            let newer = show(&backports, META_PACKAGE).with_context(why)?;
            if !newer.is_since(DMABUF_SINCE) {
                bail!("{}: they have {}", why(), newer.version);
            }
            Ok((newer, backports))
        }
    }
}

/// What apt says of a package.
fn show(sources: &Sources, wanted: &str) -> Result<Package> {
    let show = || {
        let mut command = sources.command("apt-cache");
        process::text(command.args(["show", "--no-all-versions", wanted]))
    };
    let record = match show() {
        Ok(record) => record,
        Err(_) => {
            sources.update()?;
            show()?
        }
    };
    concrete_package(&record).with_context(|| {
        let from = &sources.name;
        format!("`apt-cache show {wanted}` names no kernel in {from}")
    })
}

/// Reads an apt record: of a meta package the kernel it depends on, of a kernel itself.
fn concrete_package(record: &str) -> Option<Package> {
    let field = |name: &str| {
        record
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    };
    let (name, version) = (field("Package")?, field("Version")?);
    let depends = field("Depends")
        .unwrap_or_default()
        .split(',')
        .map(str::trim);
    let kernel = depends.filter_map(|dependency| dependency.split_whitespace().next());
    let kernel = kernel
        .into_iter()
        .find(|dependency| dependency.starts_with("linux-image-"));
    // Meta package and kernel come from one source package and share its version.
    Some(Package {
        name: kernel.unwrap_or(name).to_owned(),
        version: version.to_owned(),
    })
}

/// The cache key of the list of modules.
fn roots_key() -> String {
    let names: String = ROOTS
        .iter()
        .map(|root| format!("{} {}\n", root.name, root.required))
        .collect();
    super::key_of(names.as_bytes())
}

fn unpack(deb: &Path, work: &Path, place: &Place) -> Result<()> {
    let tree = work.join("tree");
    process::output(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(deb)
            .arg(&tree),
    )?;

    let vmlinuz = only_entry(&tree.join("boot"), "vmlinuz-")?;
    let release = vmlinuz
        .file_name()
        .and_then(|name| name.to_str()?.strip_prefix("vmlinuz-"))
        .context("no release")?;
    let modules_root = modules_root(&tree, release)?;
    process::output(
        Command::new("/sbin/depmod")
            .arg("--basedir")
            .arg(&tree)
            .arg(release),
    )?;

    let table = ModuleTable::parse(
        &fs::read_to_string(modules_root.join("modules.dep"))?,
        &fs::read_to_string(modules_root.join("modules.builtin"))?,
    )?;
    let staged = work.join("modules");
    fs::create_dir(&staged)?;
    let mut order = String::new();
    for path in table.load_order(ROOTS)? {
        let name = stage_module(&modules_root.join(&path), &staged)?;
        order.push_str(&name);
        order.push('\n');
    }
    fs::write(staged.join("order"), order)?;

    let kernel = work.join("kernel");
    match bzimage::vmlinux(&fs::read(&vmlinuz)?, work) {
        Ok(elf) => fs::write(&kernel, elf)?,
        Err(error) => {
            println!(
                "note: the guests boot some seconds slower, from the compressed kernel: {error:#}"
            );
            fs::copy(&vmlinuz, &kernel)?;
        }
    }
    fs::rename(&kernel, &place.image)?;
    if !place.modules.exists() {
        fs::rename(&staged, &place.modules)?;
    }
    Ok(())
}

fn download(package: &Package, sources: &Sources, into: &Path) -> Result<PathBuf> {
    println!(
        "downloading {} {} from {} for the guests (about 70 MB, once)",
        package.name, package.version, sources.name
    );
    let mut command = sources.command("apt-get");
    // The unprivileged user apt likes to download as cannot write below the target folder.
    command
        .current_dir(into)
        .args(["download", "--quiet", "-o", "APT::Sandbox::User=root"]);
    process::output(command.arg(format!("{}={}", package.name, package.version)))?;
    only_entry(into, "linux-image-")
}

fn modules_root(tree: &Path, release: &str) -> Result<PathBuf> {
    // Since Debian 13 modules lie below /usr, where depmod's --basedir does not look on every release.
    if !tree.join("lib").exists() && tree.join("usr/lib/modules").exists() {
        std::os::unix::fs::symlink("usr/lib", tree.join("lib"))?;
    }
    let root = tree.join("lib/modules").join(release);
    if !root.is_dir() {
        bail!("the kernel package has no folder lib/modules/{release}");
    }
    Ok(root)
}

/// Copies a module into `into`, decompressed, and returns its file name there.
fn stage_module(module: &Path, into: &Path) -> Result<String> {
    let file = module
        .file_name()
        .and_then(|name| name.to_str())
        .context("a module without a name")?;
    let tool = match module.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => Some("xz"),
        Some("zst") => Some("zstd"),
        Some("gz") => Some("gzip"),
        _ => None,
    };
    let name = file.split(".ko").next().unwrap_or(file).to_owned() + ".ko";
    let target = into.join(&name);
    match tool {
        Some(tool) => fs::write(
            target,
            process::output(Command::new(tool).args(["-d", "-c"]).arg(module))?,
        )?,
        None => fs::copy(module, target).map(|_| ())?,
    }
    Ok(name)
}

fn only_entry(dir: &Path, prefix: &str) -> Result<PathBuf> {
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    bail!("nothing named {prefix}* in {}", dir.display())
}

/// A scratch folder which goes away with its value.
struct Workbench {
    path: PathBuf,
}

impl Workbench {
    fn new(dir: &Path) -> Result<Self> {
        let path = dir.join(format!(".unpack-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self { path })
    }
}

impl Drop for Workbench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meta_package_leads_to_its_kernel() {
        let record = "Package: linux-image-amd64\nSource: linux-signed\nVersion: 6.1.9-2\n\
                      Depends: initramfs-tools, linux-image-6.1.0-5-amd64 (= 6.1.9-2)\n";
        let package = concrete_package(record).unwrap();
        assert_eq!(package.to_line(), "linux-image-6.1.0-5-amd64 6.1.9-2\n");
        assert_eq!(Package::from_line(&package.to_line()).unwrap(), package);
    }

    #[test]
    fn a_kernel_is_itself() {
        let record = "Package: linux-image-6.12.9+bpo-amd64\nVersion: 6.12.9-1~bpo12+1\nDepends: kmod, initramfs-tools\n";
        assert_eq!(
            concrete_package(record).unwrap().to_line(),
            "linux-image-6.12.9+bpo-amd64 6.12.9-1~bpo12+1\n"
        );
    }

    #[test]
    fn versions_are_compared_by_number() {
        for (version, since) in [
            ("6.1.172-1", false),
            ("6.12.95-1~bpo12+1", true),
            ("6.9-1", false),
            ("7.0~rc1-1", true),
            ("5.99.1-1", false),
            ("nonsense", false),
        ] {
            let package = Package::from_line(&format!("linux-image {version}")).unwrap();
            assert_eq!(package.is_since(DMABUF_SINCE), since, "{version}");
        }
    }

    #[test]
    fn a_record_without_a_version_is_refused() {
        assert_eq!(concrete_package("N: Unable to locate package\n"), None);
    }
}
