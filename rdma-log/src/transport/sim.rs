//! A transport within one process that behaves like a network card without manners, driven by a seed.
//!
//! Bytes arrive eight at a time, in any order, within and between requests, only when [`Card::deliver`] is called,
//! and not at all after [`Card::cut`]. An entry is committed when all bytes of it and of the requests before it in
//! its lane have arrived. There is no tail: the reader finds the end by stamps and checksums, as with `rdma`. What the
//! reader returns is there at once.
//!
//! It is here to test what relies on a ring over a network: readers, the gate, go-live.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::entry::{Lane, Nonce, Seq};
use crate::fence::{FenceError, Fenced};
use crate::lane::{ReadError, WriteError};
use crate::locks::lock;
use crate::region::{ReadView, Region};
use crate::ring::{Acks, BadSize, RingConfig, RingReader, RingWriter};
use crate::transport::{
    AckPort, Counters, FenceKey, FencePort, Limit, ProgressPort, Range, ReadPort, WritePort,
    WriteView,
};

/// Bytes that arrive together.
const ATOM: usize = 8;

/// The card between the two sides; clones are the same card.
#[derive(Clone, Debug)]
pub struct Card(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    memory: [WriteView; 2],
    requests: [VecDeque<Request>; 2],
    counters: [Counters; 2],
    /// Taken out by the reader, in bytes.
    consumed: [u64; 2],
    /// Arrived to the last byte, in bytes.
    complete: [u64; 2],
    random: u64,
    link: Link,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Up,
    Cut,
    Fenced,
}

#[derive(Debug)]
struct Request {
    range: Range,
    atoms: Vec<(usize, [u8; ATOM])>,
}

impl State {
    /// The next number of a SplitMix64 sequence, below `bound`.
    fn below(&mut self, bound: usize) -> usize {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % bound as u64) as usize
    }

    fn post(&mut self, lane: Lane, view: &WriteView, range: Range) -> Result<(), WriteError> {
        match self.link {
            Link::Up => {}
            Link::Cut => return Err(WriteError::Closed),
            Link::Fenced => return Err(WriteError::Fenced),
        }
        let size = view.len() as u64;
        let atoms = (range.from..range.to)
            .step_by(ATOM)
            .map(|at| {
                let at = (at % size) as usize;
                let mut atom = [0; ATOM];
                atom.copy_from_slice(view.bytes(at, ATOM));
                (at, atom)
            })
            .collect();
        self.requests[lane.index()].push_back(Request { range, atoms });
        Ok(())
    }

    fn deliver_one(&mut self) -> bool {
        let first = self.below(2);
        let Some(lane) = [first, 1 - first]
            .into_iter()
            .find(|lane| !self.requests[*lane].is_empty())
        else {
            return false;
        };
        // A request that is done but waits for an earlier one has no atoms left; then the earliest goes on.
        let mut which = self.below(self.requests[lane].len());
        if self.requests[lane][which].atoms.is_empty() {
            which = 0;
        }
        let left = self.requests[lane][which].atoms.len();
        let atom = self.below(left);
        let (at, bytes) = self.requests[lane][which].atoms.swap_remove(atom);
        self.memory[lane].store_words(at, &bytes);
        while let Some(request) = self.requests[lane].front()
            && request.atoms.is_empty()
        {
            self.counters[lane].committed = request.range.seq;
            self.complete[lane] = request.range.to;
            self.requests[lane].pop_front();
        }
        true
    }
}

impl Card {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    /// Lets up to `atoms` pieces of eight bytes arrive; says how many there were.
    pub fn deliver(&self, atoms: usize) -> usize {
        let mut state = self.lock();
        (0..atoms).take_while(|_| state.deliver_one()).count()
    }

    /// Lets everything arrive that was posted.
    pub fn deliver_all(&self) {
        self.deliver(usize::MAX);
    }

    /// Inverts a byte of the reader's memory, at a position in bytes since the start of the connection.
    pub fn damage(&self, lane: Lane, at: u64) {
        let memory = &mut self.lock().memory[lane.index()];
        let at = (at % memory.len() as u64) as usize;
        let atom = at - at % ATOM;
        let mut bytes = [0; ATOM];
        bytes.copy_from_slice(memory.bytes(atom, ATOM));
        bytes[at % ATOM] ^= 0xff;
        memory.store_words(atom, &bytes);
    }

    /// Loses everything that has not arrived: the writer's host is gone.
    pub fn cut(&self) {
        let mut state = self.lock();
        state.link = Link::Cut;
        state.requests.iter_mut().for_each(VecDeque::clear);
    }
}

