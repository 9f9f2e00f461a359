//! The switch's sockets and its thread.
//!
//! Unsafe code lives here for `poll(2)`, which the standard library does not have.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result};
use rdma_log::locks::lock;

use super::switch::{Card, MAX_FRAME, QUEUE, Switch};

/// Bytes that wait for somebody who is shown a host's frames: whoever judges by them must not miss one.
const VIEWER_QUEUE: usize = 64 * QUEUE;

/// The switch and the thread that serves it.
#[derive(Clone, Debug)]
pub struct Cables {
    switch: Arc<Mutex<Switch>>,
    /// Who is plugged in next.
    plugs: Arc<Mutex<Vec<(Card, Port)>>>,
    /// A byte on it makes the thread look at what is wrong anew.
    bell: Arc<UnixStream>,
}

impl Cables {
    /// Listens for the cards of hosts on these sockets, in a thread.
    ///
    /// # Errors
    /// If there is no thread or no socket to wake it.
    pub fn start(listeners: Vec<(Card, UnixListener)>) -> Result<Self> {
        let cards = listeners.iter().map(|&(card, _)| card).collect();
        let switch = Arc::new(Mutex::new(Switch::new(cards)));
        let (bell, heard) = UnixStream::pair().context("make a pair of sockets")?;
        let plugs = Arc::default();
        let mut thread = Thread {
            switch: Arc::clone(&switch),
            plugs: Arc::clone(&plugs),
            heard,
            ports: BTreeMap::new(),
        };
        for (card, listener) in listeners {
            listener
                .set_nonblocking(true)
                .context("prepare a listener")?;
            thread.ports.insert(card, Port::of_host(listener));
        }
        thread
            .heard
            .set_nonblocking(true)
            .context("prepare a socket")?;
        std::thread::Builder::new()
            .name("switch".into())
            .spawn(move || thread.serve())
            .context("start the switch's thread")?;
        Ok(Self {
            switch,
            plugs,
            bell: Arc::new(bell),
        })
    }

    /// Plugs in the other end of this stream: as a card of this network, or to be shown what a host sends. `first` goes out
    /// before any frame.
    ///
    /// # Errors
    /// If too many are plugged in, or the stream is no good.
    pub fn plug(
        &self,
        network: u8,
        shown: Option<u8>,
        stream: UnixStream,
        first: &[u8],
    ) -> Result<()> {
        stream.set_nonblocking(true).context("prepare a stream")?;
        let mut port = Port {
            stream: Some(stream),
            unsent: first.iter().copied().collect(),
            ..Port::default()
        };
        if shown.is_some() {
            port.queue = VIEWER_QUEUE;
        }
        // Known to the switch and to its thread at once: no frame of it is lost.
        let mut switch = lock(&self.switch);
        let card = switch
            .plug(network, shown)
            .context("too many are plugged in")?;
        let mut plugs = lock(&self.plugs);
        plugs.push((card, port));
        drop((plugs, switch));
        let _ = (&*self.bell).write(&[0]);
        Ok(())
    }

    /// Looks at the switch or changes it.
    pub fn with<T>(&self, work: impl FnOnce(&mut Switch) -> T) -> T {
        let outcome = work(&mut lock(&self.switch));
        // A full socket has woken the thread already.
        let _ = (&*self.bell).write(&[0]);
        outcome
    }
}

/// One card: where its host's QEMU connects, and the connection.
#[derive(Debug)]
struct Port {
    /// None for one that is plugged in by a stream of its own, and goes with it.
    listener: Option<UnixListener>,
    stream: Option<UnixStream>,
    read: Vec<u8>,
    unsent: VecDeque<u8>,
    /// The most bytes that may wait.
    queue: usize,
}

impl Default for Port {
    fn default() -> Self {
        Self {
            listener: None,
            stream: None,
            read: Vec::new(),
            unsent: VecDeque::new(),
            queue: QUEUE,
        }
    }
}

impl Port {
    fn of_host(listener: UnixListener) -> Self {
        Self {
            listener: Some(listener),
            ..Self::default()
        }
    }

    /// Whether nobody will ever be at the other end again.
    fn is_over(&self) -> bool {
        self.listener.is_none() && self.stream.is_none()
    }

    fn hang_up(&mut self) {
        self.stream = None;
        self.read.clear();
        self.unsent.clear();
    }

