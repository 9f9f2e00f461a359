//! A table of functions over a card that exists in this process only, without manners, so that all that uses verbs runs
//! everywhere.
//!
//! A thread for each queue pair carries its requests out, one after the other; within a request, eight bytes at a time in any
//! order. A place in the send queue is free again only when a signalled completion after it was *taken*, as with real cards,
//! and posting without a free place fails. A ring without a posted receive fails. Memory that is taken back in the middle of
//! a request keeps what had arrived, and the request fails. A queue pair that failed flushes the rest, and so does its peer.
//!
//! What a device does follows from its name: see [`open`]. By the name a test stops, and cuts, its device.
//!
//! Unsafe, and why it holds: handles are boxes that were leaked by the function that made them; memory is written while its
//! entry in the registry is locked, and whoever registered it keeps it mapped until it has taken the entry out.
#![allow(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::locks::lock;

use super::Verbs;
use super::abi::{
    self, BELL, Completion, Failure, INLINE, Keys, Limits, NAME, Path, Port, RUNG, Request,
    SIGNALLED, Step, Table, WRITTEN, Wish,
};

static TABLE: Table = Table {
    abi: abi::ABI,
    size: size_of::<Table>() as u32,
    open,
    close,
    register,
    deregister,
    create,
    connect,
    post,
    expect,
    poll,
    arm,
    descriptor,
    quiet,
    destroy,
    devices,
};

/// The table.
#[must_use]
pub fn verbs() -> Verbs {
    Verbs::of(&TABLE)
}

/// Requests in a queue, so few that lanes of any size fill it.
const REQUESTS: u32 = 40;
/// What arrives between two looks at whether the memory is still registered.
const PACKET: usize = 256;
const FLUSHED: u32 = 5;
const REMOTE_ACCESS: u32 = 10;
const RETRY_EXCEEDED: u32 = 12;
const NO_RECEIVE: u32 = 13;

#[derive(Default)]
struct World {
    memories: HashMap<u32, Arc<Mutex<Option<Span>>>>,
    queues: HashMap<u32, Arc<Pair>>,
    cards: HashMap<String, Arc<Card>>,
}

#[derive(Clone, Copy)]
struct Span {
    at: u64,
    len: u64,
    peer_writes: bool,
}

/// What a test does to the devices of one name.
#[derive(Default)]
struct Card {
    stopped: AtomicBool,
    cut: AtomicBool,
    keeps: AtomicBool,
}

static WORLD: LazyLock<Mutex<World>> = LazyLock::new(Mutex::default);
static NUMBERS: AtomicU64 = AtomicU64::new(17);

fn number() -> u32 {
    NUMBERS.fetch_add(1, Ordering::Relaxed) as u32 & 0xff_ffff
}

fn card(name: &str) -> Arc<Card> {
    lock(&WORLD)
        .cards
        .entry(name.to_owned())
        .or_default()
        .clone()
}

/// Nothing that a device of this name has posted is carried out from now on, or it goes on.
pub fn stop(name: &str, stopped: bool) {
    card(name).stopped.store(stopped, Ordering::SeqCst);
}

/// The host of the devices with this name is gone.
pub fn cut(name: &str) {
    card(name).cut.store(true, Ordering::SeqCst);
}

/// The devices of this name take no registration back and destroy no queue pair from now on, or do so again.
pub fn keep(name: &str, keeps: bool) {
    card(name).keeps.store(keeps, Ordering::SeqCst);
}

struct Device {
    card: Arc<Card>,
    name: String,
    told: UnixStream,
    tell: UnixStream,
}

struct Memory {
    key: u32,
    card: Arc<Card>,
}

/// A queue pair.
struct Pair {
    card: Arc<Card>,
    tell: UnixStream,
    /// It reaches nobody.
    lonely: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    peer: u32,
    depth: u32,
    used: u32,
    /// Requests since the last signalled one.
    unsignalled: u32,
    requests: VecDeque<(Request, Vec<u64>)>,
    /// With how many places each frees when it is taken.
    completions: VecDeque<(Completion, u32)>,
    receives: u32,
    armed: bool,
    failed: bool,
    destroyed: bool,
}

struct Queue {
    pair: Arc<Pair>,
    number: u32,
    worker: Option<JoinHandle<()>>,
}

fn refused(step: Step, errno: i32) -> Failure {
    Failure::of(step, errno)
}

