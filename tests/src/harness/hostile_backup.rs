//! The backup of a victim: holds the ring's memory, drains it after the death, and judges what had left.
#![forbid(unsafe_code)]

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hypervisor::backends::wait::Wake;
use hypervisor::disk::Done;
use hypervisor::entry::{Body, Decoder, OutputsDigest};
use hypervisor::event::Output;
use hypervisor::kvm::KvmSource;
use hypervisor::machine::{Machine, MachineSpec};
use hypervisor::orders::Orders;
use hypervisor::replay::{Arrived, LogError, LogSource, ReplayEnd, Replayer};
use hypervisor::ring_log::{Proof, RingSource};
use rdma_log::transport::shm;
use rdma_log::{Fencer, Seq};

use super::hostile::RING;

/// The log as it passes by on its way to the replayer.
struct Watched {
    ring: RingSource,
    decoder: Decoder,
    told: Told,
}

/// What the log said.
#[derive(Debug, Default)]
struct Told {
    /// Entries with outputs, in order.
    outputs: Vec<(Seq, OutputsDigest)>,
    /// Frames that entries applied, in order.
    applied: Vec<Vec<u8>>,
    /// The highest released mark.
    released: Seq,
    /// The last entry.
    last: Seq,
}

impl LogSource for Watched {
    fn next(&mut self) -> Result<Option<Arrived<'_>>, LogError> {
        let Some(arrived) = self.ring.next()? else {
            return Ok(None);
        };
        let entry = self
            .decoder
            .decode(arrived.payload)
            .map_err(|error| LogError(error.to_string()))?;
        if let Body::Step(step) = entry.body
            && let Some(digest) = step.outputs
        {
            self.told.outputs.push((arrived.seq, digest));
        }
        self.told.released = self.told.released.max(arrived.marks.released);
        self.told.last = arrived.seq;
        Ok(Some(arrived))
    }

    fn frame(&mut self) -> Result<Vec<u8>, LogError> {
        let frame = self.ring.frame()?;
        self.told.applied.push(frame.clone());
        Ok(frame)
    }

    fn done(&mut self) -> Result<Done, LogError> {
        self.ring.done()
    }

    fn replayed(&mut self, seq: Seq) {
        self.ring.replayed(seq);
    }

    fn is_over(&mut self) -> Result<bool, LogError> {
        self.ring.is_over()
    }

    fn wait(&mut self, longest: Duration) {
        self.ring.wait(longest);
    }
}

/// A backup that follows a victim.
pub struct Follower {
    fencer: Fencer,
    proof: Proof,
    thread: JoinHandle<Result<Drained>>,
}

/// What a drained log amounts to.
#[derive(Debug)]
pub struct Drained {
    told: Told,
    /// What a go-live would send again: the product's own answer.
    again: Vec<Output>,
    /// Frames that were staged and not applied, with what was salvaged.
    leftover: Vec<Vec<u8>>,
}

impl Follower {
    /// Offers a ring at this connection and follows its writer.
    ///
    /// # Errors
    /// If there is no ring or no machine.
    pub fn start(stream: &UnixStream, spec: &MachineSpec) -> Result<Self> {
        let machine = Machine::new(&KvmSource::default(), spec)?;
        let ring = shm::accept(stream, &RING)?;
        let proof = Proof::default();
        let log = Watched {
            ring: RingSource::new(ring.events, ring.inputs, proof.clone()),
            decoder: Decoder::default(),
            told: Told::default(),
        };
        let orders = Arc::new(Orders::new(Arc::new(
            Wake::new().context("make an event descriptor")?,
        )));
        let thread = std::thread::Builder::new()
            .name("backup".into())
            .spawn(move || follow(Replayer::new(machine, log, orders, Duration::ZERO)))
            .context("start a thread")?;
        Ok(Self {
            fencer: ring.fencer,
            proof,
            thread,
        })
    }

    /// Fences and drains.
    ///
    /// # Errors
    /// If the log cannot be fenced or replayed.
    pub fn drain(mut self) -> Result<Drained> {
        let fenced = self.fencer.fence()?;
        self.proof.leave(fenced);
        match self.thread.join() {
            Ok(drained) => drained,
            Err(_) => bail!("the backup's thread panicked"),
        }
    }
}

