//! How long until an entry over RDMA has committed, beside a bare write of as many bytes over the same device.
//!
//! `cargo run -p rdma-log --release --example commit`, on a machine with an RDMA device. Microseconds, of 64-byte entries; the
//! kinds take turns, and the best of the blocks' medians is told.

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use rdma_log::transport::rdma::{self, Config, Mode};
use rdma_log::verbs::{Bare, Choice, Verbs};
use rdma_log::{Marks, RingConfig};

const BLOCKS: usize = 20;
const BLOCK: usize = 200;

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}

fn block(mut once: impl FnMut()) -> f64 {
    let time = |_| {
        let begun = Instant::now();
        once();
        begun.elapsed()
    };
    median((0..BLOCK).map(time).collect())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let verbs = Verbs::load()?;
    let (mut there, mut here) = UnixStream::pair()?;
    let config = Config {
        mode: Mode::Nic,
        ..Config::default()
    };
    let accepting = {
        let config = config.clone();
        let sizes = RingConfig::default();
        thread::spawn(move || rdma::accept(&verbs, &mut here, &sizes, &config, Duration::ZERO))
    };
    let (mut writer, watch) = rdma::connect_watched(&verbs, &mut there, &config)?;
    let (mut reader, _) = accepting.join().expect("no panic")?;
    let mut bare = Bare::new(&verbs, &Choice::default(), 64)?;
    let mut best = [f64::INFINITY; 3];
    for _ in 0..BLOCKS {
        let times = [
            block(|| bare.write(64).expect("a device")),
            block(|| {
                writer
                    .events
                    .append(&[7; 32], Marks::default())
                    .expect("room");
                writer.events.notify().expect("a connection");
                while writer.events.committed().expect("a connection") < writer.events.last() {}
            }),
            block(|| {
                writer
                    .events
                    .append(&[7; 32], Marks::default())
                    .expect("room");
                writer.events.notify().expect("a connection");
                while watch.committed()[0] < writer.events.last() {
                    watch.turn().expect("a connection");
                }
            }),
        ];
        for (best, time) in best.iter_mut().zip(times) {
            *best = best.min(time);
        }
        while reader.events.next()?.is_some() {}
        reader.events.notify()?;
        watch.turn()?;
    }
    println!("bare write, post to completion      {:8.1}", best[0]);
    println!("ring, the lane asked                {:8.1}", best[1]);
    println!("ring, by the watch                  {:8.1}", best[2]);
    Ok(())
}
