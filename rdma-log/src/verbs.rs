//! RDMA by verbs, made safe: devices, registered memory and queues that cannot be used wrongly.
//!
//! Unsafe, and why it holds:
//! - Every handle was made by the table that it is given back to, lives in the struct that owns it and is given back when
//!   that is dropped; a queue and a registration hold their device.
//! - Memory is registered together with what keeps it mapped. So a peer that writes, however late, hits memory that nobody
//!   else has got; and what it may write is read through atomics alone ([`ReadView`](crate::region::ReadView)).
//! - A request's bytes lie in memory that is registered with the same device: [`Registered::write`] checks the bounds.
//! - The table allows one caller at a time for a queue, so a [`Queue`] is behind `&mut` wherever it changes.
#![allow(unsafe_code)]

pub mod abi;
mod bare;
mod error;
mod load;

#[cfg(any(test, feature = "fake"))]
pub mod fake;
#[cfg(test)]
mod tests;

pub use bare::Bare;
pub use error::{RdmaError, Status};

use std::fmt;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use self::abi::{Completion, Failure, Limits, NAME, Path, Port, Request, Table, Wish};
use self::error::Context;
use crate::region::{Keep, Region};

/// Which device, port and GID to use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// The device's name, as `ibv_devices` shows it; `None` for the first with an active port.
    pub device: Option<String>,
    /// The port's number; `None` for the first that is active.
    pub port: Option<u8>,
    /// The GID's index; `None` for a RoCE v2 one, of an IPv4 address where there is one.
    pub gid_index: Option<u8>,
}

/// The functions of a loaded library, or of a test.
#[derive(Clone, Copy)]
pub struct Verbs {
    table: &'static Table,
}

impl fmt::Debug for Verbs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verbs")
    }
}

fn text(name: &[u8; NAME]) -> String {
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(NAME);
    String::from_utf8_lossy(&name[..end]).into_owned()
}

fn done(failure: Failure, context: &Context) -> Result<(), RdmaError> {
    if failure == Failure::NONE {
        return Ok(());
    }
    Err(RdmaError::of(failure, context))
}

impl Verbs {
    /// Those of `libdoppel_verbs.so`.
    ///
    /// # Errors
    /// [`RdmaError::Library`] or [`RdmaError::Version`]: it is not there, or something that it needs is not.
    pub fn load() -> Result<Verbs, RdmaError> {
        load::table().map(|table| Verbs { table })
    }

    #[cfg(any(test, feature = "fake"))]
    pub(crate) fn of(table: &'static Table) -> Verbs {
        Verbs { table }
    }

    /// The names of the devices there are.
    ///
    /// # Errors
    /// What the library says.
    pub fn devices(&self) -> Result<Vec<String>, RdmaError> {
        let mut names = [[0; NAME]; 64];
        let mut count = 0;
        // SAFETY: the array has as many places as said; the count is live.
        let failure =
            unsafe { (self.table.devices)(names.as_mut_ptr(), names.len() as u32, &raw mut count) };
        done(failure, &Context::default())?;
        let count = names.len().min(count as usize);
        Ok(names[..count].iter().map(text).collect())
    }

    /// Opens the device, and finds its port and GID.
    ///
    /// # Errors
    /// What is missing, and what to do about it.
    pub fn open(&self, choice: &Choice) -> Result<Device, RdmaError> {
        let name = choice.device.as_deref().unwrap_or("");
        let port = choice.port.unwrap_or(0);
        let context = || Context {
            device: name.to_owned(),
            have: self.devices().unwrap_or_default(),
            port,
            ..Context::default()
        };
        let mut wish = Wish {
            name: [0; NAME],
            port,
            reserved: [0; 3],
            gid_index: choice.gid_index.map_or(-1, i32::from),
        };
        if name.len() >= NAME || name.contains('\0') {
            let failure = Failure::of(abi::Step::UnknownDevice, 0);
            return Err(RdmaError::of(failure, &context()));
        }
        wish.name[..name.len()].copy_from_slice(name.as_bytes());
        let mut raw = null_mut();
        // SAFETY: of integers and arrays of them; zero is a value.
        let mut found: Port = unsafe { std::mem::zeroed() };
        // SAFETY: all three are live.
        let failure = unsafe { (self.table.open)(&raw const wish, &raw mut raw, &raw mut found) };
        if failure != Failure::NONE {
            return Err(RdmaError::of(failure, &context()));
        }
        Ok(Device {
            table: self.table,
            raw: Raw(NonNull::new(raw).expect("opened without a failure")),
            port: found,
        })
    }
}

/// A handle of the table's, which any thread may use.
struct Raw(NonNull<std::ffi::c_void>);

