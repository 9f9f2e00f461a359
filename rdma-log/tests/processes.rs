//! Two real processes: this program starts itself as the writer, and kills or freezes it.
//!
//! It has its own `main`: with arguments `--writer MODE SOCKET` it is the writer, else it runs every test. In mode `tcp` only
//! what the tests say to each other goes over that socket; the ring's port follows.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command};
use std::thread;
use std::time::Duration;

use rdma_log::transport::rdma::{self, Mode};
use rdma_log::transport::{shm, tcp};
use rdma_log::verbs::Verbs;
use rdma_log::{LaneReader, LaneWriter, Marks, RingConfig, RingReader, RingWriter, WriteError};

/// Small lanes, which wrap and fill.
const SMALL: RingConfig = RingConfig {
    events: 16 << 10,
    inputs: 64 << 10,
};
/// The largest frame of these tests, in bytes.
const FRAME: usize = 1600;
/// Far longer than anything here takes.
const LONG: Duration = Duration::from_secs(20);

/// A frame that is its number, and bytes that follow from it, none of them zero.
fn frame(seq: u64) -> Vec<u8> {
    let len = 8 + (seq as usize * 37) % (FRAME - 8);
    let mut bytes = (0..len)
        .map(|i| ((seq as usize).wrapping_mul(7).wrapping_add(i) % 255) as u8 + 1)
        .collect::<Vec<_>>();
    bytes[..8].copy_from_slice(&(seq | 0x0101_0101_0101_0101 << 24).to_le_bytes());
    bytes
}

// ---------------------------------------------------------------------------------------------- the writer

/// Publishes frames until fenced.
fn hammer(half: &mut LaneWriter, mut published: impl FnMut(u64)) {
    loop {
        let bytes = frame(half.last().next().0);
        match half.wait_for_room(FRAME, LONG) {
            Err(WriteError::Fenced) => return,
            waited => {
                if !waited.expect("a connection") {
                    continue;
                }
            }
        }
        let mut slot = half.reserve_for_salvage(FRAME, FRAME).expect("room");
        slot.payload()[..bytes.len()].copy_from_slice(&bytes);
        match slot.publish(bytes.len(), Marks::default()) {
            Ok(seq) => published(seq.0),
            Err(WriteError::Fenced) => return,
            Err(error) => panic!("{error}"),
        }
        half.notify().expect("a connection");
    }
}

fn tell(mut stream: &UnixStream, numbers: [u64; 2]) {
    let bytes = numbers.map(u64::to_le_bytes).concat();
    stream.write_all(&bytes).expect("the parent listens");
}

/// Publishes frames over TCP until the connection ends; tells what has committed.
fn be_tcp_writer(socket: &str, port: &str) {
    let stream = UnixStream::connect(socket).expect("the parent listens");
    let port = port.parse::<u16>().expect("a port");
    let ring = TcpStream::connect(("127.0.0.1", port)).expect("the parent listens");
    ring.set_read_timeout(Some(LONG)).expect("a socket");
    be_network_writer(tcp::connect(ring).expect("a ring"), stream);
}

/// The same over RDMA; the set-up goes over the socket that the words go over afterwards.
fn be_rdma_writer(socket: &str, mode: &str) {
    let mut stream = UnixStream::connect(socket).expect("the parent listens");
    stream.set_read_timeout(Some(LONG)).expect("a socket");
    let config = rdma_config(mode);
    let verbs = Verbs::load().expect("the library");
    let writer = rdma::connect(&verbs, &mut stream, &config).expect("a ring");
    be_network_writer(writer, stream);
}

fn rdma_config(mode: &str) -> rdma::Config {
    rdma::Config {
        mode: match mode {
            "nic" => Mode::Nic,
            _ => Mode::Ack,
        },
        ..rdma::Config::default()
    }
}

fn be_network_writer(mut writer: RingWriter, stream: UnixStream) {
    let mut events = writer.events;
    let other = thread::spawn(move || {
        let ended = hammer_network(&mut events, |_| {});
        (events, ended)
    });
    let ended = hammer_network(&mut writer.inputs, |committed| {
        tell(&stream, [0, committed])
    });
    let (mut events, other) = other.join().expect("no panic");
    for ended in [ended, other] {
        assert!(
            matches!(ended, WriteError::Fenced | WriteError::Closed),
            "{ended}"
        );
    }
    let committed = |lane: &mut LaneWriter| lane.committed().unwrap_or_default().0;
    tell(
        &stream,
        [committed(&mut events), committed(&mut writer.inputs)],
    );
}

