//! Heartbeats over UDP, and the thread that repeats them while the I/O thread stands in line for a CPU.
//!
//! The I/O thread makes heartbeats, one every few milliseconds, and sends them. On a busy host it gets no CPU for far longer than
//! that, and nothing is wrong with it. A thread of real-time priority, which does nothing else and so takes nothing from
//! anybody, then sends the last heartbeat again, with the vCPU thread's progress of now:
//!
//! ```text
//!   I/O thread late?  ──▶ for GRACE ──▶ repeat ──▶ later: is it known to have stood in line for all but GRACE of the time?
//!                                                    │ yes: repeat               │ no: it waits for something, or loops: silence
//! ```
//!
//! So a heartbeat goes on saying what it said before: that this side reads the network, decides and serves, or would if it had
//! a CPU.
#![forbid(unsafe_code)]

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdma_log::LendingMutex;

use super::SessionError;
use crate::handshake::Channel;
use crate::orders::Orders;
use crate::protocol::Moment;
use crate::protocol::heartbeat::{Heartbeat, PairKey, SIZE};
use crate::sandbox::{NOT_CONFINED, Sandbox, Thread};
use crate::scheduling::{StandingInLine, Urgency, make_this_thread_urgent};
use crate::session::report::Timeline;

/// How long the I/O thread may be late for a reason that is not known. Longer than it takes to see in the kernel's figures that it
/// stands in line; a side whose I/O thread is stuck is given up so much later.
const GRACE: Duration = Duration::from_millis(100);

/// How long it may stand in line. A host that gives it no CPU for so long cannot serve a machine.
const STARVED: Duration = Duration::from_secs(20);

/// Datagrams of no use that are read at once: more may come than can be read, and the thread has other things to do.
const STRAYS: usize = 64;

/// Heartbeats that are read at once, for the same reason: one that was sent before is one of the pair's, whoever sends it again.
const AT_ONCE: usize = 64;

/// The socket of one pair.
#[derive(Debug)]
pub(super) struct Beats {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    socket: UdpSocket,
    key: PairKey,
    last: LendingMutex<Last>,
}

/// What was sent last.
#[derive(Debug, Default)]
struct Last {
    /// As the protocol made it; none before the first.
    beat: Option<Heartbeat>,
    /// The number on the wire, which repeats count, too.
    sequence: u64,
    /// How many the protocol has made, and when the last one.
    made: u64,
    made_at: Option<Instant>,
    sent_at: Option<Instant>,
}

impl Shared {
    /// Sends if the network takes it now. A lost one is what detectors are for.
    fn send(&self, last: &mut Last, beat: Heartbeat, now: Instant) {
        last.sequence += 1;
        last.sent_at = Some(now);
        let beat = Heartbeat {
            sequence: last.sequence,
            ..beat
        };
        let _ = self.socket.send(&beat.encode(self.key));
    }
}

impl Beats {
    /// Binds the socket; [`Beats::connect`] names the peer.
    ///
    /// Where nothing else is said they take the way of the control connection: an address that the peer cannot reach would leave
    /// the loss of a host to be noticed by nothing but the log's own connection.
    pub(super) fn bind(
        address: Option<SocketAddr>,
        control: &Channel,
    ) -> Result<UdpSocket, SessionError> {
        let address = match (address, control.tcp()) {
            (Some(address), _) => Ok(address),
            (None, Some(stream)) => stream.local_addr().map(|own| SocketAddr::new(own.ip(), 0)),
            (None, None) => Ok((Ipv4Addr::LOCALHOST, 0).into()),
        };
        Self::bind_to(address.map_err(SessionError::host("read an address of this host"))?)
    }

    fn bind_to(address: SocketAddr) -> Result<UdpSocket, SessionError> {
        let bind = || {
            let socket = UdpSocket::bind(address)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        bind().map_err(SessionError::host(
            "bind the heartbeat socket (pair.heartbeat)",
        ))
    }

    /// From now on only the peer is heard and spoken to.
    pub(super) fn connect(
        socket: UdpSocket,
        peer: SocketAddr,
        key: PairKey,
    ) -> Result<Self, SessionError> {
        socket
            .connect(peer)
            .map_err(SessionError::host("reach the peer's heartbeat address"))?;
        Ok(Self {
            shared: Arc::new(Shared {
                socket,
                key,
                last: LendingMutex::default(),
            }),
        })
    }

    /// Where the peer's come from.
    pub(super) fn peer(&self) -> Option<SocketAddr> {
        self.shared.socket.peer_addr().ok()
    }

    /// Sends one heartbeat.
    pub(super) fn send(&self, beat: &Heartbeat) {
        let now = Instant::now();
        let mut last = self.shared.last.lock();
        last.beat = Some(*beat);
        last.made += 1;
        last.made_at = Some(now);
        self.shared.send(&mut last, *beat, now);
    }

    /// The heartbeats of this pair that have come. What is behind many comes with a later call.
    pub(super) fn come(&self) -> impl Iterator<Item = Heartbeat> + '_ {
        std::iter::from_fn(|| self.receive()).take(AT_ONCE)
    }

