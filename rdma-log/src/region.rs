//! Memory that two parties see: mapped from a memfd, or on the heap within one process.
//!
//! This is where the crate touches raw memory. The rest of it works through three views that cannot reach beyond
//! their bounds: [`Words`] for the atomics of the control pages, [`ReadView`] which copies out, and [`WriteView`], the
//! only one of its range in this process, which hands out slices.
//!
//! Unsafe, and why it holds:
//! - Mappings stay for as long as any view lives (each holds its owner), and cannot lose their pages: a memfd is
//!   accepted only with the seal against shrinking, so that no peer can make an access fail by truncating it.
//! - The peer may write at any time what it is given to write. What it can change is read only through atomics
//!   ([`Words`], [`ReadView`]), and copied before it is looked at.
//! - A [`WriteView`]'s slices are plain memory that only this process is to write. A peer that writes there all the
//!   same changes the bytes of the log it will itself refuse; nothing here branches on them.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64 as Word, Ordering};

use crate::control::{LogWords, PAGE, ReturnWords};
use crate::entry::{LINE, STAMP_WORD};

/// The seals a memfd must carry: its size cannot change under a mapping.
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

/// A new memfd of `len` bytes, all zero, whose size is sealed.
///
/// # Errors
/// What the kernel says: no memory, or too many open files.
pub(crate) fn memfd(name: &std::ffi::CStr, len: usize) -> io::Result<OwnedFd> {
    // SAFETY: the name is a terminated string; the call takes no other memory.
    let fd = unsafe {
        libc::memfd_create(
            name.as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | libc::MFD_NOEXEC_SEAL,
        )
    };
    let fd = if fd < 0 && last_errno() == libc::EINVAL {
        // SAFETY: as above. Kernels before 6.3 do not know MFD_NOEXEC_SEAL.
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) }
    } else {
        fd
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let size = libc::off_t::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the calls take a valid descriptor and numbers.
    let failed = unsafe {
        libc::ftruncate(fd.as_raw_fd(), size) != 0
            || libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, SEALS | libc::F_SEAL_SEAL) != 0
    };
    if failed {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// Whether a descriptor from a peer is a memfd of exactly `len` bytes whose size cannot change.
///
/// # Errors
/// What is wrong with it, or what the kernel says.
pub(crate) fn check_memfd(fd: BorrowedFd<'_>, len: usize) -> io::Result<()> {
    // SAFETY: the call takes a valid descriptor and returns a number.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 || seals & SEALS != SEALS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the descriptor is not a memfd whose size is sealed",
        ));
    }
    let found = std::fs::File::from(fd.try_clone_to_owned()?)
        .metadata()?
        .len();
    if found != len as u64 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the memory is {found} bytes long, {len} were announced"),
        ));
    }
    Ok(())
}

fn last_errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// What a mapping may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// A store through it ends the process: only loads are made.
    ReadOnly,
    /// Loads and stores.
    ReadWrite,
}

/// A shared mapping, left out of core dumps, unmapped with its last view.
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is memory of the process, not of a thread; what views do with it is their matter.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and length are those of one successful mmap, and no view is left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

