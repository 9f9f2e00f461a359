//! The client that every contender gets: writes and what became of them, over connections that are made anew when they break.
//!
//! Each connection writes to keys of its own, in turn, values that are never written twice, and remembers the last value of each
//! key that was acknowledged and the last one that was sent. A write that fails is tried again, after the service was looked for
//! anew, until it is acknowledged: as the contenders' own clients do. In the end every key is read back.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use hdrhistogram::Histogram;

/// Between two looks for who serves, when there was nobody.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// How long a killed process's last acknowledgements may still be on their way: see the demo's client.
pub const OLD_REPLIES: Duration = hypervisor::demo::client::record::OLD_REPLIES;
/// Values are of as many bytes as the demo's.
const VALUES: RangeInclusive<usize> = 16..=512;

/// Why a request has no good answer.
#[derive(Debug)]
pub enum Failed {
    /// The connection is of no use any more.
    Broken(io::Error),
    /// The server does not take the request, or not in time, and the connection stands.
    Refused(String),
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Broken(error) => write!(f, "broken: {error}"),
            Self::Refused(words) => write!(f, "refused: {words}"),
        }
    }
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// One connection.
pub trait Line: Send {
    /// Writes a value: returns when it is acknowledged, by whatever the contender promises with that.
    ///
    /// # Errors
    /// See [`Failed`]: it may have been written or not.
    fn write(&mut self, key: &str, value: &[u8]) -> Result<(), Failed>;

    /// Reads it.
    ///
    /// # Errors
    /// See [`Failed`].
    fn read(&mut self, key: &str) -> Result<Option<Vec<u8>>, Failed>;
}

/// A way to whoever serves.
pub trait Service: Sync {
    /// Looks once for who serves and connects to it.
    ///
    /// # Errors
    /// If nobody does just now.
    fn connect(&self) -> io::Result<Box<dyn Line>>;
}

/// A key's history, as far as it matters. Numbers begin at 1.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    acknowledged: u64,
    sent: u64,
}

/// What one connection was promised.
#[derive(Debug)]
struct Ledger {
    number: usize,
    slots: Vec<Slot>,
    written: u64,
}

impl Ledger {
    fn new(number: usize, keys: usize) -> Self {
        Self {
            number,
            slots: vec![Slot::default(); keys],
            written: 0,
        }
    }

    fn key(&self, slot: usize) -> String {
        format!("side:{}:{slot}", self.number)
    }

    /// The next write: its slot.
    fn next(&mut self) -> usize {
        self.written += 1;
        let slot = (self.written % self.slots.len() as u64) as usize;
        self.slots[slot].sent = self.written;
        slot
    }

    /// A value says which write it is, and its letters and its length follow from that.
    fn value(&self, write: u64) -> Vec<u8> {
        let mut random = (write ^ (self.number as u64) << 48).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let span = (VALUES.end() - VALUES.start() + 1) as u64;
        let length = VALUES.start() + ((random >> 32) % span) as usize;
        let mut value = format!("<{}:{write}>", self.number).into_bytes();
        while value.len() < length {
            random = (random ^ random >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            value.push(b'a' + (random >> 40) as u8 % 26);
        }
        value
    }

    /// Whether what is there is what was acknowledged, or was sent after it.
    fn holds(&self, slot: usize, found: Option<&[u8]>) -> bool {
        let Slot { acknowledged, sent } = self.slots[slot];
        let write = found.and_then(|found| {
            let text = std::str::from_utf8(found).ok()?;
            let (_, write) = text.strip_prefix('<')?.split_once('>')?.0.split_once(':')?;
            write.parse::<u64>().ok()
        });
        match (found, write) {
            (Some(found), Some(write)) => {
                (acknowledged..=sent).contains(&write) && self.value(write) == found
            }
            _ => acknowledged == 0,
        }
    }
}

/// How requests are offered.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Requests a second over all connections, each due at its time whether the last one was answered or not: latency counts
    /// from then, so a stall is charged to every request that it delayed. Without a rate each connection sends when it has its answer.
    pub rate: Option<f64>,
}

