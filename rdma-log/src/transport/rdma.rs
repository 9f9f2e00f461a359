//! Transport `rdma`: one-sided writes straight into the reader's memory.
//!
//! The writer builds its entries in a copy of the ring and posts RDMA WRITEs of ranges of it, to the same places of the ring
//! in the reader's registered memory. There is one reliable connection (a pair of queue pairs) for each lane, so that a
//! small entry of the events lane never waits behind the bulk of the inputs. What the reader returns, credits and
//! acknowledgements, goes the same way into a page of the writer's ([`mod@block`]).
//!
//! An entry is committed, by [`Mode`], when the device says that its write was completed, or when the reader says that
//! it received it. The fence takes the registration of the ring back: when that has returned, the device writes no more to
//! it, whatever the writer posts and however long it was frozen; the memory itself stays to be drained. The writer's next
//! write fails, and says so.
//!
//! A thread on the reader's side sends what it returns, wakes readers that sleep, and in mode `ack` finds and checks what
//! arrived. One on the writer's side, or whoever holds the [`Watch`], takes in completions. Both sides write a few bytes
//! now and then when they have nothing to say, so that the death of the other is noticed by the queue pair.
//!
//! The library for it is loaded at run time ([`Verbs::load`]); without it, or without a device, there is an error that says
//! what is missing. The keys of memory regions and the nonce go over the stream that [`accept`] and [`connect`] are
//! given, which must be one that nobody else can read or write; the entries travel in clear.
//!
//! Nothing is assumed about the order in which a device places bytes, and no device is asked for relaxed ordering.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use crate::control::PAGE;
use crate::entry::{HEADER_LEN, Nonce};
use crate::lane::Geometry;
use crate::region::Region;
use crate::ring::{Acks, RingConfig, RingReader, RingWriter};
use crate::transport::{ReadPort, WritePort};
use crate::verbs::abi::Path;
use crate::verbs::{Choice, Device, RdmaError, Registered, Remote, Verbs, Writes};

mod block;
mod error;
mod flow;
mod hello;
mod pipe;
mod reader;
mod writer;

pub use error::ConnectError;
pub use hello::Mode;
pub use reader::Link;
pub use writer::Watch;

use block::{BLOCK, From};
use hello::{BITS24, HELLO, Hello, Side};
use pipe::{Pipe, Slots, memory};
use reader::{RdmaAcks, RdmaReader};
use writer::{RdmaProgress, RdmaWriter, Writer};

/// A packet without an answer is sent again after 4.096 µs times two to the power of this: 67 ms.
///
/// With [`RETRIES`] a peer that is gone is given up after about half a second. That is long on purpose: a queue pair that has
/// given up is lost, so it must be more patient than the heartbeats and the control connection, which decide over a failover
/// and may change their mind. With 12 (0.12 s) two emulated hosts on a machine with ten times more work than processors gave each
/// other up in health: soft-RoCE answers from a soft interrupt. Larger, and a writer learns late that nothing of what it posts can
/// commit. [`Config::patience`] makes it more.
const TIMEOUT: u8 = 14;
/// With [`RETRIES`] a minute.
const LONGEST_TIMEOUT: u8 = 21;
/// How often a packet is sent again. 7 means for ever on some devices, and would hide a dead peer.
const RETRIES: u8 = 6;

/// The time limit of a packet, as devices take it, by which a peer is given up after `patience` or a little later.
fn timeout(patience: Duration) -> u8 {
    let given_up = |exponent: u8| Duration::from_nanos(4096 << exponent) * (u32::from(RETRIES) + 1);
    (TIMEOUT..LONGEST_TIMEOUT)
        .find(|&exponent| given_up(exponent) >= patience)
        .unwrap_or(LONGEST_TIMEOUT)
}

/// How to use RDMA.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Which device.
    pub choice: Choice,
    /// When an entry counts as committed. The same on both sides.
    pub mode: Mode,
    /// How long a peer that does not answer is waited for at the least before its connection is given up, which cannot be taken
    /// back: longer than whatever decides over the peer by other means. Never less than half a second.
    pub patience: Duration,
}

/// A side's device and queue pairs, before the other side is known.
struct Local<T> {
    device: Arc<Device>,
    pipes: [Pipe<T>; 2],
    psns: [u32; 2],
    timeout: u8,
}

impl<T> Local<T> {
    fn open(verbs: &Verbs, config: &Config) -> Result<Local<T>, ConnectError> {
        let device = Arc::new(verbs.open(&config.choice)?);
        let pipes = [Pipe::new(&device)?, Pipe::new(&device)?];
        let random = crate::region::random().map_err(|error| ConnectError::Memory {
            what: "draw random numbers",
            error,
        })?;
        // A queue pair's number may soon be used again; packets of its earlier life must not fit.
        let psn = |at: usize| u32::from_le_bytes([random[at], random[at + 1], random[at + 2], 0]);
        Ok(Local {
            device,
            pipes,
            psns: [psn(0), psn(3)],
            timeout: timeout(config.patience),
        })
    }