fn map(fd: BorrowedFd<'_>, offset: usize, len: usize, access: Access) -> io::Result<Mapping> {
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let prot = match access {
        Access::ReadOnly => libc::PROT_READ,
        Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
    };
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
    let base = unsafe {
        libc::mmap(
            ptr::null_mut(),
            len,
            prot,
            libc::MAP_SHARED | libc::MAP_POPULATE,
            fd.as_raw_fd(),
            offset,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    settle(base, len)
}

/// Takes over a mapping just made: out of core dumps, locked if that is allowed.
fn settle(base: *mut libc::c_void, len: usize) -> io::Result<Mapping> {
    let base = NonNull::new(base.cast::<u8>())
        .ok_or_else(|| io::Error::other("the kernel mapped address zero"))?;
    let mapping = Mapping { base, len };
    // SAFETY: the range is the mapping just made; the advice changes no contents.
    if unsafe { libc::madvise(base.as_ptr().cast(), len, libc::MADV_DONTDUMP) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Locking saves the log path from page faults; where RLIMIT_MEMLOCK forbids it the log still works, slower when
    // memory is short. So a refusal is not an error.
    // SAFETY: the range is the mapping just made; locking changes no contents.
    unsafe { libc::mlock(base.as_ptr().cast(), len) };
    Ok(mapping)
}

/// Maps `len` bytes of new memory, in huge pages if the system has them to give.
///
/// It is shared memory, though with nobody: a process that forks must not get its pages copied away from under a device.
fn map_locked(len: usize) -> io::Result<Mapping> {
    const HUGE: usize = 2 << 20;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    let tries = [
        (libc::MAP_HUGETLB, len.next_multiple_of(HUGE)),
        (0, len.next_multiple_of(PAGE)),
    ];
    // Huge pages for less than one would waste the most of it.
    let tries = &tries[usize::from(len < HUGE)..];
    for (huge, len) in tries {
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                *len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | huge,
                -1,
                0,
            )
        };
        if base != libc::MAP_FAILED {
            return settle(base, *len);
        }
    }
    Err(io::Error::last_os_error())
}

/// Zeroed memory of this process, aligned to cache lines.
struct Heap {
    base: NonNull<u8>,
    layout: std::alloc::Layout,
    #[cfg(loom)]
    lines: Vec<loom::cell::UnsafeCell<()>>,
    /// The words of the lines that are stored and loaded in an order: one a line.
    #[cfg(loom)]
    ordered: Vec<loom::sync::atomic::AtomicU64>,
}

// SAFETY: the memory belongs to no thread; what views do with it is their matter.
unsafe impl Send for Heap {}
// SAFETY: as above.
unsafe impl Sync for Heap {}

impl Heap {
    fn new(len: usize) -> Heap {
        let layout =
            std::alloc::Layout::from_size_align(len.max(LINE), PAGE).expect("a ring's size fits");
        // SAFETY: the layout's size is not zero.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        Heap {
            base: NonNull::new(base).unwrap_or_else(|| std::alloc::handle_alloc_error(layout)),
            layout,
            #[cfg(loom)]
            lines: (0..len / LINE)
                .map(|_| loom::cell::UnsafeCell::new(()))
                .collect(),
            #[cfg(loom)]
            ordered: (0..len / LINE)
                .map(|_| loom::sync::atomic::AtomicU64::new(0))
                .collect(),
        }
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and no view is left.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), self.layout) };
    }
}

#[derive(Clone)]
enum Owner {
    Map(Arc<Mapping>),
    Heap(Arc<Heap>),
}

impl Owner {
    fn base(&self) -> NonNull<u8> {
        match self {
            Owner::Map(map) => map.base,
            Owner::Heap(heap) => heap.base,
        }
    }

    fn len(&self) -> usize {
        match self {
            Owner::Map(map) => map.len,
            Owner::Heap(heap) => heap.layout.size(),
        }
    }
}

/// A share in a region's memory: it stays mapped for as long as this lives.
#[derive(Clone)]
pub(crate) struct Keep(Owner);

impl Keep {
    /// Where it starts. What may be done there is for the holder to show.
    pub(crate) fn address(&self) -> *mut u8 {
        self.0.base().as_ptr()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// A piece of memory that is cut into views.
pub(crate) struct Region {
    owner: Owner,
}

impl Region {
    /// Maps `len` bytes of a memfd, from `offset`.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn map(
        fd: BorrowedFd<'_>,
        offset: usize,
        len: usize,
        access: Access,
    ) -> io::Result<Region> {
        Ok(Region {
            owner: Owner::Map(Arc::new(map(fd, offset, len, access)?)),
        })
    }

    /// At least `len` bytes of zeroed memory for a device that is to read and write it by itself.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn locked(len: usize) -> io::Result<Region> {
        Ok(Region {
            owner: Owner::Map(Arc::new(map_locked(len)?)),
        })
    }

