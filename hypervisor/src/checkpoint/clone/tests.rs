use super::*;
use crate::checkpoint::Pages;
use crate::entry::Base;
use crate::event::{GuestTime, Input, Need};
use crate::kvm::KvmSource;
use crate::machine::{MachineSpec, Phase};

fn machine() -> Machine {
    let spec = MachineSpec::new("memory", 16, "", 7).unwrap();
    let mut machine = Machine::new(&KvmSource::default(), &spec).unwrap();
    machine.watch_memory().unwrap();
    machine
}

fn run(machine: &mut Machine, exits: usize) {
    for _ in 0..exits {
        machine.step().unwrap();
        machine.outputs().for_each(drop);
        let now = Input::Clock(GuestTime(machine.position().0 * 50_000));
        match machine.phase() {
            Phase::Ready => {}
            Phase::Halted | Phase::Needs(Need::Clock) => machine.supply(&now).unwrap(),
            Phase::Needs(Need::Random(count)) => {
                machine.supply(&Input::Random(vec![5; count])).unwrap();
            }
            other => panic!("the guest is {other:?}"),
        }
    }
}

/// A machine that ran, copied in rounds with work between; and the bytes that went over.
fn copied() -> (Machine, Vec<u8>) {
    let mut machine = machine();
    run(&mut machine, 20);
    machine.track_for_copy().unwrap();
    let mut stream = Vec::new();
    let mut sender = Sender::new(&mut stream, machine.shared_ram());
    // In many parts, between which the guest runs on and somebody else has the memory hashed.
    let (mut from, mut parts) = (0, 0);
    loop {
        let swept = machine.sweep_uncopied(3).unwrap();
        let upto = swept.next.map_or(machine.pages(), |next| next.0);
        let passed = swept.pages.iter().filter(|page| page.0 < from);
        sender.pages(&passed.collect()).unwrap();
        sender.touched(from..upto).unwrap();
        run(&mut machine, 2);
        machine.memory_hash().unwrap();
        parts += 1;
        match swept.next {
            Some(next) => from = next.0,
            None => break,
        }
    }
    assert!(parts > 1, "one part");
    run(&mut machine, 30);
    let changed = machine.sweep_uncopied(1).unwrap();
    assert!(sender.pages(&changed.pages).unwrap() > 0);
    run(&mut machine, 5);
    let checkpoint = machine
        .save(Pages::Uncopied, Base::default(), vec![vec![1, 2, 3]])
        .unwrap();
    sender.checkpoint(&checkpoint).unwrap();
    assert_eq!(sender.bytes(), stream.len() as u64);
    (machine, stream)
}

#[test]
fn a_copy_goes_on_as_the_machine_does() {
    let (mut first, stream) = copied();
    let mut second = machine();
    let (restored, bytes) = receive(&stream[..], &mut second, None).unwrap();
    assert_eq!(
        (restored.staged, bytes),
        (vec![vec![1, 2, 3]], stream.len() as u64)
    );
    assert_eq!(
        first.memory_hash_full().unwrap(),
        second.memory_hash_full().unwrap()
    );
    run(&mut first, 40);
    run(&mut second, 40);
    assert_eq!(first.digest(), second.digest());
    assert_eq!(
        first.memory_hash_full().unwrap(),
        second.memory_hash_full().unwrap()
    );
}

