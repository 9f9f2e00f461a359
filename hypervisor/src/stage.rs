//! Staging: frames are read ahead by the I/O thread and wait here, by number, until the vCPU thread applies them; likewise what
//! came of requests to the disk, of which the guest's device bounds how many there are.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, Thread};
use std::time::Duration;

use crossbeam::queue::{ArrayQueue, SegQueue};
use rdma_log::Seq;
use rdma_log::locks::lock;

use crate::backends::wait::Wake;
use crate::disk::Done;

/// Frames that may wait unapplied; beyond it the host stops reading and the kernel's queue holds the rest. Twice the
/// guest's receive ring: enough that the guest never waits for the I/O thread, small enough (under 1 MiB) that a guest which
/// stops receiving pins little. Too small shows as `rx` stalls at high packet rates.
const FRAMES_MAX: usize = 512;

/// A frame on its way into the guest.
#[derive(Debug)]
pub struct StagedFrame {
    /// Its entry in the inputs lane; zero when there is no log.
    pub seq: Seq,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// What came of a request to the disk, on its way into the guest.
#[derive(Debug)]
pub struct StagedDone {
    /// Its last entry in the inputs lane; zero when there is no log.
    pub seq: Seq,
    /// What the guest is told.
    pub done: Done,
}

/// Inputs between the thread that reads them and the thread that applies them.
#[derive(Debug)]
pub struct Stage {
    /// Frames of a dead primary's that come before all others, and how many there are.
    inherited: Mutex<VecDeque<Vec<u8>>>,
    left: AtomicUsize,
    frames: ArrayQueue<StagedFrame>,
    spare: ArrayQueue<Vec<u8>>,
    console: ArrayQueue<u8>,
    done: SegQueue<StagedDone>,
    bell: Bell,
    /// The I/O thread stopped reading because there was no room, and wants to know when there is.
    starved: AtomicBool,
    feeder: Arc<Wake>,
}

impl Stage {
    /// An empty stage; `feeder` wakes the thread that reads inputs.
    #[must_use]
    pub fn new(feeder: Arc<Wake>) -> Self {
        Self {
            inherited: Mutex::default(),
            left: AtomicUsize::new(0),
            frames: ArrayQueue::new(FRAMES_MAX),
            spare: ArrayQueue::new(FRAMES_MAX),
            console: ArrayQueue::new(256),
            done: SegQueue::new(),
            bell: Bell::default(),
            starved: AtomicBool::new(false),
            feeder,
        }
    }

    /// Whether one more frame may be read, beside so many that were read and not added. If not, the feeder is woken when one may.
    #[must_use]
    pub fn has_room(&self, beside: usize) -> bool {
        let has = || self.frames.len() + beside < self.frames.capacity();
        if has() {
            return true;
        }
        self.starved.store(true, Ordering::SeqCst);
        has()
    }

    /// A frame to be added, its bytes in a buffer that was used before, where there is one.
    #[must_use]
    pub fn frame(&self, seq: Seq, frame: &[u8]) -> StagedFrame {
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(frame);
        StagedFrame { seq, bytes }
    }

    /// Adds a frame and wakes the vCPU thread.
    ///
    /// # Errors
    /// Gives the frame back when there is no room.
    pub fn push(&self, frame: StagedFrame) -> Result<(), StagedFrame> {
        self.frames.push(frame)?;
        self.bell.ring();
        Ok(())
    }

    /// Takes over what a dead primary had read and not applied, or applied after the state that goes on: more than fits the
    /// stage, where that was an interval. Before anything else is added.
    pub fn inherit(&self, frames: Vec<Vec<u8>>) {
        let mut inherited = lock(&self.inherited);
        inherited.extend(frames);
        self.left.store(inherited.len(), Ordering::Release);
        self.bell.ring();
    }

    fn pop_inherited(&self) -> Option<StagedFrame> {
        if self.left.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut inherited = lock(&self.inherited);
        let bytes = inherited.pop_front();
        self.left.store(inherited.len(), Ordering::Release);
        bytes.map(|bytes| StagedFrame {
            seq: Seq::ZERO,
            bytes,
        })
    }

    /// The oldest frame.
    pub fn pop(&self) -> Option<StagedFrame> {
        if let Some(inherited) = self.pop_inherited() {
            return Some(inherited);
        }
        let frame = self.frames.pop();
        if self.starved.load(Ordering::Relaxed) && self.starved.swap(false, Ordering::SeqCst) {
            self.feeder.ring();
        }
        frame
    }

    /// Takes every frame that waits.
    pub fn take_all(&self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.pop().map(|frame| frame.bytes)).collect()
    }

    /// Whether a frame waits.
    #[must_use]
    pub fn has_frames(&self) -> bool {
        !self.frames.is_empty() || self.left.load(Ordering::Acquire) > 0
    }

    /// Gives a frame's buffer back for the next one.
    pub fn recycle(&self, bytes: Vec<u8>) {
        let _ = self.spare.push(bytes);
    }

    /// Adds what came of a request to the disk, and wakes the vCPU thread.
    pub fn push_done(&self, seq: Seq, done: Done) {
        self.done.push(StagedDone { seq, done });
        self.bell.ring();
    }

    /// The oldest of what came of requests to the disk.
    pub fn pop_done(&self) -> Option<StagedDone> {
        self.done.pop()
    }

    /// Whether something came of a request to the disk.
    #[must_use]
    pub fn has_done(&self) -> bool {
        !self.done.is_empty()
    }

    /// Adds a byte typed at the console; it is lost if the guest lets 256 of them wait.
    pub fn type_byte(&self, byte: u8) {
        if self.console.push(byte).is_ok() {
            self.bell.ring();
        }
    }

    /// How many more bytes can be typed.
    #[must_use]
    pub fn typing_room(&self) -> usize {
        self.console.capacity() - self.console.len()
    }

    /// Takes a byte typed at the console.
    pub fn typed(&self) -> Option<u8> {
        self.console.pop()
    }

    /// Whether typed bytes wait.
    #[must_use]
    pub fn has_typed(&self) -> bool {
        !self.console.is_empty()
    }

    /// What wakes the vCPU thread.
    #[must_use]
    pub fn bell(&self) -> &Bell {
        &self.bell
    }
}

/// Wakes one thread out of a wait, without a lost wake-up: a ring between the check and the wait ends the wait at once.
#[derive(Debug, Default)]
pub struct Bell {
    sleeper: OnceLock<Thread>,
    asleep: AtomicBool,
}

impl Bell {
    /// Names the calling thread as the one that waits.
    pub fn attach(&self) {
        let _ = self.sleeper.set(thread::current());
    }

    /// Ends the current or next wait. Costs no system call while nobody waits.
    pub fn ring(&self) {
        // Pairs with the exchange in `wait`: either the ringer sees `asleep`, or the waiter's check sees what the ringer did.
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed)
            && let Some(sleeper) = self.sleeper.get()
        {
            sleeper.unpark();
        }
    }

    /// Waits until rung or the time is over, unless `ready` holds already.
    pub fn wait(&self, longest: Duration, ready: impl Fn() -> bool) {
        self.asleep.store(true, Ordering::Relaxed);
        std::sync::atomic::fence(Ordering::SeqCst);
        if !ready() {
            thread::park_timeout(longest);
        }
        self.asleep.store(false, Ordering::Relaxed);
    }
}