    /// What keeps the memory where it is, for whoever gave its address away.
    pub(crate) fn keep(&self) -> Keep {
        Keep(self.owner.clone())
    }

    /// Zeroed memory on the heap, for both sides in one process.
    pub(crate) fn heap(len: usize) -> Region {
        Region {
            owner: Owner::Heap(Arc::new(Heap::new(len))),
        }
    }

    /// Views for reading, one after the other from `start`.
    pub(crate) fn read_views(&self, start: usize, lens: [usize; 2]) -> [ReadView; 2] {
        let spans = self.cut(start, lens);
        spans.map(|span| ReadView { span })
    }

    /// Views for writing, one after the other from `start`.
    ///
    /// It takes the region, and a region cannot be copied, so in this process no other writing view of these bytes
    /// comes from it. The mapping must be a writable one.
    pub(crate) fn write_views(self, start: usize, lens: [usize; 2]) -> [WriteView; 2] {
        let spans = self.cut(start, lens);
        spans.map(|span| WriteView { span })
    }

    fn cut(&self, start: usize, [first, second]: [usize; 2]) -> [Span; 2] {
        assert!(
            start.is_multiple_of(LINE)
                && first.is_multiple_of(LINE)
                && second.is_multiple_of(LINE)
                && start + first + second <= self.owner.len(),
            "views lie inside their region"
        );
        [(start, first), (start + first, second)].map(|(start, len)| Span {
            // SAFETY: the span lies inside its owner.
            base: unsafe { self.owner.base().add(start) },
            len,
            #[cfg(loom)]
            start,
            _owner: self.owner.clone(),
        })
    }
}

/// Types that may lie at the start of a page that a peer writes.
///
/// # Safety
/// Atomics only, valid for every bit pattern, and at most a page long.
pub(crate) unsafe trait ControlPage: Default {
    /// Its size in bytes.
    const LEN: usize = size_of::<Self>();
}
// SAFETY: made of atomic integers; control.rs asserts the size. (Under loom it is never mapped.)
unsafe impl ControlPage for LogWords {}
// SAFETY: as above.
unsafe impl ControlPage for ReturnWords {}

/// The atomics of a control page.
pub(crate) struct Words<T> {
    at: NonNull<T>,
    _owner: WordsOwner<T>,
}

enum WordsOwner<T> {
    #[cfg_attr(loom, expect(dead_code, reason = "loom's atomics cannot be mapped"))]
    Map {
        _owner: Owner,
    },
    Heap {
        _owner: Arc<T>,
    },
}

// SAFETY: it gives out shared references to atomics only, and its owner may be held by any thread.
unsafe impl<T: Sync> Send for Words<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Words<T> {}

impl<T> Clone for Words<T> {
    fn clone(&self) -> Self {
        Words {
            at: self.at,
            _owner: match &self._owner {
                WordsOwner::Map { _owner } => WordsOwner::Map {
                    _owner: _owner.clone(),
                },
                WordsOwner::Heap { _owner } => WordsOwner::Heap {
                    _owner: _owner.clone(),
                },
            },
        }
    }
}

impl<T> std::ops::Deref for Words<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the address is aligned and inside what the owner keeps alive; T is atomics, which a peer may change.
        unsafe { self.at.as_ref() }
    }
}

impl<T: ControlPage> Words<T> {
    /// New words on the heap, for both sides in one process.
    pub(crate) fn heap() -> Words<T> {
        let words = Arc::new(T::default());
        Words {
            at: NonNull::from(&*words),
            _owner: WordsOwner::Heap { _owner: words },
        }
    }

    /// The words at the start of a mapping.
    #[cfg(not(loom))]
    pub(crate) fn of(region: &Region) -> Words<T> {
        assert!(T::LEN <= region.owner.len());
        Words {
            at: region.owner.base().cast(),
            _owner: WordsOwner::Map {
                _owner: region.owner.clone(),
            },
        }
    }
}

struct Span {
    /// Where it starts: held here, not asked of the owner, because every access needs it.
    base: NonNull<u8>,
    len: usize,
    #[cfg(loom)]
    start: usize,
    _owner: Owner,
}