#[test]
fn a_copy_that_is_cut_or_spoilt_anywhere_is_refused() {
    let (_, stream) = copied();
    let mut machine = machine();
    for at in (0..stream.len()).step_by(stream.len() / 40) {
        let error = receive(&stream[..at], &mut machine, None).unwrap_err();
        assert!(matches!(error, CloneError::Stream { bytes, .. } if bytes <= at as u64));
        let mut spoilt = stream.clone();
        spoilt[at] ^= 0x20;
        receive(&spoilt[..], &mut machine, None).unwrap_err();
    }
    assert_eq!(machine.position().0, 0, "nothing was put in place");
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![tag];
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&rdma_log::crc32c(body).to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

#[test]
fn a_hostile_sender_reaches_nothing_outside() {
    let mut machine = machine();
    let pages = machine.pages();
    let page = |number: u64| {
        let mut body = number.to_le_bytes().to_vec();
        body.extend_from_slice(&[7; PAGE_SIZE]);
        message(PAGES, &body)
    };
    let run = |first: u64, count: u64| {
        let mut body = first.to_le_bytes().to_vec();
        body.extend_from_slice(&count.to_le_bytes());
        message(ZEROS, &body)
    };
    for bad in [
        page(pages),
        page(u64::MAX),
        run(0, pages + 1),
        run(u64::MAX, 2),
        run(pages, u64::MAX),
        message(PAGES, &[0; 100]),
        message(ZEROS, &[0; 17]),
        message(PART, &[0; 3]),
        message(PART, &[1, 0, 0, 0, 1, 9]),
        message(PART, &[0, 0, 0, 0, 1]),
        message(9, &[]),
        [&[PAGES, 0xff, 0xff, 0xff, 0x7f][..], &[0; 64]].concat(),
    ] {
        let error = receive(&bad[..], &mut machine, None).unwrap_err();
        assert!(
            !matches!(error, CloneError::Stream { .. }),
            "{error}: {bad:?}"
        );
    }
}

#[test]
fn a_sender_that_goes_on_for_ever_is_refused() {
    let mut machine = machine();
    let mut run = 0u64.to_le_bytes().to_vec();
    run.extend_from_slice(&machine.pages().to_le_bytes());
    let everything = message(ZEROS, &run);
    let error = receive(
        &everything.repeat(TIMES_MAX as usize)[..],
        &mut machine,
        None,
    )
    .unwrap_err();
    assert!(matches!(error, CloneError::Stream { .. }), "{error}");
    let once_more = everything.repeat(TIMES_MAX as usize + 1);
    let error = receive(&once_more[..], &mut machine, None).unwrap_err();
    assert!(matches!(error, CloneError::Message { .. }), "{error}");
}

/// An image in memory, of blocks.
struct Plate(Vec<[u8; BLOCK]>);

impl Incoming for Plate {
    fn blocks(&self) -> u64 {
        self.0.len() as u64
    }

    fn put(&mut self, block: u64, content: &[u8; BLOCK]) -> std::io::Result<()> {
        self.0[block as usize] = *content;
        Ok(())
    }
}

#[test]
fn blocks_of_a_disk_go_over_with_the_machine() {
    let (_, copy) = copied();
    let mut stream = Vec::new();
    let blocks = Blocks {
        numbers: (0..100).map(|number| 3 * number).collect(),
        contents: (0..100).flat_map(|number| [number + 1; BLOCK]).collect(),
        zeros: vec![1, 2, 4],
        next: None,
    };
    Sender::new(&mut stream, machine().shared_ram())
        .blocks(&blocks)
        .unwrap();
    let whole = [&stream[..], &copy[..]].concat();
    let mut plate = Plate(vec![[9; BLOCK]; 300]);
    receive(&whole[..], &mut machine(), Some(&mut plate)).unwrap();
    for (block, content) in plate.0.iter().enumerate() {
        let expected = match block {
            block if block % 3 == 0 => (block / 3) as u8 + 1,
            1 | 2 | 4 => 0,
            _ => 9,
        };
        assert_eq!(*content, [expected; BLOCK], "block {block}");
    }
    for (why, image) in [
        ("block 99 of 99", Some(Plate(vec![[0; BLOCK]; 99]))),
        ("not copied", None),
    ] {
        let mut image = image;
        let to = image.as_mut().map(|image| image as &mut dyn Incoming);
        let error = receive(&whole[..], &mut machine(), to).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    }
    let mut plate = Plate(vec![[0; BLOCK]; 4]);
    for (tag, body) in [
        (BLOCKS, &[0; 100][..]),
        (NO_BLOCKS, &[0; 15]),
        (NO_BLOCKS, &[0xff; 16]),
    ] {
        let bytes = message(tag, body);
        receive(&bytes[..], &mut machine(), Some(&mut plate)).unwrap_err();
    }
}
