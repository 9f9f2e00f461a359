//! A copy's bytes over the inputs lane of the new ring, which nothing else uses before the copy is over.
//!
//! ```text
//!  clone::Sender ─▶ gathered ─▶ sealed into a slot ══ the lane, whatever carries it ══▶ opened ─▶ clone::receive
//!                                        ◀── credits: as many pieces are under way as the lane holds ──
//! ```
//! An entry is a piece of the stream: [`INPUT_COPY`] (u8), then its bytes, sealed where the control connection is
//! (`handshake/parcel.rs`). So a copy travels as the log does, over RDMA by writes of which dozens are in flight, and a piece
//! that is torn, late or somebody else's is no piece. The control connection says that the other side is gone, where the lane
//! cannot.
#![forbid(unsafe_code)]

use std::io::{self, ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use rdma_log::transport::network::{Link, Watch};
use rdma_log::{LaneReader, Marks, WriteError};

use super::io::InputLane;
use crate::backends::wait::Waiter;
use crate::handshake::parcel::{PARCEL_TAG, Parcels};
use crate::handshake::{Channel, PATIENCE};
use crate::ring_log::INPUT_COPY;

/// The longest piece, in bytes: large against what an entry costs, and small against a lane, so that the device writes one
/// while the next is being sealed and the one before opened.
const PIECE_MAX: usize = 256 << 10;

/// The shortest that a lane's size makes of it: a page.
const PIECE_MIN: usize = 4096;

/// Between two looks at what no lane tells: that the other side is gone, that this process is to end.
const LOOK: Duration = Duration::from_millis(10);

/// What stands before a piece's bytes.
const KIND: usize = 1;

/// The sender's end.
pub(super) struct Consignor<'a> {
    lane: InputLane,
    watch: Option<Watch>,
    control: &'a Channel,
    seal: Option<Parcels>,
    gathered: Vec<u8>,
    /// Bytes that gather before they go.
    piece: usize,
    waiter: Waiter,
}

fn refused(error: WriteError) -> io::Error {
    match error {
        WriteError::Closed => ErrorKind::ConnectionAborted.into(),
        other => io::Error::other(other),
    }
}

impl<'a> Consignor<'a> {
    /// Sends over this lane. `watch` is that of the ring, where it goes over a network.
    pub(super) fn new(
        lane: InputLane,
        watch: Option<Watch>,
        control: &'a Channel,
        seal: Option<Parcels>,
    ) -> Self {
        let most = lane.0.max_payload() - KIND - PARCEL_TAG;
        // Entries may be a quarter of the lane; a quarter of that keeps it full while one of them is on its way.
        let piece = (most / 4).clamp(PIECE_MIN.min(most), PIECE_MAX);
        Self {
            lane,
            watch,
            control,
            seal,
            gathered: Vec::with_capacity(piece),
            piece,
            waiter: Waiter::new(),
        }
    }

    /// The lane, for what comes after the copy.
    pub(super) fn into_lane(self) -> InputLane {
        self.lane
    }

    /// Sends what gathered, as soon as there is room for it.
    fn send(&mut self) -> io::Result<()> {
        let tag = self.seal.as_ref().map_or(0, |_| PARCEL_TAG);
        let length = KIND + self.gathered.len() + tag;
        self.await_room(length)?;
        let (lane, epoch, _) = &mut self.lane;
        let mut slot = lane.reserve(length).map_err(refused)?;
        let (kind, to) = slot.payload().split_at_mut(KIND);
        kind[0] = INPUT_COPY;
        match &mut self.seal {
            Some(seal) => seal.seal(&self.gathered, to),
            None => to.copy_from_slice(&self.gathered),
        }
        let marks = Marks {
            epoch: *epoch,
            ..Marks::default()
        };
        slot.publish(length, marks).map_err(refused)?;
        lane.notify().map_err(refused)?;
        self.gathered.clear();
        Ok(())
    }

    fn await_room(&mut self, length: usize) -> io::Result<()> {
        let since = Instant::now();
        let lane = &mut self.lane.0;
        loop {
            // Who watches many things is woken by their descriptors; a lane in shared memory wakes by itself.
            let asleep = self.watch.as_ref().map_or(LOOK, |_| Duration::ZERO);
            if lane.wait_for_room(length, asleep).map_err(refused)? {
                return Ok(());
            }
            if since.elapsed() >= PATIENCE {
                return Err(ErrorKind::TimedOut.into());
            }
            self.waiter.clear();
            // It has nothing to say before it has everything.
            let gone = self.waiter.add(self.control, true, false);
            let limit = match &self.watch {
                Some(watch) => {
                    self.waiter.add(watch, true, watch.wants_write());
                    LOOK
                }
                None => Duration::ZERO,
            };
            self.waiter.wait(Some(limit))?;
            let gone = self.waiter.ready(gone);
            if gone.read || gone.hung_up || gone.failed {
                return Err(ErrorKind::ConnectionAborted.into());
            }
            if let Some(watch) = &self.watch {
                watch.turn().map_err(refused)?;
            }
        }
    }
}