    fn hello(&self, mode: Mode, nonce: Nonce, sizes: [u64; 2], memory: Remote) -> Hello {
        let port = self.device.port();
        Hello {
            mode,
            ethernet: port.ethernet == 1,
            mtu: port.mtu,
            nonce,
            sizes,
            gid: port.gid,
            queues: self.pipes.each_ref().map(|pipe| pipe.queue.limits().number),
            psns: self.psns.map(|psn| psn & BITS24),
            memory,
            lid: port.lid,
        }
    }

    /// Entries longer than a message could not go in one request.
    fn check_message(&self, geometries: [Geometry; 2]) -> Result<(), RdmaError> {
        let most = u64::from(self.device.port().max_message);
        for geometry in geometries {
            let needed = (geometry.max_payload() + HEADER_LEN) as u64;
            if needed > most {
                return Err(RdmaError::Message {
                    device: self.device.name(),
                    needed,
                    most,
                });
            }
        }
        Ok(())
    }

    /// Connects both queue pairs to those of the other side.
    fn connect(&mut self, own: &Hello, there: &Hello) -> Result<(), ConnectError> {
        fits("mode", own.mode, there.mode, |mode| mode.name().to_owned())?;
        fits("link layer", own.ethernet, there.ethernet, |ethernet| {
            let name = if ethernet {
                "Ethernet (RoCE)"
            } else {
                "InfiniBand"
            };
            name.to_owned()
        })?;
        for i in 0..2 {
            self.pipes[i].queue.connect(&Path {
                gid: there.gid,
                number: there.queues[i],
                psn: there.psns[i],
                own_psn: own.psns[i],
                lid: there.lid,
                mtu: own.mtu.min(there.mtu),
                timeout: self.timeout,
                retries: RETRIES,
                reserved: [0; 3],
            })?;
            self.pipes[i].start()?;
        }
        Ok(())
    }
}

fn fits<T: Copy + PartialEq>(
    what: &'static str,
    here: T,
    there: T,
    name: impl Fn(T) -> String,
) -> Result<(), ConnectError> {
    if here == there {
        return Ok(());
    }
    let (here, there) = (name(here), name(there));
    Err(ConnectError::Differs { what, here, there })
}

fn receive(stream: &mut impl Read, side: Side) -> Result<Hello, ConnectError> {
    let mut bytes = [0; HELLO];
    stream.read_exact(&mut bytes)?;
    Hello::from_bytes(&bytes, side)
}

/// The reader's last word: its queue pairs are connected, as the writer's were before it spoke. A write before that would
/// be answered by nobody.
const READY: [u8; 4] = *b"redy";

/// Where the lanes start in the reader's memory; before them is a page for the writer's block.
fn starts(config: &RingConfig) -> [usize; 2] {
    [PAGE, PAGE + config.events]
}

/// The reader's side: offers its memory and waits for a writer, as long as the stream's read time limit says.
///
/// Who the peer is must be settled before, and the stream be one that nobody else can read or write: it carries the keys of
/// this side's memory. The thread that this starts has the CPUs of the caller; it looks for more for `spin` after something
/// came before it sleeps, which is worth it only on a core of its own.
///
/// # Errors
/// No library or device, bad sizes, memory that cannot be had, a peer that is gone, too slow, speaks another version or is
/// set up in another way.
pub fn accept(
    verbs: &Verbs,
    stream: &mut (impl Read + Write),
    ring: &RingConfig,
    config: &Config,
    spin: Duration,
) -> Result<(RingReader, Link), ConnectError> {
    let geometries = ring.geometries()?;
    let nonce = Nonce::random().map_err(|error| ConnectError::Memory {
        what: "draw a random nonce",
        error,
    })?;
    let mut local = Local::open(verbs, config)?;
    local.check_message(geometries)?;
    let region = memory(PAGE + ring.events + ring.inputs)?;
    let registered = Registered::new(&local.device, &region, Writes::Peer)?;
    let sizes = [ring.events as u64, ring.inputs as u64];
    let own = local.hello(config.mode, nonce, sizes, registered.remote());
    stream.write_all(&own.to_bytes(Side::Reader))?;
    stream.flush()?;
    let there = receive(stream, Side::Writer)?;
    if there.nonce != nonce || there.sizes != sizes {
        return Err(ConnectError::Protocol {
            what: "an answer to another offer",
        });
    }
    let slots = slots(&local.device, there.memory, nonce, From::Reader)?;
    local.connect(&own, &there)?;
    stream.write_all(&READY)?;
    stream.flush()?;

    let parts = reader::Parts {
        nonce,
        mode: config.mode,
        geometries,
        device: local.device,
        pipes: local.pipes,
        slots,
        ring: registered,
        spin,
    };
    let (shared, fence) = reader::start(parts, &region, starts(ring)[0], ring)?;
    Ok(reader_handles(shared, fence, &region, ring, geometries))
}

