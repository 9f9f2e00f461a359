//! A guest that reads the clock and random numbers all the time.
//!
//! Words: `reads=` how many of each before it powers off (default 0, endless), `entropy=` reads between two requests
//! of the entropy device (default 256; 0 for none). All of it goes into a ring of 1 MiB, so that memory depends on
//! every value. Status 0 if the clock never went back and random numbers did not repeat.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec;
use guest_runtime::platform::{GuestTime, clock, halt, random};
use guest_runtime::virtio::Entropy;
use guest_runtime::{Boot, Outcome, console_line};

guest_runtime::entry!(main);

const RING_WORDS: usize = (1 << 20) / size_of::<u64>();

fn main(boot: &'static Boot) -> Outcome {
    let words = boot.command_line;
    let reads = words.number_or("reads", 0)?;
    let interval = words.number_or("entropy", 256)?;
    let mut entropy = if interval == 0 {
        None
    } else {
        Some(Entropy::open()?)
    };
    let mut ring = vec![0_u64; RING_WORDS];
    let mut slots = (0..RING_WORDS).cycle();
    let mut put = |value| ring[slots.next().unwrap_or(0)] ^= value;
    console_line!("clock: started");

    let start = clock();
    let (mut last_time, mut last_random) = (start, random());
    let (mut backward, mut repeated, mut entropy_bytes) = (0_u64, 0_u64, 0_usize);
    let mut read = 0;
    while reads == 0 || read < reads {
        read += 1;
        let (time, bits) = (clock(), random());
        backward += u64::from(time < last_time);
        repeated += u64::from(bits == last_random);
        (last_time, last_random) = (time, bits);
        put(time.0);
        put(bits);
        if let Some(entropy) = entropy.as_mut().filter(|_| read % interval == 0) {
            // Every other request rings the bell itself; the rest leave it to the halt.
            entropy.request(read / interval % 2 == 0);
            while entropy
                .poll()
                .map(|bytes| {
                    entropy_bytes += bytes.len();
                    bytes.chunks_exact(8).for_each(|chunk| {
                        put(u64::from_le_bytes(core::array::from_fn(|byte| chunk[byte])));
                    });
                })
                .is_none()
            {
                let time = halt();
                backward += u64::from(time < last_time);
                last_time = time;
            }
        }
    }
    let GuestTime(took) = GuestTime(last_time.0 - start.0);
    console_line!(
        "clock: {reads} reads, {} ns each, back {backward}, repeats {repeated}, entropy {entropy_bytes}",
        took / reads.max(1)
    );
    Ok(u8::from(backward + repeated > 0))
}
