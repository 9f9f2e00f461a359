//! Guest RAM.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    ByteValued, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestRegionMmap,
};

use super::dirty::{DirtyPages, PageNumber};
use super::{PAGE_SIZE, memfd};

/// The least RAM a guest can have: what the ABI places below 1 MiB, and 1 MiB for the guest itself.
pub const MIN_RAM_MIB: u32 = 2;

/// The most RAM a guest can have: below the device windows, in round numbers.
pub const MAX_RAM_MIB: u32 = 3072;

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size that no guest can have.
    #[error("guest memory of {mib} MiB: choose {MIN_RAM_MIB} to {MAX_RAM_MIB} MiB")]
    Size {
        /// What was asked for.
        mib: u32,
    },
    /// The kernel gave no memory.
    #[error("cannot make guest memory of {mib} MiB: free some memory or choose less")]
    Create {
        /// What was asked for.
        mib: u32,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The memory exists but cannot be mapped.
    #[error("cannot map guest memory of {mib} MiB: check the address-space limit (ulimit -v)")]
    Map {
        /// What was asked for.
        mib: u32,
        /// The reason.
        source: MmapRegionError,
    },
    /// The kernel does not say which parts of RAM are holes.
    #[error("cannot find the touched parts of guest memory")]
    Scan(#[source] io::Error),
    /// An access beyond the end of RAM.
    #[error("guest address {address:#x} + {len} bytes is outside RAM (0 to {size:#x})")]
    OutOfRange {
        /// Where the access begins.
        address: u64,
        /// Its length in bytes.
        len: usize,
        /// The size of RAM in bytes.
        size: u64,
    },
}

/// A guest's RAM: guest-physical addresses from 0 to [`size`](Self::size).
///
/// Reads and writes are bounds-checked; every write marks its pages for [`take_dirty`](Self::take_dirty).
/// They race with a running vCPU as any DMA would (no undefined behaviour, but torn values): callers access
/// RAM while the vCPU is stopped.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemoryMmap<AtomicBitmap>,
    memfd: File,
    host_address: u64,
    size: u64,
}

impl GuestRam {
    /// Makes RAM of `mib` MiB, all zero, nothing dirty.
    ///
    /// # Errors
    /// A size outside [`MIN_RAM_MIB`]..=[`MAX_RAM_MIB`], or too little memory or address space on this host.
    pub fn new(mib: u32) -> Result<Self, MemoryError> {
        if !(MIN_RAM_MIB..=MAX_RAM_MIB).contains(&mib) {
            return Err(MemoryError::Size { mib });
        }
        let bytes = (mib as usize) << 20;
        let size = bytes as u64;
        let create = |source| MemoryError::Create { mib, source };
        let memfd = memfd::create(size).map_err(create)?;
        let mapped = memfd.try_clone().map_err(create)?;

        const PAGE: NonZeroUsize = NonZeroUsize::new(PAGE_SIZE).expect("a page is not empty");
        let region = MmapRegionBuilder::new_with_bitmap(bytes, AtomicBitmap::new(bytes, PAGE))
            .with_file_offset(FileOffset::new(mapped, 0))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|source| MemoryError::Map { mib, source })?;
        memfd::keep_out_of_core_dumps(&region).map_err(create)?;