/// `fake…` is a device; with `-no-port`, `-no-gid`, `-forbidden`, `-memlock`, `-infiniband`, `-short`, `-full`, `-no-path`, `-gone` in its
/// name it has no active port, no GID, refuses to be opened, or to register memory, is InfiniBand, sends short messages only, has
/// no room for queue pairs, reaches no peer, or is taken away before memory is registered.
unsafe extern "C" fn open(
    wish: *const Wish,
    device: *mut *mut abi::Device,
    port: *mut Port,
) -> Failure {
    // SAFETY: the caller's live struct.
    let wish = unsafe { &*wish };
    let mut name = super::text(&wish.name);
    if name.is_empty() {
        name = "fake".to_owned();
    }
    for (part, step, errno) in [
        ("none", Step::NoDevice, 0),
        ("-no-port", Step::NoPort, 0),
        ("-no-gid", Step::NoGid, 0),
        ("-forbidden", Step::Open, libc::EACCES),
    ] {
        if name.contains(part) {
            return refused(step, errno);
        }
    }
    if !name.starts_with("fake") {
        return refused(Step::UnknownDevice, 0);
    }
    let (told, tell) = UnixStream::pair().expect("sockets");
    told.set_nonblocking(true).expect("a socket");
    tell.set_nonblocking(true).expect("a socket");
    let found = Port {
        name: wish.name,
        gid: [7; 16],
        max_message: if name.contains("-short") {
            1 << 10
        } else {
            8 << 20
        },
        max_requests: REQUESTS,
        gid_index: 1,
        lid: if name.contains("-infiniband") { 9 } else { 0 },
        port: 1,
        mtu: 3,
        ethernet: u8::from(!name.contains("-infiniband")),
        reserved: [0; 3],
    };
    let made = Device {
        card: card(&name),
        name,
        told,
        tell,
    };
    // SAFETY: the caller's live places.
    unsafe {
        port.write(found);
        device.write(Box::into_raw(Box::new(made)).cast());
    }
    Failure::NONE
}

unsafe extern "C" fn close(device: *mut abi::Device) {
    // SAFETY: made by `open`, given back once.
    drop(unsafe { Box::from_raw(device.cast::<Device>()) });
}

unsafe extern "C" fn register(
    device: *mut abi::Device,
    at: *mut u8,
    len: u64,
    peer_writes: u32,
    memory: *mut *mut abi::Memory,
    keys: *mut Keys,
) -> Failure {
    // SAFETY: an open device.
    let Device { name, card, .. } = unsafe { &*device.cast::<Device>() };
    for (part, errno) in [("-memlock", libc::ENOMEM), ("-gone", libc::ENODEV)] {
        if name.contains(part) {
            return refused(Step::Register, errno);
        }
    }
    let key = number();
    let span = Span {
        at: at as u64,
        len,
        peer_writes: peer_writes == 1,
    };
    lock(&WORLD)
        .memories
        .insert(key, Arc::new(Mutex::new(Some(span))));
    // SAFETY: the caller's live places.
    unsafe {
        keys.write(Keys {
            local: key,
            remote: key,
        });
        let card = card.clone();
        memory.write(Box::into_raw(Box::new(Memory { key, card })).cast());
    }
    Failure::NONE
}

unsafe extern "C" fn deregister(memory: *mut abi::Memory) -> Failure {
    // SAFETY: made by `register`, and given back until that succeeds.
    let memory = unsafe {
        let memory = memory.cast::<Memory>();
        let Memory { card, .. } = &*memory;
        if card.keeps.load(Ordering::SeqCst) {
            return refused(Step::Deregister, libc::EBUSY);
        }
        Box::from_raw(memory)
    };
    let entry = lock(&WORLD)
        .memories
        .remove(&memory.key)
        .expect("registered");
    *lock(&entry) = None;
    Failure::NONE
}