// SAFETY: the memory belongs to no thread, and its owner, which keeps it, may be held by any.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

impl Span {
    /// The address of `len` bytes at `at`.
    #[inline]
    fn address(&self, at: usize, len: usize) -> *mut u8 {
        assert!(
            at <= self.len && len <= self.len - at,
            "an access lies inside its view"
        );
        // SAFETY: the span lies inside its owner (checked when it was cut), the bytes inside the span.
        unsafe { self.base.as_ptr().add(at) }
    }

    /// Tells loom of an access, so that it finds those that race.
    #[cfg(loom)]
    fn track(&self, at: usize, len: usize, write: bool) {
        let Owner::Heap(heap) = &self._owner else {
            return;
        };
        let first = self.start + at;
        for line in &heap.lines[first / LINE..(first + len).div_ceil(LINE)] {
            if write {
                line.with_mut(|_| ());
            } else {
                line.with(|_| ());
            }
        }
    }

    #[cfg(not(loom))]
    #[inline(always)]
    fn track(&self, _: usize, _: usize, _: bool) {}

    /// Loom's stand-in for the word of the line at `at` that is stored and loaded in an order.
    #[cfg(loom)]
    fn ordered(&self, at: usize) -> &loom::sync::atomic::AtomicU64 {
        let Owner::Heap(heap) = &self._owner else {
            unreachable!("the models map no memory")
        };
        &heap.ordered[(self.start + at) / LINE]
    }
}

/// Memory that is copied out before it is believed.
pub(crate) struct ReadView {
    span: Span,
}

impl ReadView {
    /// The little-endian word at `at`, a multiple of 8. What was stored before it by [`WriteView::publish`] can then be
    /// copied out.
    #[inline]
    pub(crate) fn load(&self, at: usize) -> u64 {
        assert!(at.is_multiple_of(size_of::<Word>()));
        #[cfg(loom)]
        return self.span.ordered(at).load(Ordering::Acquire);
        #[cfg(not(loom))]
        {
            let from = self.span.address(at, size_of::<Word>()).cast::<u64>();
            // SAFETY: inside the view and aligned, as in `copy_out`.
            u64::from_le(unsafe { Word::from_ptr(from) }.load(Ordering::Acquire))
        }
    }

    /// Copies out `to.len()` bytes from `at`, a multiple of 8.
    pub(crate) fn copy_out(&self, at: usize, to: &mut [u8]) {
        const WORD: usize = size_of::<Word>();
        assert!(at.is_multiple_of(WORD));
        let from = self
            .span
            .address(at, to.len().next_multiple_of(WORD))
            .cast::<u64>();
        self.span.track(at, to.len(), false);
        // SAFETY: the words lie inside the view and are aligned (views start on cache lines); a peer may change them
        // meanwhile, which an atomic load allows. They are only loaded, so the mapping may be read-only.
        let load = |i: usize| unsafe { Word::from_ptr(from.add(i)) }.load(Ordering::Relaxed);
        // A line, as most are, without a loop.
        if let Ok(line) = <&mut [u8; LINE]>::try_from(&mut *to) {
            let (words, _) = line.as_chunks_mut::<WORD>();
            (0..LINE / WORD).for_each(|i| words[i] = load(i).to_ne_bytes());
            return;
        }
        let (words, rest) = to.as_chunks_mut::<WORD>();
        let whole = words.len();
        for (i, word) in words.iter_mut().enumerate() {
            *word = load(i).to_ne_bytes();
        }
        if !rest.is_empty() {
            rest.copy_from_slice(&load(whole).to_ne_bytes()[..rest.len()]);
        }
    }
}

impl fmt::Debug for ReadView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReadView({} bytes)", self.span.len)
    }
}

/// Memory that this process alone writes, and through this view alone.
///
/// With transport `shm` it is the reader's memory itself; for others it is what they send from.
pub struct WriteView {
    span: Span,
}

