//! What a request waits for where a machine is replicated by checkpoints, by how much it has the guest write.
//!
//! A request is an `EXEC` of commands that wait in the guest already, each of which writes into a page of its own: a frame in, so many
//! pages written, one exit that replies. Its time is held against what the same bytes take over the bare link ([`crate::link`]),
//! measured in the same run.
//!
//! ```text
//!  EXEC ─▶ guest writes N pages ─▶ reply ┐ stop ┌ checkpoint to the backup ┐ ─▶ the reply leaves
//!          (each noted by KVM)           └──────┘     the link's part      │
//!          └── alone, and what noting adds ──┘ └────────── commit ─────────┘
//! ```
#![forbid(unsafe_code)]

mod telling;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddrV4, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use hypervisor::config::Transport;
use hypervisor::demo::pair::Pair;
use hypervisor::intervals::Ends;
use hypervisor::session::report::Event;
use serde_json::json;

use crate::link::{self, Link};
use crate::sheet::{Sheet, round};
use crate::world::{Guest, Mode, Network};
use telling::{Row, Tables, tell, tell_anew};

/// Pages that a request writes, besides those of the server's own.
const PAGES: [usize; 5] = [16, 64, 256, 1024, 2048];
/// The same where each page is written from end to end: what the guest holds of eight such requests is all of it.
const PAGES_ANEW: [usize; 3] = [16, 64, 256];
const PAGE: usize = 4096;

/// What a request writes into each of its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writes {
    /// One byte.
    Byte,
    /// All of it, and nothing of what was there.
    Anew,
}

impl Writes {
    fn sizes(self) -> &'static [usize] {
        match self {
            Self::Byte => &PAGES,
            Self::Anew => &PAGES_ANEW,
        }
    }

    /// The command that writes this page, as the request of this number does it that writes so many. It changes the page: what is written again as it was is not
    /// what a server writes, and a page that is found as it was is not left open to the guest.
    fn command(self, pages: usize, page: usize, number: usize) -> String {
        match self {
            Self::Byte => {
                let size = PAGES.iter().take_while(|&&size| size < pages).count();
                let letter = char::from(b'a' + size as u8);
                format!("SETRANGE b {} {letter}\r\n", page * PAGE + number % PAGE)
            }
            Self::Anew => {
                let mut state = (number * 2 * PAGES[PAGES.len() - 1] + page) as u64 | 1 << 63;
                // Text that repeats nothing (xorshift64).
                let letter = |_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    char::from(b'a' + (state >> 32) as u8 % 26)
                };
                let text: String = (0..PAGE).map(letter).collect();
                format!("SETRANGE b {} {text}\r\n", page * PAGE)
            }
        }
    }
}

/// Transactions that wait in the guest at once. Their commands take a guest of 64 MiB some 4 MiB at the most.
const WAITING: usize = 8;

/// Between two requests: longer than an interval's transfer, so that none waits for the one before.
const APART: Duration = Duration::from_millis(8);
/// The beat of fixed intervals (`--interval-ms`, its default); requests are spread over it.
const BEAT: Duration = Duration::from_millis(25);
/// A step of this part of the beat from request to request comes by every phase evenly.
const GOLDEN: f64 = 0.618_034;

/// A side tells its commits and stops every 50 ms.
const TOLD: Duration = Duration::from_millis(120);
const PATIENCE: Duration = Duration::from_secs(10);

/// The aim: so many times what the same bytes take over the bare link, besides the stop.
pub const AIM: f64 = 2.0;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Requests of each size, alone and where an output ends its interval.
    pub requests: usize,
    /// The same in fixed intervals.
    pub fixed: usize,
    /// Blocks of each size over the bare link.
    pub blocks: usize,
}

