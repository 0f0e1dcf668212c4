//! Errors of verbs calls, with the device, the port, the call, the errno and what to do about it.

use std::{io, sync::OnceLock};

use crate::fabric::{FabricError, FabricErrorKind};

use super::facts::Memlock;

/// Which rail an error is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) device: String,
    pub(crate) port: u8,
}

impl Place {
    /// A refusal of the kernel or the driver. Finds a hint by call and errno.
    pub(crate) fn os(&self, operation: &'static str, errno: i32) -> FabricError {
        FabricError {
            hint: hint(operation, errno),
            ..self.error(operation, FabricErrorKind::Os(errno))
        }
    }

    /// Any other error.
    pub(crate) fn error(&self, operation: &'static str, kind: FabricErrorKind) -> FabricError {
        FabricError {
            device: self.device.clone(),
            port: self.port,
            operation,
            kind,
            hint: None,
        }
    }

    /// Something that is not there, with what to do about it.
    pub(crate) fn unavailable(
        &self,
        operation: &'static str,
        what: String,
        hint: &'static str,
    ) -> FabricError {
        FabricError {
            hint: Some(hint),
            ..self.error(operation, FabricErrorKind::Unavailable(what))
        }
    }

    /// Refuses `value` if it exceeds `limit`.
    pub(crate) fn limit(
        &self,
        operation: &'static str,
        what: &'static str,
        value: u64,
        limit: u64,
    ) -> Result<(), FabricError> {
        if value <= limit {
            return Ok(());
        }
        Err(self.error(operation, FabricErrorKind::Limit { what, value, limit }))
    }
}

/// The calling thread's errno, after a system call that failed.
pub(crate) fn last_errno() -> i32 {
    match io::Error::last_os_error().raw_os_error() {
        Some(0) | None => libc::EIO,
        Some(errno) => errno,
    }
}

/// How much memory this process may lock.
pub(crate) fn memlock() -> Memlock {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: getrlimit(2) writes the struct it is given.
    if unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } != 0 {
        return Memlock::Unknown;
    }
    match limit.rlim_cur {
        libc::RLIM_INFINITY => Memlock::Unlimited,
        bytes => Memlock::Bytes(bytes),
    }
}

fn hint(operation: &'static str, errno: i32) -> Option<&'static str> {
    Some(match (operation, errno) {
        ("ibv_reg_mr", libc::ENOMEM) => memlock_hint(),
        ("ibv_reg_mr", libc::EFAULT) => "the range is not mapped, or not writable by this process",
        (
            "ibv_reg_dmabuf_mr",
            libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::ENOSYS | libc::ENOENT,
        ) => {
            "the device, its driver or its library registers no dmabufs (soft-RoCE never does): it takes Linux 5.12, \
             rdma-core 34 and a driver that can"
        }
        ("ibv_reg_dmabuf_mr", libc::EINVAL) => {
            "the exporter cannot be reached by the device (PCI peer-to-peer, CONFIG_DMABUF_MOVE_NOTIFY), or the range is \
             not of this dmabuf"
        }
        ("ibv_reg_dmabuf_mr", libc::ENOMEM) => memlock_hint(),
        ("ibv_open_device", libc::EACCES | libc::EPERM) => {
            "this process may not open /dev/infiniband/uverbs*"
        }
        (
            "ibv_modify_qp(RTR)",
            libc::EHOSTUNREACH | libc::ENETUNREACH | libc::ETIMEDOUT | libc::ENODATA,
        ) => {
            "the peer's GID cannot be resolved from this port: check the route and the neighbour entry (`ip route get`, \
             `ip neigh`), the VLAN, and that both sides use the same kind of GID"
        }
        ("ibv_modify_qp(RTR)", libc::EINVAL) => {
            "the port refuses the peer's address: the GID or LID is not reachable from this GID index, or the path MTU \
             exceeds the port's"
        }
        ("ibv_create_qp" | "ibv_create_cq" | "ibv_create_srq", libc::ENOMEM) => {
            "the device or the locked-memory limit (`ulimit -l`) has no room for queues of this depth"
        }
        ("ibv_create_qp", libc::EINVAL) => {
            "the device does not allow this combination of queue depth, gather elements and inline bytes"
        }
        (_, libc::ENODEV | libc::EIO) => "the device may have been removed or reset; see `dmesg`",
        _ => return None,
    })
}

/// Names the limit as it was when first asked for; it seldom changes while a process runs.
fn memlock_hint() -> &'static str {
    static HINT: OnceLock<String> = OnceLock::new();
    HINT.get_or_init(|| {
        let limit = match memlock() {
            Memlock::Unknown => "unknown".into(),
            Memlock::Unlimited => "unlimited, so the device has no room".into(),
            Memlock::Bytes(bytes) => format!("{} KiB", bytes / 1024),
        };
        format!("registration locks memory; the limit (`ulimit -l`) is {limit}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        Place {
            device: "rxe0".into(),
            port: 1,
        }
    }

    #[test]
    fn a_full_memlock_names_the_limit() {
        let error = place().os("ibv_reg_mr", libc::ENOMEM).to_string();
        assert!(
            error.starts_with("rxe0/1: ibv_reg_mr: Cannot allocate memory"),
            "{error}"
        );
        assert!(error.contains("ulimit -l"), "{error}");
    }

    #[test]
    fn an_unreachable_peer_gets_a_hint_and_may_be_tried_again() {
        for errno in [libc::EHOSTUNREACH, libc::ENETUNREACH, libc::ETIMEDOUT] {
            let error = place().os("ibv_modify_qp(RTR)", errno);
            assert!(error.hint.is_some_and(|hint| hint.contains("ip neigh")));
            assert!(error.is_retryable());
        }
    }

    #[test]
    fn a_limit_is_inclusive() {
        assert!(place().limit("register", "length", 8, 8).is_ok());
        let error = place().limit("register", "length", 9, 8).unwrap_err();
        assert_eq!(
            error.to_string(),
            "rxe0/1: register: length is 9, the device allows 8"
        );
    }
}