fn follow(mut replayer: Replayer<Watched>) -> Result<Drained> {
    let end = replayer.run()?;
    ensure!(
        end == ReplayEnd::LogOver,
        "the replay ended otherwise: {end:?}"
    );
    let (remains, mut log) = replayer.into_remains();
    let leftover = log.ring.leftover_frames()?;
    Ok(Drained {
        told: log.told,
        again: remains.unreleased,
        leftover,
    })
}

/// What a judged run amounts to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verdict {
    /// Entries in the log.
    pub entries: u64,
    /// Outputs that had left.
    pub left: u64,
    /// Outputs in the log that had not left: a go-live sends them.
    pub held: u64,
    /// Outputs that had left and that a go-live sends again.
    pub repeats: u64,
    /// Frames that were read and not applied.
    pub leftover: u64,
}

impl Drained {
    /// Holds what had left and what had been sent in against the log.
    ///
    /// # Errors
    /// What does not hold: an output that left without its entry, out of order or changed; one that neither left nor would be
    /// sent again; a frame that got lost, changed or out of order.
    pub fn judge(
        &self,
        left: &[Output],
        sent_in: &[Vec<u8>],
        in_cable: &[Vec<u8>],
    ) -> Result<Verdict> {
        let counts = self
            .told
            .outputs
            .iter()
            .map(|(_, digest)| digest.count as usize);
        let made: usize = counts.sum();
        ensure!(
            left.len() <= made,
            "{} outputs had left, the log has entries for {made}: a client saw what the backup lacks",
            left.len()
        );
        let first_again = made
            .checked_sub(self.again.len())
            .with_context(|| format!("{} outputs to send again, {made} made", self.again.len()))?;
        ensure!(
            first_again <= left.len(),
            "of {made} outputs {} had left and the last {} would be sent again: some are lost",
            left.len(),
            self.again.len()
        );
        self.compare_with_entries(left)?;
        // What had left of an entry that did not leave whole has no checksum of its own: compare the bytes.
        for (at, output) in left.iter().enumerate().skip(first_again) {
            ensure!(
                *output == self.again[at - first_again],
                "output {at} had left, and its repeat is another"
            );
        }
        self.compare_released(left.len())?;
        self.compare_inputs(sent_in, in_cable)?;
        Ok(Verdict {
            entries: self.told.last.0,
            left: left.len() as u64,
            held: (made - left.len()) as u64,
            repeats: (left.len() - first_again) as u64,
            leftover: self.leftover.len() as u64,
        })
    }

    fn compare_with_entries(&self, left: &[Output]) -> Result<()> {
        let mut rest = left;
        for (seq, expected) in &self.told.outputs {
            let Some((outputs, later)) = rest.split_at_checked(expected.count as usize) else {
                return Ok(());
            };
            let mut found = OutputsDigest::default();
            outputs.iter().for_each(|output| found.add(output));
            ensure!(
                found == *expected,
                "the outputs of entry {seq} left as {found:?}, the log says {expected:?}"
            );
            rest = later;
        }
        Ok(())
    }

    /// Nothing that is marked as released may be still inside.
    fn compare_released(&self, left: usize) -> Result<()> {
        let marked = self
            .told
            .outputs
            .iter()
            .filter(|(seq, _)| *seq <= self.told.released);
        let released: usize = marked.map(|(_, digest)| digest.count as usize).sum();
        ensure!(
            released <= left,
            "the log says that {released} outputs were released (to entry {}), {left} had left",
            self.told.released
        );
        Ok(())
    }

    /// Every frame that was sent in was applied, or waits to be, or is still in the cable; each once, in order.
    fn compare_inputs(&self, sent_in: &[Vec<u8>], in_cable: &[Vec<u8>]) -> Result<()> {
        let found = || {
            self.told
                .applied
                .iter()
                .chain(&self.leftover)
                .chain(in_cable)
        };
        if let Some(at) = sent_in
            .iter()
            .zip(found())
            .position(|(sent, found)| sent != found)
        {
            bail!(
                "frame {at} of those sent in is another where it came to ({} applied, {} left over, {} in the cable)",
                self.told.applied.len(),
                self.leftover.len(),
                in_cable.len()
            );
        }
        ensure!(
            found().count() == sent_in.len(),
            "{} frames were sent in; {} were applied, {} are left over, {} are in the cable",
            sent_in.len(),
            self.told.applied.len(),
            self.leftover.len(),
            in_cable.len()
        );
        Ok(())
    }
}