/// Measures and makes the sheet.
///
/// # Errors
/// If a machine does not start or does not serve.
pub fn measure(extent: Extent) -> Result<Sheet> {
    let network = Network::set_up()?;
    let mut sheet = Sheet::new(
        "checkpoint",
        "Replicated by checkpoints: a request by what it writes",
    );
    let alone = all_sizes(Mode::Run, &network, extent.requests, Writes::Byte)?;
    let alone_anew = all_sizes(Mode::Run, &network, extent.requests, Writes::Anew)?;
    let mut tables = Tables::default();
    for (transport, kind) in [
        (Transport::Shm, link::Kind::Memory),
        (Transport::Tcp, link::Kind::Socket),
    ] {
        let ended = |ends| Mode::Checkpoint(transport, ends);
        let output = all_sizes(ended(Ends::Output), &network, extent.requests, Writes::Byte)?;
        let fixed = all_sizes(ended(Ends::Fixed), &network, extent.fixed, Writes::Byte)?;
        let anew = all_sizes(ended(Ends::Output), &network, extent.requests, Writes::Anew)?;
        let mut bare = Link::start(kind)?;
        let rows = PAGES
            .iter()
            .enumerate()
            .map(|(at, &asked)| {
                let bytes = output[at].bytes()?;
                Ok(Row {
                    asked,
                    bytes,
                    link: micros(&bare.send(bytes, extent.blocks)?, 0.5),
                    alone: micros(&alone[at].latency, 0.5),
                    output: &output[at],
                    fixed: &fixed[at],
                })
            })
            .collect::<Result<Vec<_>>>()?;
        tell(&mut sheet, &mut tables, transport, &rows)?;
        let mut told = Vec::new();
        for ((found, alone), &asked) in anew.iter().zip(&alone_anew).zip(Writes::Anew.sizes()) {
            let bytes = found.bytes()?;
            let link = micros(&bare.send(bytes, extent.blocks)?, 0.5);
            let alone = micros(&alone.latency, 0.5);
            told.push(tell_anew(
                &mut tables.anew,
                transport,
                found,
                [asked as f64, alone, link],
            )?);
        }
        sheet.figure(
            &format!("{}_anew", transport.name()),
            json!({ "sizes": told }),
        );
    }
    let Tables {
        requests,
        stops,
        anew,
        panels,
    } = tables;
    sheet.tables.extend(requests.into_iter().chain(stops));
    sheet.tables.push(anew);
    sheet.panels = panels;
    sheet.figure("network", network.kind);
    sheet.note(format!(
        "Network: {}. A request is an EXEC of so many SETRANGE of one byte, each in a page of its own, one request at a time. {} of each \
         size alone and with intervals that an output ends, {} in fixed intervals, over all their phases.",
        network.kind, extent.requests, extent.fixed
    ));
    sheet.note(
        "`bare link`: the same bytes between two processes, in the same run, until the other one has them and has said so: copied through shared \
         memory, or sent over a socket, with no checksum; the median. `added` is to what the request takes unprotected. Of it the commit (from the reply's exit until it may \
         leave) holds stop and transfer; the rest is the guest's own. Of eight requests that come one after the other the first two have a fault for each page, which was not left open \
         to them: the commands of all eight were queued just before. The other six have none; why they take longer than alone was not taken apart: memory that the copies have put out of the caches is likely.",
    );
    sheet.note(
        "A byte in a page is what a server writes, and of such a page some 30 bytes are sent; a page that is written from end to end goes whole. `KiB` and the bare link's time are of whole \
         pages in both tables.",
    );
    sheet.note(
        "The aim is for what is added, less the stop. Two cores carry client, primary, courier and backup, so over TCP each wake of another \
         thread is in it.",
    );
    Ok(sheet)
}

/// What requests of one size came to.
struct Found {
    latency: Histogram<u64>,
    commits: Histogram<u64>,
    /// Of the intervals that such requests ended: pages and microseconds.
    stops: Vec<(u64, u64)>,
    /// All intervals, those of a few pages too.
    intervals: usize,
    /// All pages and all bytes of intervals, small ones too.
    written: [u64; 2],
}

impl Found {
    fn new() -> Self {
        Self {
            latency: histogram(),
            commits: histogram(),
            stops: Vec::new(),
            intervals: 0,
            written: [0; 2],
        }
    }

    fn pages(&self) -> Result<u64> {
        let mut pages: Vec<u64> = self.stops.iter().map(|(pages, _)| *pages).collect();
        pages.sort_unstable();
        let middle = pages.get(pages.len() / 2);
        middle.copied().context("no interval had such a request")
    }

    /// Of one request's checkpoint.
    fn bytes(&self) -> Result<usize> {
        let [pages, bytes] = self.written;
        Ok((self.pages()? as f64 * bytes as f64 / pages.max(1) as f64) as usize)
    }

    /// How many intervals there were for each request.
    fn intervals_a_request(&self) -> f64 {
        round(self.intervals as f64 / self.latency.len() as f64)
    }

    fn stops_us(&self) -> Histogram<u64> {
        let mut all = histogram();
        for (_, micros) in &self.stops {
            all.saturating_record(micros * 1000);
        }
        all
    }
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("legal bounds")
}

/// A quantile of nanoseconds, in microseconds.
fn micros(of: &Histogram<u64>, quantile: f64) -> f64 {
    round(of.value_at_quantile(quantile) as f64 / 1000.0)
}

fn all_sizes(mode: Mode, network: &Network, requests: usize, writes: Writes) -> Result<Vec<Found>> {
    let guest = Guest::start(mode, "kv", "", Some(network))?;
    let largest = PAGES[PAGES.len() - 1];
    let mut first = Caller::connect(network.address())?;
    // Longer than all that is written, so that nothing moves.
    first.ask(&format!("SETRANGE b {} x\r\n", (largest + 1) * PAGE), 1)?;
    let mut found = Vec::new();
    for &pages in writes.sizes() {
        let mut of_size = Found::new();
        // The first batch finds pages that nobody has touched.
        for batch in 0..=requests.div_ceil(WAITING) {
            let taken = batch_of(mode, network, &guest, (pages, writes), batch)?;
            if batch > 0 {
                of_size.take(taken, pages);
            }
        }
        found.push(of_size);
    }
    drop(first);
    guest.end()?;
    Ok(found)
}

