//! Takes the ELF `vmlinux` out of a bzImage.
//!
//! A bzImage unpacks itself when it boots, and doing that in emulation takes seconds; QEMU boots the ELF file directly
//! (through its PVH entry point). Format: Linux `Documentation/arch/x86/boot.rst`, "The Real-Mode Kernel Header".

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;

/// Returns the uncompressed kernel. `scratch` is a folder for intermediate files.
pub(crate) fn vmlinux(image: &[u8], scratch: &Path) -> Result<Vec<u8>> {
    let payload = payload(image)?;
    let file = scratch.join("payload");
    // xz(1) can be told to ignore what follows the stream; for the others the appended length word is cut off.
    let without_length = payload
        .get(..payload.len().saturating_sub(4))
        .unwrap_or_default();
    let (tool, arguments, content): (_, &[&str], _) = match payload {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => ("xz", &["-d", "-c", "--single-stream"], payload),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", &["-d", "-c"], without_length),
        // gzip's own trailer holds the length, so none is appended.
        [0x1f, 0x8b, ..] => ("gzip", &["-d", "-c"], payload),
        _ => bail!("it is compressed in a way which is not known here"),
    };
    fs::write(&file, content)?;
    let elf = process::output(Command::new(tool).args(arguments).arg(&file))?;
    if !elf.starts_with(b"\x7fELF") {
        bail!("its payload is not an ELF file");
    }
    Ok(elf)
}

/// The compressed part, as the setup header describes it.
fn payload(image: &[u8]) -> Result<&[u8]> {
    let word = |offset: usize| -> Result<u32> {
        let bytes = image
            .get(offset..offset + 4)
            .context("it is too short for a kernel")?;
        Ok(u32::from_le_bytes(bytes.try_into()?))
    };
    if image.get(0x202..0x206) != Some(b"HdrS") || (word(0x206)? & 0xffff) < 0x0208 {
        bail!("it has no boot protocol 2.08 header");
    }
    let setup_sectors = match image.get(0x1f1) {
        None | Some(0) => 4,
        Some(sectors) => usize::from(*sectors),
    };
    let start = (setup_sectors + 1) * 512 + word(0x248)? as usize;
    let end = start + word(0x24c)? as usize;
    image
        .get(start..end)
        .context("its payload lies outside of the file")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(offset: u32, length: u32) -> Vec<u8> {
        let mut image = vec![0_u8; 1024 + 64];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&offset.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image[1024 + 8..1024 + 12].copy_from_slice(b"data");
        image
    }

    #[test]
    fn payload_is_found_by_the_setup_header() {
        assert_eq!(payload(&image(8, 4)).unwrap(), b"data");
    }

    #[test]
    fn damaged_headers_are_errors() {
        assert!(payload(&image(8, 4096)).is_err());
        assert!(payload(&image(u32::MAX, u32::MAX)).is_err());
        assert!(payload(&image(8, 4)[..600]).is_err());
        assert!(payload(b"short").is_err());
        let mut old = image(8, 4);
        old[0x206] = 1;
        assert!(payload(&old).is_err());
    }
}