unsafe extern "C" fn create(
    device: *mut abi::Device,
    limits: *mut Limits,
    queue: *mut *mut abi::Queue,
) -> Failure {
    // SAFETY: an open device and the caller's live struct.
    let (device, limits) = unsafe { (&*device.cast::<Device>(), &mut *limits) };
    if device.name.contains("-full") {
        return refused(Step::QueuePair, libc::ENOMEM);
    }
    limits.number = number();
    limits.inline = limits.inline.min(128);
    let pair = Arc::new(Pair {
        card: device.card.clone(),
        tell: device.tell.try_clone().expect("a socket"),
        lonely: device.name.contains("-no-path"),
        state: Mutex::new(State {
            depth: limits.requests,
            ..State::default()
        }),
        changed: Condvar::new(),
    });
    lock(&WORLD).queues.insert(limits.number, pair.clone());
    let worker = pair.clone();
    let made = Queue {
        pair,
        number: limits.number,
        worker: Some(std::thread::spawn(move || worker.work())),
    };
    // SAFETY: the caller's live place.
    unsafe { queue.write(Box::into_raw(Box::new(made)).cast()) };
    Failure::NONE
}

/// # Safety
/// A handle from `create` that was not given back.
unsafe fn pair<'a>(queue: *mut abi::Queue) -> &'a Pair {
    // SAFETY: the caller's part.
    unsafe { &(*queue.cast::<Queue>()).pair }
}

unsafe extern "C" fn connect(queue: *mut abi::Queue, path: *const Path) -> Failure {
    // SAFETY: a live queue and the caller's live struct.
    let (pair, path) = unsafe { (pair(queue), &*path) };
    if pair.lonely {
        return refused(Step::Receive, libc::EINVAL);
    }
    lock(&pair.state).peer = path.number;
    Failure::NONE
}

unsafe extern "C" fn post(queue: *mut abi::Queue, requests: *const Request, count: u32) -> Failure {
    // SAFETY: a live queue; the caller's array has so many.
    let (pair, requests) = unsafe {
        let requests = std::slice::from_raw_parts(requests, count as usize);
        (pair(queue), requests)
    };
    let mut state = lock(&pair.state);
    if state.used + count > state.depth || requests.is_empty() {
        return refused(Step::Post, libc::ENOMEM);
    }
    for request in requests {
        state.used += 1;
        let inline = if request.flags & INLINE == 0 {
            Vec::new()
        } else {
            let mut words = vec![0; request.len as usize / 8];
            copy(
                request.local,
                words.as_mut_ptr() as u64,
                request.len as usize,
                1,
            );
            words
        };
        state.requests.push_back((*request, inline));
    }
    pair.changed.notify_all();
    Failure::NONE
}

unsafe extern "C" fn expect(queue: *mut abi::Queue, count: u32) -> Failure {
    // SAFETY: a live queue.
    lock(&unsafe { pair(queue) }.state).receives += count;
    Failure::NONE
}

unsafe extern "C" fn poll(
    queue: *mut abi::Queue,
    to: *mut Completion,
    most: u32,
    count: *mut u32,
) -> Failure {
    // SAFETY: a live queue.
    let mut state = lock(&unsafe { pair(queue) }.state);
    let got = state.completions.len().min(most as usize);
    for i in 0..got {
        let (completion, frees) = state.completions.pop_front().expect("counted");
        state.used -= frees;
        // SAFETY: the caller's array has so many places.
        unsafe { to.add(i).write(completion) };
    }
    // SAFETY: the caller's live integer.
    unsafe { count.write(got as u32) };
    Failure::NONE
}

unsafe extern "C" fn arm(queue: *mut abi::Queue) -> Failure {
    // SAFETY: a live queue.
    lock(&unsafe { pair(queue) }.state).armed = true;
    Failure::NONE
}

unsafe extern "C" fn descriptor(device: *mut abi::Device) -> i32 {
    // SAFETY: an open device.
    unsafe { &*device.cast::<Device>() }.told.as_raw_fd()
}

unsafe extern "C" fn quiet(device: *mut abi::Device, count: *mut u32) -> Failure {
    let mut bytes = [0; 64];
    // SAFETY: an open device.
    let got = unsafe { &(*device.cast::<Device>()).told }.read(&mut bytes);
    // SAFETY: the caller's live integer.
    unsafe { count.write(got.unwrap_or(0) as u32) };
    Failure::NONE
}

unsafe extern "C" fn destroy(queue: *mut abi::Queue) -> Failure {
    // SAFETY: made by `create`, and given back until that succeeds.
    let mut queue = unsafe {
        let queue = queue.cast::<Queue>();
        let Queue { pair, .. } = &*queue;
        if pair.card.keeps.load(Ordering::SeqCst) {
            return refused(Step::Destroy, libc::EBUSY);
        }
        Box::from_raw(queue)
    };
    lock(&WORLD).queues.remove(&queue.number);
    lock(&queue.pair.state).destroyed = true;
    queue.pair.changed.notify_all();
    if let Some(worker) = queue.worker.take() {
        worker.join().expect("no panic");
    }
    Failure::NONE
}

