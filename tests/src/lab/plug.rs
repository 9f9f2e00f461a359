//! A cable of the lab's in this process: this machine is a card of one of its networks, or sees what a host sends.
#![forbid(unsafe_code)]

use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use hypervisor::backends::wait::Waiter;
use hypervisor::backends::{ETHERNET_HEADER, NetPort};
use rdma_log::locks::lock;

use super::switch::MAX_FRAME;

/// This process's end.
#[derive(Debug)]
pub struct Plug {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Plug {
    pub(super) fn new(reader: BufReader<UnixStream>) -> Result<Self> {
        let writer = reader.get_ref().try_clone().context("share the socket")?;
        writer.set_read_timeout(None).context("wait for long")?;
        Ok(Self { reader, writer })
    }

    /// Carries frames between the lab and a link's end, in threads of their own, until either is closed.
    ///
    /// # Errors
    /// If there are no threads.
    pub fn carry(self, port: NetPort) -> Result<Carrier> {
        let Self { mut reader, writer } = self;
        let end = writer.try_clone().context("share the socket")?;
        let inward = port.try_clone().context("share the link")?;
        let threads = vec![
            thread("lab-to-link", move || {
                while let Ok(Some(frame)) = read_frame(&mut reader) {
                    if send(&inward, &frame).is_err() {
                        break;
                    }
                }
            })?,
            thread("link-to-lab", move || {
                // It ends with either: that is how it is told to.
                let _ = hand_over(&port, &writer);
                let _ = writer.shutdown(Shutdown::Both);
            })?,
        ];
        Ok(Carrier { end, threads })
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// If the lab takes none.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        write_frame(&self.writer, frame).context("send a frame into the lab")
    }

    /// The next frame that comes; none if none has begun to come so soon.
    ///
    /// # Errors
    /// If the lab is gone.
    pub fn next_within(&mut self, within: Duration) -> Result<Option<Vec<u8>>> {
        if self.reader.buffer().is_empty() {
            let mut waiter = Waiter::new();
            waiter.add(&self.writer, true, false);
            if waiter.wait(Some(within))? == 0 {
                return Ok(None);
            }
        }
        let frame = read_frame(&mut self.reader).context("read a frame of the lab's")?;
        frame.context("the lab is gone").map(Some)
    }

    /// Keeps every frame whose sender is this address.
    ///
    /// # Errors
    /// If there is no thread.
    pub fn keep(self, sender: [u8; 6]) -> Result<Kept> {
        let Self { mut reader, writer } = self;
        let frames = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&frames);
        let reading = thread("lab-frames", move || {
            while let Ok(Some(frame)) = read_frame(&mut reader) {
                if frame.get(6..12) == Some(&sender) {
                    let mut kept = lock(&kept);
                    kept.push(frame);
                }
            }
        })?;
        Ok(Kept {
            frames,
            carrier: Carrier {
                end: writer,
                threads: vec![reading],
            },
        })
    }
}

/// Threads that carry frames; they end with it.
#[derive(Debug)]
pub struct Carrier {
    end: UnixStream,
    threads: Vec<JoinHandle<()>>,
}

impl Carrier {
    /// Whether the lab is still at the other end.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.threads.iter().all(|thread| !thread.is_finished())
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        // Threads that wait at it hear of it; one that waits at the link hears when that is closed, so none is waited for.
        let _ = self.end.shutdown(Shutdown::Both);
    }
}

/// Frames that a host sent.
#[derive(Debug)]
pub struct Kept {
    frames: Arc<Mutex<Vec<Vec<u8>>>>,
    carrier: Carrier,
}

impl Kept {
    /// Takes those that have come since the last time.
    ///
    /// # Errors
    /// If the lab shows nothing more.
    pub fn take(&self) -> Result<Vec<Vec<u8>>> {
        anyhow::ensure!(self.carrier.is_on(), "the lab shows no frames any more");
        let mut frames = lock(&self.frames);
        Ok(std::mem::take(&mut *frames))
    }
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .context("start a thread")
}

/// The next frame; `None` at the end of the stream.
fn read_frame(reader: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    match reader.read_exact(&mut length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut frame = vec![0; length];
    reader.read_exact(&mut frame)?;
    Ok(Some(frame))
}

fn write_frame(mut writer: &UnixStream, frame: &[u8]) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(4 + frame.len());
    bytes.extend((frame.len() as u32).to_be_bytes());
    bytes.extend(frame);
    writer.write_all(&bytes)
}

/// Sends a frame into the link, however long it is full.
fn send(port: &NetPort, frame: &[u8]) -> io::Result<()> {
    while !port.write(frame)? {
        let mut waiter = Waiter::new();
        waiter.add(port, false, true);
        waiter.wait(None)?;
    }
    Ok(())
}

/// Hands the link's frames to the lab until either ends.
fn hand_over(port: &NetPort, writer: &UnixStream) -> io::Result<()> {
    let mut slot = vec![0; ETHERNET_HEADER + MAX_FRAME];
    let mut waiter = Waiter::new();
    loop {
        while let Some(length) = port.read_into(&mut slot)? {
            write_frame(writer, &slot[..length])?;
        }
        waiter.clear();
        waiter.add(port, true, false);
        let stream = waiter.add(writer, false, false);
        waiter.wait(None)?;
        let stream = waiter.ready(stream);
        if stream.hung_up || stream.failed {
            return Ok(());
        }
    }
}
