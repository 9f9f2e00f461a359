//! The ring over RDMA, beside what the device does by itself: bare writes, and perftest's programs.
//!
//! Both sides are in this process, over one device. The kinds take turns in short blocks, so that whatever else the machine
//! does falls upon all of them; of each kind the median of every block is taken, and the best block compared with the other
//! kind's best: under emulation most blocks measure who else had the processors.
#![forbid(unsafe_code)]

use std::hint::spin_loop;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::backends::wait::Waiter;
use rdma_log::transport::network::Watch;
use rdma_log::transport::rdma::{self, Config, Mode};
use rdma_log::transport::tcp;
use rdma_log::verbs::{Bare, Choice, Verbs};
use rdma_log::{LaneReader, LaneWriter, Marks, RingConfig, RingReader, RingWriter, WriteError};
use serde_json::json;

use crate::draw::Panel;
use crate::sheet::{Aim, Sheet, Table, median, round};

/// With its header it fills one cache line.
const PAYLOAD: usize = 32;
/// A header of an entry, in bytes.
const HEADER: usize = 32;
/// Bytes that entries carry besides their header: 16 B to 1 MiB, which includes the header.
const PAYLOADS: [usize; 9] = [
    16,
    64,
    256,
    1024,
    4096,
    16_384,
    65_536,
    262_144,
    (1 << 20) - HEADER,
];
/// Entries in a batch.
const BATCHES: [usize; 6] = [1, 4, 16, 64, 256, 1024];
/// Bytes of a message where the bandwidth is measured.
const MESSAGE: usize = 65_536;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Blocks of each kind.
    pub blocks: usize,
    /// Operations in a block.
    pub block: usize,
    /// Bytes that go through for the bandwidth.
    pub bytes: usize,
}

/// Measures and makes the sheet.
///
/// # Errors
/// If there is no RDMA device, or perftest's programs are missing or fail.
pub fn measure(extent: Extent) -> Result<Sheet> {
    let mut sheet = Sheet::new("rdma", "The ring over RDMA");
    let verbs = Verbs::load()?;
    latency(&verbs, &mut sheet, extent)?;
    sizes(&verbs, &mut sheet, extent)?;
    batches(&verbs, &mut sheet, extent)?;
    bandwidth(&verbs, &mut sheet, extent)?;
    sheet.note(
        "One device, both sides in one process. Best block of each kind (the median of the block's operations); a bare write \
         is posted and polled through the same library.",
    );
    Ok(sheet)
}

/// How the two sides wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// Both look again and again, each on a processor of its own.
    Poll,
    /// Both sleep at a descriptor, which an event of the kernel's wakes.
    Events,
}

impl Wait {
    /// How long the reader's thread looks for work before it sleeps.
    fn spin(self) -> Duration {
        match self {
            Self::Poll => Duration::from_secs(1),
            Self::Events => Duration::ZERO,
        }
    }
}

/// Both sides of a ring, and whoever takes in what the writer is answered.
struct Ring {
    writer: RingWriter,
    reader: RingReader,
    watch: Watch,
    wait: Wait,
}

fn config(mode: Mode) -> Config {
    Config {
        mode,
        ..Config::default()
    }
}

/// A lane of 8 MiB for events as well, so that it takes entries of 1 MiB.
const LANES: RingConfig = RingConfig {
    events: 8 << 20,
    inputs: 8 << 20,
};

fn over_rdma(verbs: &Verbs, mode: Mode, wait: Wait) -> Result<Ring> {
    let (mut there, mut here) = UnixStream::pair()?;
    let verbs = *verbs;
    // In mode nic nobody has to find entries for them to commit.
    let spin = match mode {
        Mode::Nic => Duration::ZERO,
        Mode::Ack => wait.spin(),
    };
    let accepting =
        thread::spawn(move || rdma::accept(&verbs, &mut here, &LANES, &config(mode), spin));
    let (writer, watch) = rdma::connect_watched(&verbs, &mut there, &config(mode))?;
    let (reader, _) = accepting.join().expect("no panic")?;
    Ok(Ring {
        writer,
        reader,
        watch: Watch::Rdma(watch),
        wait,
    })
}

