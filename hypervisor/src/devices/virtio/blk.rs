//! The block device (virtio 1.2, section 5.2).
//!
//! ```text
//!  driver ──▶ queue ──look──▶ checked, captured ──Output──▶ (an image, by the host)
//!                               │      ▲ waits in the queue while it overlaps one under way, or too much is
//!             used ring ◀─answer┴──────┴────────Input──── what came of it, from the log
//! ```
//! A request is taken at a sync point, and what it writes is captured there. Its data and its status reach the guest at a
//! sync point, too, as an input. What the device can answer by itself (its name, a request that makes no sense) it answers
//! at once.
//!
//! An input hands nothing out: what it makes room for leaves the queue at the guest's next exit ([`Blk::has_more`]), so that all
//! outputs are made by exits.
//!
//! A request that was handed out stays here until what came of it is known, with what it writes: whoever goes on from this
//! state can hand out again all that is not known. That holds for those that a driver forgot by a reset, too; they count
//! against the bounds, so that resets cannot pile up work.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::disk::{DATA_MAX, Data, Done, Extent, Operation, Request, RequestNumber, Status};
use crate::event::Output;
use crate::memory::GuestRam;

use super::queue::{Chain, QueueFault, VirtQueue};
use super::{Device, Interrupt};

/// The queue of requests.
pub const REQUESTS: usize = 0;

/// Requests under way at once: enough for an image's thread never to idle, little to hand out again after a failover.
pub const DEPTH: usize = 64;

/// Bytes that those may move together. They are in every checkpoint.
pub const BYTES_MAX: usize = 2 * DATA_MAX;

/// Bytes of the disk's name.
pub const ID_BYTES: usize = 20;

/// Names of disks.
const OWN: &[u8] = b"doppel";
const SHARED: &[u8] = b"doppel-shared";

/// Pieces of a request, and how large each can be: together a request of [`DATA_MAX`].
const SEGMENTS: u32 = 32;
const SEGMENT_BYTES: u32 = DATA_MAX as u32 / SEGMENTS;

/// `virtio_blk_req` before its data: kind, reserved, sector.
const HEADER: usize = 16;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_READ_ONLY: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;

const KIND_READ: u32 = 0;
const KIND_WRITE: u32 = 1;
const KIND_FLUSH: u32 = 4;
const KIND_ID: u32 = 8;

const STATUS_GOOD: u8 = 0;
const STATUS_ERROR: u8 = 1;
const STATUS_UNKNOWN: u8 = 2;

/// A disk as its guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Its name, with zeros behind it.
    pub id: [u8; ID_BYTES],
}

impl DiskConfig {
    /// A disk of so many sectors, by the name that says how a pair has it: who expects the other arrangement finds another disk.
    #[must_use]
    pub fn new(sectors: u64, read_only: bool, shared: bool) -> Self {
        let name = if shared { SHARED } else { OWN };
        let mut id = [0; ID_BYTES];
        id[..name.len()].copy_from_slice(name);
        Self {
            sectors,
            read_only,
            id,
        }
    }

    /// Whether both sides of a pair have one image.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.id.starts_with(SHARED)
    }
}

/// A request that was handed out.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Pending {
    request: Request,
    /// Where the answer goes; nowhere after a reset.
    place: Option<Chain>,
}

/// The block device.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Blk {
    disk: DiskConfig,
    /// `virtio_blk_config`, up to the number of queues.
    config: Vec<u8>,
    /// The driver flushes; otherwise every write is durable once it is done.
    flushes: bool,
    /// Of the last request.
    number: RequestNumber,
    /// A request was left in the queue.
    held_back: bool,
    /// What it waited for may be over.
    again: bool,
    pending: VecDeque<Pending>,
}

/// What becomes of a request that the driver made.
enum Verdict {
    /// Not yet.
    Wait,
    /// It is handed out.
    HandOut(Operation),
    /// It is answered here.
    Answer(u8, Vec<u8>),
}

/// Why an input does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// No such request is under way.
    Unknown,
    /// Data of another length.
    Length {
        /// Bytes that were asked for.
        expected: usize,
    },
}

