//! What can stop a preparation.

use std::path::PathBuf;

/// Why something cannot be prepared. What is merely not understood inside an archive is no error: the report says so.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// No kernel, or one that is packed in an unknown way.
    #[error(
        "this is no kernel that can be prepared: {why}; give /boot/vmlinuz-VERSION, or a vmlinux for x86-64"
    )]
    Kernel {
        /// What was found instead.
        why: String,
    },
    /// An ELF file that contradicts itself.
    #[error("damaged ELF file: {why}; fetch it again, or build it anew")]
    Elf {
        /// What is wrong.
        why: String,
    },
    /// The kernel has no symbols, so that nobody knows where its functions start.
    #[error(
        "nothing says where the kernel's functions start: it has no symbol table, and no table of CONFIG_KALLSYMS that can be read; give its System.map with --symbols"
    )]
    NoSymbols,
    /// A System.map that does not belong to this kernel, or is none.
    #[error(
        "the symbols given are not of this kernel: {why}; Debian has the real System.map in the package linux-image-VERSION-dbg, and the kernel's own table does without it"
    )]
    Symbols {
        /// What is wrong.
        why: String,
    },
    /// The table of alternatives makes no sense.
    #[error(
        "the kernel's table of alternatives is of no kind known here ({why}): what it would patch in at boot cannot be rewritten"
    )]
    Alternatives {
        /// What is wrong.
        why: String,
    },
    /// A compressed piece that cannot be unpacked.
    #[error("{what} cannot be unpacked: {why}")]
    Packed {
        /// Which piece.
        what: String,
        /// What is wrong, and what to do.
        why: String,
    },
    /// An archive that is none.
    #[error(
        "the initramfs is damaged at byte {at}: {why}; give what the bootloader loads, such as /boot/initrd.img-VERSION"
    )]
    Archive {
        /// Where, in the archive as it is when unpacked.
        at: usize,
        /// What is wrong.
        why: String,
    },
    /// A file or directory that cannot be read or written.
    #[error("{path}: cannot {doing} it: {source}", path = path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// A file that an archive cannot hold.
    #[error("{path}: {why}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        why: String,
    },
}

impl PrepareError {
    pub(super) fn elf(why: impl Into<String>) -> Self {
        Self::Elf { why: why.into() }
    }

    pub(super) fn archive(at: usize, why: impl Into<String>) -> Self {
        Self::Archive {
            at,
            why: why.into(),
        }
    }
}