impl Write for Consignor<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let count = from.len().min(self.piece - self.gathered.len());
        self.gathered.extend_from_slice(&from[..count]);
        if self.gathered.len() == self.piece {
            self.send()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        self.send()
    }
}

fn no_piece() -> io::Error {
    io::Error::new(
        ErrorKind::InvalidData,
        "what came in the log is no piece of a copy",
    )
}

/// The receiver's end.
pub(super) struct Consignee<'a> {
    lane: &'a mut LaneReader,
    link: Option<&'a Link>,
    control: &'a Channel,
    /// Whether this process is told to end.
    is_told_to_end: &'a dyn Fn() -> bool,
    seal: Option<Parcels>,
    piece: Vec<u8>,
    /// Its bytes, if it opened, and how many of them were taken.
    opened: usize,
    taken: usize,
    waiter: Waiter,
}

impl<'a> Consignee<'a> {
    /// Receives from this lane. `link` is that of the ring, where it goes over a network.
    pub(super) fn new(
        lane: &'a mut LaneReader,
        link: Option<&'a Link>,
        control: &'a Channel,
        is_told_to_end: &'a dyn Fn() -> bool,
        seal: Option<Parcels>,
    ) -> Self {
        Self {
            lane,
            link,
            control,
            is_told_to_end,
            seal,
            piece: Vec::new(),
            opened: 0,
            taken: 0,
            waiter: Waiter::new(),
        }
    }

    /// Whether all that came was taken.
    pub(super) fn is_at_end(&self) -> bool {
        self.taken == self.opened
    }

    /// Takes the next piece out of the lane.
    fn next(&mut self) -> io::Result<()> {
        let since = Instant::now();
        let mut over = None;
        self.check_orders()?;
        loop {
            if let Some(entry) = self.lane.next().map_err(io::Error::other)? {
                (self.taken, self.opened) = (0, 0);
                let Some((&INPUT_COPY, bytes)) = entry.payload().split_first() else {
                    return Err(no_piece());
                };
                match &mut self.seal {
                    Some(seal) => seal.open(bytes, &mut self.piece)?,
                    None => {
                        self.piece.clear();
                        self.piece.extend_from_slice(bytes);
                    }
                }
                if self.piece.is_empty() {
                    return Err(no_piece());
                }
                self.opened = self.piece.len();
                self.lane.notify().map_err(io::Error::other)?;
                return Ok(());
            }
            // What had arrived before the end was seen has been looked for.
            if let Some(why) = over {
                return Err(why);
            }
            if since.elapsed() >= PATIENCE {
                return Err(ErrorKind::TimedOut.into());
            }
            self.lane.wait(LOOK).map_err(io::Error::other)?;
            self.check_orders()?;
            over = self.is_over()?;
        }
    }

    fn check_orders(&self) -> io::Result<()> {
        match (self.is_told_to_end)() {
            true => Err(io::Error::other("this process is told to end")),
            false => Ok(()),
        }
    }

    /// Why nothing more comes, if that is known.
    fn is_over(&mut self) -> io::Result<Option<io::Error>> {
        self.waiter.clear();
        let control = self.waiter.add(self.control, true, false);
        self.waiter.wait(Some(Duration::ZERO))?;
        let control = self.waiter.ready(control);
        if control.read || control.hung_up || control.failed {
            // Before its copy is whole nothing is said to this side.
            return Ok(Some(ErrorKind::UnexpectedEof.into()));
        }
        let broken = self.link.and_then(Link::broken);
        Ok(broken.map(|broken| io::Error::new(ErrorKind::ConnectionAborted, broken.reason)))
    }
}

impl Read for Consignee<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if to.is_empty() {
            return Ok(0);
        }
        if self.is_at_end() {
            self.next()?;
        }
        let rest = &self.piece[self.taken..self.opened];
        let count = rest.len().min(to.len());
        to[..count].copy_from_slice(&rest[..count]);
        self.taken += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