impl Blk {
    /// A device for this disk.
    #[must_use]
    pub fn new(disk: DiskConfig) -> Self {
        let mut config = vec![0; 36];
        config[..8].copy_from_slice(&disk.sectors.to_le_bytes());
        config[8..12].copy_from_slice(&SEGMENT_BYTES.to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS.to_le_bytes());
        Self {
            disk,
            config,
            flushes: false,
            number: RequestNumber(0),
            held_back: false,
            again: false,
            pending: VecDeque::new(),
        }
    }

    /// Whether it is a device for the same disk.
    #[must_use]
    pub fn is_alike(&self, other: &Self) -> bool {
        self.disk == other.disk && self.config == other.config
    }

    /// Requests of which it is not known what came of them, oldest first.
    pub fn under_way(&self) -> impl Iterator<Item = &Request> {
        self.pending.iter().map(|pending| &pending.request)
    }

    /// Whether this device can be in this state.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let fits = |request: &Request| {
            let extent = request.extent();
            request.length() <= DATA_MAX
                && extent.is_none_or(|extent| extent.is_within(self.disk.sectors))
        };
        let ascending = self
            .under_way()
            .zip(self.under_way().skip(1))
            .all(|(one, next)| one.number < next.number);
        let last = self.under_way().last();
        self.pending.len() <= DEPTH
            && self.bytes() <= BYTES_MAX
            && ascending
            && last.is_none_or(|last| last.number <= self.number)
            && self.under_way().all(fits)
    }

    /// Takes the request that this came of out of those under way, if it fits there.
    ///
    /// # Errors
    /// [`Misfit`]; nothing has changed.
    pub fn take(&mut self, done: &Done) -> Result<Taken, Misfit> {
        let at = self
            .pending
            .iter()
            .position(|pending| pending.request.number == done.number)
            .ok_or(Misfit::Unknown)?;
        let expected = match (&self.pending[at].request.operation, done.status) {
            (Operation::Read { length, .. }, Status::Good) => *length as usize,
            _ => 0,
        };
        if done.data.0.len() != expected {
            return Err(Misfit::Length { expected });
        }
        let taken = self.pending.remove(at).ok_or(Misfit::Unknown)?;
        self.again |= self.held_back;
        Ok(Taken(taken.place))
    }

    /// Whether the queue has requests that may be handed out now, though nobody notified.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.again
    }

    /// Tells the driver what came of a request that was [taken](Self::take).
    ///
    /// # Errors
    /// What is wrong with the queue.
    pub fn answer(
        queue: &mut VirtQueue,
        ram: &GuestRam,
        Taken(place): Taken,
        done: &Done,
    ) -> Result<Interrupt, QueueFault> {
        let Some(place) = place else {
            return Ok(Interrupt(false));
        };
        let status = match done.status {
            Status::Good => STATUS_GOOD,
            Status::Error => STATUS_ERROR,
        };
        give_back(queue, ram, &place, status, &done.data.0)?;
        Ok(Interrupt(queue.wants_interrupt(ram)))
    }

    fn bytes(&self) -> usize {
        self.under_way().map(Request::length).sum()
    }

    /// Takes requests from the queue as long as there is nothing to wait for. Says whether any was answered.
    fn look(
        &mut self,
        queue: &mut VirtQueue,
        ram: &GuestRam,
        outputs: &mut Vec<Output>,
    ) -> Result<bool, QueueFault> {
        let mut used = false;
        (self.held_back, self.again) = (false, false);
        for _ in 0..queue.size {
            let mut ahead = *queue;
            let Some((asked, place)) = ahead.pop_request(ram)? else {
                break;
            };
            match self.judge(ram, &asked, &place)? {
                Verdict::Wait => {
                    self.held_back = true;
                    break;
                }
                Verdict::HandOut(operation) => {
                    *queue = ahead;
                    self.number.0 += 1;
                    let request = Request {
                        number: self.number,
                        operation,
                    };
                    outputs.push(Output::Disk(request.clone()));
                    self.pending.push_back(Pending {
                        request,
                        place: Some(place),
                    });
                }
                Verdict::Answer(status, data) => {
                    *queue = ahead;
                    give_back(queue, ram, &place, status, &data)?;
                    used = true;
                }
            }
        }
        Ok(used)
    }

    /// What is to become of a request that is asked by these bytes and answered at this place.
    fn judge(&self, ram: &GuestRam, asked: &Chain, place: &Chain) -> Result<Verdict, QueueFault> {
        let error = Ok(Verdict::Answer(STATUS_ERROR, Vec::new()));
        // Without a place for the status it cannot even be refused in words.
        if asked.len() < HEADER || place.is_empty() {
            return error;
        }
        let mut header = [0; HEADER];
        asked.read_at(ram, 0, &mut header)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let (data_in, data_out) = (place.len() - 1, asked.len() - HEADER);
        match u32::from_le_bytes([k0, k1, k2, k3]) {
            KIND_READ => {
                let extent = Extent::new(sector, data_in, false);
                match self.may(extent, data_in) {
                    May::Never => error,
                    May::Later => Ok(Verdict::Wait),
                    May::Now => Ok(Verdict::HandOut(Operation::Read {
                        sector,
                        length: data_in as u32,
                    })),
                }
            }
            KIND_WRITE if self.disk.read_only => error,
            KIND_WRITE => {
                let extent = Extent::new(sector, data_out, true);
                match self.may(extent, data_out) {
                    May::Never => error,
                    May::Later => Ok(Verdict::Wait),
                    May::Now => Ok(Verdict::HandOut(Operation::Write {
                        sector,
                        data: Data(asked.read_after(ram, HEADER)?),
                        durable: !self.flushes,
                    })),
                }
            }
            KIND_FLUSH if self.disk.read_only => Ok(Verdict::Answer(STATUS_GOOD, Vec::new())),
            KIND_FLUSH if self.pending.len() >= DEPTH => Ok(Verdict::Wait),
            KIND_FLUSH => Ok(Verdict::HandOut(Operation::Flush)),
            KIND_ID => {
                let id = &self.disk.id[..ID_BYTES.min(data_in)];
                Ok(Verdict::Answer(STATUS_GOOD, id.to_vec()))
            }
            _ => Ok(Verdict::Answer(STATUS_UNKNOWN, Vec::new())),
        }
    }

    /// Whether a request of this extent may be handed out.
    fn may(&self, extent: Extent, length: usize) -> May {
        if length == 0 || length > DATA_MAX || !extent.is_within(self.disk.sectors) {
            return May::Never;
        }
        let full = self.pending.len() >= DEPTH || self.bytes() + length > BYTES_MAX;
        let mut others = self.under_way().filter_map(Request::extent);
        if full || others.any(|other| other.conflicts(extent)) {
            return May::Later;
        }
        May::Now
    }
}

