//! A ring in shared memory between two sides of which either may be hostile: what one can write, the other must survive.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rdma_log::entry::{Head, Keys, encode};
use rdma_log::fdpass::{recv_with_fds, send_with_fds};
use rdma_log::transport::shm;
use rdma_log::{
    Epoch, Fenced, Lane, LaneReader, LaneWriter, Marks, RingConfig, RingReader, RingWriter, Seq,
};

use super::Target;
use super::source::Source;

pub(super) const TARGET: Target = Target {
    name: "ring",
    line: "a shared ring whose bytes, words and entries either side forges: entries that were written, or an error",
    run,
    seeds,
};

/// The smallest lanes, so that laps come soon.
const CONFIG: RingConfig = RingConfig {
    events: 4096,
    inputs: 4096,
};
const PAGE: u64 = 4096;
/// Bytes of one lane's words in either page.
const LANE_WORDS: u64 = 384;
/// Length of either message of the set-up.
const MESSAGE: usize = 48;

fn run(bytes: &[u8]) {
    let mut ring = Ring::new();
    let mut source = Source::new(bytes);
    while !source.is_over() {
        ring.step(&mut source);
    }
    ring.end();
}

/// Passes one message of the set-up on, and keeps a copy of its descriptor.
fn pass_on(from: &UnixStream, to: &UnixStream) -> File {
    let mut message = [0; MESSAGE];
    let fds: Vec<OwnedFd> = recv_with_fds(from, &mut message, 1).expect("a message");
    send_with_fds(to, &message, &[fds[0].as_fd()]).expect("room for a message");
    File::from(fds.into_iter().next().expect("its descriptor"))
}

struct Ring {
    writer: RingWriter,
    reader: RingReader,
    /// What the writer shares with the reader: a page of words, the lanes.
    log: File,
    /// What the reader shares with the writer.
    back: File,
    keys: Keys,
    proof: Option<Fenced>,
    /// Something was forged: what is read need not be what the writer wrote.
    forged: bool,
    written: [u64; 2],
    read: [u64; 2],
}

impl Ring {
    fn new() -> Self {
        let (reads, to_reader) = UnixStream::pair().expect("sockets");
        let (writes, to_writer) = UnixStream::pair().expect("sockets");
        let (log, back, writer, reader) = std::thread::scope(|scope| {
            let accepted = scope.spawn(|| shm::accept(&reads, &CONFIG).expect("a ring"));
            let log = pass_on(&to_reader, &to_writer);
            let writer = shm::connect(&writes).expect("a ring");
            let back = pass_on(&to_writer, &to_reader);
            (log, back, writer, accepted.join().expect("no panic"))
        });
        Self {
            keys: Keys::new(&reader.nonce),
            writer,
            reader,
            log,
            back,
            proof: None,
            forged: false,
            written: [0; 2],
            read: [0; 2],
        }
    }

    fn writer(&mut self, lane: Lane) -> &mut LaneWriter {
        match lane {
            Lane::Events => &mut self.writer.events,
            Lane::Inputs => &mut self.writer.inputs,
        }
    }

    fn reader(&mut self, lane: Lane) -> &mut LaneReader {
        match lane {
            Lane::Events => &mut self.reader.events,
            Lane::Inputs => &mut self.reader.inputs,
        }
    }

    fn step(&mut self, source: &mut Source<'_>) {
        let choice = source.u8();
        let lane = Lane::ALL[usize::from(choice >> 7)];
        match choice & 15 {
            0 | 1 => self.append(lane, source),
            2..=4 => self.next(lane),
            5 => self.poke(source),
            6 => self.forge(lane, source),
            7 => self.move_tail(lane, source),
            8 => self.answer(source),
            9 => {
                let _ = self.reader(lane).wait(Duration::ZERO);
                let _ = self.reader(lane).notify();
            }
            10 => {
                let room = usize::from(source.u16());
                let _ = self.writer(lane).wait_for_room(room, Duration::ZERO);
                let _ = self.writer(lane).notify();
                let _ = self.writer(lane).committed();
            }
            11 => drop(self.writer.progress.poll()),
            12 => self.acknowledge(lane, source),
            13 => self.salvageable(lane, source),
            14 => self.fence(),
            _ => self.look_at_end(lane),
        }
    }

