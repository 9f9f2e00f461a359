//! The vCPU thread of a backup: replays, and goes live when it is handed the claim.
#![forbid(unsafe_code)]

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

use rdma_log::Fenced;

use crate::arbiter::Claim;
use crate::backends::disk::Disk;
use crate::backends::wait::Wake;
use crate::clock::GuestClock;
use crate::config::Config;
use crate::desk::Desk;
use crate::gate::Committed;
use crate::record::{
    Ended, Intervals, Outlet, Parts, RecordError, RecordOptions, Recorder, random_source,
};
use crate::replay::{MemoryCheck, Remains, ReplayEnd, ReplayError, Replayer};
use crate::ring_log::{RingSink, RingSource};
use crate::sandbox::{NOT_CONFINED, Thread};
use crate::session::io::Io;
use crate::session::{SessionError, confined, host, intervals, record_options};
use crate::stage::Stage;

/// What the vCPU thread says.
pub(super) enum Told {
    /// The log was replayed to its end after the fence.
    Drained(Drained),
    /// This copy is of no use.
    Failed(ReplayError),
    /// The thread has ended without a word.
    Gone,
}

/// What is said of a thread that has.
pub(super) const GONE: &str = "the thread that replays has ended without a word; this is a bug";

/// Facts about a drained log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Drained {
    pub(super) position: u64,
    pub(super) memory_checks: u64,
    pub(super) last_memory_check: Option<MemoryCheck>,
    pub(super) resent: usize,
    pub(super) inherited_frames: usize,
    pub(super) torn: bool,
}

/// The vCPU thread of a backup: replays, and goes live when it is handed the claim.
pub(super) struct Follower {
    pub(super) thread: JoinHandle<Result<Ended, RecordError>>,
    told: Receiver<Told>,
    /// It has said what its replay came to.
    said: bool,
    pub(super) claims: Sender<Claim>,
    /// The number of the last entry that came.
    pub(super) arrived: Arc<AtomicU64>,
    /// The guest has turned itself off.
    pub(super) off: Arc<AtomicBool>,
}

/// What going live needs besides the proofs.
struct Live {
    outlet: Outlet,
    stage: Arc<Stage>,
    orders: Arc<crate::orders::Orders>,
    samples: Arc<crate::orders::Samples>,
    options: RecordOptions,
    random: File,
    desk: Option<Arc<Desk<RingSink>>>,
    disk: Option<Arc<Disk>>,
    intervals: Option<Intervals<RingSink>>,
}

impl Follower {
    /// What the thread says, if there is something new.
    pub(super) fn hear(&mut self) -> Option<Told> {
        match self.told.try_recv() {
            Ok(told) => {
                self.said = true;
                Some(told)
            }
            // Without it this side would go on to beat, and be no backup.
            Err(TryRecvError::Disconnected) if !self.said => {
                self.said = true;
                Some(Told::Gone)
            }
            Err(_) => None,
        }
    }

    /// Waits for the thread, which was ordered to stop.
    pub(super) fn end(self) {
        drop(self.claims);
        // Whatever it came to is of no interest any more.
        let _ = self.thread.join();
    }

    pub(super) fn start(
        config: &Config,
        io: &Io,
        mut replayer: Replayer<RingSource>,
        desk: Option<Arc<Desk<RingSink>>>,
    ) -> Result<Self, SessionError> {
        let arrived = replayer.source().arrivals();
        let off = replayer.off();
        let (tell, told) = channel();
        let (claims, claim) = channel();
        let live = Live {
            outlet: io.outlet.clone(),
            stage: Arc::clone(&io.stage),
            orders: Arc::clone(&io.orders),
            samples: Arc::clone(&io.samples),
            options: record_options(config),
            random: random_source()?,
            desk,
            disk: io.stager.disk().cloned(),
            intervals: intervals(config, io)?,
        };
        let (cpus, wake) = (config.cpus.vcpu.clone(), Arc::clone(&io.wake));
        let sandbox = io.sandbox.clone();
        replayer.man(confined(&sandbox))?;
        let thread = std::thread::Builder::new()
            .name("vcpu".into())
            .spawn(move || {
                host::pin(&cpus, "vCPU");
                live.orders.watch_this_thread();
                sandbox.confine(Thread::Vcpu).expect(NOT_CONFINED);
                let outcome = follow(replayer, live, &tell, &claim, &wake);
                wake.ring();
                outcome
            })
            .map_err(SessionError::host("start the vCPU thread"))?;
        Ok(Self {
            thread,
            told,
            said: false,
            claims,
            arrived,
            off,
        })
    }
}