fn hammer_network(half: &mut LaneWriter, mut committed: impl FnMut(u64)) -> WriteError {
    loop {
        let bytes = frame(half.last().next().0);
        let published = half
            .wait_for_room(FRAME, LONG)
            .and_then(|room| match room {
                true => half.append(&bytes, Marks::default()).map(|seq| seq.0),
                false => Ok(0),
            })
            .and_then(|seq| half.notify().map(|()| seq));
        match published {
            Ok(seq) if seq % 16 == 1 => {
                if let Ok(seq) = half.committed() {
                    committed(seq.0);
                }
            }
            Ok(_) => {}
            Err(ended) => return ended,
        }
    }
}

fn be_writer(mode: &str, socket: &str) {
    let stream = UnixStream::connect(socket).expect("the parent listens");
    stream.set_read_timeout(Some(LONG)).expect("a socket");
    let mut writer = shm::connect(&stream).expect("a ring");
    match mode {
        "hammer" => {
            let mut events = writer.events;
            let other = thread::spawn(move || {
                hammer(&mut events, |_| {});
                events
            });
            // Says what it published only after publishing returned; the parent holds it to that.
            hammer(&mut writer.inputs, |seq| {
                if seq % 16 == 0 {
                    tell(&stream, [0, seq]);
                }
            });
            let events = other.join().expect("no panic");
            tell(&stream, [events.last().0, writer.inputs.last().0]);
        }
        "fill" => {
            let bytes = frame(1);
            let mut slot = writer
                .inputs
                .reserve_for_salvage(FRAME, FRAME)
                .expect("room");
            slot.payload()[..bytes.len()].copy_from_slice(&bytes);
            tell(&stream, [0, 0]);
            loop {
                thread::park();
            }
        }
        other => panic!("no mode {other}"),
    }
}

// ---------------------------------------------------------------------------------------------- the reader

/// The other process; killed if a test fails before it does so itself.
struct Writer {
    child: Child,
    stream: UnixStream,
}

impl Writer {
    fn start(mode: &str, config: &RingConfig) -> (Writer, RingReader) {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("ring");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--writer", mode])
            .arg(&socket)
            .spawn()
            .expect("a process");
        let (stream, _) = listener.accept().expect("the child connects");
        stream.set_read_timeout(Some(LONG)).expect("a socket");
        let reader = shm::accept(&stream, config).expect("a ring");
        (Writer { child, stream }, reader)
    }

    fn start_tcp(config: &RingConfig) -> (Writer, RingReader) {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("words");
        let words = UnixListener::bind(&socket).expect("a socket");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
        let port = listener.local_addr().expect("an address").port();
        let child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--writer", "tcp"])
            .arg(&socket)
            .arg(port.to_string())
            .spawn()
            .expect("a process");
        let (stream, _) = words.accept().expect("the child connects");
        stream.set_read_timeout(Some(LONG)).expect("a socket");
        let (ring, _) = listener.accept().expect("the child connects");
        ring.set_read_timeout(Some(LONG)).expect("a socket");
        let (reader, _) = tcp::accept(ring, config, Duration::ZERO).expect("a ring");
        (Writer { child, stream }, reader)
    }

    fn start_rdma(mode: &str, config: &RingConfig) -> (Writer, RingReader) {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("words");
        let words = UnixListener::bind(&socket).expect("a socket");
        let child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--writer", "rdma"])
            .arg(&socket)
            .arg(mode)
            .spawn()
            .expect("a process");
        let (mut stream, _) = words.accept().expect("the child connects");
        stream.set_read_timeout(Some(LONG)).expect("a socket");
        let verbs = Verbs::load().expect("the library");
        let rdma = rdma_config(mode);
        let made = rdma::accept(&verbs, &mut stream, config, &rdma, Duration::ZERO);
        let (reader, _) = made.expect("a ring");
        (Writer { child, stream }, reader)
    }

