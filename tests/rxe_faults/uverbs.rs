//! What no caller of verbs can do: faults in the objects of an endpoint, behind its back.
//!
//! An endpoint's device files are open in this process. The kernel takes a command for any object that was made through
//! a file from everybody who has that file, so commands can be written beside the library that owns the objects. Which
//! handles there are is not known; the kernel refuses those that name nothing, or an object of another kind.
//!
//! Formats: `ib_uverbs_modify_qp` and `ib_uverbs_dereg_mr` of the kernel's `rdma/ib_user_verbs.h`, each behind a
//! `ib_uverbs_cmd_hdr`.

use std::{
    fs::{self, File},
    io::Write,
    os::fd::BorrowedFd,
};

const MODIFY_QP: u32 = 26;
const DEREG_MR: u32 = 13;
/// More objects than an endpoint of these tests has.
const HANDLES: u32 = 512;
/// `IB_QP_STATE` and `IB_QPS_ERR`.
const STATE: u32 = 1;
const ERROR: u8 = 6;

/// The files of this process through which `device` is open.
fn files(device: &str) -> Vec<File> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/self/fd").expect("procfs").flatten() {
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let Some(name) = target
            .to_str()
            .and_then(|t| t.strip_prefix("/dev/infiniband/"))
        else {
            continue;
        };
        let Ok(of) = fs::read_to_string(format!("/sys/class/infiniband_verbs/{name}/ibdev")) else {
            continue;
        };
        if of.trim() != device {
            continue;
        }
        let number = entry.file_name().to_str().and_then(|n| n.parse().ok());
        // SAFETY: the file is the endpoint's, which the caller keeps alive; it is duplicated and not closed here.
        let file = unsafe { BorrowedFd::borrow_raw(number.expect("a number")) };
        found.push(File::from(file.try_clone_to_owned().expect("dup")));
    }
    assert!(!found.is_empty(), "{device} is not open");
    found
}

/// Writes the command for each handle there may be; says how many objects took it.
fn command(device: &str, number: u32, body: impl Fn(u32) -> Vec<u8>) -> usize {
    let mut taken = 0;
    for mut file in files(device) {
        for handle in 0..HANDLES {
            let body = body(handle);
            let words = (8 + body.len()) / 4;
            let mut bytes = number.to_ne_bytes().to_vec();
            bytes.extend((words as u16).to_ne_bytes());
            bytes.extend(0u16.to_ne_bytes());
            bytes.extend(body);
            taken += usize::from(file.write(&bytes).is_ok_and(|n| n == bytes.len()));
        }
    }
    taken
}

/// Moves all queue pairs of this process on `device` to the error state; says how many there were.
pub(crate) fn fail_queue_pairs(device: &str) -> usize {
    command(device, MODIFY_QP, |handle| {
        // Two destinations of 32 bytes, then the handle; nothing but the state is changed.
        let mut body = vec![0; 112];
        body[64..68].copy_from_slice(&handle.to_ne_bytes());
        body[68..72].copy_from_slice(&STATE.to_ne_bytes());
        body[96] = ERROR;
        body
    })
}

/// Takes all registrations of this process on `device` away, so that its keys are bad; says how many there were.
pub(crate) fn spoil_keys(device: &str) -> usize {
    command(device, DEREG_MR, |handle| handle.to_ne_bytes().to_vec())
}