    fn append(&mut self, lane: Lane, source: &mut Source<'_>) {
        let length = usize::from(source.u16()) % 1200;
        let fill = source.u8();
        let marks = Marks {
            epoch: Epoch(1),
            ..Marks::default()
        };
        let appended = self.writer(lane).append(&vec![fill; length], marks);
        if appended.is_ok() {
            self.written[lane.index()] += 1;
        }
        assert!(
            self.proof.is_none() || self.forged || appended.is_err(),
            "an entry was posted after the fence"
        );
    }

    fn next(&mut self, lane: Lane) {
        let (keys, most) = (self.keys, self.writer(lane).max_payload());
        let last = self.reader(lane).last();
        let outcome = match self.reader(lane).next() {
            Ok(None) => Ok(false),
            Err(error) => Err(error),
            Ok(Some(entry)) => {
                assert_eq!(entry.seq(), last.next());
                assert!(entry.payload().len() <= most);
                let (header, payload) = entry.raw().split_at(rdma_log::entry::HEADER_LEN);
                let header = header.try_into().expect("a header");
                let header = rdma_log::entry::Header::from_bytes(header);
                assert_eq!(keys.check(&header, payload), Ok(()));
                Ok(true)
            }
        };
        let index = lane.index();
        match outcome {
            Ok(found) => self.read[index] += u64::from(found),
            Err(error) => assert!(self.forged, "an honest ring is refused: {error}"),
        }
        assert!(
            self.forged || self.read[index] <= self.written[index],
            "an entry that nobody wrote"
        );
    }

    /// Any bytes anywhere in either side's memory.
    fn poke(&mut self, source: &mut Source<'_>) {
        let at = u64::from(source.u16()) % (3 * PAGE);
        let length = usize::from(source.u8());
        let _ = self.log.write_at(source.bytes(length), at);
        self.forged = true;
    }

    /// A well-sealed entry or pad, where and about what the input says.
    fn forge(&mut self, lane: Lane, source: &mut Source<'_>) {
        let at = u64::from(source.u8()) * 64 % PAGE;
        let (lap, seq) = (u32::from(source.u8()), Seq(u64::from(source.u16())));
        let choice = source.u8();
        let length = usize::from(source.u16());
        let start = PAGE * (1 + lane.index() as u64) + at;
        let bytes = if choice & 1 == 0 {
            let marks = Marks {
                epoch: Epoch(u32::from(choice)),
                committed: Seq(seq.0.saturating_sub(1 + u64::from(choice >> 4))),
                released: Seq::ZERO,
            };
            let head = Head {
                lane: if choice & 2 == 0 { lane } else { Lane::Events },
                lap,
                seq: Seq(seq.0.max(1)),
                marks,
            };
            encode(&self.keys, &head, &vec![choice; length % 4096])
        } else {
            let length = if choice & 2 == 0 {
                (PAGE - at) as u32 - 32
            } else {
                length as u32
            };
            self.keys.pad(lane, lap, seq, length).to_bytes().to_vec()
        };
        let most = (PAGE - at) as usize;
        let _ = self.log.write_at(&bytes[..bytes.len().min(most)], start);
        self.forged = true;
    }

    /// A lane's tail, or its open slot.
    fn move_tail(&mut self, lane: Lane, source: &mut Source<'_>) {
        let word = [0, 128, 136, 256][usize::from(source.u8() & 3)];
        let value = match source.u8() & 3 {
            0 => u64::from(source.u8()) * 64,
            1 => u64::from(source.u16()),
            2 => source.u64() | 1 << 63,
            _ => source.u64(),
        };
        let at = LANE_WORDS * lane.index() as u64 + word;
        let _ = self.log.write_at(&value.to_le_bytes(), at);
        self.forged = true;
    }