    fn kill(&mut self) {
        self.child.kill().expect("a process");
        self.child.wait().expect("a process");
    }

    fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.child.id()).expect("a process id");
        // SAFETY: the call takes numbers; the child was not waited for, so the number is still its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Returns when the process has stopped.
    fn freeze(&self) {
        self.signal(libc::SIGSTOP);
        let pid = i32::try_from(self.child.id()).expect("a process id");
        let mut status = 0;
        // SAFETY: the status is a live integer. The process is stopped, not dead, so it is not reaped here.
        let got = unsafe { libc::waitpid(pid, &raw mut status, libc::WUNTRACED) };
        assert!(got == pid && libc::WIFSTOPPED(status));
    }

    /// The next two numbers that it told, if it got so far.
    fn told(&mut self) -> Option<[u64; 2]> {
        let mut bytes = [0; 16];
        self.stream.read_exact(&mut bytes).ok()?;
        let (a, b) = bytes.split_at(8);
        Some([a, b].map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes"))))
    }

    /// The last two numbers that it told.
    fn last_told(&mut self) -> Option<[u64; 2]> {
        let mut last = None;
        while let Some(told) = self.told() {
            last = Some(told);
        }
        last
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Fails if it is dead already, as it should be.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads up to `most` entries, or to the end; each is whole and the next one.
fn read(half: &mut LaneReader, most: u64) {
    for _ in 0..most {
        let Some(entry) = half.next().expect("whole entries") else {
            return;
        };
        assert_eq!(entry.payload(), frame(entry.seq().0));
    }
}

/// Reads both lanes until `most` entries of inputs have come, sleeping when there are none.
fn read_for(reader: &mut RingReader, most: u64) {
    while reader.inputs.last().0 < most {
        read(&mut reader.events, 20);
        read(&mut reader.inputs, 20);
        reader.events.notify().expect("connected");
        reader.inputs.notify().expect("connected");
        let waited = reader.inputs.wait(LONG).expect("connected");
        assert!(waited, "a wake-up was lost");
    }
}

fn a_killed_writer_leaves_all_it_had_published() {
    let mut salvaged = 0;
    // About one lane in eight dies with a slot open, so forty rounds nearly always show some; go on until they do.
    for round in 0.. {
        if round >= 40 && salvaged > 0 {
            break;
        }
        assert!(round < 400, "no slot was open when its writer died");
        // Lanes so large that the writer has not filled them, and waits, by the time the signal gets to it.
        let (mut writer, mut reader) = Writer::start("hammer", &RingConfig::default());
        read_for(&mut reader, 50 + round % 40 * 13);
        writer.kill();
        let proof = reader.fencer.fence().expect("the first time");
        for half in [&mut reader.events, &mut reader.inputs] {
            read(half, u64::MAX);
            assert_eq!(half.at_end(&proof), Ok(true));
            let Some(bytes) = half.salvage(&proof).expect("drained") else {
                continue;
            };
            // Killed while filling: every byte is either there or not yet.
            let whole = frame(half.last().next().0);
            assert_eq!(bytes.len(), FRAME);
            for (i, byte) in bytes.iter().enumerate() {
                assert!(*byte == 0 || whole.get(i) == Some(byte), "byte {i}");
            }
            salvaged += 1;
        }
        if let Some([_, published]) = writer.last_told() {
            assert!(published <= reader.inputs.last().0);
        }
    }
}

fn a_frame_that_the_kernel_had_delivered_is_salvaged() {
    let (mut writer, mut reader) = Writer::start("fill", &SMALL);
    writer.told().expect("it filled the slot");
    writer.kill();
    let proof = reader.fencer.fence().expect("the first time");
    let bytes = reader
        .inputs
        .salvage(&proof)
        .expect("drained")
        .expect("an open slot");
    let whole = frame(1);
    assert_eq!(bytes[..whole.len()], whole);
    assert!(bytes.len() == FRAME && bytes[whole.len()..].iter().all(|b| *b == 0));
}

fn a_frozen_writer_that_thaws_after_the_fence_has_committed_what_was_drained() {
    for round in 0..20 {
        let (mut writer, mut reader) = Writer::start("hammer", &SMALL);
        read_for(&mut reader, 30 + round * 7);
        writer.freeze();
        let proof = reader.fencer.fence().expect("the first time");
        for half in [&mut reader.events, &mut reader.inputs] {
            read(half, u64::MAX);
            assert_eq!(half.at_end(&proof), Ok(true));
        }
        writer.signal(libc::SIGCONT);
        let last = writer.last_told().expect("it ends by itself");
        for (published, half) in last.into_iter().zip([&reader.events, &reader.inputs]) {
            // Frozen between an entry's last byte and its commit: a quick reader has taken it, and it met the fence.
            assert!((published..=published + 1).contains(&half.last().0));
        }
        assert!(writer.child.wait().expect("a process").success());
        assert_eq!(reader.events.at_end(&proof), Ok(true));
    }
}

/// Killed or frozen in the middle, over a network: what it saw commit is drained, and a thawed one commits nothing more.
fn leaves_what_it_saw_commit(rounds: u64, start: impl Fn(&RingConfig) -> (Writer, RingReader)) {
    for round in 0..rounds {
        let config = match round % 2 {
            0 => SMALL,
            _ => RingConfig::default(),
        };
        let (mut writer, mut reader) = start(&config);
        read_for(&mut reader, 30 + round * 7);
        let freezes = round % 4 >= 2;
        if freezes {
            writer.freeze();
        } else {
            writer.kill();
        }
        let proof = reader.fencer.fence().expect("the first time");
        for half in [&mut reader.events, &mut reader.inputs] {
            read(half, u64::MAX);
            assert_eq!(half.at_end(&proof), Ok(true));
            assert_eq!(half.salvage(&proof), Ok(None));
        }
        if freezes {
            writer.signal(libc::SIGCONT);
        }
        let last = writer.last_told();
        assert!(
            last.is_some() || !freezes,
            "a thawed writer ends by itself and says so"
        );
        if let Some([events, inputs]) = last {
            assert!(events <= reader.events.last().0 && inputs <= reader.inputs.last().0);
        }
        if freezes {
            assert!(writer.child.wait().expect("a process").success());
        }
        assert_eq!(reader.inputs.at_end(&proof), Ok(true));
    }
}

fn a_tcp_writer_leaves_what_it_saw_commit() {
    leaves_what_it_saw_commit(40, Writer::start_tcp);
}

/// On a machine with an RDMA device, whose library DOPPEL_VERBS names: the lab's hosts are.
fn an_rdma_writer_leaves_what_it_saw_commit() {
    if std::env::var_os("DOPPEL_VERBS").is_none() {
        println!("no RDMA device here: DOPPEL_VERBS is not set");
        return;
    }
    for mode in ["nic", "ack"] {
        leaves_what_it_saw_commit(20, |config| Writer::start_rdma(mode, config));
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let [_, flag, mode, socket, port] = &args[..]
        && flag == "--writer"
    {
        return match &**mode {
            "tcp" => be_tcp_writer(socket, port),
            _ => be_rdma_writer(socket, port),
        };
    }
    if let [_, flag, mode, socket] = &args[..]
        && flag == "--writer"
    {
        return be_writer(mode, socket);
    }
    let tests: [(&str, fn()); 5] = [
        (
            "a_killed_writer_leaves_all_it_had_published",
            a_killed_writer_leaves_all_it_had_published,
        ),
        (
            "a_frame_that_the_kernel_had_delivered_is_salvaged",
            a_frame_that_the_kernel_had_delivered_is_salvaged,
        ),
        (
            "a_frozen_writer_that_thaws_after_the_fence_has_committed_what_was_drained",
            a_frozen_writer_that_thaws_after_the_fence_has_committed_what_was_drained,
        ),
        (
            "a_tcp_writer_leaves_what_it_saw_commit",
            a_tcp_writer_leaves_what_it_saw_commit,
        ),
        (
            "an_rdma_writer_leaves_what_it_saw_commit",
            an_rdma_writer_leaves_what_it_saw_commit,
        ),
    ];
    // As with other tests: a part of a name runs those that have it.
    let wanted = args.get(1).filter(|wanted| !wanted.starts_with('-'));
    for (name, test) in tests {
        if wanted.is_some_and(|wanted| !name.contains(&**wanted)) {
            continue;
        }
        test();
        println!("test {name} ... ok");
    }
}