    /// The next one. Behind many strays it comes with a later call.
    fn receive(&self) -> Option<Heartbeat> {
        let mut datagram = [0; SIZE + 1];
        for _ in 0..STRAYS {
            // An error is either "nothing there" or the peer's port being closed, which is no news of ours to act on.
            let length = self.shared.socket.recv(&mut datagram).ok()?;
            if let Ok(beat) = Heartbeat::decode(&datagram[..length], self.shared.key) {
                return Some(beat);
            }
        }
        None
    }
}

/// One look of the repeater: repeats if it is time to; when to look again.
fn repeat_if_late(
    shared: &Shared,
    every: Duration,
    orders: &Orders,
    sender: &mut Lateness,
) -> Duration {
    // Looked up before the lock is taken: it may take a file.
    let progress = orders.progress();
    let now = Instant::now();
    let mut last = shared.last.lock();
    let (Some(beat), Some(sent_at), Some(made_at)) = (last.beat, last.sent_at, last.made_at) else {
        return every;
    };
    // A little later than the I/O thread itself, which is in time on most hosts most of the time.
    let due = sent_at + every + every / 2;
    if now < due {
        return due - now;
    }
    let ago = now.saturating_duration_since(made_at);
    if sender.is_excused(last.made, ago, progress.stood, now) {
        let beat = Heartbeat {
            clock: Moment(Timeline::now()),
            progress,
            ..beat
        };
        shared.send(&mut last, beat, now);
    }
    every
}

/// Whether the I/O thread is late for want of a CPU.
#[derive(Debug)]
struct Lateness {
    standing: StandingInLine,
}

impl Lateness {
    fn of(standing: StandingInLine) -> Self {
        Self { standing }
    }

    /// It made its heartbeat number `made` so long ago. The vCPU thread stands in line for so long; it may hold a lock that the I/O
    /// thread waits for, which then sleeps, for want of a CPU all the same.
    fn is_excused(&mut self, made: u64, ago: Duration, vcpu_stood: Duration, now: Instant) -> bool {
        let stood = self.standing.told(made, now) + vcpu_stood;
        ago.saturating_sub(stood) < GRACE && ago < STARVED
    }
}

/// The thread that repeats what the I/O thread is late with. It is there before there is a peer, for a thread that is confined
/// can start no other.
#[derive(Debug)]
pub(super) struct Repeater {
    slot: Arc<Slot>,
    thread: Option<JoinHandle<()>>,
}

/// Whose heartbeats it repeats.
#[derive(Debug, Default)]
struct Slot {
    beats: LendingMutex<Option<Arc<Shared>>>,
    over: AtomicBool,
}

/// How long it sleeps while there is nobody to send to; a new peer wakes it.
const NOBODY: Duration = Duration::from_secs(1);

impl Repeater {
    /// Starts the thread, for the calling one, if the host permits it to be urgent. What it permits.
    pub(super) fn start(
        every: Duration,
        orders: &Arc<Orders>,
        sandbox: &Sandbox,
    ) -> Result<(Self, Urgency), SessionError> {
        let slot = Arc::new(Slot::default());
        let (shared, orders, sandbox) = (Arc::clone(&slot), Arc::clone(orders), sandbox.clone());
        let mut sender = Lateness::of(StandingInLine::of_this_thread());
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("heartbeat".into())
            .spawn(move || {
                let urgency = make_this_thread_urgent();
                let _ = tell.send(urgency);
                if urgency == Urgency::Usual {
                    return;
                }
                sandbox.confine(Thread::Io).expect(NOT_CONFINED);
                while !shared.over.load(Ordering::Relaxed) {
                    let beats = shared.beats.lock().clone();
                    let wait = match beats {
                        Some(beats) => repeat_if_late(&beats, every, &orders, &mut sender),
                        None => NOBODY,
                    };
                    std::thread::park_timeout(wait);
                }
            })
            .map_err(SessionError::host("start the heartbeat thread"))?;
        let repeater = Self {
            slot,
            thread: Some(thread),
        };
        Ok((repeater, told.recv().unwrap_or(Urgency::Usual)))
    }

