//! Consoles at a site: an agent shows those of the machines that its host serves to whoever holds the site's secret.
//!
//! ```text
//!  doppel vm console                                  agent of the host that serves the machine            the role
//!     │◀═ each proves that it holds the site's secret; what follows is sealed ═▶│                              │
//!     │── which machine, which process, from which byte on ────────────────────▶│── Ask::Console ─────────────▶│
//!     │◀── the first byte's number, or why not ─────────────────────────────────│◀─ control socket ────────────│
//!     │◀═ "d" and bytes of the console, or typed ones; "k": I am still here ═══▶│◀═ bytes ════════════════════▶│
//! ```
//! The proof is a pair's (`handshake/proof.rs`), by a secret of its own that is made of the site's: nothing that is said to a backup's door opens
//! this one, or the other way round. A record is a message. A side that has said nothing for half a minute is gone.
//!
//! Each visit has a thread, and none holds up the agent. A stranger has three seconds to prove itself, and no more than so many come in at once.
#![forbid(unsafe_code)]

use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rdma_log::locks::lock;
use serde::{Deserialize, Serialize};

use super::seal;
use super::store::Store;
use crate::backends::wait::Waiter;
use crate::control::visit::{Pace, Seen, Server, VisitError, Way};
use crate::control::{find, is_name};
use crate::handshake::{self, Channel, HandshakeError, Secret, Stream, Trust};

/// What the secret of consoles is made with.
const LABEL: &str = "doppel-console-1";

/// Visits at once, strangers among them.
const MOST: usize = 64;

/// How long a connection, an answer or a record may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// So often a side says that it is there.
const STILL: Duration = Duration::from_secs(10);

/// A side that has said nothing for so long is gone.
const GONE: Duration = Duration::from_secs(30);

/// Typed bytes that wait for the role; no more are taken meanwhile.
const TYPED: usize = 4096;

/// The most that a record brings.
const RECORD: usize = 64 << 10;

/// Between two lines of the log about visitors that were turned away: anybody on the network can be one as often as he likes.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// What is said of them.
#[derive(Debug, Default)]
struct Told {
    last: Option<Instant>,
    unsaid: u64,
}

impl Told {
    /// Whether one more is told of now: then how many were not.
    fn another(&mut self, now: Instant) -> Option<u64> {
        let said = |last| now.saturating_duration_since(last) < TELL_EVERY;
        if self.last.is_some_and(said) {
            self.unsaid += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.unsaid))
    }
}

/// What is wanted.
#[derive(Debug, Serialize, Deserialize)]
struct Wanted {
    machine: String,
    pid: u32,
    from: Option<u64>,
}

/// What is given.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Given {
    /// The console's bytes follow, from this one on.
    From(u64),
    /// That process is not there any more.
    Gone(String),
    /// Why not.
    Refused(String),
}

