//! Where kernels come from: the package lists of this machine's own apt configuration, or those of the same mirror's
//! backports, kept apart below the target folder. The machine's configuration is never changed.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{apt, process};

/// Where Debian keeps the keys of its archive. Elsewhere apt finds them by itself.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Package lists.
#[derive(Debug)]
pub(super) struct Sources {
    /// What apt's programs are told; nothing for the machine's own lists.
    options: Vec<OsString>,
    /// What to call them.
    pub(super) name: String,
}

impl Sources {
    /// The machine's own.
    pub(super) fn own() -> Self {
        Self {
            options: Vec::new(),
            name: "the machine's own sources".to_owned(),
        }
    }

    /// Backports, from the mirror that the machine itself uses. Refreshes the lists.
    pub(super) fn backports(folder: &Path) -> Result<Self> {
        let ask = || {
            let format = "$(REPO_URI) $(RELEASE) $(COMPONENT)";
            let targets = ["indextargets", "--format", format, "Created-By: Packages"];
            process::text(Command::new("apt-get").args(targets))
        };
        let mirror = match main_mirror(&ask()?) {
            Some(mirror) => mirror,
            // Some sources are known only once their lists have been read.
            None => {
                apt::update()?;
                main_mirror(&ask()?).context("apt knows no source of a Debian release's `main`")?
            }
        };
        let lists = folder.join("lists");
        fs::create_dir_all(lists.join("partial"))?;
        fs::create_dir_all(folder.join("cache/archives/partial"))?;
        let list = folder.join("backports.list");
        fs::write(&list, mirror.line(Path::new(KEYRING).exists()))?;
        let option = |name: &str, value: PathBuf| {
            let mut text = OsString::from(format!("{name}="));
            text.push(value);
            [OsString::from("-o"), text]
        };
        let options = [
            option("Dir::Etc::SourceList", list),
            option("Dir::Etc::SourceParts", "-".into()),
            option("Dir::State::Lists", lists),
            option("Dir::Cache", folder.join("cache")),
            option("APT::Sandbox::User", "root".into()),
        ];
        let sources = Self {
            options: options.into_iter().flatten().collect(),
            name: format!("{}-backports", mirror.release),
        };
        process::output(sources.command("apt-get").args(["update", "-q"]))
            .with_context(|| format!("reading the package lists of {}", sources.name))?;
        Ok(sources)
    }

    /// Refreshes the lists.
    pub(super) fn update(&self) -> Result<()> {
        match self.options.is_empty() {
            true => apt::update(),
            false => process::output(self.command("apt-get").args(["update", "-q"])).map(|_| ()),
        }
    }

    /// One of apt's programs, looking at these lists.
    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }
}

/// A Debian mirror and the release that the machine takes from it.
#[derive(Debug, PartialEq, Eq)]
struct Mirror {
    uri: String,
    release: String,
}

impl Mirror {
    fn line(&self, keyring: bool) -> String {
        let signed = match keyring {
            true => format!("[signed-by={KEYRING}] "),
            false => String::new(),
        };
        format!("deb {signed}{} {}-backports main\n", self.uri, self.release)
    }
}

/// The first source of a plain release, from lines of address, release and component.
fn main_mirror(targets: &str) -> Option<Mirror> {
    targets.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (uri, release, component) = (words.next()?, words.next()?, words.next()?);
        let plain = component == "main" && !release.contains(['-', '/']);
        plain.then(|| Mirror {
            uri: uri.to_owned(),
            release: release.to_owned(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backports_come_from_the_mirror_of_the_release_itself() {
        let targets = "http://m/security/ bookworm-security main\nhttp://m/tools/ bookworm contrib\n\
                       http://m/debian/ bookworm main\nhttp://n/debian/ trixie main\n";
        let mirror = main_mirror(targets).unwrap();
        assert_eq!(mirror.release, "bookworm");
        assert_eq!(
            mirror.line(false),
            "deb http://m/debian/ bookworm-backports main\n"
        );
        assert!(mirror.line(true).contains("[signed-by=/usr/share/"));
        assert_eq!(
            main_mirror("http://m/debian/ bookworm-updates main\n"),
            None
        );
        assert_eq!(main_mirror("garbage\n\n"), None);
    }
}