/// What came of a stretch of load.
#[derive(Debug)]
pub struct Stretch {
    /// From when a request was due (or sent, without a rate) to its acknowledgement, retries included, in nanoseconds.
    pub latency: Histogram<u64>,
    /// How long it was.
    pub took: Duration,
    /// Connections that broke.
    pub broken: u64,
    /// Requests that the servers refused; each was tried again.
    pub refused: u64,
    /// The first problem of each connection, in words.
    pub problems: Vec<String>,
    /// When each write was acknowledged, in order.
    acknowledged: Vec<Instant>,
}

impl Stretch {
    /// How many writes were acknowledged.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.latency.len()
    }

    /// From the kill until there was service again: the end of the longest silence among those that began soon after the kill. An
    /// acknowledgement of the killed process may come after it. Nothing, if that silence lasted to the end.
    #[must_use]
    pub fn without_service(&self, killed: Instant) -> Option<Duration> {
        let after = self.acknowledged.partition_point(|at| *at <= killed);
        let replies = &self.acknowledged[after..];
        let starts = std::iter::once(&killed).chain(replies);
        let ends = replies.iter().map(Some).chain(std::iter::once(None));
        let longest = starts
            .zip(ends)
            .take_while(|(start, _)| start.duration_since(killed) <= OLD_REPLIES)
            .max_by_key(|(start, end)| {
                end.map_or(Duration::MAX, |end| end.duration_since(**start))
            })?;
        Some(longest.1?.duration_since(killed))
    }
}

/// What reading everything back has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Keys with an acknowledged value that were looked at.
    pub keys: u64,
    /// Of these, how many do not hold it.
    pub lost: u64,
}

/// What a worker brings back.
struct Tally {
    latency: Histogram<u64>,
    acknowledged: Vec<Instant>,
    broken: u64,
    refused: u64,
    problem: Option<String>,
}

/// What is going on, for whoever watches.
#[derive(Debug, Default)]
pub struct Watch {
    stop: AtomicBool,
    acknowledged: AtomicU64,
}

impl Watch {
    /// Writes acknowledged so far.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }
}

/// The connections and what they were promised.
pub struct Client<'a> {
    service: &'a dyn Service,
    members: Vec<Member>,
}

struct Member {
    ledger: Ledger,
    line: Option<Box<dyn Line>>,
}