    /// Repeats these heartbeats from now on, or none.
    pub(super) fn repeat(&self, beats: Option<&Beats>) {
        *self.slot.beats.lock() = beats.map(|beats| Arc::clone(&beats.shared));
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Drop for Repeater {
    fn drop(&mut self) {
        self.slot.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It sends and sleeps; if it panicked there is nothing to say about it here.
            let _ = thread.join();
        }
    }
}

impl AsFd for Beats {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::wait::Wake;
    use crate::config;
    use crate::protocol::heartbeat::{MachineId, Progress};
    use crate::protocol::{Configuration, Epoch, Identity};

    const EVERY: Duration = Duration::from_millis(5);
    const KEY: [u8; 16] = [3; 16];

    fn pair() -> [Beats; 2] {
        let any = "127.0.0.1:0".parse().unwrap();
        let sockets = [Beats::bind_to(any).unwrap(), Beats::bind_to(any).unwrap()];
        let [a, b] = [&sockets[0], &sockets[1]].map(|socket| socket.local_addr().unwrap());
        let [one, two] = sockets;
        let key = || PairKey::from_bytes(KEY);
        [
            Beats::connect(one, b, key()).unwrap(),
            Beats::connect(two, a, key()).unwrap(),
        ]
    }

    fn beat() -> Heartbeat {
        Heartbeat {
            machine: MachineId::of("kv"),
            epoch: Epoch(1),
            configuration: Configuration(1),
            sender: Identity::from_bytes([9; 16]),
            sequence: 1,
            clock: Moment(0),
            progress: Progress::default(),
        }
    }

    /// All that `listener` has got by now.
    fn heard(listener: &Beats) -> Vec<Heartbeat> {
        std::iter::from_fn(|| listener.receive()).collect()
    }

    #[test]
    fn a_late_sender_is_repeated_for_a_while_and_a_stuck_one_is_not_for_ever() {
        let [ours, theirs] = pair();
        let sandbox = Sandbox::prepare(&config::Sandbox {
            enabled: false,
            strict: false,
        })
        .unwrap();
        let orders = Arc::new(Orders::new(Arc::new(Wake::new().unwrap())));
        ours.send(&beat());
        let (repeater, urgency) = Repeater::start(EVERY, &orders, &sandbox).unwrap();
        repeater.repeat(Some(&ours));
        if urgency == Urgency::Usual {
            eprintln!("this user may have no urgent thread: nothing is repeated");
            return;
        }
        // This thread sleeps from here on: it is late, and not for want of a CPU.
        std::thread::sleep(3 * GRACE);
        let first = heard(&theirs);
        assert!(first.len() > 3, "{}", first.len());
        let numbers: Vec<u64> = first.iter().map(|beat| beat.sequence).collect();
        assert!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
        assert!(first[1..].iter().all(|beat| beat.clock > Moment(0)));
        std::thread::sleep(GRACE);
        assert_eq!(heard(&theirs), [], "it is stuck");
        // Its next heartbeat begins anew.
        ours.send(&beat());
        std::thread::sleep(GRACE);
        let again = heard(&theirs);
        assert!(again.len() > 3 && again[0].sequence > *numbers.last().unwrap());
        repeater.repeat(None);
        // Without a peer nobody is repeated; a look that was under way may still end.
        std::thread::sleep(GRACE);
        heard(&theirs);
        std::thread::sleep(4 * EVERY);
        assert_eq!(heard(&theirs), []);
    }

    /// Whoever has heard a pair can repeat what it said, as fast as it can be read.
    #[test]
    fn a_flood_of_heartbeats_leaves_time_for_other_things() {
        let [ours, theirs] = pair();
        for _ in 0..2 * AT_ONCE {
            ours.send(&beat());
        }
        assert_eq!(theirs.come().count(), AT_ONCE);
        assert_eq!(theirs.come().count(), AT_ONCE);
        assert_eq!(theirs.come().count(), 0);
    }

    #[test]
    fn a_thread_that_stands_in_line_is_excused_up_to_a_bound() {
        let mut late = Lateness::of(StandingInLine::of_nobody());
        let now = Instant::now();
        let none = Duration::ZERO;
        assert!(late.is_excused(1, GRACE - Duration::from_millis(1), none, now));
        assert!(!late.is_excused(1, GRACE, none, now));
        // It waits for a lock whose holder stands in line.
        assert!(late.is_excused(1, 5 * GRACE, 5 * GRACE, now));
        assert!(!late.is_excused(1, STARVED, STARVED, now));
    }
}