/// Both sides of a ring with a [`Card`] between them.
///
/// The same seed, nonce and calls give the same run.
///
/// # Errors
/// A lane's size that cannot be.
pub fn pair(
    config: &RingConfig,
    nonce: Nonce,
    seed: u64,
) -> Result<(RingWriter, RingReader, Card), BadSize> {
    let geometries = config.geometries()?;
    let sizes = [config.events, config.inputs];
    let remote = Region::heap(config.events + config.inputs);
    let read = remote.read_views(0, sizes);
    let card = Card(Arc::new(Mutex::new(State {
        memory: remote.write_views(0, sizes),
        requests: Default::default(),
        counters: Default::default(),
        consumed: [0; 2],
        complete: [0; 2],
        random: seed,
        link: Link::Up,
    })));
    let side = |lane| Side {
        lane,
        card: card.clone(),
    };
    let writer = RingWriter::assemble(
        nonce,
        geometries,
        Region::heap(config.events + config.inputs).write_views(0, sizes),
        |lane| Box::new(side(lane)),
        Box::new(card.clone()),
    );
    let acks = Acks::new(Arc::new(card.clone()));
    let port = |lane, view| -> (Box<dyn ReadPort>, Acks) {
        let side = side(lane);
        (Box::new(SimReader { side, view }), acks.clone())
    };
    let fence = Box::new(SimFence {
        card: card.clone(),
        nonce,
    });
    let reader = RingReader::assemble(nonce, geometries, read, port, acks.clone(), fence);
    Ok((writer, reader, card))
}

/// One lane's end of the card.
#[derive(Clone, Debug)]
struct Side {
    lane: Lane,
    card: Card,
}

impl WritePort for Side {
    fn post(&mut self, view: &WriteView, range: Range) -> Result<(), WriteError> {
        self.card.lock().post(self.lane, view, range)
    }

    fn push(&mut self, _: &WriteView) -> Result<(), WriteError> {
        Ok(())
    }

    fn consumed(&mut self) -> Result<u64, WriteError> {
        let (state, lane) = (self.card.lock(), self.lane.index());
        Ok(state.consumed[lane].min(state.complete[lane]))
    }

    fn committed(&mut self) -> Result<Seq, WriteError> {
        Ok(self.card.lock().counters[self.lane.index()].committed)
    }

    fn fenced(&mut self) -> bool {
        self.card.lock().link == Link::Fenced
    }

    fn arm(&mut self) -> u32 {
        0
    }

    // Nothing happens by itself here, so there is nothing to sleep for.
    fn sleep(&mut self, _: u32, _: Duration) -> bool {
        false
    }

    fn disarm(&mut self) {}
}

impl ProgressPort for Card {
    fn poll(&mut self) -> Result<[Counters; 2], WriteError> {
        let state = self.lock();
        let fenced = state.link == Link::Fenced;
        Ok(state
            .counters
            .map(|counters| Counters { fenced, ..counters }))
    }
}

impl AckPort for Card {
    fn received(&self, lane: Lane, seq: Seq) {
        let counter = &mut self.lock().counters[lane.index()].received;
        *counter = seq.max(*counter);
    }

    fn replayed(&self, lane: Lane, seq: Seq) {
        let counter = &mut self.lock().counters[lane.index()].replayed;
        *counter = seq.max(*counter);
    }
}

#[derive(Debug)]
struct SimReader {
    side: Side,
    view: ReadView,
}

impl ReadPort for SimReader {
    fn limit(&mut self) -> Result<Limit, ReadError> {
        Ok(Limit::Unknown {
            fenced: self.side.fenced(),
        })
    }

    fn copy_out(&self, at: usize, to: &mut [u8]) {
        self.view.copy_out(at, to);
    }

    fn release(&mut self, consumed: u64) {
        self.side.card.lock().consumed[self.side.lane.index()] = consumed;
    }

    fn push(&mut self) -> Result<(), ReadError> {
        Ok(())
    }

    fn arm(&mut self) -> u32 {
        0
    }

    fn sleep(&mut self, _: u32, _: Duration) -> bool {
        false
    }

    fn disarm(&mut self) {}
}

#[derive(Debug)]
struct SimFence {
    card: Card,
    nonce: Nonce,
}

impl FencePort for SimFence {
    fn fence(&mut self) -> Result<Fenced, FenceError> {
        self.card.cut();
        self.card.lock().link = Link::Fenced;
        Ok(Fenced::attest(FenceKey(()), self.nonce, [None; 2]))
    }
}
