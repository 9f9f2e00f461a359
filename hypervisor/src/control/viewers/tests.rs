use std::sync::Arc;

use super::*;
use crate::backends::wait::Wake;
use crate::spool::SIZE;

/// A console, its viewers, and the time as the test has it.
struct Host {
    viewers: Viewers,
    spool: Spool,
    stage: Stage,
    now: Instant,
}

impl Host {
    fn new() -> Self {
        Self {
            viewers: Viewers::default(),
            spool: Spool::new().unwrap(),
            stage: Stage::new(Arc::new(Wake::new().unwrap())),
            now: Instant::now(),
        }
    }

    fn connect(&mut self, hello: &[u8], at: u64) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        self.viewers.admit(ours, hello.to_vec(), at, Vec::new());
        theirs
    }

    /// One round, so much later.
    fn round(&mut self, later: Duration) {
        self.now += later;
        let mut waiter = Waiter::new();
        self.viewers
            .wait(&mut waiter, &self.spool, Some(&self.stage), self.now);
        waiter.wait(Some(Duration::ZERO)).unwrap();
        self.viewers
            .turn(&waiter, &self.spool, Some(&self.stage), self.now);
    }

    fn typed(&self) -> Vec<u8> {
        std::iter::from_fn(|| self.stage.typed()).collect()
    }
}

fn read(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    bytes
}

#[test]
fn everybody_sees_all_from_where_it_asked_and_everybody_types() {
    let mut host = Host::new();
    host.spool.feed(b"before ");
    let mut one = host.connect(b"hello\n", 0);
    let mut other = host.connect(b"", 7);
    host.spool.feed(b"after");
    host.round(PACE);
    assert_eq!(read(&mut one), b"hello\nbefore after");
    assert_eq!(read(&mut other), b"after");
    one.write_all(b"a").unwrap();
    host.round(PACE);
    other.write_all(b"b").unwrap();
    host.round(PACE);
    assert_eq!(host.typed(), b"ab");
    drop(one);
    host.round(PACE);
    assert_eq!(host.viewers.list.len(), 1);
}

#[test]
fn a_paste_is_taken_as_the_guest_takes_it_and_none_of_it_is_lost() {
    let mut host = Host::new();
    let mut viewer = host.connect(b"", 0);
    let paste: Vec<u8> = (0..3000_u32).map(|at| (at % 251) as u8).collect();
    viewer.write_all(&paste).unwrap();
    drop(viewer);
    let mut typed = Vec::new();
    for _ in 0..100 {
        host.round(ROOM);
        typed.extend(std::iter::from_fn(|| host.stage.typed()).take(64));
    }
    assert_eq!(typed, paste);
}

#[test]
fn one_that_does_not_read_is_dropped_and_holds_nothing_up() {
    let mut host = Host::new();
    let _deaf = host.connect(b"", 0);
    let mut other = host.connect(b"", 0);
    let mut seen = 0;
    // Less than would overwrite what it has not read.
    while host.viewers.list.len() == 2 && seen < 64 << 20 {
        host.spool.feed(&[b'x'; SIZE / 8]);
        host.round(PACE);
        seen += read(&mut other).len();
    }
    assert_eq!(host.viewers.list.len(), 1, "it was overtaken");
    host.round(PACE);
    seen += read(&mut other).len();
    assert_eq!(seen as u64, host.spool.head());
}

#[test]
fn one_that_takes_nothing_of_little_is_dropped_in_time() {
    let mut host = Host::new();
    let deaf = host.connect(b"", 0);
    // The socket's buffer is full, and the guest falls silent.
    for _ in 0..2000 {
        host.spool.feed(&[b'x'; 512]);
        host.round(PACE);
        if host.viewers.list[0].stuck.is_some() {
            break;
        }
    }
    assert_eq!(host.viewers.list.len(), 1);
    host.round(PATIENCE / 2);
    assert_eq!(host.viewers.list.len(), 1);
    host.round(PATIENCE);
    assert!(host.viewers.list.is_empty());
    drop(deaf);
}

#[test]
fn one_that_reads_nothing_because_there_is_nothing_stays() {
    let mut host = Host::new();
    let _viewer = host.connect(b"", 0);
    for _ in 0..10 {
        host.round(PATIENCE);
    }
    assert_eq!(host.viewers.list.len(), 1);
}

#[test]
fn what_was_let_out_before_the_end_is_still_shown() {
    let mut host = Host::new();
    let mut viewer = host.connect(b"hello\n", 0);
    host.spool.feed(&[b'x'; 40_000]);
    host.viewers.last_words(&host.spool, host.now);
    assert_eq!(read(&mut viewer).len(), 6 + 40_000);
}