/// Shows consoles at this listener, for as long as the process lives.
///
/// # Errors
/// If no thread can be started.
pub fn show(listener: TcpListener, run_dir: &Path, secret: &Secret) -> io::Result<()> {
    let trust = Trust::holders(seal::derived(secret, LABEL));
    let (run_dir, inside) = (run_dir.to_owned(), Arc::new(AtomicUsize::new(0)));
    let told = Arc::new(Mutex::new(Told::default()));
    let receive = move || {
        loop {
            let Ok((stream, from)) = listener.accept() else {
                // Out of descriptors, or a connection that is gone already: neither is worth a busy loop.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            if inside.fetch_add(1, Ordering::Relaxed) >= MOST {
                inside.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (trust, run_dir, count) = (trust.clone(), run_dir.clone(), Arc::clone(&inside));
            let told = Arc::clone(&told);
            let visit = move || {
                if let Err(error) = receive_one(stream, &trust, &run_dir) {
                    let mut told = lock(&told);
                    match told.another(Instant::now()) {
                        None => {}
                        Some(0) => tracing::info!("a visitor from {from}: {error}"),
                        Some(others) => tracing::info!(
                            "a visitor from {from}: {error} (and {others} others before)"
                        ),
                    }
                }
                count.fetch_sub(1, Ordering::Relaxed);
            };
            let started = std::thread::Builder::new()
                .name("console".into())
                .spawn(visit);
            if started.is_err() {
                inside.fetch_sub(1, Ordering::Relaxed);
            }
        }
    };
    let thread = std::thread::Builder::new().name("consoles".into());
    thread.spawn(receive).map(|_| ())
}

fn receive_one(stream: TcpStream, trust: &Trust, run_dir: &Path) -> Result<(), HandshakeError> {
    stream.set_nodelay(true)?;
    let channel = handshake::admit(Stream::Tcp(stream), trust)?;
    channel.set_patience(Some(PATIENCE))?;
    let wanted: Wanted = hear(&channel)?;
    let found = match is_name(&wanted.machine) {
        true => find::console(run_dir, &wanted.machine, wanted.pid, wanted.from),
        false => Err(io::Error::other("that is no name of a machine")),
    };
    match found {
        Ok((first, reader)) => {
            tell(&channel, &Given::From(first))?;
            let came = reader.buffer().to_vec();
            Ok(carry(&channel, reader.into_inner(), &came)?)
        }
        Err(error) if is_gone(&error) => Ok(tell(&channel, &Given::Gone(error.to_string()))?),
        Err(error) => Ok(tell(&channel, &Given::Refused(error.to_string()))?),
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::UnexpectedEof
    )
}

fn tell(mut channel: &Channel, what: &impl Serialize) -> io::Result<()> {
    channel.write_all(&serde_json::to_vec(what).expect("plain fields always encode"))
}

fn hear<T: for<'a> Deserialize<'a>>(mut channel: &Channel) -> io::Result<T> {
    let mut record = vec![0; RECORD];
    let count = channel.read(&mut record)?;
    let malformed = |error| {
        io::Error::new(
            ErrorKind::InvalidData,
            format!("its message is none: {error}"),
        )
    };
    serde_json::from_slice(&record[..count]).map_err(malformed)
}

/// Carries bytes between the channel and the socket until either ends.
fn carry(mut channel: &Channel, mut socket: UnixStream, came: &[u8]) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    let mut record = vec![0; RECORD];
    let mut pending: Vec<u8> = Vec::new();
    let say = |mut channel: &Channel, bytes: &[u8]| -> io::Result<()> {
        let mut message = Vec::with_capacity(bytes.len() + 1);
        message.push(b'd');
        message.extend_from_slice(bytes);
        channel.write_all(&message)
    };
    if !came.is_empty() {
        say(channel, came)?;
    }
    let (mut heard, mut said) = (Instant::now(), Instant::now());
    loop {
        let mut waiter = Waiter::new();
        let listens = pending.len() < TYPED;
        let from = listens.then(|| waiter.add(channel, true, false));
        let to = waiter.add(&socket, true, !pending.is_empty());
        waiter.wait(Some(STILL))?;
        let now = Instant::now();
        let ready = from.map(|at| waiter.ready(at)).unwrap_or_default();
        if ready.read || ready.hung_up || ready.failed {
            heard = now;
            let count = channel.read(&mut record)?;
            match record[..count].split_first() {
                None => return Ok(()),
                Some((b'd', bytes)) => pending.extend_from_slice(bytes),
                Some((b'k', _)) => {}
                Some(_) => return Err(io::Error::other("it says what this version does not know")),
            }
        } else if listens && now - heard > GONE {
            return Err(ErrorKind::TimedOut.into());
        }
        let ready = waiter.ready(to);
        if !pending.is_empty() {
            match socket.write(&pending) {
                Ok(count) => drop(pending.drain(..count)),
                Err(error) if is_transient(error.kind()) => {}
                // Its end is seen by reading.
                Err(_) => pending.clear(),
            }
        }
        if ready.read || ready.hung_up || ready.failed {
            match socket.read(&mut record[..RECORD / 4]) {
                Ok(0) => return Ok(()),
                Ok(count) => {
                    say(channel, &record[..count])?;
                    said = now;
                }
                Err(error) if is_transient(error.kind()) => {}
                Err(error) => return Err(error),
            }
        }
        if now - said >= STILL {
            channel.write_all(b"k")?;
            said = now;
        }
    }
}

fn is_transient(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

impl std::fmt::Debug for AtSite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AtSite").finish_non_exhaustive()
    }
}

/// The way to a console by the site's records and the agent of the host that serves the machine.
pub struct AtSite {
    store: Mutex<Store>,
    trust: Trust,
}

impl AtSite {
    /// By these records, and this secret of the site's.
    #[must_use]
    pub fn new(store: Store, secret: &Secret) -> Self {
        Self {
            store: Mutex::new(store),
            trust: Trust::holders(seal::derived(secret, LABEL)),
        }
    }
}

impl Way for AtSite {
    fn pace(&self) -> Pace {
        Pace {
            look: Duration::from_millis(500),
            hurry: Duration::from_millis(100),
            // A role that was just turned to another host's agent is told of with that one's next look.
            nobody: Duration::from_secs(5),
        }
    }

    fn look(&self, name: &str) -> Result<Seen, VisitError> {
        let store = lock(&self.store);
        let Ok(site) = store.read() else {
            // etcd is away: machines run on, and so does whoever looks.
            return Ok(Seen {
                server: None,
                processes: 1,
            });
        };
        let roles = site
            .hosts
            .values()
            .flat_map(|host| host.value.roles_of(name));
        let processes = roles.count();
        let Some((host, role)) = site.serving(name) else {
            return Ok(Seen {
                server: None,
                processes,
            });
        };
        let Some(port) = host.console else {
            return Err(VisitError::Refused(io::Error::other(format!(
                "the agent of host {} shows no consoles (`console_port` in its configuration)",
                host.name
            ))));
        };
        Ok(Seen {
            server: Some(Server {
                pid: role.pid,
                epoch: role.epoch(),
                on: Some((host.name.clone(), SocketAddr::new(host.address, port))),
            }),
            processes,
        })
    }