        let host_address = region.as_ptr() as u64;
        let region = GuestRegionMmap::new(region, GuestAddress(0))
            .expect("a region from address 0 cannot wrap around");
        let memory = GuestMemoryMmap::from_regions(vec![region])
            .expect("a single region cannot overlap another");
        Ok(Self {
            memory,
            memfd,
            host_address,
            size,
        })
    }

    /// The size in bytes: the first guest-physical address that is not RAM.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.size / PAGE_SIZE as u64
    }

    /// Where RAM is mapped in this process, for `KVM_SET_USER_MEMORY_REGION` (guest-physical address 0,
    /// length [`size`](Self::size)). The mapping lives as long as `self`.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        self.host_address
    }

    /// The file behind RAM, for handing its descriptor to another process. It cannot be resized. Its file
    /// position is ours.
    #[must_use]
    pub fn memfd(&self) -> &File {
        &self.memfd
    }

    /// RAM as the rust-vmm crates (loader, virtqueues) want it.
    #[must_use]
    pub fn guest_memory(&self) -> &GuestMemoryMmap<AtomicBitmap> {
        &self.memory
    }

    /// Whether `len` bytes from `address` are RAM.
    #[must_use]
    pub fn contains(&self, address: u64, len: usize) -> bool {
        address
            .checked_add(len as u64)
            .is_some_and(|end| end <= self.size)
    }

    /// Fills `data` from RAM.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], and then nothing was read.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        self.check(address, data.len())?;
        self.memory
            .read_slice(data, GuestAddress(address))
            .map_err(|_| self.out_of_range(address, data.len()))
    }

    /// Copies `data` to RAM and marks the pages as written.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], and then nothing was written.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.check(address, data.len())?;
        self.memory
            .write_slice(data, GuestAddress(address))
            .map_err(|_| self.out_of_range(address, data.len()))
    }

    /// Reads an object of plain data.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub fn read_obj<T: ByteValued>(&self, address: u64) -> Result<T, MemoryError> {
        let len = size_of::<T>();
        self.check(address, len)?;
        self.memory
            .read_obj(GuestAddress(address))
            .map_err(|_| self.out_of_range(address, len))
    }

    /// Writes an object of plain data and marks its pages as written.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], and then nothing was written.
    pub fn write_obj<T: ByteValued>(&self, address: u64, value: T) -> Result<(), MemoryError> {
        self.write(address, value.as_slice())
    }

    /// Copies a whole page out of RAM.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub fn read_page(
        &self,
        page: PageNumber,
        data: &mut [u8; PAGE_SIZE],
    ) -> Result<(), MemoryError> {
        self.read(page.0.saturating_mul(PAGE_SIZE as u64), data)
    }

    /// The pages that this process wrote since the last take (or since RAM was made), and forgets them. What
    /// the guest wrote is in KVM's log only: [`DirtyPages::merge`] joins both.
    #[must_use]
    pub fn take_dirty(&self) -> DirtyPages {
        let region = self.memory.iter().next().expect("RAM is one region");
        DirtyPages::from_bitmap(region.bitmap().get_and_reset())
    }

    /// The next run of pages at or after `from` that were ever touched; all others are zero and cost nothing.
    ///
    /// # Errors
    /// [`MemoryError::Scan`].
    pub fn next_touched(&self, from: PageNumber) -> Result<Option<Range<u64>>, MemoryError> {
        let bytes = from.0.saturating_mul(PAGE_SIZE as u64);
        if bytes >= self.size {
            return Ok(None);
        }
        let found = memfd::next_data(&self.memfd, bytes).map_err(MemoryError::Scan)?;
        let page = PAGE_SIZE as u64;
        Ok(found.map(|r| r.start / page..r.end.div_ceil(page).min(self.pages())))
    }

    fn check(&self, address: u64, len: usize) -> Result<(), MemoryError> {
        if self.contains(address, len) {
            Ok(())
        } else {
            Err(self.out_of_range(address, len))
        }
    }

    fn out_of_range(&self, address: u64, len: usize) -> MemoryError {
        MemoryError::OutOfRange {
            address,
            len,
            size: self.size,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn dirty(ram: &GuestRam) -> Vec<u64> {
        ram.take_dirty().iter().map(|p| p.0).collect()
    }

    #[test]
    fn sizes_have_limits() {
        for mib in [0, 1, 3073, u32::MAX] {
            assert!(matches!(GuestRam::new(mib), Err(MemoryError::Size { .. })));
        }
        let small = GuestRam::new(2).unwrap();
        assert_eq!((small.size(), small.pages()), (2 << 20, 512));
        assert_eq!(GuestRam::new(3072).unwrap().size(), 3 << 30);
    }

    #[test]
    fn accesses_stay_inside() {
        let ram = GuestRam::new(2).unwrap();
        let end = ram.size();
        ram.write(end - 4, &[1, 2, 3, 4]).unwrap();
        let mut back = [0; 4];
        ram.read(end - 4, &mut back).unwrap();
        assert_eq!(back, [1, 2, 3, 4]);
        assert_eq!(ram.read_obj::<u32>(end - 4).unwrap(), 0x0403_0201);

        for address in [end - 3, end, end + 1, u64::MAX - 3, u64::MAX] {
            assert!(ram.write(address, &[9; 4]).is_err(), "{address:#x}");
            assert!(ram.read(address, &mut back).is_err(), "{address:#x}");
            assert!(ram.write_obj(address, 9u32).is_err(), "{address:#x}");
            assert!(ram.read_obj::<u32>(address).is_err(), "{address:#x}");
        }
        assert_eq!(ram.read_obj::<u32>(end - 4).unwrap(), 0x0403_0201);
        ram.write(end, &[]).unwrap();
        let mut page = [0; PAGE_SIZE];
        assert!(ram.read_page(PageNumber(512), &mut page).is_err());
        assert!(ram.read_page(PageNumber(u64::MAX), &mut page).is_err());
        ram.read_page(PageNumber(511), &mut page).unwrap();
        assert_eq!(page[4092..], [1, 2, 3, 4]);
    }

    #[test]
    fn every_written_page_is_dirty_once() {
        let ram = GuestRam::new(2).unwrap();
        assert!(ram.take_dirty().is_empty());
        ram.write(3 * 4096 - 1, &[1, 2]).unwrap();
        ram.write_obj(7 * 4096, 5u64).unwrap();
        let mut byte = [0];
        ram.read(9 * 4096, &mut byte).unwrap();
        assert_eq!(dirty(&ram), [2, 3, 7]);
        assert!(ram.take_dirty().is_empty());
        ram.guest_memory()
            .write_obj(1u8, GuestAddress(511 * 4096))
            .unwrap();
        assert_eq!(dirty(&ram), [511]);
    }

    #[test]
    fn the_memfd_is_the_ram_and_cannot_be_resized() {
        let ram = GuestRam::new(2).unwrap();
        ram.write(5000, b"doppel").unwrap();
        let mut seen = [0; 6];
        ram.memfd().read_exact_at(&mut seen, 5000).unwrap();
        assert_eq!(&seen, b"doppel");
        ram.memfd().set_len(4096).unwrap_err();
        ram.memfd().set_len(4 << 20).unwrap_err();
        assert_eq!(ram.memfd().metadata().unwrap().len(), ram.size());
        assert_ne!(ram.host_address(), 0);
    }

    #[test]
    fn touched_pages_are_found() {
        let ram = GuestRam::new(8).unwrap();
        assert_eq!(ram.next_touched(PageNumber(0)).unwrap(), None);
        ram.write(700 * 4096 + 9, &[1]).unwrap();
        let run = ram.next_touched(PageNumber(0)).unwrap().unwrap();
        assert!(run.contains(&700), "{run:?}");
        assert_eq!(ram.next_touched(PageNumber(run.end)).unwrap(), None);
        assert_eq!(ram.next_touched(PageNumber(u64::MAX)).unwrap(), None);
    }
}
