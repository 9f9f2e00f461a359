//! What a machine does for a backup that is to take another one's place, on real KVM.
#![forbid(unsafe_code)]

mod common;

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use hypervisor::backends::disk::{Disk, OpenImage, Opening};
use hypervisor::config;
use hypervisor::desk::{Answer, Ask, Desk};
use hypervisor::kvm::KvmSource;
use hypervisor::machine::{Machine, MachineSpec};
use hypervisor::orders::Order;
use hypervisor::record::{Ended, Recorder};
use hypervisor::sandbox::Sandbox;
use hypervisor::sink::NoLog;
use rdma_log::Seq;

/// Long enough for a host with much else to do.
const PATIENCE: Duration = Duration::from_secs(60);

fn answer(answers: &Receiver<(u64, Answer)>) -> Answer {
    answers
        .recv_timeout(PATIENCE)
        .expect("the guest's thread answers")
        .1
}

/// The guest stands, and the newcomer gets what its copies lack, that of the disk as well as that of the memory; the guest stands for
/// as long as that takes.
#[test]
fn a_newcomer_gets_the_rest_of_the_disk_while_the_guest_stands() {
    const SECTORS: u64 = 64;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, vec![7; SECTORS as usize * 512]).unwrap();
    let image = OpenImage::open(&path, Opening::Own).unwrap();
    let mut spec = MachineSpec::new("clock", 16, "", 0).unwrap();
    spec.disk = Some(image.config());
    let off = config::Sandbox {
        enabled: false,
        strict: false,
    };
    let sandbox = Sandbox::prepare(&off).unwrap();
    let disk = Arc::new(Disk::start(image, "m", common::wake(), sandbox).unwrap());
    let rest = disk.begin_copy(SECTORS);

    let (desk, answers) = Desk::new();
    let desk = Arc::new(desk);
    let mut parts = common::parts(Machine::new(&KvmSource::default(), &spec).unwrap());
    parts.desk = Some(Arc::clone(&desk));
    let (stage, orders) = (Arc::clone(&parts.stage), Arc::clone(&parts.orders));
    let disk_of_guest = Arc::clone(&disk);
    let recorder = std::thread::spawn(move || {
        let recorder = Recorder::new(parts);
        recorder.with_disk(Some(disk_of_guest)).run()
    });
    let order = |order| {
        orders.give(order);
        stage.bell().ring();
    };
    desk.leave(1, Ask::Watch);
    order(Order::Attend);
    assert!(matches!(answer(&answers), Answer::Watching));
    desk.leave(2, Ask::Stand(Box::new(NoLog::default()), Seq::ZERO));
    order(Order::Attend);
    assert!(matches!(answer(&answers), Answer::Cut(_)));
    let blocks = rest.recv_timeout(PATIENCE).expect("the rest of the disk");
    assert_eq!(blocks.unwrap().count() as u64, SECTORS / 8);
    // It is called off, and the guest runs on.
    order(Order::Resume);
    order(Order::Stop);
    assert_eq!(recorder.join().unwrap().unwrap(), Ended::Stopped);
}
