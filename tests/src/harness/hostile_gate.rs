//! A gate under a hostile log: commits are withheld, then admitted in odd amounts and out of step.
//!
//! The book is kept beside the product: from the entries as they are posted it knows which output belongs to which entry and
//! what that entry rests on, so it can judge every output at the moment at which it leaves.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use hypervisor::entry::{Body, Decoder, LoggedInput, OutputsDigest};
use hypervisor::event::Output;
use hypervisor::gate::{Committed, Sent};
use hypervisor::ring_log::RingSink;
use hypervisor::sink::{Sink, SinkError};
use hypervisor::world::World;
use rdma_log::Seq;
use rdma_log::locks::lock;

use super::random::Random;

/// An entry with outputs.
#[derive(Clone, Copy, Debug)]
struct Made {
    seq: Seq,
    /// The last staged input that entries before it applied: the outputs may depend on these.
    rests_on: Seq,
    /// The last staged input up to and with its own, behind which the gate may keep them as well.
    with_own: Seq,
    /// Outputs of this entry and all before it.
    outputs_to: u64,
    digest: OutputsDigest,
}

/// What was posted, what was admitted, what has left.
#[derive(Debug)]
struct Ledger {
    decoder: Decoder,
    entries: u64,
    applied: u64,
    made: Vec<Made>,
    admitted: Committed,
    left: u64,
    /// The entry whose outputs leave, as an index of `made`, and what has left of it.
    leaving: usize,
    digest: OutputsDigest,
    power_off: bool,
    /// One output in so many finds the way out full; 0 for none.
    busy_one_in: u64,
    random: Random,
    wrong: Vec<String>,
}

/// How it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Entries posted.
    pub entries: u64,
    /// Outputs that they made.
    pub made: u64,
    /// Outputs that have left.
    pub left: u64,
    /// Staged inputs applied.
    pub applied: u64,
}

/// The book, kept by sink, world and judge.
#[derive(Clone, Debug)]
pub struct Book(Arc<Mutex<Ledger>>);

impl Book {
    /// An empty one; nothing is admitted.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Ledger {
            decoder: Decoder::default(),
            entries: 0,
            applied: 0,
            made: Vec::new(),
            admitted: Committed {
                events: Seq::ZERO,
                inputs: Seq::ZERO,
            },
            left: 0,
            leaving: 0,
            digest: OutputsDigest::default(),
            power_off: false,
            busy_one_in: 0,
            random: Random::new(seed),
            wrong: Vec::new(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.0)
    }

    /// What counts as committed.
    #[must_use]
    pub fn admitted(&self) -> Committed {
        self.lock().admitted
    }

    /// Admits more, each lane by itself. Nothing is taken back.
    pub fn admit(&self, events: u64, inputs: u64) {
        let mut ledger = self.lock();
        let admitted = ledger.admitted;
        ledger.admitted = Committed {
            events: Seq(admitted.events.0.saturating_add(events)),
            inputs: Seq(admitted.inputs.0.saturating_add(inputs)),
        };
    }

    /// From now on one output in so many finds the way out full; 0 for none.
    pub fn be_busy(&self, one_in: u64) {
        self.lock().busy_one_in = one_in;
    }

    /// How it stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let ledger = self.lock();
        Standing {
            entries: ledger.entries,
            made: ledger.made.last().map_or(0, |made| made.outputs_to),
            left: ledger.left,
            applied: ledger.applied,
        }
    }

    /// The last entry with outputs.
    #[must_use]
    pub fn last_with_outputs(&self) -> Seq {
        self.lock().made.last().map_or(Seq::ZERO, |made| made.seq)
    }

    /// How many outputs must have left, and how many may have, with what is admitted.
    #[must_use]
    pub fn bounds(&self) -> (u64, u64) {
        let ledger = self.lock();
        let admitted = ledger.admitted;
        let until = |fits: &dyn Fn(&Made) -> bool| {
            let fitting = ledger.made.iter().take_while(|made| fits(made));
            fitting.last().map_or(0, |made| made.outputs_to)
        };
        let must = until(&|made| made.seq <= admitted.events && made.with_own <= admitted.inputs);
        let may = until(&|made| made.seq <= admitted.events && made.rests_on <= admitted.inputs);
        (must, may)
    }

    /// Whether the machine's power-off has left.
    #[must_use]
    pub fn powered_off(&self) -> bool {
        self.lock().power_off
    }

    /// What was wrong, in words.
    #[must_use]
    pub fn wrong(&self) -> Vec<String> {
        self.lock().wrong.clone()
    }
}

