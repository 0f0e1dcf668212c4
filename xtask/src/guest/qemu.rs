//! Starts one QEMU process.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use super::Machine;
use super::builder::Guest;

/// Files of a guest's run, below its run folder.
pub(super) const CONSOLE_LOG: &str = "console.log";
pub(super) const QEMU_LOG: &str = "qemu.log";
pub(super) const OUT: &str = "out";

/// Starts `guest` in the empty folder `dir`. What its program writes comes out of the child's stdout.
///
/// Call it from the main thread: the child is killed when the thread that started it ends.
pub(super) fn start(machine: &Machine, guest: &Guest, dir: &Path, nonce: &str) -> Result<Child> {
    let out = dir.join(OUT);
    fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
    guest
        .write_scripts(&out)
        .context("writing the guest's scripts")?;

    // Software emulation works everywhere. KVM is much faster where it works, and a hang where it only seems to.
    let accelerator = match guest.counted_time {
        true => "tcg,thread=single".to_owned(),
        false => std::env::var("KVPUSH_GUEST_ACCEL").unwrap_or_else(|_| "tcg,thread=multi".into()),
    };
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-machine",
            "q35",
            "-cpu",
            "max",
        ])
        .args(["-accel", &accelerator])
        .args([
            "-smp",
            &guest.cpus.to_string(),
            "-m",
            &guest.memory_mib.to_string(),
        ])
        .arg("-kernel")
        .arg(&machine.kernel)
        .arg("-initrd")
        .arg(&machine.initramfs)
        .args(["-append", &kernel_command_line(nonce)])
        .args([
            "-serial",
            &format!("file:{}", escaped(&dir.join(CONSOLE_LOG))),
        ])
        .args([
            "-chardev",
            "stdio,id=program,signal=off",
            "-serial",
            "chardev:program",
        ]);
    share(
        &mut command,
        "hostroot",
        Path::new("/"),
        "readonly=on,multidevs=remap",
    );
    share(&mut command, "out", &out, "multidevs=remap");

    if guest.counted_time {
        // One instruction is one nanosecond. Idle time passes as ever, for disks and networks are real.
        command.args(["-icount", "shift=0"]);
    }

    let links: Vec<i32> = guest.links.iter().map(AsRawFd::as_raw_fd).collect();
    for (rail, fd) in links.iter().enumerate() {
        let host = guest.name.bytes().last().unwrap_or_default();
        command.args(["-netdev", &format!("socket,id=net{rail},fd={fd}")]);
        let card = format!(
            "virtio-net-pci,netdev=net{rail},mac=52:54:00:77:{rail:02x}:{host:02x},romfile="
        );
        command.args(["-device", &card]);
    }

    let log = File::create(dir.join(QEMU_LOG))?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log);
    // SAFETY: the closure runs between fork and exec in a process that has other threads, so it may make only
    // async-signal-safe calls and must not allocate: prctl(2) and fcntl(2) are plain system calls, `links` was allocated
    // before, and `last_os_error` holds just the number. The descriptors are open: `guest` owns them and is borrowed
    // for the whole of this function, in which the child is started.
    unsafe {
        command.pre_exec(move || {
            // However we end, the guest does, too.
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            for fd in &links {
                // Rust opens descriptors close-on-exec; QEMU is to have these.
                if libc::fcntl(*fd, libc::F_SETFD, 0) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    command.spawn().context("starting qemu-system-x86_64")
}

fn kernel_command_line(nonce: &str) -> String {
    // A panic ends the guest at once (with -no-reboot). The emulated processor needs no mitigations, and entropy is at
    // hand from its RDRAND, without which the first program to ask would wait. The kernel hands what it does not know
    // (kvpush_nonce) to init as an environment variable.
    format!(
        "console=ttyS0 quiet panic=-1 oops=panic nokaslr mitigations=off no_timer_check random.trust_cpu=on kvpush_nonce={nonce}"
    )
}

fn share(command: &mut Command, tag: &str, path: &Path, options: &str) {
    let path = escaped(path);
    command.args([
        "-fsdev",
        &format!("local,id={tag},path={path},security_model=none,{options}"),
    ]);
    command.args([
        "-device",
        &format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
    ]);
}

/// QEMU separates options by commas and reads a doubled one as a comma.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}
