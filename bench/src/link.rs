//! What carries a checkpoint, bare: the same bytes between two processes, by shared memory and by a socket, with nothing around them.
//!
//! The other process is this program again (`bench peer`). A block is over when that process has it in memory of its own and has said so with a
//! byte over a socket. That is what a commit over TCP waits for; one over shared memory waits for less, as a checkpoint is safe there before the
//! backup has looked at it. In shared memory the socket carries the length alone: a process that waits in the kernel is woken, where one
//! that looks at a word would, on a busy machine, keep the processor from the one it waits for.
//!
//! Unsafe: the mapping of the memory that both share, and its bytes.

use std::fs::File;
use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::{Child, Command, Stdio};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;

use crate::world::end_with_us;

/// The longest block.
const MOST: usize = 16 << 20;
/// Blocks that are not counted: they find pages and buffers that nobody has touched.
const WARM: usize = 3;
/// For the other side's answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Which of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Memory that both processes have mapped.
    Memory,
    /// A socket over loopback.
    Socket,
}

/// What the other process is told.
#[derive(Clone, Debug, clap::Args)]
pub struct Peer {
    /// Where the socket listens
    #[arg(long, value_name = "PORT")]
    socket: u16,
    /// The memory's descriptor, which it inherits
    #[arg(long, value_name = "FD")]
    memory: Option<RawFd>,
}

/// A link to another process.
#[derive(Debug)]
pub struct Link {
    stream: TcpStream,
    shared: Option<Shared>,
    peer: Child,
    source: Vec<u8>,
}

impl Link {
    /// Starts the other process.
    ///
    /// # Errors
    /// If it does not start, or there is no memory to share.
    pub fn start(kind: Kind) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen")?;
        let port = listener.local_addr().context("ask for a port")?.port();
        let own = std::env::current_exe().context("find this program's own file")?;
        let mut command = Command::new(own);
        command
            .args(["peer", "--socket", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let memory = (kind == Kind::Memory).then(memory).transpose()?;
        if let Some(memory) = &memory {
            command.args(["--memory", &memory.as_raw_fd().to_string()]);
        }
        end_with_us(&mut command);
        let peer = command.spawn().context("start the other side")?;
        let (stream, _) = listener.accept().context("accept the other side")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream,
            shared: memory.as_ref().map(Shared::map).transpose()?,
            peer,
            source: (0..MOST).map(|at| (at % 251) as u8).collect(),
        })
    }

    /// Sends so many blocks of so many bytes, and says how long each took until the other process had it, in nanoseconds.
    ///
    /// # Errors
    /// If the other process is gone.
    pub fn send(&mut self, bytes: usize, blocks: usize) -> Result<Histogram<u64>> {
        ensure!((1..=MOST).contains(&bytes), "a block has 1 to {MOST} bytes");
        let mut times = Histogram::new_with_bounds(1, 60_000_000_000, 3)?;
        for block in 0..blocks + WARM {
            let from = (block * 4096) % (MOST - bytes + 1);
            let content = &self.source[from..from + bytes];
            let begun = Instant::now();
            if let Some(shared) = &mut self.shared {
                shared.put(content);
            }
            self.stream.write_all(&(bytes as u64).to_le_bytes())?;
            if self.shared.is_none() {
                self.stream.write_all(content)?;
            }
            self.stream
                .read_exact(&mut [0])
                .context("wait for the other side's answer")?;
            let took = begun.elapsed();
            if block >= WARM {
                times.saturating_record(took.as_nanos() as u64);
            }
        }
        Ok(times)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Both fail only for a process that was reaped.
        let _ = self.peer.kill();
        let _ = self.peer.wait();
    }
}

/// The other process: takes blocks until there is nobody who sends them.
///
/// # Errors
/// If there is nobody at all, or what comes is no block.
pub fn serve(peer: &Peer) -> Result<()> {
    let mut stream =
        TcpStream::connect((Ipv4Addr::LOCALHOST, peer.socket)).context("connect to bench")?;
    stream.set_nodelay(true)?;
    let shared = peer
        .memory
        .map(|memory| {
            // SAFETY: the descriptor was inherited for this alone, and nothing else in this process has it.
            let memory = File::from(unsafe { OwnedFd::from_raw_fd(memory) });
            Shared::map(&memory)
        })
        .transpose()?;
    let mut taken = vec![0; MOST];
    let mut length = [0; 8];
    while stream.read_exact(&mut length).is_ok() {
        let length = u64::from_le_bytes(length) as usize;
        ensure!(length <= MOST, "a block of {length} bytes");
        match &shared {
            Some(shared) => shared.take(&mut taken[..length]),
            None => stream.read_exact(&mut taken[..length])?,
        }
        black_box(&taken);
        stream.write_all(&[1])?;
    }
    Ok(())
}

/// A memfd that a child inherits.
fn memory() -> Result<File> {
    // SAFETY: the name is a string that ends, and the descriptor that comes back is nobody else's.
    let fd = unsafe { libc::memfd_create(c"bench-link".as_ptr(), 0) };
    ensure!(
        fd >= 0,
        "make memory to share: {}",
        std::io::Error::last_os_error()
    );
    // SAFETY: as above.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(MOST as u64).context("make memory to share")?;
    Ok(file)
}

/// The memory as this process has it mapped, for its life. Who may touch it goes to and fro over the socket: the length hands it over, the
/// answer gives it back.
#[derive(Debug)]
struct Shared(NonNull<u8>);

impl Shared {
    fn map(memory: &File) -> Result<Self> {
        // SAFETY: a new mapping at a place that the kernel chooses takes nobody's memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MOST,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                memory.as_raw_fd(),
                0,
            )
        };
        ensure!(
            base != libc::MAP_FAILED,
            "map the memory: {}",
            std::io::Error::last_os_error()
        );
        let base = NonNull::new(base.cast()).context("map the memory")?;
        Ok(Self(base))
    }

    fn put(&mut self, content: &[u8]) {
        assert!(content.len() <= MOST);
        // SAFETY: inside the mapping, which is never undone. The other process has answered the block before, and looks again when it is
        // told this one's length.
        unsafe {
            std::ptr::copy_nonoverlapping(content.as_ptr(), self.0.as_ptr(), content.len());
        }
    }

    fn take(&self, to: &mut [u8]) {
        assert!(to.len() <= MOST);
        // SAFETY: as above; the other process does not write before this block is answered.
        unsafe { std::ptr::copy_nonoverlapping(self.0.as_ptr(), to.as_mut_ptr(), to.len()) };
    }
}