enum May {
    Never,
    Later,
    Now,
}

/// A request that is not under way any more: where its answer goes.
#[derive(Debug)]
#[must_use = "its driver waits for the answer"]
pub struct Taken(Option<Chain>);

/// Returns a chain to the driver with this data at its begin and this status at its end.
fn give_back(
    queue: &mut VirtQueue,
    ram: &GuestRam,
    place: &Chain,
    status: u8,
    data: &[u8],
) -> Result<(), QueueFault> {
    let written = place.write(ram, &[data])?;
    place.write_last(ram, status)?;
    // Counted from the begin, without a gap (virtio 1.2, section 2.7.8.2).
    let whole = written as usize + 1 == place.len();
    queue.push(ram, place, written + u32::from(whole))
}

impl Device for Blk {
    const ID: u32 = 2;

    fn features(&self) -> u64 {
        let read_only = if self.disk.read_only { F_READ_ONLY } else { 0 };
        F_SIZE_MAX | F_SEG_MAX | F_FLUSH | read_only
    }

    fn agreed(&mut self, features: u64) {
        self.flushes = features & F_FLUSH != 0;
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn notify(
        &mut self,
        _index: usize,
        queue: &mut VirtQueue,
        ram: &GuestRam,
        outputs: &mut Vec<Output>,
    ) -> Result<Interrupt, QueueFault> {
        let used = self.look(queue, ram, outputs)?;
        Ok(Interrupt(used && queue.wants_interrupt(ram)))
    }

    fn reset(&mut self) {
        self.flushes = false;
        (self.held_back, self.again) = (false, false);
        for pending in &mut self.pending {
            pending.place = None;
        }
    }
}
