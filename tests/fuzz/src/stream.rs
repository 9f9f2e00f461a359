//! A ring over TCP with a hostile peer: frames to a backup's landing thread, answers to a primary.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use rdma_log::entry::{Head, Keys, encode};
use rdma_log::transport::tcp;
use rdma_log::{Epoch, Lane, Marks, Nonce, RingConfig, Seq};

use super::Target;
use super::source::Source;

pub(super) const TARGET: Target = Target {
    name: "stream",
    line: "frames to a backup and answers to a primary, sealed or not: entries that were sent, or a refusal",
    run,
    seeds,
};

const CONFIG: RingConfig = RingConfig {
    events: 4096,
    inputs: 4096,
};
const MESSAGE: usize = 48;
const HEADER: usize = 48;
const ANSWER: usize = 72;

thread_local! {
    static LISTENER: TcpListener = TcpListener::bind("127.0.0.1:0").expect("a port of the loopback");
}

/// Two ends of a connection; `None` when the kernel has no port left, which is no matter of ours.
fn pair() -> Option<(TcpStream, TcpStream)> {
    LISTENER.with(|listener| {
        let ours = TcpStream::connect(listener.local_addr().ok()?).ok()?;
        ours.set_nodelay(true).ok()?;
        let (theirs, _) = listener.accept().ok()?;
        for stream in [&ours, &theirs] {
            stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        }
        Some((ours, theirs))
    })
}

fn run(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let Some((ours, theirs)) = pair() else {
        return;
    };
    if source.u8() & 1 == 0 {
        to_backup(ours, theirs, source);
    } else {
        to_primary(ours, theirs, source);
    }
}

/// The message of the set-up, with what the input wants to be wrong about it.
fn set_up(source: &mut Source<'_>, good: &[u8; MESSAGE]) -> [u8; MESSAGE] {
    let mut message = *good;
    let (at, change) = (source.u8(), source.u8());
    if let Some(byte) = message.get_mut(usize::from(at)) {
        *byte ^= change;
    }
    message
}