fn follow(
    mut replayer: Replayer<RingSource>,
    live: Live,
    tell: &Sender<Told>,
    claim: &Receiver<Claim>,
    wake: &Wake,
) -> Result<Ended, RecordError> {
    let say = |told| {
        // If nobody listens the process is ending.
        let _ = tell.send(told);
        wake.ring();
    };
    match replayer.run() {
        Ok(ReplayEnd::LogOver) => {
            if let Err(error) = replayer.settle() {
                say(Told::Failed(error));
                return Ok(Ended::Stopped);
            }
        }
        Ok(ReplayEnd::Stopped | ReplayEnd::There | ReplayEnd::Finished { .. }) => {
            return Ok(Ended::Stopped);
        }
        Err(error) => {
            say(Told::Failed(error));
            return Ok(Ended::Stopped);
        }
    }
    let (memory_checks, last_memory_check) = replayer.memory_checks();
    let torn = replayer.is_torn();
    let (remains, mut log) = replayer.into_remains();
    // Before anybody is told that this side is live.
    live.orders.set_share(remains.share);
    let frames = match log.leftover_frames() {
        Ok(frames) => frames,
        Err(error) => {
            say(Told::Failed(error.into()));
            return Ok(Ended::Stopped);
        }
    };
    let drained = Drained {
        position: remains.machine.position().0,
        memory_checks,
        last_memory_check,
        resent: remains.unreleased.len(),
        inherited_frames: frames.len(),
        torn,
    };
    live.stage.inherit(frames);
    let Some(fenced) = log.into_proof() else {
        say(Told::Failed(ReplayError::Log(crate::replay::LogError(
            "the log ended without a fence".into(),
        ))));
        return Ok(Ended::Stopped);
    };
    if let Some(disk) = &live.disk
        && let Err(failure) = disk.take_over()
    {
        say(Told::Failed(failure.into()));
        return Ok(Ended::Stopped);
    }
    say(Told::Drained(drained));
    let Ok(claim) = claim.recv() else {
        return Ok(Ended::Stopped);
    };
    go_live(remains, claim, fenced, live).run()
}

/// Makes the backup the primary. It takes the proof that the claim was won and the proof that nothing more can commit to the
/// old log; without both there is no way to call it.
fn go_live(remains: Remains, _claim: Claim, _fenced: Fenced, live: Live) -> Recorder<RingSink> {
    for output in remains.unreleased {
        live.outlet
            .hold(rdma_log::Seq::ZERO, rdma_log::Seq::ZERO, output);
    }
    if let Some(disk) = live.disk.as_ref().filter(|disk| disk.is_shared()) {
        // As below; and not before this side is known to be the one that serves.
        live.outlet.lead_to(Arc::clone(disk));
        for request in remains.machine.disk_requests() {
            let (seq, request) = (rdma_log::Seq::ZERO, request.clone());
            live.outlet.hold_request(seq, seq, request);
        }
    } else if let Some(disk) = &live.disk {
        // What came of them the guest was not told, and what this image has of them does no harm: they are the last that were
        // asked, and are done again in their order.
        for request in remains.machine.disk_requests() {
            disk.serve(request);
        }
    }
    // Nothing leaves if the gate is still shut. If it was opened already, nobody else comes by for these until the guest has
    // something to log.
    live.outlet.release(Committed::EVERYTHING);
    Recorder::new(Parts {
        machine: remains.machine,
        sink: RingSink::detached(),
        base: remains.base,
        outlet: live.outlet,
        stage: live.stage,
        orders: live.orders,
        samples: live.samples,
        clock: GuestClock::starting(remains.clock, remains.clock_came),
        options: live.options,
        random: live.random,
        desk: live.desk,
        intervals: live.intervals,
    })
    .with_disk(live.disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn follower(thread: impl FnOnce(Sender<Told>) + Send + 'static) -> Follower {
        let (tell, told) = channel();
        let (claims, _) = channel();
        Follower {
            thread: std::thread::spawn(move || {
                thread(tell);
                Ok(Ended::Stopped)
            }),
            told,
            said: false,
            claims,
            arrived: Arc::default(),
            off: Arc::default(),
        }
    }

    fn heard(mut follower: Follower) -> Vec<Told> {
        while !follower.thread.is_finished() {
            std::thread::yield_now();
        }
        // Told once, however often it is asked.
        (0..3).filter_map(|_| follower.hear()).collect()
    }

    #[test]
    fn a_thread_that_ends_without_a_word_is_told_of_and_one_that_said_something_is_not() {
        let gone = heard(follower(drop));
        assert!(matches!(gone[..], [Told::Gone]));
        let failed = heard(follower(|tell| {
            let error = crate::replay::LogError("of no use".into());
            tell.send(Told::Failed(error.into())).unwrap();
        }));
        assert!(matches!(failed[..], [Told::Failed(_)]));
    }
}