impl<'a> Client<'a> {
    /// So many connections, each with so many keys; the service must be up within the time given.
    ///
    /// # Errors
    /// If it is not.
    pub fn new(
        service: &'a dyn Service,
        connections: usize,
        keys: usize,
        within: Duration,
    ) -> Result<Self> {
        let until = Instant::now() + within;
        let connect = || loop {
            match service.connect() {
                Ok(line) => return Ok(line),
                Err(error) if Instant::now() > until => {
                    return Err(anyhow!("nobody serves within {within:?}: {error}"));
                }
                Err(_) => std::thread::sleep(LOOK_AGAIN),
            }
        };
        let members = (0..connections)
            .map(|number| {
                Ok(Member {
                    ledger: Ledger::new(number, keys),
                    line: Some(connect()?),
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { service, members })
    }

    /// Offers load for as long as `meanwhile` takes.
    ///
    /// # Errors
    /// What `meanwhile` says.
    pub fn load<T>(
        &mut self,
        pace: Pace,
        meanwhile: impl FnOnce(&Watch) -> Result<T>,
    ) -> Result<(Stretch, T)> {
        let service = self.service;
        let watch = Watch::default();
        let connections = self.members.len() as u32;
        let every = pace
            .rate
            .map(|rate| Duration::from_secs_f64(f64::from(connections) / rate));
        let begun = Instant::now();
        let (tallies, outcome) = std::thread::scope(|scope| {
            let workers: Vec<_> = self
                .members
                .iter_mut()
                .zip(0..)
                .map(|(member, number)| {
                    // Each at its own time.
                    let first =
                        begun + every.map_or(Duration::ZERO, |every| every * number / connections);
                    let watch = &watch;
                    scope.spawn(move || {
                        work(service, member, every.map(|every| (first, every)), watch)
                    })
                })
                .collect();
            let outcome = meanwhile(&watch);
            watch.stop.store(true, Ordering::Relaxed);
            let tallies: Vec<Tally> = workers
                .into_iter()
                .map(|worker| worker.join().expect("a client does not panic"))
                .collect();
            (tallies, outcome)
        });
        let mut stretch = Stretch {
            latency: histogram(),
            took: begun.elapsed(),
            broken: 0,
            refused: 0,
            problems: Vec::new(),
            acknowledged: Vec::new(),
        };
        for tally in tallies {
            stretch.latency.add(&tally.latency)?;
            stretch.broken += tally.broken;
            stretch.refused += tally.refused;
            stretch.problems.extend(tally.problem);
            stretch.acknowledged.extend(tally.acknowledged);
        }
        stretch.acknowledged.sort_unstable();
        Ok((stretch, outcome?))
    }

    /// Reads everything back over new connections to `service`. What cannot be read within the time given is lost.
    #[must_use]
    pub fn verify(&self, service: &dyn Service, within: Duration) -> Verdict {
        let until = Instant::now() + within;
        std::thread::scope(|scope| {
            let readers: Vec<_> = self
                .members
                .iter()
                .map(|member| &member.ledger)
                .map(|ledger| scope.spawn(move || read_back(service, ledger, until)))
                .collect();
            readers
                .into_iter()
                .map(|reader| reader.join().expect("a client does not panic"))
                .fold(Verdict::default(), |all, one| Verdict {
                    keys: all.keys + one.keys,
                    lost: all.lost + one.lost,
                })
        })
    }
}

/// Nanoseconds, to a minute and more.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 100_000_000_000, 3)
        .expect("bounds and digits that a histogram takes")
}

fn work(
    service: &dyn Service,
    member: &mut Member,
    mut schedule: Option<(Instant, Duration)>,
    watch: &Watch,
) -> Tally {
    let mut tally = Tally {
        latency: histogram(),
        acknowledged: Vec::new(),
        broken: 0,
        refused: 0,
        problem: None,
    };
    let stopped = || watch.stop.load(Ordering::Relaxed);
    let Member { ledger, line } = member;
    while !stopped() {
        let due = match &mut schedule {
            None => Instant::now(),
            Some((due, every)) => {
                let now = *due;
                *due += *every;
                std::thread::sleep(now.saturating_duration_since(Instant::now()));
                now
            }
        };
        let slot = ledger.next();
        let write = ledger.slots[slot].sent;
        let (key, value) = (ledger.key(slot), ledger.value(write));
        loop {
            let outcome = match line {
                Some(line) => line.write(&key, &value),
                None => match service.connect() {
                    Ok(new) => {
                        *line = Some(new);
                        continue;
                    }
                    Err(_) if stopped() => break,
                    Err(_) => {
                        std::thread::sleep(LOOK_AGAIN);
                        continue;
                    }
                },
            };
            match outcome {
                Ok(()) => {
                    let now = Instant::now();
                    ledger.slots[slot].acknowledged = write;
                    watch.acknowledged.fetch_add(1, Ordering::Relaxed);
                    let took = now.duration_since(due).as_nanos() as u64;
                    tally.latency.saturating_record(took);
                    tally.acknowledged.push(now);
                    break;
                }
                Err(failed) => {
                    match failed {
                        Failed::Broken(_) => tally.broken += 1,
                        Failed::Refused(_) => tally.refused += 1,
                    }
                    tally.problem.get_or_insert_with(|| failed.to_string());
                }
            }
            *line = None;
            if stopped() {
                break;
            }
        }
    }
    tally
}

fn read_back(service: &dyn Service, ledger: &Ledger, until: Instant) -> Verdict {
    let mut verdict = Verdict::default();
    let mut line: Option<Box<dyn Line>> = None;
    for (slot, _) in ledger
        .slots
        .iter()
        .enumerate()
        .filter(|(_, slot)| slot.acknowledged > 0)
    {
        verdict.keys += 1;
        let key = ledger.key(slot);
        let found = loop {
            if Instant::now() > until {
                break None;
            }
            if line.is_none() {
                line = service.connect().ok();
            }
            match line.as_mut().map(|line| line.read(&key)) {
                Some(Ok(found)) => break Some(found),
                _ => line = None,
            }
            std::thread::sleep(LOOK_AGAIN);
        };
        let holds = found.is_some_and(|found| ledger.holds(slot, found.as_deref()));
        verdict.lost += u64::from(!holds);
    }
    verdict
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A server that forgets what it is told to, and breaks connections.
    #[derive(Default)]
    struct Fake {
        kept: Arc<Mutex<HashMap<String, Vec<u8>>>>,
        writes: Arc<AtomicU64>,
    }

    struct FakeLine {
        kept: Arc<Mutex<HashMap<String, Vec<u8>>>>,
        writes: Arc<AtomicU64>,
    }

    impl Line for FakeLine {
        fn write(&mut self, key: &str, value: &[u8]) -> Result<(), Failed> {
            std::thread::sleep(Duration::from_micros(200));
            match self.writes.fetch_add(1, Ordering::Relaxed) % 100 {
                50 => return Err(Failed::Refused("not now".into())),
                51 => return Err(io::Error::from(io::ErrorKind::ConnectionReset).into()),
                _ => {}
            }
            let mut kept = self.kept.lock().unwrap();
            kept.insert(key.to_owned(), value.to_owned());
            Ok(())
        }

        fn read(&mut self, key: &str) -> Result<Option<Vec<u8>>, Failed> {
            Ok(self.kept.lock().unwrap().get(key).cloned())
        }
    }

    impl Service for Fake {
        fn connect(&self) -> io::Result<Box<dyn Line>> {
            Ok(Box::new(FakeLine {
                kept: Arc::clone(&self.kept),
                writes: Arc::clone(&self.writes),
            }))
        }
    }

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn every_write_is_kept_and_one_that_is_not_is_found() {
        let fake = Fake::default();
        let mut client = Client::new(&fake, 2, 16, SOON).unwrap();
        let enough = |watch: &Watch| {
            while watch.acknowledged() < 300 {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        };
        let (stretch, ()) = client.load(Pace { rate: None }, enough).unwrap();
        assert!(stretch.writes() >= 300);
        assert!(stretch.broken >= 2 && stretch.refused >= 2, "{stretch:?}");
        let all = Verdict { keys: 32, lost: 0 };
        assert_eq!(client.verify(&fake, SOON), all);
        fake.kept.lock().unwrap().remove("side:1:7").unwrap();
        assert_eq!(client.verify(&fake, SOON).lost, 1);
        // An older value than the acknowledged one.
        let old = client.members[0].ledger.value(1);
        fake.kept.lock().unwrap().insert("side:0:1".into(), old);
        assert_eq!(client.verify(&fake, SOON).lost, 2);
    }

    #[test]
    fn at_a_fixed_rate_a_late_answer_is_charged_from_when_it_was_due() {
        let fake = Fake::default();
        let mut client = Client::new(&fake, 1, 16, SOON).unwrap();
        // Ten times what the server can do.
        let pace = Pace {
            rate: Some(50_000.0),
        };
        let (stretch, ()) = client
            .load(pace, |_| {
                std::thread::sleep(Duration::from_millis(100));
                Ok(())
            })
            .unwrap();
        assert!(
            stretch.latency.max() > 20_000_000,
            "the queue was not counted: {} ns",
            stretch.latency.max()
        );
    }

    #[test]
    fn the_time_without_service_ends_with_the_longest_silence() {
        let zero = Instant::now();
        let at = |ms: u64| zero + Duration::from_millis(ms);
        let stretch = |acknowledged: &[u64]| Stretch {
            latency: histogram(),
            took: Duration::ZERO,
            broken: 0,
            refused: 0,
            problems: Vec::new(),
            acknowledged: acknowledged.iter().map(|ms| at(*ms)).collect(),
        };
        let found = |acknowledged: &[u64]| stretch(acknowledged).without_service(at(100));
        let ms = Duration::from_millis;
        // One that was on its way, then the survivor's, one after the other.
        let served: Vec<u64> = [90, 101].into_iter().chain(150..300).collect();
        assert_eq!(found(&served), Some(ms(50)));
        assert_eq!(found(&[90, 99, 2000, 2001]), Some(ms(1900)));
        // A pause long after the failover is none of its.
        assert_eq!(found(&[90, 110, 205, 900]), Some(ms(105)));
        assert_eq!(found(&[90, 101]), None);
        assert_eq!(found(&[]), None);
    }
}
