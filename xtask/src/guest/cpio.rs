//! Writes a cpio archive in the "newc" format, which is what the kernel unpacks as its initramfs. Pure.
//!
//! Written here rather than by cpio(1) because that cannot make a device node without being root.
//! Format: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`.

/// An archive under construction.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

impl Archive {
    /// Adds a folder.
    pub(crate) fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// Adds a file which may be executed.
    pub(crate) fn file(&mut self, path: &str, content: &[u8]) {
        self.entry(path, REGULAR | 0o755, (0, 0), content);
    }

    /// Adds a character device.
    pub(crate) fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER_DEVICE | 0o600, (major, minor), &[]);
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.entries += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let (size, name_size) = (content.len() as u32, path.len() as u32 + 1);
        self.bytes.extend_from_slice(b"070701");
        // inode, mode, uid, gid, links, mtime, size, device major and minor, node's major and minor, name size, check.
        for field in [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            major,
            minor,
            name_size,
            0,
        ] {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_newc() {
        let mut archive = Archive::default();
        archive.file("abc", b"hello");
        archive.character_device("dev/console", 5, 1);
        let bytes = archive.finish();

        let header = "070701000000010000 81ed 00000000 00000000 00000001 00000000 00000005 00000000 00000000 00000000 \
                      00000000 00000004 00000000"
            .replace(' ', "");
        assert_eq!(std::str::from_utf8(&bytes[..110]).unwrap(), header);
        assert_eq!(&bytes[110..114], b"abc\0");
        // 110 + 4 is padded to 116, the five bytes of content to eight.
        assert_eq!(&bytes[114..124], b"\0\0hello\0\0\0");
        assert_eq!(&bytes[124..130], b"070701");
        let node = std::str::from_utf8(&bytes[124..234]).unwrap();
        assert_eq!(
            &node[14..22],
            "00002180",
            "mode of a character device, 0600"
        );
        assert_eq!(
            (&node[78..86], &node[86..94]),
            ("00000005", "00000001"),
            "major and minor"
        );
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}