fn over_tcp(wait: Wait) -> Result<Ring> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let there = TcpStream::connect(listener.local_addr()?)?;
    let (here, _) = listener.accept()?;
    let accepting = thread::spawn(move || tcp::accept(here, &LANES, wait.spin()));
    let (writer, watch) = tcp::connect_watched(there)?;
    let (reader, _) = accepting.join().expect("no panic")?;
    Ok(Ring {
        writer,
        reader,
        watch: Watch::Tcp(watch),
        wait,
    })
}

impl Ring {
    /// Publishes so many entries, pushes once, and waits until the last has committed.
    fn commit(&mut self, count: usize, payload: &[u8]) -> Result<Duration> {
        let lane = &mut self.writer.events;
        let begun = Instant::now();
        for _ in 0..count {
            append(lane, payload)?;
        }
        lane.notify()?;
        while lane.committed()? < lane.last() {
            match (self.wait, &self.watch) {
                (Wait::Events, watch) => sleep_at(watch)?,
                // The lane itself asks the device.
                (Wait::Poll, Watch::Rdma(_)) => spin_loop(),
                (Wait::Poll, watch @ Watch::Tcp(_)) => watch.turn()?,
            }
        }
        Ok(begun.elapsed())
    }

    /// Takes out what came, and lets both sides do what is due. Not within a block: a turn of the watch arms the completion
    /// queue, and then every completion costs an event in the kernel, as it does for a thread that waits, not for one that spins.
    fn settle(&mut self) -> Result<()> {
        while self.reader.events.last() < self.writer.events.last() {
            drain(&mut self.reader.events)?;
        }
        self.reader.events.notify()?;
        self.watch.turn()?;
        Ok(())
    }

    fn block(&mut self, block: usize, count: usize, payload: &[u8]) -> Result<f64> {
        let mut times = Vec::with_capacity(block);
        for _ in 0..block {
            times.push(self.commit(count, payload)?.as_nanos() as f64 / 1e3);
            drain(&mut self.reader.events)?;
        }
        self.settle()?;
        Ok(median(times))
    }
}

/// Takes in what has come, having slept until something has.
fn sleep_at(watch: &Watch) -> Result<()> {
    // Arms the device, too, and finds what came before it was armed.
    watch.turn()?;
    let mut waiter = Waiter::new();
    waiter.add(watch, true, watch.wants_write());
    waiter.wait(Some(Duration::from_millis(1)))?;
    watch.turn()?;
    Ok(())
}