impl Ledger {
    fn note(&mut self, what: String) {
        /// The first ones tell; a flood of the rest would not.
        const KEPT: usize = 8;
        if self.wrong.len() < KEPT {
            self.wrong.push(what);
        }
    }

    fn posted(&mut self, seq: Seq, payload: &[u8]) {
        self.entries += 1;
        let entry = match self.decoder.decode(payload) {
            Ok(entry) => entry,
            Err(error) => return self.note(format!("entry {seq}: {error}")),
        };
        let Body::Step(step) = entry.body else { return };
        let rests_on = Seq(self.applied);
        for input in &step.inputs {
            if let LoggedInput::Frames { count, .. } = input {
                self.applied += u64::from(*count);
            }
        }
        if let Some(digest) = step.outputs {
            let before = self.made.last().map_or(0, |made| made.outputs_to);
            self.made.push(Made {
                seq,
                rests_on,
                with_own: Seq(self.applied),
                outputs_to: before + u64::from(digest.count),
                digest,
            });
        }
    }

    /// Judges an output that leaves now.
    fn leaves(&mut self, output: &Output) {
        let at = self.left;
        self.left += 1;
        self.power_off |= matches!(output, Output::PowerOff(_));
        let Some(&made) = self.made.get(self.leaving) else {
            return self.note(format!(
                "output {at} left, and no entry in the log has made it"
            ));
        };
        let admitted = self.admitted;
        if made.seq > admitted.events || made.rests_on > admitted.inputs {
            self.note(format!(
                "output {at} of entry {} (resting on input {}) left with {admitted:?}",
                made.seq, made.rests_on
            ));
        }
        self.digest.add(output);
        if self.left == made.outputs_to {
            let found = std::mem::take(&mut self.digest);
            if found != made.digest {
                self.note(format!(
                    "entry {} made {:?}, {found:?} left",
                    made.seq, made.digest
                ));
            }
            self.leaving += 1;
        }
    }

    /// Judges a mark that says everything up to an entry has left.
    fn released(&mut self, released: Seq) {
        if let Some(made) = self.made.get(self.leaving)
            && made.seq <= released
        {
            let words = format!(
                "entry {released} was called released with {} outputs gone, entry {} makes {}",
                self.left, made.seq, made.outputs_to
            );
            self.note(words);
        }
    }
}

/// A ring whose commits are withheld until the book admits them.
pub struct WithheldSink {
    ring: RingSink,
    book: Book,
}

impl WithheldSink {
    /// Around a real one.
    #[must_use]
    pub fn new(ring: RingSink, book: Book) -> Self {
        Self { ring, book }
    }
}

impl Sink for WithheldSink {
    fn post(&mut self, payload: &[u8]) -> Result<Seq, SinkError> {
        let seq = self.ring.post(payload)?;
        self.book.lock().posted(seq, payload);
        Ok(seq)
    }

    fn committed(&mut self) -> Committed {
        let real = self.ring.committed();
        let admitted = self.book.admitted();
        Committed {
            events: real.events.min(admitted.events),
            inputs: real.inputs.min(admitted.inputs),
        }
    }

    fn released(&mut self, released: Seq) {
        self.book.lock().released(released);
        self.ring.released(released);
    }

    fn notify(&mut self, urgent: bool) {
        self.ring.notify(urgent);
    }

    fn is_behind(&mut self) -> bool {
        self.ring.is_behind()
    }

    fn wait_for_room(&mut self, longest: Duration) {
        self.ring.wait_for_room(longest);
    }

    fn detach(&mut self) {
        self.ring.detach();
    }
}

/// A world that is judged by the book.
pub struct JudgedWorld(pub Book);

impl World for JudgedWorld {
    fn send(&mut self, output: &Output) -> Sent {
        let mut ledger = self.0.lock();
        let one_in = ledger.busy_one_in;
        if one_in > 0 && ledger.random.below(one_in) == 0 {
            return Sent::Busy;
        }
        ledger.leaves(output);
        Sent::Done
    }
}