impl WriteView {
    /// Bytes in the view.
    #[allow(clippy::len_without_is_empty, reason = "a view is never empty")]
    pub fn len(&self) -> usize {
        self.span.len
    }

    /// The bytes of a range, for a transport that sends them.
    ///
    /// # Panics
    /// If the range is not inside the view.
    pub fn bytes(&self, at: usize, len: usize) -> &[u8] {
        let from = self.span.address(at, len);
        self.span.track(at, len, false);
        // SAFETY: inside the view; the only writer in this process is this view, borrowed shared here. For the
        // peer's writes see the module's text.
        unsafe { std::slice::from_raw_parts(from, len) }
    }

    /// The bytes of a range, to be filled.
    pub(crate) fn bytes_mut(&mut self, at: usize, len: usize) -> &mut [u8] {
        let from = self.span.address(at, len);
        self.span.track(at, len, true);
        // SAFETY: inside the view, writable, and the view is borrowed alone. For the peer see the module's text.
        unsafe { std::slice::from_raw_parts_mut(from, len) }
    }

    /// Has the processor fetch the line at `at` for writing. To be said at the start of work that ends, within the time
    /// that the fetch takes, with stores to that line: then the two overlap. Said earlier, a reader that polls the line takes it back.
    #[inline(always)]
    pub(crate) fn claim(&self, at: usize) {
        let line = self.span.address(at, 1);
        // SAFETY: a hint, which changes neither memory nor flags nor the stack; the address is inside the view.
        #[cfg(all(target_arch = "x86_64", not(loom)))]
        unsafe {
            std::arch::asm!("prefetchw [{}]", in(reg) line, options(nostack, preserves_flags, readonly));
        }
        #[cfg(not(all(target_arch = "x86_64", not(loom))))]
        let _ = line;
    }

    /// Stores the words of a header at `at`, the start of a line, the one with the stamp last: whoever
    /// [loads](ReadView::load) that sees everything that was written through this view before, and the other words.
    pub(crate) fn publish(&mut self, at: usize, words: [u64; 4]) {
        assert!(at.is_multiple_of(LINE));
        let to = self.span.address(at, size_of_val(&words)).cast::<u64>();
        self.span.track(at, size_of_val(&words), true);
        let store = |i: usize, order| {
            // SAFETY: the words lie inside the view and are aligned; atomics allow concurrent loads.
            unsafe { Word::from_ptr(to.add(i)) }.store(words[i].to_le(), order);
        };
        (0..words.len())
            .filter(|i| *i != STAMP_WORD)
            .for_each(|i| store(i, Ordering::Relaxed));
        store(STAMP_WORD, Ordering::Release);
        #[cfg(loom)]
        let ordered = self.span.ordered(at);
        #[cfg(loom)]
        ordered.store(words[STAMP_WORD], Ordering::Release);
    }

    /// Stores whole words the way a network card does: while someone may be loading them, in no promised order.
    pub(crate) fn store_words(&mut self, at: usize, from: &[u8]) {
        const WORD: usize = size_of::<Word>();
        let (words, rest) = from.as_chunks::<WORD>();
        assert!(at.is_multiple_of(WORD) && rest.is_empty());
        let to = self.span.address(at, from.len()).cast::<u64>();
        self.span.track(at, from.len(), true);
        for (i, word) in words.iter().enumerate() {
            // SAFETY: the words lie inside the view and are aligned; atomics allow concurrent loads.
            unsafe { Word::from_ptr(to.add(i)) }
                .store(u64::from_ne_bytes(*word), Ordering::Relaxed);
        }
    }
}

impl fmt::Debug for WriteView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WriteView({} bytes)", self.span.len)
    }
}

/// Sixteen bytes from the kernel's random number generator.
///
/// # Errors
/// What the kernel says; on any supported one it does not fail.
pub(crate) fn random() -> io::Result<[u8; 16]> {
    let mut bytes = [0u8; 16];
    // SAFETY: the buffer is as long as said. Requests of up to 256 bytes are answered whole.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got != bytes.len() as isize {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes)
}

#[cfg(all(test, not(loom)))]
mod tests;