    /// Any word of what the reader returns.
    fn answer(&mut self, source: &mut Source<'_>) {
        let at = u64::from(source.u8()) * 8 % (2 * LANE_WORDS);
        let value = if source.u8() & 1 == 0 {
            u64::from(source.u16())
        } else {
            source.u64()
        };
        let _ = self.back.write_at(&value.to_le_bytes(), at);
        self.forged = true;
    }

    fn acknowledge(&mut self, lane: Lane, source: &mut Source<'_>) {
        let seq = Seq(u64::from(source.u8()));
        let ahead = seq > self.reader(lane).last();
        assert_eq!(self.reader(lane).set_received(seq).is_err(), ahead);
        assert_eq!(self.reader(lane).set_replayed(seq).is_err(), ahead);
    }

    /// A slot that is reserved and never published, as by a writer that dies.
    fn salvageable(&mut self, lane: Lane, source: &mut Source<'_>) {
        let length = usize::from(source.u16()) % 1200;
        if let Ok(slot) = self.writer(lane).reserve_for_salvage(length, length)
            && source.u8() & 1 == 0
        {
            std::mem::forget(slot);
        }
    }

    fn fence(&mut self) {
        if self.proof.is_none() {
            self.proof = Some(self.reader.fencer.fence().expect("a first fence"));
        } else {
            assert!(self.reader.fencer.fence().is_err());
        }
    }

    fn look_at_end(&mut self, lane: Lane) {
        let Some(proof) = self.proof.take() else {
            return;
        };
        let most = self.writer(lane).max_payload();
        let _ = self.reader(lane).at_end(&proof);
        if let Ok(Some(slot)) = self.reader(lane).salvage(&proof) {
            assert!(slot.len() <= most);
        }
        self.proof = Some(proof);
    }

    /// What an heir does: fence, drain, salvage. It ends, whatever the ring holds.
    fn end(mut self) {
        if self.proof.is_none() {
            self.fence();
        }
        for lane in Lane::ALL {
            // An entry takes a line at least.
            for _ in 0..=CONFIG.events / 64 {
                match self.reader(lane).next() {
                    Ok(Some(_)) => self.read[lane.index()] += 1,
                    Ok(None) | Err(_) => break,
                }
            }
            self.look_at_end(lane);
            assert!(
                self.forged || self.read[lane.index()] == self.written[lane.index()],
                "an entry of the {lane} lane was lost"
            );
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let append = [0u8, 40, 0, 7];
    let (inputs, next) = (0x80u8, 2u8);
    let mut honest = Vec::new();
    for _ in 0..150 {
        honest.extend(append);
        honest.extend([inputs, 200, 3, 9]);
        honest.extend([next, next | inputs, 12, 1, 11, 9, 10, 0, 1]);
    }
    let mut dead = honest[..300].to_vec();
    dead.extend([13 | inputs, 100, 0, 0, 14, 15, 15 | inputs, 0]);
    // A pad, an entry behind it, and a tail that covers both; then bytes over them, and mad answers.
    let mut forged = vec![6, 0, 0, 1, 0, 1, 0, 0, 7, 0, 0, 64, next];
    forged.extend([6, 0, 0, 1, 0, 0, 40, 0, 7, 0, 0, 2, next]);
    forged.extend([5, 0, 16, 4, 1, 2, 3, 4, next, next | inputs]);
    forged.extend([8, 0, 0, 0, 9, 8, 16, 1, 255, 255, 255, 255, 0, 0, 0, 0]);
    forged.extend(append);
    forged.extend([7, 1, 0, 1, 7, 2, 1, 255, 255, 14, 15, 11]);
    vec![honest, dead, forged]
}
