//! The ring over verbs: a card that exists in this process only, or, where `DOPPEL_VERBS` names the library, the machine's own.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64 as Count, Ordering::SeqCst};
use std::thread;
use std::time::Instant;

use super::*;
use crate::entry::{Marks, Seq};
use crate::fence::FenceError;
use crate::lane::WriteError;
use crate::ring::RingWriter;
use crate::transport::suite::{LONG, SMALL, await_committed, payload, publish, read, read_until};
use crate::verbs::fake;

/// Whether the machine's own device carries the ring.
fn real() -> bool {
    std::env::var_os("DOPPEL_VERBS").is_some()
}

fn verbs() -> Verbs {
    if real() {
        Verbs::load().unwrap()
    } else {
        fake::verbs()
    }
}

/// Of the suite's counts: a soft-RoCE under emulation is a thousand times slower.
fn part() -> f64 {
    if real() { 0.05 } else { 1.0 }
}

/// A name for a fake device that no other test has.
fn name(side: &str) -> String {
    static NAMES: Count = Count::new(0);
    format!("fake-{side}-{}", NAMES.fetch_add(1, SeqCst))
}

fn config(mode: Mode, device: Option<&str>) -> Config {
    let device = device.filter(|_| !real()).map(str::to_owned);
    Config {
        choice: Choice {
            device,
            ..Choice::default()
        },
        mode,
    }
}

fn streams() -> (UnixStream, UnixStream) {
    let (writer, reader) = UnixStream::pair().unwrap();
    for stream in [&writer, &reader] {
        stream.set_read_timeout(Some(LONG)).unwrap();
    }
    (writer, reader)
}

/// Both sides, over devices of these names.
fn over(
    ring: RingConfig,
    mode: Mode,
    [writer, reader]: [&str; 2],
) -> (RingWriter, RingReader, Link) {
    let (mut there, mut here) = streams();
    let (writer, reader) = (config(mode, Some(writer)), config(mode, Some(reader)));
    thread::scope(|scope| {
        let accepting =
            scope.spawn(move || accept(&verbs(), &mut here, &ring, &reader, Duration::ZERO));
        let writer = connect(&verbs(), &mut there, &writer).unwrap();
        let (reader, link) = accepting.join().unwrap().unwrap();
        (writer, reader, link)
    })
}

fn pair(mode: Mode) -> impl Fn(RingConfig) -> (RingWriter, RingReader) {
    move |ring| {
        let (writer, reader, _) = over(ring, mode, [&name("writer"), &name("reader")]);
        (writer, reader)
    }
}

mod nic {
    use super::*;
    ring_suite!(pair(Mode::Nic), part());
}

mod ack {
    use super::*;
    ring_suite!(pair(Mode::Ack), part());
}
