//! Measures: CPU time, percentiles, memory to be had.

use std::{fs, time::Duration};

/// CPU seconds this process has used, user and system, all threads (`getrusage(2)`).
pub(crate) fn cpu_seconds() -> f64 {
    // SAFETY: an all-zero rusage is valid, and getrusage writes no more than the struct it is given.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// The value that `percent` of `sorted` do not exceed (nearest rank), 0 if there is none.
pub(crate) fn percentile(sorted: &[Duration], percent: u32) -> Duration {
    let rank = (sorted.len() * percent as usize).div_ceil(100).max(1);
    sorted
        .get(rank - 1)
        .or(sorted.last())
        .copied()
        .unwrap_or_default()
}

/// Bytes of memory that can be taken without swapping: what the kernel says, or less where a cgroup sets a limit.
/// `None` if neither can be read.
pub(crate) fn available_memory() -> Option<u64> {
    let host = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text
            .lines()
            .find(|line| line.starts_with("MemAvailable:"))?;
        line.split_whitespace()
            .nth(1)?
            .parse::<u64>()
            .ok()?
            .checked_mul(1024)
    });
    match (host, cgroup_room()) {
        (Some(host), Some(cgroup)) => Some(host.min(cgroup)),
        (host, cgroup) => host.or(cgroup),
    }
}

/// What the nearest cgroup with a limit leaves (cgroup v2, as a container sees its own).
fn cgroup_room() -> Option<u64> {
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let limit = number("/sys/fs/cgroup/memory.max")?;
    // Page cache counts as used but can be dropped.
    let cache = fs::read_to_string("/sys/fs/cgroup/memory.stat")
        .ok()
        .and_then(|text| {
            let line = text
                .lines()
                .find(|line| line.starts_with("inactive_file "))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .unwrap_or(0);
    let used = number("/sys/fs/cgroup/memory.current")?.saturating_sub(cache);
    Some(limit.saturating_sub(used))
}

/// Bytes for a person: `1.5 GiB`.
pub(crate) fn bytes_text(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return match unit {
                "B" => format!("{bytes} B"),
                _ if value.fract() == 0.0 => format!("{value:.0} {unit}"),
                _ => format!("{value:.1} {unit}"),
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let sorted: Vec<_> = (1..=200).map(Duration::from_micros).collect();
        assert_eq!(percentile(&sorted, 50), Duration::from_micros(100));
        assert_eq!(percentile(&sorted, 99), Duration::from_micros(198));
        assert_eq!(percentile(&sorted[..1], 99), Duration::from_micros(1));
        assert_eq!(percentile(&sorted[..3], 50), Duration::from_micros(2));
        assert_eq!(percentile(&[], 50), Duration::ZERO);
    }

    #[test]
    fn work_costs_cpu_time() {
        let before = cpu_seconds();
        let mut x = 1u64;
        while cpu_seconds() - before < 0.01 {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
        assert!(cpu_seconds() - before < 10.0);
    }

    #[test]
    fn sizes_as_people_write_them() {
        assert_eq!(bytes_text(17), "17 B");
        assert_eq!(bytes_text(4096), "4 KiB");
        assert_eq!(bytes_text(3 << 29), "1.5 GiB");
    }
}