    fn enter(
        &self,
        name: &str,
        server: &Server,
        from: Option<u64>,
    ) -> io::Result<(u64, BufReader<UnixStream>)> {
        let (_, address) = server.on.as_ref().ok_or(ErrorKind::NotFound)?;
        let stream = TcpStream::connect_timeout(address, PATIENCE).map_err(|error| {
            io::Error::new(ErrorKind::ConnectionRefused, format!("{address}: {error}"))
        })?;
        stream.set_nodelay(true)?;
        let proved = handshake::prove(Stream::Tcp(stream), &self.trust);
        let channel = proved.map_err(|error| io::Error::other(error.to_string()))?;
        channel.set_patience(Some(PATIENCE))?;
        let wanted = Wanted {
            machine: name.to_owned(),
            pid: server.pid,
            from,
        };
        tell(&channel, &wanted)?;
        let first = match hear(&channel)? {
            Given::From(first) => first,
            Given::Gone(why) => return Err(io::Error::new(ErrorKind::NotFound, why)),
            Given::Refused(why) => return Err(io::Error::other(why)),
        };
        let (ours, theirs) = UnixStream::pair()?;
        // It ends with either side; what it has to say about that is that the connection is over.
        let carrying = move || drop(carry(&channel, theirs, &[]));
        std::thread::Builder::new()
            .name("carrier".into())
            .spawn(carrying)?;
        Ok((first, BufReader::new(ours)))
    }

    fn nobody(&self, name: &str) -> String {
        format!(
            "no host of this site has a process of machine {name:?}: doppel vm list shows them all"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Strangers of every kind, and one who holds the secret: whoever does not is told nothing, and he is told what there is not.
    #[test]
    fn only_a_holder_of_the_sites_secret_is_answered() {
        let directory = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let secret = Secret::from_bytes([1; 32]);
        show(listener, directory.path(), &secret).unwrap();
        let call = |trust: &Trust| {
            let stream = TcpStream::connect(address).unwrap();
            handshake::prove(Stream::Tcp(stream), trust)
        };
        // Another's, and the site's own where a pair's is proved: it is not the console's.
        for stranger in [Secret::from_bytes([2; 32]), secret.clone()] {
            let error = call(&Trust::holders(stranger)).unwrap_err();
            assert!(matches!(error, HandshakeError::Secret), "{error}");
        }
        let holder = Trust::holders(seal::derived(&secret, LABEL));
        for (machine, pid, word) in [("kv", 1, "Gone"), ("../kv", 1, "no name")] {
            let channel = call(&holder).unwrap();
            let wanted = Wanted {
                machine: machine.into(),
                pid,
                from: None,
            };
            tell(&channel, &wanted).unwrap();
            let given: Given = hear(&channel).unwrap();
            assert!(format!("{given:?}").contains(word), "{given:?}");
        }
        let channel = call(&holder).unwrap();
        (&channel).write_all(b"what?").unwrap();
        assert!(hear::<Given>(&channel).is_err());
    }

    #[test]
    fn who_is_turned_away_over_and_over_fills_no_log() {
        let (mut told, now) = (Told::default(), Instant::now());
        assert_eq!(told.another(now), Some(0));
        for _ in 0..1000 {
            assert_eq!(told.another(now + TELL_EVERY / 2), None);
        }
        assert_eq!(told.another(now + TELL_EVERY), Some(1000));
        assert_eq!(told.another(now + TELL_EVERY), None);
        assert_eq!(told.another(now + 3 * TELL_EVERY), Some(1));
    }

    #[test]
    fn bytes_are_carried_both_ways_until_either_end() {
        let (near, far) = UnixStream::pair().unwrap();
        let trust = Trust::holders(Secret::from_bytes([1; 32]));
        let other = trust.clone();
        let admitting =
            std::thread::spawn(move || handshake::admit(Stream::Unix(far), &other).unwrap());
        let near = handshake::prove(Stream::Unix(near), &trust).unwrap();
        let far = admitting.join().unwrap();
        let (mut left, left_end) = UnixStream::pair().unwrap();
        let (mut right, right_end) = UnixStream::pair().unwrap();
        let one = std::thread::spawn(move || carry(&near, left_end, b"before "));
        let two = std::thread::spawn(move || carry(&far, right_end, &[]));
        left.write_all(b"and after").unwrap();
        let mut got = [0; 16];
        right.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"before and after");
        right.write_all(b"typed").unwrap();
        let mut got = [0; 5];
        left.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"typed");
        drop(left);
        one.join().unwrap().unwrap();
        two.join().unwrap().unwrap();
        assert_eq!(right.read(&mut got).unwrap(), 0);
    }
}