fn append(lane: &mut LaneWriter, payload: &[u8]) -> Result<()> {
    loop {
        match lane.append(payload, Marks::default()) {
            Ok(_) => return Ok(()),
            Err(WriteError::Full { .. }) => {
                lane.wait_for_room(payload.len(), Duration::from_millis(100))?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn drain(lane: &mut LaneReader) -> Result<()> {
    while lane.next()?.is_some() {}
    Ok(())
}

fn bare_block(bare: &mut Bare, block: usize, len: usize) -> Result<f64> {
    let mut times = Vec::with_capacity(block);
    for _ in 0..block {
        let begun = Instant::now();
        bare.write(len)?;
        times.push(begun.elapsed().as_nanos() as f64 / 1e3);
    }
    Ok(median(times))
}

fn best(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

/// What the latency table compares; the order is that of its rows.
const KINDS: [&str; 8] = [
    "bare write, post to completion",
    "ring, mode nic",
    "ring, mode nic, by events",
    "ring, mode ack, both sides poll",
    "ring, mode ack, by events",
    "ib_write_lat, round trip, both sides poll",
    "ring over tcp, both sides poll",
    "ring over tcp, by events",
];

/// The baseline of the two-sided way, where this program was built with it.
#[derive(Debug, Default)]
struct TwoSided {
    #[cfg(feature = "two-sided")]
    rounds: [Vec<f64>; crate::two_sided::KINDS.len()],
}

impl TwoSided {
    /// A block of each kind, of as many bytes as an entry has.
    #[cfg_attr(
        not(feature = "two-sided"),
        expect(
            clippy::unused_self,
            clippy::unnecessary_wraps,
            reason = "nothing to measure"
        )
    )]
    fn measure(&mut self, extent: Extent) -> Result<()> {
        #[cfg(feature = "two-sided")]
        for (kind, values) in self.rounds.iter_mut().enumerate() {
            values.push(crate::two_sided::block(
                kind,
                extent.block,
                HEADER + PAYLOAD,
            )?);
        }
        #[cfg(not(feature = "two-sided"))]
        let _ = extent;
        Ok(())
    }

    /// Names and blocks, for the table.
    fn rows(&self) -> impl Iterator<Item = (&&'static str, &Vec<f64>)> {
        #[cfg(feature = "two-sided")]
        return crate::two_sided::KINDS.iter().zip(&self.rounds);
        #[cfg(not(feature = "two-sided"))]
        return std::iter::empty();
    }
}

fn latency(verbs: &Verbs, sheet: &mut Sheet, extent: Extent) -> Result<()> {
    let payload = [7; PAYLOAD];
    let mut bare = Bare::new(verbs, &Choice::default(), HEADER + PAYLOAD)?;
    let mut rounds: [Vec<f64>; KINDS.len()] = Default::default();
    let mut two_sided = TwoSided::default();
    let mut nic = over_rdma(verbs, Mode::Nic, Wait::Poll)?;
    for _ in 0..extent.blocks {
        rounds[0].push(bare_block(&mut bare, extent.block, HEADER + PAYLOAD)?);
        rounds[1].push(nic.block(extent.block, 1, &payload)?);
    }
    drop(nic);
    for _ in 0..extent.blocks {
        // A reader's thread that polls has a processor for itself, so each is there only while it is measured.
        let mut once = |which: usize, ring: Result<Ring>| -> Result<()> {
            rounds[which].push(ring?.block(extent.block, 1, &payload)?);
            Ok(())
        };
        once(2, over_rdma(verbs, Mode::Nic, Wait::Events))?;
        once(3, over_rdma(verbs, Mode::Ack, Wait::Poll))?;
        once(4, over_rdma(verbs, Mode::Ack, Wait::Events))?;
        once(6, over_tcp(Wait::Poll))?;
        once(7, over_tcp(Wait::Events))?;
        rounds[5].push(perftest("ib_write_lat", HEADER + PAYLOAD, 4)? * 2.0);
        two_sided.measure(extent)?;
    }
    let mut table = Table::new(
        "Commit of one 64-byte entry (µs)",
        &["", "best block", "median block"],
    );
    let mut bars = Vec::new();
    for (name, values) in KINDS.iter().zip(&rounds).chain(two_sided.rows()) {
        let (best, middle) = (best(values), median(values.clone()));
        table.row([
            (*name).to_owned(),
            format!("{best:.1}"),
            format!("{middle:.1}"),
        ]);
        bars.push(((*name).to_owned(), best));
        sheet.figures.insert(
            (*name).to_owned(),
            json!({"best_us": round(best), "median_us": round(middle), "blocks": values}),
        );
    }
    let why = "an entry is checksummed, and its completion taken under the lane's lock";
    let of = |which: usize| best(&rounds[which]);
    sheet.aims.push(Aim::at_most(
        "mode nic / bare write",
        1.1,
        of(1) / of(0),
        why,
    ));
    let why = "a thread finds the entry, checks it and writes back; ib_write_lat looks at one byte";
    sheet.aims.push(Aim::at_most(
        "mode ack, polling / round trip of ib_write_lat",
        1.1,
        of(3) / of(5),
        why,
    ));
    sheet.tables.push(table);
    sheet.panels.push(Panel::Bars {
        title: "Commit of one 64-byte entry".into(),
        unit: "µs".into(),
        bars,
    });
    Ok(())
}

fn sizes(verbs: &Verbs, sheet: &mut Sheet, extent: Extent) -> Result<()> {
    let mut table = Table::new(
        "Commit by what the entry carries besides its 32-byte header, mode nic (µs)",
        &[
            "payload (B)",
            "bare write of as many bytes",
            "ring",
            "ratio",
        ],
    );
    let mut lines = [("bare write", Vec::new()), ("ring", Vec::new())];
    let mut bare = Bare::new(verbs, &Choice::default(), 1 << 20)?;
    let mut ring = over_rdma(verbs, Mode::Nic, Wait::Poll)?;
    for carried in PAYLOADS {
        let (size, payload) = (HEADER + carried, vec![7; carried]);
        let block = (extent.block * 4096 / size).clamp(3, extent.block);
        let mut rounds: [Vec<f64>; 2] = Default::default();
        for _ in 0..extent.blocks {
            rounds[0].push(bare_block(&mut bare, block, size)?);
            rounds[1].push(ring.block(block, 1, &payload)?);
        }
        let [a, b] = rounds.each_ref().map(|values| best(values));
        table.row([
            carried.to_string(),
            format!("{a:.1}"),
            format!("{b:.1}"),
            format!("{:.2}", b / a),
        ]);
        lines[0].1.push((carried as f64, a));
        lines[1].1.push((carried as f64, b));
    }
    sheet.figure("by_size_us", json!(lines));
    sheet.tables.push(table);
    sheet.panels.push(Panel::Lines {
        title: "Commit by size of the entry, mode nic".into(),
        x: "bytes of payload".into(),
        y: "µs".into(),
        lines: lines.map(|(name, points)| (name.to_owned(), points)).into(),
    });
    Ok(())
}

fn batches(verbs: &Verbs, sheet: &mut Sheet, extent: Extent) -> Result<()> {
    let mut table = Table::new(
        "Commit of a batch of 64-byte entries, mode nic (µs)",
        &["entries", "the last has committed", "for each entry"],
    );
    let mut ring = over_rdma(verbs, Mode::Nic, Wait::Poll)?;
    let mut points = Vec::new();
    for count in BATCHES {
        let block = (extent.block / count).max(5);
        let values = (0..extent.blocks)
            .map(|_| ring.block(block, count, &[7; PAYLOAD]))
            .collect::<Result<Vec<_>>>()?;
        let best = best(&values);
        table.row([
            count.to_string(),
            format!("{best:.1}"),
            format!("{:.2}", best / count as f64),
        ]);
        points.push((count as f64, best));
    }
    sheet.figure("by_batch_us", json!(points));
    sheet.tables.push(table);
    sheet.panels.push(Panel::Lines {
        title: "Commit of a batch, mode nic".into(),
        x: "entries".into(),
        y: "µs".into(),
        lines: vec![("64-byte entries".into(), points)],
    });
    Ok(())
}

/// Megabytes a second through the ring, with a reader that takes everything out.
fn through(ring: Ring, bytes: usize) -> Result<f64> {
    let Ring {
        writer,
        reader,
        watch,
        ..
    } = ring;
    let (mut events, mut there) = (writer.events, reader.events);
    let count = (bytes / MESSAGE).max(4);
    let payload = vec![7; MESSAGE - HEADER];
    thread::scope(|scope| {
        let reading = scope.spawn(move || -> Result<LaneReader> {
            while there.last().0 < count as u64 {
                if there.next()?.is_none() {
                    there.notify()?;
                    there.wait(Duration::from_millis(5))?;
                }
            }
            there.notify()?;
            Ok(there)
        });
        let begun = Instant::now();
        for _ in 0..count {
            loop {
                match events.append(&payload, Marks::default()) {
                    Ok(_) => break,
                    Err(WriteError::Full { .. }) => {
                        watch.turn()?;
                        events.notify()?;
                        thread::yield_now();
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            events.notify()?;
        }
        while events.committed()? < events.last() {
            watch.turn()?;
            thread::yield_now();
        }
        let took = begun.elapsed();
        let _reader = reading.join().expect("no panic")?;
        Ok((count * MESSAGE) as f64 / took.as_secs_f64() / 1e6)
    })
}

fn bandwidth(verbs: &Verbs, sheet: &mut Sheet, extent: Extent) -> Result<()> {
    let names = ["ib_write_bw", "ring over rdma, mode nic", "ring over tcp"];
    let mut rounds: [Vec<f64>; 3] = Default::default();
    for _ in 0..extent.blocks.div_ceil(2) {
        // It prints MiB a second.
        rounds[0].push(perftest("ib_write_bw", MESSAGE, 3)? * 1.048_576);
        rounds[1].push(through(
            over_rdma(verbs, Mode::Nic, Wait::Poll)?,
            extent.bytes,
        )?);
        rounds[2].push(through(over_tcp(Wait::Events)?, extent.bytes)?);
    }
    let mut table = Table::new("Bandwidth in 64 KiB entries (MB/s)", &["", "best"]);
    let mut bars = Vec::new();
    let bests = rounds
        .each_ref()
        .map(|values| values.iter().copied().fold(0.0, f64::max));
    for ((name, values), best) in names.iter().zip(&rounds).zip(bests) {
        table.row([(*name).to_owned(), format!("{best:.0}")]);
        bars.push(((*name).to_owned(), best));
        sheet.figure(&format!("{name} MB/s"), json!(values));
    }
    let why = "the ring checksums every byte on both sides, copies it in and out, and here shares two processors with that";
    sheet.aims.push(Aim::at_least(
        "ring / ib_write_bw",
        0.95,
        bests[1] / bests[0],
        why,
    ));
    sheet.tables.push(table);
    sheet.panels.push(Panel::Bars {
        title: "Bandwidth in 64 KiB entries".into(),
        unit: "MB/s".into(),
        bars,
    });
    Ok(())
}

/// Ends with the value.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended by itself if all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs one of perftest's programs with itself as the peer; the number in that column of its last line.
fn perftest(program: &str, bytes: usize, column: usize) -> Result<f64> {
    let (size, count) = (bytes.to_string(), "1000");
    let command = || {
        let mut command = Command::new(program);
        command.args(["-x", "1", "-F", "-s", &size, "-n", count]);
        command
    };
    let server = command()
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("start {program}: install perftest"))?;
    let _server = Server(server);
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let output = command().arg("127.0.0.1").output()?;
        if output.status.success() {
            return number(&String::from_utf8_lossy(&output.stdout), bytes, column)
                .with_context(|| format!("what {program} printed"));
        }
        // The server may not listen yet.
        ensure!(
            Instant::now() < until,
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        thread::sleep(Duration::from_millis(100));
    }
}

/// The number in that column of the line that starts with the size.
fn number(text: &str, bytes: usize, column: usize) -> Result<f64> {
    for line in text.lines() {
        let words = line.split_whitespace().collect::<Vec<_>>();
        if words.first() == Some(&&*bytes.to_string())
            && let Some(word) = words.get(column)
        {
            return Ok(word.parse()?);
        }
    }
    bail!("no line for {bytes} bytes in: {text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perftests_columns_are_found() {
        let text = " #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]\n \
                    64      1000          9.15           62122.45      28.42  	       61.40\n";
        assert_eq!(number(text, 64, 4).unwrap(), 28.42);
        assert!(number(text, 65, 4).is_err());
    }
}