// SAFETY: the table's functions may be called from any thread.
unsafe impl Send for Raw {}
// SAFETY: as above; that one queue is used by one at a time is seen to by `&mut`.
unsafe impl Sync for Raw {}

/// An open device.
pub struct Device {
    table: &'static Table,
    raw: Raw,
    port: Port,
}

impl Device {
    /// The port in use.
    pub fn port(&self) -> &Port {
        &self.port
    }

    /// The device's name.
    pub fn name(&self) -> String {
        text(&self.port.name)
    }

    fn context(&self) -> Context {
        Context {
            device: self.name(),
            ..Context::default()
        }
    }

    /// Takes in what made the descriptor readable; whether something had.
    pub(crate) fn quiet(&self) -> Result<bool, RdmaError> {
        let mut count = 0;
        // SAFETY: the device is open, the count is live.
        let failure = unsafe { (self.table.quiet)(self.raw.0.as_ptr(), &raw mut count) };
        if failure != Failure::NONE {
            return Err(RdmaError::of(failure, &self.context()));
        }
        Ok(count > 0)
    }
}

/// It becomes readable when an armed queue completes something.
impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the device is open, and its descriptor with it.
        unsafe { BorrowedFd::borrow_raw((self.table.descriptor)(self.raw.0.as_ptr())) }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({}, port {})", self.name(), self.port.port)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: opened, closed once; queues and registrations, which hold it, are gone.
        unsafe { (self.table.close)(self.raw.0.as_ptr()) };
    }
}

/// Who writes to registered memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writes {
    /// This side alone; the device reads from it.
    Own,
    /// The peer.
    Peer,
}

/// Memory that the device may use. Dropped, it may no more.
pub(crate) struct Registered {
    device: Arc<Device>,
    raw: Option<Raw>,
    keys: abi::Keys,
    address: u64,
    len: usize,
    _keep: Keep,
}

impl Registered {
    /// Registers the whole of a region. One that the peer writes is to be looked at through reading views only.
    pub(crate) fn new(
        device: &Arc<Device>,
        region: &Region,
        writes: Writes,
    ) -> Result<Registered, RdmaError> {
        let keep = region.keep();
        let (at, len) = (keep.address(), keep.len());
        let mut raw = null_mut();
        let mut keys = abi::Keys::default();
        // SAFETY: the range is mapped, and kept so by what is stored below.
        let failure = unsafe {
            (device.table.register)(
                device.raw.0.as_ptr(),
                at,
                len as u64,
                u32::from(writes == Writes::Peer),
                &raw mut raw,
                &raw mut keys,
            )
        };
        let context = Context {
            bytes: len as u64,
            ..device.context()
        };
        done(failure, &context)?;
        Ok(Registered {
            device: device.clone(),
            raw: Some(Raw(NonNull::new(raw).expect("registered without a failure"))),
            keys,
            address: at as u64,
            len,
            _keep: keep,
        })
    }

    /// Where a peer finds it.
    pub(crate) fn remote(&self) -> Remote {
        Remote {
            address: self.address,
            key: self.keys.remote,
            len: self.len as u64,
        }
    }

    /// A request to write `len` bytes from here to there.
    pub(crate) fn write(&self, from: usize, len: usize, to: Remote, at: u64) -> Write<'_> {
        assert!(
            from <= self.len && len <= self.len - from,
            "the bytes lie in the registered memory"
        );
        assert!(
            at <= to.len && len as u64 <= to.len - at,
            "they go to the peer's memory"
        );
        let request = Request {
            id: 0,
            local: self.address + from as u64,
            remote: to.address + at,
            len: len as u32,
            local_key: self.keys.local,
            remote_key: to.key,
            flags: 0,
        };
        Write(request, PhantomData)
    }

    /// Takes the registration back. When it has returned without an error, the device touches the memory no more.
    pub(crate) fn deregister(&mut self) -> Result<(), RdmaError> {
        let Some(raw) = &self.raw else { return Ok(()) };
        // SAFETY: registered, and not given back yet.
        let failure = unsafe { (self.device.table.deregister)(raw.0.as_ptr()) };
        done(failure, &self.device.context())?;
        self.raw = None;
        Ok(())
    }
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registered({} bytes)", self.len)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // If the library refuses, the memory stays mapped as long as the process: a peer may still write there.
        if self.deregister().is_err() {
            std::mem::forget(self._keep.clone());
        }
    }
}

/// Memory of the peer's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Remote {
    pub(crate) address: u64,
    pub(crate) key: u32,
    pub(crate) len: u64,
}

/// A write to be posted. Only [`Registered::write`] makes one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Write<'m>(Request, PhantomData<&'m Registered>);

impl Write<'_> {
    pub(crate) fn ring(&mut self) {
        self.0.flags |= abi::BELL;
    }
}