    /// Sends a frame, now or later; drops it when too much waits, and says so. Where nobody is plugged in nothing is lost.
    fn send(&mut self, frame: &[u8]) -> bool {
        if self.stream.is_none() {
            return true;
        }
        if self.unsent.len() + frame.len() > self.queue {
            return false;
        }
        self.unsent.extend((frame.len() as u32).to_be_bytes());
        self.unsent.extend(frame);
        true
    }

    fn flush(&mut self) {
        while let Some(stream) = &mut self.stream
            && !self.unsent.is_empty()
        {
            match stream.write(self.unsent.as_slices().0) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.hang_up(),
            }
        }
    }

    /// Reads what is there; whole frames go to `take`.
    fn receive(&mut self, mut take: impl FnMut(&[u8])) {
        let mut buffer = [0; 64 * 1024];
        let Some(stream) = &mut self.stream else {
            return;
        };
        match stream.read(&mut buffer) {
            Ok(0) => self.hang_up(),
            Ok(more) => {
                self.read.extend(&buffer[..more]);
                let mut rest = self.read.as_slice();
                while let Some((length, behind)) = rest.split_first_chunk::<4>() {
                    let length = u32::from_be_bytes(*length) as usize;
                    if length > MAX_FRAME {
                        eprintln!(
                            "lab: a card sent a frame of {length} bytes, its cable is unplugged"
                        );
                        self.hang_up();
                        return;
                    }
                    let Some((frame, after)) = behind.split_at_checked(length) else {
                        break;
                    };
                    take(frame);
                    rest = after;
                }
                let used = self.read.len() - rest.len();
                self.read.drain(..used);
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(_) => self.hang_up(),
        }
    }
}

struct Thread {
    switch: Arc<Mutex<Switch>>,
    plugs: Arc<Mutex<Vec<(Card, Port)>>>,
    heard: UnixStream,
    ports: BTreeMap<Card, Port>,
}

impl Thread {
    fn serve(mut self) {
        loop {
            if let Err(error) = self.wait() {
                eprintln!("lab: the switch cannot wait for frames ({error}) and ends");
                return;
            }
            let mut bell = [0; 64];
            while matches!(self.heard.read(&mut bell), Ok(1..)) {}
            let mut arrived = Vec::new();
            for (&card, port) in &mut self.ports {
                if let Some(Ok((stream, _))) = port.listener.as_ref().map(UnixListener::accept) {
                    // A host that was started again takes its cable back.
                    port.hang_up();
                    port.stream = stream.set_nonblocking(true).is_ok().then_some(stream);
                }
                port.receive(|frame| arrived.push((card, frame.to_vec())));
            }
            let now = Instant::now();
            let mut switch = lock(&self.switch);
            let mut plugs = lock(&self.plugs);
            self.ports.extend(plugs.drain(..));
            drop(plugs);
            let ports = &mut self.ports;
            let mut overflowed = 0;
            let mut deliver = |to: Card, frame: &[u8]| {
                if let Some(port) = ports.get_mut(&to)
                    && !port.send(frame)
                {
                    overflowed += 1;
                }
            };
            switch.due(now, &mut deliver);
            for (from, frame) in arrived {
                switch.frame(from, &frame, now, &mut deliver);
            }
            switch.overflowed += overflowed;
            for (&card, port) in &mut *ports {
                port.flush();
                if port.is_over() {
                    switch.unplug(card);
                }
            }
            ports.retain(|_, port| !port.is_over());
        }
    }

    /// Waits until a card has something, can take something, or something is due.
    fn wait(&self) -> io::Result<()> {
        let mut waited = vec![libc::pollfd {
            fd: self.heard.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }];
        for port in self.ports.values() {
            if let Some(listener) = &port.listener {
                waited.push(libc::pollfd {
                    fd: listener.as_raw_fd(),
                    events: libc::POLLIN,
                    revents: 0,
                });
            }
            if let Some(stream) = &port.stream {
                let out = if port.unsent.is_empty() {
                    0
                } else {
                    libc::POLLOUT
                };
                waited.push(libc::pollfd {
                    fd: stream.as_raw_fd(),
                    events: libc::POLLIN | out,
                    revents: 0,
                });
            }
        }
        let due = lock(&self.switch).next_due();
        let left = due.map(|due| due.saturating_duration_since(Instant::now()));
        let left = left.map(|left| libc::timespec {
            tv_sec: left.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(left.subsec_nanos() as i32),
        });
        let left = left.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the array and the time live until the call returns, and the length is the array's.
        let ready = unsafe {
            libc::ppoll(
                waited.as_mut_ptr(),
                waited.len() as libc::nfds_t,
                left,
                std::ptr::null(),
            )
        };
        if ready < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Ok(())
    }
}
