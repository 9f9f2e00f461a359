//! A bzImage: a real-mode part, a program that unpacks, and in it the packed kernel (Documentation/arch/x86/boot.rst).

use super::Limits;
use super::elf::word;
use super::error::PrepareError;
use super::unpack::{packing, unpack};

const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: std::ops::Range<usize> = 0x202..0x206;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// The first version of the protocol that says where the payload is: Linux 2.6.26.
const SINCE: u64 = 0x208;
const SECTOR: usize = 512;

/// Whether this is one.
pub(super) fn is_bzimage(bytes: &[u8]) -> bool {
    bytes.get(MAGIC) == Some(b"HdrS")
}

/// The kernel in it, unpacked.
///
/// # Errors
/// [`PrepareError::Kernel`], [`PrepareError::Packed`].
pub(super) fn kernel(image: &[u8], limits: Limits) -> Result<Vec<u8>, PrepareError> {
    let payload = payload(image)?;
    let what = "the kernel in the bzImage";
    let Some(packing) = packing(payload, what)? else {
        return Err(PrepareError::Kernel {
            why: "the bzImage is packed by nothing that is known here".into(),
        });
    };
    let (kernel, _) = unpack(payload, packing, what, limits)?;
    // The build notes the size behind what it packed.
    let noted = word(payload, payload.len().saturating_sub(4), 4);
    if noted != Some(kernel.len() as u64 & 0xffff_ffff) {
        return Err(PrepareError::Kernel {
            why: format!(
                "the bzImage's kernel has {} bytes, but notes {}",
                kernel.len(),
                noted.unwrap_or(0)
            ),
        });
    }
    Ok(kernel)
}

/// The packed kernel, with the four bytes of its size behind it.
fn payload(image: &[u8]) -> Result<&[u8], PrepareError> {
    let cut = || PrepareError::Kernel {
        why: "the bzImage is cut off".into(),
    };
    let number = |at, width| word(image, at, width).ok_or_else(cut);
    let version = number(VERSION, 2)?;
    if version < SINCE {
        return Err(PrepareError::Kernel {
            why: format!(
                "the bzImage is of boot protocol {:#x}; {SINCE:#x} and later say where the kernel is",
                version
            ),
        });
    }
    let sectors = match number(SETUP_SECTORS, 1)? {
        0 => 4,
        sectors => sectors as usize,
    };
    let from = ((sectors + 1) * SECTOR)
        .checked_add(number(PAYLOAD_OFFSET, 4)? as usize)
        .ok_or_else(cut)?;
    let length = number(PAYLOAD_LENGTH, 4)? as usize;
    image
        .get(from..)
        .and_then(|rest| rest.get(..length))
        .filter(|payload| !payload.is_empty())
        .ok_or_else(cut)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An image that holds this payload, which has its size behind it.
    pub(in crate::prepare) fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[SETUP_SECTORS] = 1;
        image[MAGIC].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&0x20fu16.to_le_bytes());
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&8u32.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4]
            .copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend([0xcc; 8]);
        image.extend(payload);
        image.extend([0xcc; 100]);
        image
    }

    #[test]
    fn the_payload_is_where_the_header_says() {
        let image = image(b"payload");
        assert!(is_bzimage(&image));
        assert_eq!(payload(&image).expect("a payload"), b"payload");
        assert!(
            payload(&image[..0x40a])
                .expect_err("cut")
                .to_string()
                .contains("cut off")
        );
        let mut old = image;
        old[VERSION] = 0x07;
        assert!(
            payload(&old)
                .expect_err("old")
                .to_string()
                .contains("protocol 0x207")
        );
    }

    #[test]
    fn what_is_packed_by_other_means_is_named() {
        let said = kernel(&image(b"BZh9xxxx"), Limits::default())
            .expect_err("bzip2")
            .to_string();
        assert!(said.contains("bunzip2"), "{said}");
        let said = kernel(&image(b"what's this"), Limits::default())
            .expect_err("junk")
            .to_string();
        assert!(said.contains("packed by nothing"), "{said}");
    }
}
