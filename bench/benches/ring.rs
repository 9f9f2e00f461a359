//! What one thread pays for an entry: to write it, to read it, by size, beside a plain copy of as many bytes.
//!
//! `cargo bench -p doppel-bench`. What two cores pay between them is measured by `bench ring`.

#![expect(
    missing_docs,
    reason = "criterion makes functions that cannot be documented"
)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rdma_log::transport::shm;
use rdma_log::{Marks, RingConfig};

const SIZES: [usize; 5] = [16, 32, 256, 4096, 65_536];

fn write_and_read(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("write and read");
    for size in SIZES {
        let (mut writer, mut reader) = shm::pair(&RingConfig::default()).expect("shared memory");
        let payload = vec![7; size];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_with_input(
            BenchmarkId::new("ring", size),
            &payload,
            |bencher, payload| {
                bencher.iter(|| {
                    writer
                        .events
                        .append(black_box(payload), Marks::default())
                        .expect("room");
                    let entry = reader
                        .events
                        .next()
                        .expect("a good entry")
                        .expect("an entry");
                    black_box(entry.payload()[0])
                });
            },
        );
        let mut to = vec![0_u8; size];
        group.bench_with_input(
            BenchmarkId::new("memcpy", size),
            &payload,
            |bencher, payload| {
                bencher.iter(|| black_box(&mut to).copy_from_slice(black_box(payload)));
            },
        );
    }
    group.finish();
}

criterion_group!(ring, write_and_read);
criterion_main!(ring);