fn seal(bytes: &mut [u8], at: usize, piece: &[u8]) {
    bytes[at..at + 4].fill(0);
    let crc = crc32c::crc32c_append(crc32c::crc32c(piece), bytes);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// A hostile primary: the backup's landing thread reads what the input says.
fn to_backup(mut ours: TcpStream, theirs: TcpStream, mut source: Source<'_>) {
    let (accepted, nonce) = std::thread::scope(|scope| {
        let accepted = scope.spawn(|| tcp::accept(theirs, &CONFIG, Duration::ZERO));
        let mut offer = [0; MESSAGE];
        ours.read_exact(&mut offer).expect("an offer");
        let mut good = offer;
        good[7] = b't';
        let _ = ours.write_all(&set_up(&mut source, &good));
        let mut nonce = [0; 16];
        nonce.copy_from_slice(&offer[16..32]);
        (accepted.join().expect("no panic"), nonce)
    });
    let Ok((mut reader, link)) = accepted else {
        return;
    };
    let mut peer = Peer {
        nonce,
        keys: Keys::new(&Nonce(nonce)),
        from: [0; 2],
        seq: [0; 2],
    };
    while !source.is_over() {
        let frame = peer.frame(&mut source);
        if ours.write_all(&frame).is_err() {
            break;
        }
    }
    let _ = ours.shutdown(Shutdown::Write);
    // The landing thread ends by what it read; the fence waits for that.
    let proof = reader.fencer.fence().expect("a first fence");
    for lane in [&mut reader.events, &mut reader.inputs] {
        for _ in 0..=CONFIG.events / 64 {
            match lane.next() {
                Ok(Some(entry)) => assert!(entry.payload().len() <= CONFIG.events / 4),
                Ok(None) | Err(_) => break,
            }
        }
        let _ = lane.at_end(&proof);
        let _ = lane.salvage(&proof);
    }
    if let Some(error) = link.broken() {
        assert!(!error.to_string().is_empty());
    }
}

struct Peer {
    nonce: [u8; 16],
    keys: Keys,
    from: [u64; 2],
    seq: [u64; 2],
}

impl Peer {
    /// One frame: entries of the lane in their order, a lie about one field if the choice says so, or plain bytes.
    fn frame(&mut self, source: &mut Source<'_>) -> Vec<u8> {
        let choice = source.u8();
        if choice & 31 == 31 {
            let length = usize::from(source.u8());
            return source.bytes(length).to_vec();
        }
        let lane = Lane::ALL[usize::from(choice >> 7)];
        let index = lane.index();
        let length = usize::from(source.u16()) % 1100;
        let (lap, to_end) = (self.from[index] / 4096, 4096 - self.from[index] % 4096);
        let head = Head {
            lane,
            lap: lap as u32,
            seq: Seq(self.seq[index] + 1),
            marks: Marks {
                epoch: Epoch(1),
                ..Marks::default()
            },
        };
        let mut piece = encode(&self.keys, &head, &vec![choice; length]);
        piece.resize(piece.len().next_multiple_of(64), 0);
        if piece.len() as u64 > to_end && choice & 16 == 0 {
            // A pad fills the lap.
            let pad = self.keys.pad(lane, head.lap, head.seq, to_end as u32 - 32);
            let mut padded = pad.to_bytes().to_vec();
            padded.resize(to_end as usize, 0);
            let again = Head {
                lap: head.lap + 1,
                ..head
            };
            padded.extend(encode(&self.keys, &again, &vec![choice; length]));
            padded.resize(padded.len().next_multiple_of(64), 0);
            piece = padded;
        }
        let mut header = [0; HEADER];
        header[..16].copy_from_slice(&self.nonce);
        header[16..24].copy_from_slice(&self.from[index].to_le_bytes());
        header[24..32].copy_from_slice(&head.seq.0.to_le_bytes());
        header[32..36].copy_from_slice(&(piece.len() as u32).to_le_bytes());
        header[40] = lane as u8;
        // A word of the header, or a byte of the piece.
        match choice & 7 {
            5 => {
                let at = usize::from(source.u8()) % (HEADER - 8);
                let value: [u8; 8] = source.array();
                header[at..at + 8].copy_from_slice(&value);
            }
            6 => {
                let at = usize::from(source.u16()) % piece.len();
                piece[at] ^= source.u8();
            }
            _ => {}
        }
        if choice & 8 == 0 {
            seal(&mut header, 36, &piece);
        }
        self.from[index] += piece.len() as u64;
        self.seq[index] += 1;
        let mut frame = header.to_vec();
        frame.extend(piece);
        if choice & 7 == 7 {
            frame.truncate(usize::from(source.u16()));
        }
        frame
    }
}

/// A hostile backup: offers a ring of any size, and answers what it likes.
fn to_primary(mut ours: TcpStream, theirs: TcpStream, mut source: Source<'_>) {
    let nonce: [u8; 16] = [9; 16];
    let mut good = [0; MESSAGE];
    good[..8].copy_from_slice(b"rdmalogT");
    good[8] = 1;
    good[16..32].copy_from_slice(&nonce);
    good[32..40].copy_from_slice(&4096u64.to_le_bytes());
    good[40..48].copy_from_slice(&4096u64.to_le_bytes());
    let _ = ours.write_all(&set_up(&mut source, &good));
    let Ok((mut writer, watch)) = tcp::connect_watched(theirs) else {
        return;
    };
    let mut posted = [0; 2];
    let mut buffer = [0; 1 << 14];
    let _ = ours.set_nonblocking(true);
    while !source.is_over() {
        let choice = source.u8();
        let lane = usize::from(choice >> 7);
        match choice & 7 {
            0..=2 => {
                let length = usize::from(source.u16()) % 1100;
                let lane_writer = [&mut writer.events, &mut writer.inputs];
                let [events, inputs] = lane_writer;
                let of = if lane == 0 { events } else { inputs };
                let marks = Marks {
                    epoch: Epoch(1),
                    ..Marks::default()
                };
                posted[lane] += u64::from(of.append(&vec![1; length], marks).is_ok());
                let _ = of.notify();
                let _ = of.wait_for_room(length, Duration::ZERO);
            }
            3 => {
                let length = usize::from(source.u8());
                let _ = ours.write(source.bytes(length));
            }
            4 => {
                let _ = ours.read(&mut buffer);
            }
            _ => {
                let mut answer = [0; ANSWER];
                answer[..16].copy_from_slice(&nonce);
                answer[16] = u8::from(choice & 64 != 0);
                for word in answer[24..].chunks_exact_mut(8) {
                    let value = if choice & 32 == 0 {
                        u64::from(source.u8()) * if choice & 16 == 0 { 1 } else { 64 }
                    } else {
                        source.u64()
                    };
                    word.copy_from_slice(&value.to_le_bytes());
                }
                if choice & 8 == 0 {
                    seal(&mut answer, 20, &[]);
                }
                let _ = ours.write(&answer);
            }
        }
        let turned = watch.turn();
        let committed = watch.committed();
        // What a peer that has nothing says must not open a gate for what was not posted.
        if let Ok([events, inputs]) = writer.progress.poll() {
            assert!(events.committed.0 <= posted[0] && inputs.committed.0 <= posted[1]);
        }
        assert!(
            committed[0].0 <= posted[0] && committed[1].0 <= posted[1],
            "committed {committed:?} of {posted:?} posted"
        );
        if turned.is_err() {
            break;
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let nothing_wrong = [255, 0];
    let mut honest = vec![0];
    honest.extend(nothing_wrong);
    for _ in 0..60 {
        honest.extend([0, 100, 0, 0x80, 200, 3]);
    }
    let mut lies = vec![0];
    lies.extend(nothing_wrong);
    for (choice, more) in [
        (5u8, vec![16, 1, 0, 0, 0, 0, 0, 0, 0]),
        (6, vec![9, 0, 1]),
        (7, vec![60, 0]),
        (31, vec![4, 1, 2, 3, 4]),
    ] {
        let mut lie = lies[..3].to_vec();
        lie.extend([0, 100, 0, choice, 100, 0]);
        lie.extend(more);
        lies.extend(&lie[3..]);
    }
    let mut answers = vec![1];
    answers.extend(nothing_wrong);
    for n in 1..20u8 {
        answers.extend([0, 40, 0, 4]);
        answers.extend([5 | 16, n, 0, 0, 0, 0, 0]);
    }
    answers.extend([5, 255, 255, 255, 0, 0, 0]);
    vec![honest, lies, answers]
}
