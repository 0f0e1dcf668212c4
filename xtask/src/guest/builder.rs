//! What a guest is: its size, its devices and what it runs.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::workspace;

/// IPv4 addresses of the two guests of [`Guest::pair`], on their first rail.
const PAIR_ADDRESSES: [&str; 2] = ["10.77.0.1", "10.77.0.2"];

const PRELUDE: &str = include_str!("prelude.sh");
const WAIT_FOR_GIDS: &str = include_str!("wait_for_gids.sh");
const SETUP_VETH: &str = include_str!("setup_veth.sh");
const SETUP_PAIR: &str = include_str!("setup_pair.sh");

/// When a guest's work is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// When its script ends. The group has finished when all guests of this role have.
    Main,
    /// When the group has finished; the script's `serve_until_stopped` returns then.
    Server,
}

/// A guest to be started.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(super) name: String,
    pub(super) memory_mib: u32,
    pub(super) cpus: u32,
    pub(super) role: Role,
    pub(super) timeout: Duration,
    /// Whether its clock counts instructions.
    pub(super) counted_time: bool,
    /// One stream socket per network card; its other end belongs to the peer.
    pub(super) links: Vec<OwnedFd>,
    env: Vec<(String, String)>,
    setup: &'static str,
    script: String,
}

impl Guest {
    /// A guest with two RDMA devices, `rxe0` (10.78.0.1) and `rxe1` (10.78.0.2), joined by a virtual cable.
    ///
    /// One program can open both; traffic between them crosses the cable, where `tc qdisc … netem` applies.
    pub(crate) fn alone(script: impl Into<String>) -> Self {
        Self::new("guest", SETUP_VETH, script.into())
    }

    /// Two guests, `a` and `b`, joined by `rails` networks. On each rail either has an RDMA device and an address:
    /// `rxe0` with those of [`PAIR_ADDRESSES`], `rxe1` on 10.77.1.x, and so on.
    pub(crate) fn pair(
        rails: usize,
        script_a: impl Into<String>,
        script_b: impl Into<String>,
    ) -> Result<[Self; 2]> {
        let mut a = Self::new("a", SETUP_PAIR, script_a.into());
        let mut b = Self::new("b", SETUP_PAIR, script_b.into());
        for _ in 0..rails {
            let (end_a, end_b) = UnixStream::pair().context("joining two guests")?;
            a.links.push(end_a.into());
            b.links.push(end_b.into());
        }
        Ok([
            a.with_place(1, PAIR_ADDRESSES),
            b.with_place(2, [PAIR_ADDRESSES[1], PAIR_ADDRESSES[0]]),
        ])
    }

    fn new(name: &str, setup: &'static str, script: String) -> Self {
        Self {
            name: name.to_owned(),
            memory_mib: 1024,
            cpus: 2,
            role: Role::Main,
            timeout: Duration::from_secs(600),
            counted_time: false,
            links: Vec::new(),
            env: Vec::new(),
            setup,
            script,
        }
    }

    fn with_place(self, index: u32, [own, peer]: [&str; 2]) -> Self {
        let own = self
            .env("KVPUSH_GUEST_INDEX", index.to_string())
            .env("KVPUSH_GUEST_ADDR", own);
        own.env("KVPUSH_GUEST_PEER", peer)
    }

    /// Sets an environment variable of the script.
    pub(crate) fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// Sets the memory, 1024 MiB if not called.
    pub(crate) fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Sets the number of processors, 2 if not called.
    pub(crate) fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Has the guest's clock count instructions instead of time, so that figures repeat whatever else this machine does.
    /// Its processors take turns then.
    pub(crate) fn counted_time(mut self, counted: bool) -> Self {
        self.counted_time = counted;
        self
    }

    /// Makes this guest one which serves the others and ends with them.
    pub(crate) fn server(mut self) -> Self {
        self.role = Role::Server;
        self
    }

    /// Sets how long the guest may take from power-on to power-off; ten minutes if not called.
    pub(crate) fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Writes what the guest reads from its output folder at boot.
    pub(super) fn write_scripts(&self, out: &Path) -> io::Result<()> {
        let dir = out.join(".guest");
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("prelude.sh"), PRELUDE)?;
        fs::write(dir.join("wait_for_gids.sh"), WAIT_FOR_GIDS)?;
        fs::write(dir.join("setup.sh"), self.setup)?;
        fs::write(
            dir.join("command.sh"),
            format!(". /out/.guest/prelude.sh\n{}\n", self.script),
        )?;
        fs::write(dir.join("main.sh"), self.main_script())
    }

    fn main_script(&self) -> String {
        let mut exports = String::new();
        for (name, value) in &self.env {
            exports.push_str(&format!("export {name}={}\n", quote(value)));
        }
        let root = quote(&workspace::root().to_string_lossy());
        format!(
            r#"export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb
export RUST_BACKTRACE=1
{exports}ulimit -l unlimited
cd {root}
if ! bash -eu -o pipefail /out/.guest/setup.sh; then
    echo "@@kvpush-guest $kvpush_nonce broken the RDMA devices could not be set up@@"
    exit 125
fi
echo "@@kvpush-guest $kvpush_nonce ready @@"
unset kvpush_nonce
bash /out/.guest/command.sh
"#
        )
    }
}

/// Quotes one word for a shell.
pub(crate) fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_words_stay_one_word() {
        for word in [
            "",
            "plain/word-1",
            "two words",
            "it's",
            "$HOME `id` \"x\" \\",
            "a\nb",
            "*;&|",
        ] {
            let script = format!("printf %s {}", quote(word));
            let output = std::process::Command::new("sh")
                .arg("-c")
                .arg(&script)
                .output()
                .unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), word, "{script}");
        }
    }

    #[test]
    fn paired_guests_know_each_other() {
        let [a, b] = Guest::pair(3, "true", "true").unwrap();
        assert!(a.main_script().contains("KVPUSH_GUEST_PEER=10.77.0.2"));
        assert!(b.main_script().contains("KVPUSH_GUEST_PEER=10.77.0.1"));
        assert_eq!((a.links.len(), b.links.len()), (3, 3));
    }
}