/// A queue pair with its completion queue.
pub(crate) struct Queue {
    device: Arc<Device>,
    raw: Option<Raw>,
    limits: Limits,
}

impl Queue {
    /// Makes one for so many requests in flight, so many receives, and up to so many bytes inline.
    pub(crate) fn new(
        device: &Arc<Device>,
        requests: u32,
        receives: u32,
        inline: u32,
    ) -> Result<Queue, RdmaError> {
        let mut limits = Limits {
            requests: requests.min(device.port.max_requests),
            receives,
            inline,
            number: 0,
        };
        let mut raw = null_mut();
        // SAFETY: the device is open; both others are live.
        let failure =
            unsafe { (device.table.create)(device.raw.0.as_ptr(), &raw mut limits, &raw mut raw) };
        done(failure, &device.context())?;
        Ok(Queue {
            device: device.clone(),
            raw: Some(Raw(NonNull::new(raw).expect("made without a failure"))),
            limits,
        })
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    #[inline]
    fn raw(&mut self) -> Result<*mut abi::Queue, RdmaError> {
        let destroyed = || RdmaError::of_status(5, 0);
        self.raw
            .as_ref()
            .map(|raw| raw.0.as_ptr())
            .ok_or_else(destroyed)
    }

    #[inline]
    fn done(&self, failure: Failure) -> Result<(), RdmaError> {
        if failure == Failure::NONE {
            return Ok(());
        }
        Err(self.failed(failure))
    }

    #[cold]
    fn failed(&self, failure: Failure) -> RdmaError {
        RdmaError::of(failure, &self.device.context())
    }

    pub(crate) fn connect(&mut self, path: &Path) -> Result<(), RdmaError> {
        let raw = self.raw()?;
        // SAFETY: the queue lives, and so does the path.
        let failure = unsafe { (self.device.table.connect)(raw, path) };
        let context = Context {
            gid: path.gid,
            mtu: path.mtu,
            ..self.device.context()
        };
        done(failure, &context)
    }

    /// Posts up to [`abi::BATCH`] writes with one doorbell, the last of them signalled. All carry the id.
    pub(crate) fn post<'m>(
        &mut self,
        writes: impl IntoIterator<Item = Write<'m>>,
        id: u64,
    ) -> Result<u32, RdmaError> {
        let raw = self.raw()?;
        let mut requests = [const { std::mem::MaybeUninit::<Request>::uninit() }; abi::BATCH];
        let mut writes = writes.into_iter().peekable();
        let mut count = 0;
        while let Some(write) = writes.next() {
            let to = requests[count].write(Request { id, ..write.0 });
            count += 1;
            if to.len <= self.limits.inline {
                to.flags |= abi::INLINE;
            }
            if writes.peek().is_none() {
                to.flags |= abi::SIGNALLED;
            }
        }
        let count = count as u32;
        // SAFETY: the queue lives; as many requests as said were written above. Each one's bytes are in memory that was
        // registered when it was made, and the request borrows the registration, which keeps it mapped.
        let failure = unsafe { (self.device.table.post)(raw, requests.as_ptr().cast(), count) };
        self.done(failure)?;
        Ok(count)
    }

    pub(crate) fn expect(&mut self, receives: u32) -> Result<(), RdmaError> {
        let raw = self.raw()?;
        // SAFETY: the queue lives.
        let failure = unsafe { (self.device.table.expect)(raw, receives) };
        self.done(failure)
    }

    /// Takes completions; how many there were.
    #[inline]
    pub(crate) fn poll(&mut self, to: &mut [Completion]) -> Result<usize, RdmaError> {
        let raw = self.raw()?;
        let mut count = 0;
        // SAFETY: the queue lives; the slice has as many places as said.
        let failure = unsafe {
            (self.device.table.poll)(raw, to.as_mut_ptr(), to.len() as u32, &raw mut count)
        };
        self.done(failure)?;
        Ok(to.len().min(count as usize))
    }

    /// Makes the device's descriptor readable with the next completion.
    pub(crate) fn arm(&mut self) -> Result<(), RdmaError> {
        let raw = self.raw()?;
        // SAFETY: the queue lives.
        let failure = unsafe { (self.device.table.arm)(raw) };
        self.done(failure)
    }

    /// Destroys the queue pair: when it has returned without an error nothing comes or goes by it any more.
    pub(crate) fn destroy(&mut self) -> Result<(), RdmaError> {
        let Some(raw) = &self.raw else { return Ok(()) };
        // SAFETY: the queue was made, and not destroyed yet.
        let failure = unsafe { (self.device.table.destroy)(raw.0.as_ptr()) };
        self.done(failure)?;
        self.raw = None;
        Ok(())
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Queue({:?})", self.limits)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _ = self.destroy();
    }
}