fn reader_handles(
    shared: Arc<reader::Shared>,
    fence: reader::RdmaFence,
    region: &Region,
    ring: &RingConfig,
    geometries: [Geometry; 2],
) -> (RingReader, Link) {
    let acks = Acks::new(Arc::new(RdmaAcks(shared.clone())));
    let port = |lane, view| -> (Box<dyn ReadPort>, Acks) {
        let shared = shared.clone();
        let reader = RdmaReader {
            lane,
            end: shared,
            view,
        };
        (Box::new(reader), acks.clone())
    };
    let reader = RingReader::assemble(
        shared.nonce(),
        geometries,
        region.read_views(starts(ring)[0], [ring.events, ring.inputs]),
        port,
        acks.clone(),
        Box::new(fence),
    );
    (reader, Link::of(&shared))
}

/// The memory for the other side's blocks must hold one.
fn slots(
    device: &Arc<Device>,
    to: Remote,
    nonce: Nonce,
    from: From,
) -> Result<Slots, ConnectError> {
    if to.len < BLOCK as u64 {
        return Err(ConnectError::Protocol {
            what: "the length of its memory",
        });
    }
    Slots::new(device, to, nonce, from)
}

fn expect_ready(stream: &mut impl Read) -> Result<(), ConnectError> {
    let mut bytes = [0; READY.len()];
    stream.read_exact(&mut bytes)?;
    if bytes != READY {
        return Err(ConnectError::Protocol {
            what: "that it is ready",
        });
    }
    Ok(())
}

/// The writer's side, with a thread of its own that takes in completions and what the reader returns.
///
/// It waits for the offer, as long as the stream's read time limit says. Who the peer is must be settled before, and the
/// stream be one that nobody else can read or write.
///
/// # Errors
/// As for [`accept`].
pub fn connect(
    verbs: &Verbs,
    stream: &mut (impl Read + Write),
    config: &Config,
) -> Result<RingWriter, ConnectError> {
    Ok(connect_with(verbs, stream, config, false)?.0)
}

/// The writer's side, for a caller with a thread that waits for many things, or spins: that thread takes completions in, by
/// the [`Watch`].
///
/// # Errors
/// As for [`accept`].
pub fn connect_watched(
    verbs: &Verbs,
    stream: &mut (impl Read + Write),
    config: &Config,
) -> Result<(RingWriter, Watch), ConnectError> {
    connect_with(verbs, stream, config, true)
}

fn connect_with(
    verbs: &Verbs,
    stream: &mut (impl Read + Write),
    config: &Config,
    driven: bool,
) -> Result<(RingWriter, Watch), ConnectError> {
    let mut local = Local::open(verbs, config)?;
    let there = receive(stream, Side::Reader)?;
    let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    let ring = RingConfig {
        events: size(there.sizes[0]),
        inputs: size(there.sizes[1]),
    };
    let geometries = ring.geometries()?;
    local.check_message(geometries)?;
    let needed = starts(&ring)[1] as u64 + there.sizes[1];
    if there.memory.len < needed {
        return Err(ConnectError::Protocol {
            what: "the length of its memory",
        });
    }
    let lanes = memory(ring.events + ring.inputs)?;
    let source = Registered::new(&local.device, &lanes, Writes::Own)?;
    let page = memory(PAGE)?;
    let returned = Registered::new(&local.device, &page, Writes::Peer)?;
    let slots = slots(&local.device, there.memory, there.nonce, From::Writer)?;
    let own = local.hello(config.mode, there.nonce, there.sizes, returned.remote());
    local.connect(&own, &there)?;
    stream.write_all(&own.to_bytes(Side::Writer))?;
    stream.flush()?;
    expect_ready(stream)?;

    let [block, _] = page.read_views(0, [BLOCK, 0]);
    let writer = Arc::new(Writer::new(writer::Parts {
        nonce: there.nonce,
        mode: config.mode,
        device: local.device,
        pipes: local.pipes,
        slots,
        source,
        returned,
        block,
        ring: there.memory,
        starts: starts(&ring).map(|start| start as u64),
        sizes: there.sizes,
        driven,
    })?);
    let watch = writer.watch();
    let views = lanes.write_views(0, [ring.events, ring.inputs]);
    let port = |lane| -> Box<dyn WritePort> { Box::new(RdmaWriter::new(lane, writer.clone())) };
    let progress = Box::new(RdmaProgress(writer.clone()));
    let ring = RingWriter::assemble(there.nonce, geometries, views, port, progress);
    Ok((ring, watch))
}

#[cfg(test)]
mod tests;