unsafe extern "C" fn devices(to: *mut [u8; NAME], most: u32, count: *mut u32) -> Failure {
    let mut name = [0; NAME];
    name[..4].copy_from_slice(b"fake");
    // SAFETY: the caller's array has so many places, and its integer is live.
    unsafe {
        if most > 0 {
            to.write(name);
        }
        count.write(1);
    }
    Failure::NONE
}

/// Copies the way a device does: eight bytes at a time, every `stride`th first. Lengths are multiples of a line, or inline.
fn copy(from: u64, to: u64, len: usize, stride: usize) {
    let words = len / 8;
    for start in 0..stride {
        for word in (start..words).step_by(stride) {
            let at = 8 * word as u64;
            // SAFETY: inside what was registered, or the caller's buffer; others may load these words meanwhile.
            unsafe {
                let value = AtomicU64::from_ptr((from + at) as *mut u64).load(Ordering::Relaxed);
                AtomicU64::from_ptr((to + at) as *mut u64).store(value, Ordering::Relaxed);
            }
        }
    }
}

impl Pair {
    fn work(&self) {
        let mut round = 0_usize;
        loop {
            let mut state = lock(&self.state);
            while state.requests.is_empty() && !state.destroyed {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if state.destroyed {
                return;
            }
            if self.card.stopped.load(Ordering::SeqCst) {
                drop(state);
                std::thread::sleep(Duration::from_micros(100));
                continue;
            }
            let (request, inline) = state.requests.pop_front().expect("there is one");
            let (failed, peer) = (state.failed, state.peer);
            drop(state);
            round += 1;
            let status = if failed {
                FLUSHED
            } else {
                self.carry(&request, &inline, peer, 1 + round % 7)
            };
            self.complete(&request, status);
        }
    }

    /// Carries a request out; its status.
    fn carry(&self, request: &Request, inline: &[u64], peer: u32, stride: usize) -> u32 {
        let (peer, memory) = {
            let world = lock(&WORLD);
            let memory = world.memories.get(&request.remote_key).cloned();
            (world.queues.get(&peer).cloned(), memory)
        };
        let Some(peer) = peer.filter(|peer| !peer.card.cut.load(Ordering::SeqCst)) else {
            return RETRY_EXCEEDED;
        };
        if self.card.cut.load(Ordering::SeqCst) || lock(&peer.state).failed {
            return RETRY_EXCEEDED;
        }
        let Some(memory) = memory else {
            peer.fail();
            return REMOTE_ACCESS;
        };
        let from = if inline.is_empty() {
            request.local
        } else {
            inline.as_ptr() as u64
        };
        let mut done = 0;
        while done < request.len as usize {
            let len = PACKET.min(request.len as usize - done);
            let span = lock(&memory);
            let to = request.remote + done as u64;
            let fits = span.is_some_and(|span| {
                span.peer_writes && to >= span.at && to + len as u64 <= span.at + span.len
            });
            if !fits {
                drop(span);
                peer.fail();
                return REMOTE_ACCESS;
            }
            copy(from + done as u64, to, len, stride);
            done += len;
        }
        if request.flags & BELL != 0 {
            let mut state = lock(&peer.state);
            if state.receives == 0 {
                return NO_RECEIVE;
            }
            state.receives -= 1;
            let rung = Completion {
                kind: RUNG,
                ..Completion::default()
            };
            state.completions.push_back((rung, 0));
            peer.tell(&mut state);
        }
        0
    }

    fn complete(&self, request: &Request, status: u32) {
        let mut state = lock(&self.state);
        state.unsignalled += 1;
        state.failed |= status != 0;
        if request.flags & SIGNALLED == 0 && status == 0 {
            return;
        }
        let frees = std::mem::take(&mut state.unsignalled);
        let completion = Completion {
            id: request.id,
            status,
            kind: WRITTEN,
            ..Completion::default()
        };
        state.completions.push_back((completion, frees));
        self.tell(&mut state);
    }

    fn fail(&self) {
        lock(&self.state).failed = true;
    }

    fn tell(&self, state: &mut State) {
        if std::mem::take(&mut state.armed) {
            // If it is full it is readable.
            let _ = (&self.tell).write(&[0]);
        }
    }
}