/// What one batch came to: times, and what the side that serves said meanwhile.
type Batch = (Vec<Duration>, Vec<Event>);

fn batch_of(
    mode: Mode,
    network: &Network,
    guest: &Guest,
    (pages, writes): (usize, Writes),
    batch: usize,
) -> Result<Batch> {
    let place = |number| batch * WAITING + number;
    let mut callers = (0..WAITING)
        .map(|number| Caller::waiting(network.address(), pages, writes, place(number)))
        .collect::<Result<Vec<_>>>()?;
    // What the queueing came to is not the measurement's.
    if let Some(pair) = guest.pair() {
        std::thread::sleep(TOLD);
        drop(pair.primary.events());
    }
    let mut times = Vec::new();
    for (number, caller) in callers.iter_mut().enumerate() {
        let phase = (batch * WAITING + number) as f64 * GOLDEN % 1.0;
        std::thread::sleep(match mode {
            Mode::Checkpoint(_, Ends::Fixed) => APART + BEAT.mul_f64(phase),
            _ => APART,
        });
        let begun = Instant::now();
        caller.ask("EXEC\r\n", pages + 1)?;
        times.push(begun.elapsed());
    }
    let told = guest.pair().map(|pair| told(pair, pages * WAITING));
    Ok((times, told.transpose()?.unwrap_or_default()))
}

/// What the side that serves says of intervals with so many pages, once it has said so of all of them.
fn told(pair: &Pair, pages: usize) -> Result<Vec<Event>> {
    let until = Instant::now() + PATIENCE;
    let (mut all, mut seen) = (Vec::new(), 0);
    while seen < pages as u64 {
        ensure!(
            Instant::now() < until,
            "the primary tells of {seen} pages in intervals, and {pages} were written"
        );
        std::thread::sleep(TOLD);
        for event in pair.primary.events() {
            if let Event::Intervals { pages, .. } = &event {
                seen += pages.iter().sum::<u64>();
            }
            all.push(event);
        }
    }
    Ok(all)
}

impl Found {
    fn take(&mut self, (times, events): Batch, asked: usize) {
        for time in times {
            self.latency.saturating_record(time.as_nanos() as u64);
        }
        for event in events {
            match event {
                Event::Commits { buckets } => {
                    for (nanos, count) in buckets {
                        self.commits.saturating_record_n(nanos, count);
                    }
                }
                Event::Intervals {
                    stops_us,
                    pages,
                    bytes,
                } => {
                    self.intervals += stops_us.len();
                    self.written[0] += pages.iter().sum::<u64>();
                    self.written[1] += bytes;
                    let ends = pages.into_iter().zip(stops_us);
                    self.stops
                        .extend(ends.filter(|(pages, _)| *pages >= asked as u64));
                }
                _ => {}
            }
        }
    }
}

/// A connection, on which one request is under way at a time.
struct Caller(TcpStream);

impl Caller {
    fn connect(address: SocketAddrV4) -> Result<Self> {
        let until = Instant::now() + PATIENCE;
        let stream = loop {
            match TcpStream::connect(address) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > until => {
                    return Err(error).context("connect to the guest");
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(stream))
    }

    /// One whose commands wait for their EXEC.
    fn waiting(address: SocketAddrV4, pages: usize, writes: Writes, place: usize) -> Result<Self> {
        let mut caller = Self::connect(address)?;
        let commands = (0..pages).map(|page| writes.command(pages, page, place));
        let words: String = std::iter::once("MULTI\r\n".to_owned())
            .chain(commands)
            .collect();
        caller.ask(&words, pages + 1)?;
        Ok(caller)
    }

    /// Sends this, and takes so many lines for an answer.
    fn ask(&mut self, words: &str, mut lines: usize) -> Result<()> {
        self.0.write_all(words.as_bytes())?;
        let mut buffer = vec![0; 64 << 10];
        while lines > 0 {
            let got = self
                .0
                .read(&mut buffer)
                .context("wait for the guest's answer")?;
            ensure!(got > 0, "the guest ended the connection");
            let text = &buffer[..got];
            if let Some(at) = text.iter().position(|&byte| byte == b'-') {
                bail!("the guest says {:?}", String::from_utf8_lossy(&text[at..]));
            }
            let came = text.iter().filter(|&&byte| byte == b'\n').count();
            lines = lines
                .checked_sub(came)
                .context("the guest says more than it was asked")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_that_of_one_request() {
        let mut found = Found::new();
        assert!(found.bytes().is_err());
        let events = vec![Event::Intervals {
            stops_us: vec![50, 300, 310],
            pages: vec![10, 100, 110],
            bytes: 220 * 4100,
        }];
        found.take((vec![Duration::from_micros(900)], events), 90);
        assert_eq!(found.stops, [(100, 300), (110, 310)]);
        assert_eq!(found.bytes().unwrap(), 110 * 4100);
        assert_eq!(found.latency.len(), 1);
        assert_eq!(found.intervals_a_request(), 3.0);
    }
}
