//! The two-sided way, as a baseline: the same bytes by SEND, into a buffer for which the other side has posted a receive, by the
//! crate `ibverbs` (the feature `two-sided`). What a one-sided write saves is that other side's part.
//!
//! Unsafe: posting. The crate asks that a buffer outlives what was posted of it and is not touched meanwhile; here the buffers
//! outlive the queue pairs, and nobody looks at them.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ibverbs::{CompletionQueue, Context, MemoryRegion, QueuePair, ibv_qp_type, ibv_wc};

use crate::sheet::median;

/// What is measured; the order is that of [`block`]'s first argument.
pub const KINDS: [&str; 2] = [
    "SEND by ibverbs, post to completion",
    "SEND and SEND back by ibverbs, both sides poll",
];

/// What was completed.
const SENT: u64 = 1;
const RECEIVED: u64 = 2;
/// Receives that are posted ahead: with fewer than two a SEND may meet none, and is then sent again much later.
const RECEIVES: usize = 4;
/// `IBV_GID_TYPE_ROCE_V2`, which the crate does not name.
const ROCE_V2: u32 = 2;
/// Places in the queues.
const REQUESTS: u32 = 16;
/// A completion takes microseconds, milliseconds where the processors are others'.
const LONGEST: Duration = Duration::from_secs(10);

/// One end of the connection.
struct Side<'a> {
    queue: QueuePair<'a>,
    done: &'a CompletionQueue<'a>,
    buffer: &'a mut MemoryRegion<u8>,
}

impl Side<'_> {
    fn send(&mut self) -> Result<()> {
        // SAFETY: the buffer outlives the queue pair, and nobody touches it.
        unsafe { self.queue.post_send(self.buffer, .., SENT) }.context("post a SEND")
    }

    fn expect(&mut self) -> Result<()> {
        // SAFETY: as above; what several receives and a SEND leave in it is of no interest.
        unsafe { self.queue.post_receive(self.buffer, .., RECEIVED) }.context("post a receive")
    }

    /// Waits until this was completed; the other kind's completions are taken on the way.
    fn wait(&self, what: u64, over: &AtomicBool) -> Result<()> {
        let until = Instant::now() + LONGEST;
        loop {
            let mut places = [ibv_wc::default(); 1];
            let Some(one) = self.done.poll(&mut places)?.first() else {
                ensure!(!over.load(Ordering::Relaxed), "the other side has failed");
                if Instant::now() > until {
                    bail!("nothing was completed within {LONGEST:?}");
                }
                spin_loop();
                continue;
            };
            if let Some((status, vendor)) = one.error() {
                bail!("a request failed: status {status}, the device's own code {vendor:#x}");
            }
            if one.wr_id() == what {
                return Ok(());
            }
        }
    }
}

/// The device's RoCE v2 GID of an IPv4 address; none on InfiniBand.
fn gid(context: &Context) -> Option<u32> {
    let v2 = |entry: &&ibverbs::GidEntry| {
        entry.gid_type == ROCE_V2
            && entry.gid.subnet_prefix() == 0
            && entry.gid.interface_id() >> 32 == 0xffff
    };
    context
        .gid_table()
        .iter()
        .find(v2)
        .map(|entry| entry.gid_index)
}

/// The median of so many operations of this kind, in µs, over a connection of its own.
///
/// # Errors
/// If there is no device, or it fails.
pub fn block(kind: usize, operations: usize, bytes: usize) -> Result<f64> {
    let devices = ibverbs::devices().context("look for RDMA devices")?;
    let device = devices.iter().next().context("there is no RDMA device")?;
    let context = device.open().context("open the RDMA device")?;
    let domain = context.alloc_pd().context("make a protection domain")?;
    let mut buffers = [domain.allocate(bytes)?, domain.allocate(bytes)?];
    let queues = [
        context.create_cq(2 * REQUESTS as i32, 0)?,
        context.create_cq(2 * REQUESTS as i32, 1)?,
    ];
    let prepared = queues.each_ref().map(|done| {
        let mut builder = domain.create_qp(done, done, ibv_qp_type::IBV_QPT_RC);
        if let Some(index) = gid(&context) {
            builder.set_gid_index(index);
        }
        // As the ring's: patient, and not for ever.
        builder.set_timeout(14).set_retry_count(6).set_rnr_retry(6);
        builder.set_max_send_wr(REQUESTS).set_max_recv_wr(REQUESTS);
        builder.build()
    });
    let [one, other] = prepared;
    let (one, other) = (
        one.context("make a queue pair")?,
        other.context("make a queue pair")?,
    );
    let ends = [other.endpoint(), one.endpoint()];
    let [here, there] = buffers.each_mut();
    let mut here = Side {
        queue: one.handshake(ends[0]).context("connect")?,
        done: &queues[0],
        buffer: here,
    };
    let mut there = Side {
        queue: other.handshake(ends[1]).context("connect")?,
        done: &queues[1],
        buffer: there,
    };
    for _ in 0..RECEIVES {
        here.expect()?;
        there.expect()?;
    }
    match kind {
        0 => to_completion(&mut here, &mut there, operations),
        _ => there_and_back(&mut here, &mut there, operations),
    }
}

fn to_completion(here: &mut Side<'_>, there: &mut Side<'_>, operations: usize) -> Result<f64> {
    let over = AtomicBool::new(false);
    let mut times = Vec::with_capacity(operations);
    for _ in 0..operations {
        let begun = Instant::now();
        here.send()?;
        here.wait(SENT, &over)?;
        times.push(begun.elapsed().as_nanos() as f64 / 1e3);
        // The other side's part, which a write does not have.
        there.wait(RECEIVED, &over)?;
        there.expect()?;
    }
    Ok(median(times))
}

fn there_and_back(here: &mut Side<'_>, there: &mut Side<'_>, operations: usize) -> Result<f64> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let answering = scope.spawn(|| -> Result<()> {
            for _ in 0..operations {
                there.wait(RECEIVED, &over)?;
                there.send()?;
                there.expect()?;
            }
            there.wait(SENT, &over)
        });
        let mut times = Vec::with_capacity(operations);
        let mut measured = || -> Result<()> {
            for _ in 0..operations {
                let begun = Instant::now();
                here.send()?;
                here.wait(RECEIVED, &over)?;
                times.push(begun.elapsed().as_nanos() as f64 / 1e3);
                here.expect()?;
            }
            Ok(())
        };
        let outcome = measured();
        over.store(outcome.is_err(), Ordering::Relaxed);
        let answered = answering.join().expect("no panic");
        outcome.and(answered)?;
        Ok(median(times))
    })
}
