//! The block device, by the specification and against it.

use proptest::prelude::*;

use super::driver::{BLK, Guest, NEXT, Rings, WRITE};
use crate::devices::{BadDevices, DISK_BYTES_MAX, DISK_DEPTH, DeviceError, DiskConfig, QueueFault};
use crate::disk::{DATA_MAX, Data, Done, Operation, Request, RequestNumber, Status};
use crate::event::{Input, Output};

const SECTORS: u64 = 4096;
const F_FLUSH: u64 = 1 << 9;
const HEADERS: u64 = 0x20_0000;
const STATUSES: u64 = 0x21_0000;
const DATA: u64 = 0x22_0000;

const READ: u32 = 0;
const WRITES: u32 = 1;
const FLUSH: u32 = 4;
const ID: u32 = 8;

fn config(read_only: bool) -> DiskConfig {
    let mut id = [0; 20];
    id[..6].copy_from_slice(b"doppel");
    DiskConfig {
        sectors: SECTORS,
        read_only,
        id,
    }
}

struct Driver {
    guest: Guest,
    rings: Rings,
    next: u16,
}

impl Driver {
    fn new() -> Self {
        Self::with(config(false), F_FLUSH)
    }

    fn with(disk: DiskConfig, features: u64) -> Self {
        let mut guest = Guest::with(Some(disk));
        guest.set_up_pic();
        let rings = Rings::standard(3, 256);
        guest.negotiate(BLK, 1 << 32 | features);
        assert!(guest.set_up_queue(BLK, 0, rings));
        guest.mmio_write(BLK + 0x70, 0xf);
        assert_eq!(guest.mmio_read(BLK + 0x70), 0xf);
        Self {
            guest,
            rings,
            next: 0,
        }
    }

    /// Offers a request with `length` bytes of data at `at`; its number of turn.
    fn ask(&mut self, kind: u32, sector: u64, at: u64, length: u32) -> u64 {
        let turn = u64::from(self.next / 3);
        let (header, status) = (HEADERS + 16 * turn, STATUSES + turn);
        let ram = &self.guest.ram;
        ram.write_obj(header, kind).unwrap();
        ram.write_obj(header + 8, sector).unwrap();
        ram.write(status, &[0xff]).unwrap();
        let head = self.next;
        self.next += 3;
        let way = if kind == WRITES { 0 } else { WRITE };
        let after = if length > 0 { head + 1 } else { head + 2 };
        let guest = &self.guest;
        guest.descriptor(self.rings, head, (header, 16, NEXT, after));
        guest.descriptor(self.rings, head + 1, (at, length, way | NEXT, head + 2));
        guest.descriptor(self.rings, head + 2, (status, 1, WRITE, 0));
        guest.offer(self.rings, head);
        turn
    }

    fn notify(&mut self) -> Vec<Request> {
        self.guest.notify(BLK, 0);
        self.handed_out()
    }

    fn handed_out(&mut self) -> Vec<Request> {
        let outputs = self.guest.outputs().into_iter();
        outputs
            .map(|output| match output {
                Output::Disk(request) => request,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    fn done(&mut self, number: u64, status: Status, data: &[u8]) -> Result<(), DeviceError> {
        let done = Done {
            number: RequestNumber(number),
            status,
            data: Data(data.to_vec()),
        };
        let Guest { board, ram } = &mut self.guest;
        board.apply(ram, &Input::Disk(done))
    }

    fn status(&self, turn: u64) -> u8 {
        self.guest.bytes(STATUSES + turn, 1)[0]
    }
}

#[test]
fn registers_identify_the_device() {
    let mut driver = Driver::new();
    let guest = &mut driver.guest;
    assert_eq!(guest.mmio_read(BLK + 8), 2);
    let low = u64::from(guest.mmio_read(BLK + 0x100));
    let high = u64::from(guest.mmio_read(BLK + 0x104));
    assert_eq!(low | high << 32, SECTORS);
    let (size_max, seg_max) = (
        guest.mmio_read(BLK + 0x108) as usize,
        guest.mmio_read(BLK + 0x10c) as usize,
    );
    assert_eq!(
        size_max * seg_max,
        DATA_MAX,
        "what a driver may ask for is done"
    );
    guest.mmio_write(BLK + 0x14, 0);
    let features = u64::from(guest.mmio_read(BLK + 0x10));
    assert_eq!(features, 1 << 1 | 1 << 2 | F_FLUSH);
    let mut read_only = Driver::with(config(true), 0);
    read_only.guest.mmio_write(BLK + 0x14, 0);
    assert_eq!(read_only.guest.mmio_read(BLK + 0x10) & 1 << 5, 1 << 5);
}

#[test]
fn a_read_brings_its_data_and_an_interrupt() {
    let mut driver = Driver::new();
    let turn = driver.ask(READ, 5, DATA, 1024);
    let requests = driver.notify();
    let expected = Operation::Read {
        sector: 5,
        length: 1024,
    };
    assert_eq!(requests[0].operation, expected);
    assert_eq!(requests.len(), 1);
    assert_eq!(driver.guest.used_index(driver.rings), 0, "not yet");
    assert!(!driver.guest.board.interrupt_pending());
    driver.done(1, Status::Good, &[7; 1024]).unwrap();
    assert_eq!(driver.guest.bytes(DATA, 1024), [7; 1024]);
    assert_eq!(driver.status(turn), 0);
    assert_eq!(driver.guest.used(driver.rings, 0), (0, 1025));
    assert!(driver.guest.board.interrupt_pending());
    // Line 2 of the second controller.
    assert_eq!(driver.guest.board.acknowledge_interrupt(), 0x2a);
    assert!(driver.guest.board.something_happened());
    assert_eq!(driver.guest.mmio_read(BLK + 0x60), 1);
}

#[test]
fn a_write_is_captured_when_it_is_asked() {
    let mut driver = Driver::new();
    driver.guest.ram.write(DATA, &[1; 512]).unwrap();
    driver.ask(WRITES, 0, DATA, 512);
    let requests = driver.notify();
    driver.guest.ram.write(DATA, &[2; 512]).unwrap();
    assert_eq!(requests[0].written(), [1; 512]);
    let under_way: Vec<_> = driver.guest.board.disk_requests().collect();
    assert_eq!(under_way, [&requests[0]]);
    driver.done(1, Status::Error, &[]).unwrap();
    assert_eq!(driver.status(0), 1);
    assert_eq!(driver.guest.used(driver.rings, 0), (0, 1));
    assert_eq!(driver.guest.board.disk_requests().count(), 0);
}

#[test]
fn without_flushes_every_write_is_durable() {
    for (features, through) in [(F_FLUSH, false), (0, true)] {
        let mut driver = Driver::with(config(false), features);
        driver.ask(WRITES, 0, DATA, 512);
        let requests = driver.notify();
        match requests[0].operation {
            Operation::Write { durable, .. } => assert_eq!(durable, through),
            ref other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_makes_no_sense_is_answered_at_once() {
    let last = SECTORS - 1;
    let all: [(u32, u64, u32, u8); 10] = [
        (READ, SECTORS, 512, 1),
        (READ, last, 1024, 1),
        (READ, u64::MAX, 512, 1),
        (READ, 0, 100, 1),
        (READ, 0, 0, 1),
        (READ, 0, DATA_MAX as u32 + 512, 1),
        (WRITES, SECTORS, 512, 1),
        (WRITES, u64::MAX / 512, 512, 1),
        (11, 0, 16, 2),
        (0x8000_0000, 0, 16, 2),
    ];
    let mut driver = Driver::new();
    for (kind, sector, length, status) in all {
        let turn = driver.ask(kind, sector, DATA, length);
        assert_eq!(driver.notify(), [], "{kind} {sector} {length}");
        assert_eq!(driver.status(turn), status, "{kind} {sector} {length}");
    }
    let mut read_only = Driver::with(config(true), F_FLUSH);
    let turn = read_only.ask(WRITES, 0, DATA, 512);
    assert_eq!(read_only.notify(), []);
    assert_eq!(read_only.status(turn), 1);
    let turn = read_only.ask(FLUSH, 0, DATA, 0);
    assert_eq!(read_only.notify(), []);
    assert_eq!(read_only.status(turn), 0);
}

#[test]
fn the_name_is_told_as_far_as_it_fits() {
    let mut driver = Driver::new();
    for length in [20, 512, 3] {
        driver.guest.ram.write(DATA, &[0xee; 512]).unwrap();
        let turn = driver.ask(ID, 0, DATA, length);
        assert_eq!(driver.notify(), []);
        assert_eq!(driver.status(turn), 0);
        assert_eq!(driver.guest.bytes(DATA, 3), b"dop");
        assert_eq!(driver.guest.bytes(DATA + 20, 1), [0xee]);
    }
}

#[test]
fn overlapping_requests_wait_for_each_other_and_others_do_not() {
    let mut driver = Driver::new();
    driver.ask(WRITES, 8, DATA, 1024);
    driver.ask(READ, 100, DATA, 512);
    driver.ask(READ, 9, DATA, 512);
    driver.ask(WRITES, 200, DATA, 512);
    assert_eq!(
        driver.notify().len(),
        2,
        "the third reads what the first writes"
    );
    assert_eq!(driver.notify(), []);
    driver.done(2, Status::Good, &[0; 512]).unwrap();
    driver.guest.mmio_read(BLK);
    assert_eq!(driver.handed_out(), [], "the first is still under way");
    driver.done(1, Status::Good, &[]).unwrap();
    assert!(
        !driver.guest.board.has_outputs(),
        "an input makes no output"
    );
    // Any exit will do.
    driver.guest.inb(0x21);
    let requests = driver.handed_out();
    assert_eq!(requests.len(), 2);
    assert_eq!(requests[0].number, RequestNumber(3));
}

#[test]
fn what_is_under_way_is_bounded_however_often_the_driver_resets() {
    let mut driver = Driver::new();
    let mut handed_out = 0;
    for round in 0..8u64 {
        driver.next = 0;
        for n in 0..80 {
            driver.ask(READ, 2 * (80 * round + n), DATA, 512);
        }
        handed_out += driver.notify().len();
        driver.guest.mmio_write(BLK + 0x70, 0);
        driver.guest.negotiate(BLK, 1 << 32 | F_FLUSH);
        driver
            .guest
            .ram
            .write(driver.rings.available, &[0; 600])
            .unwrap();
        driver
            .guest
            .ram
            .write(driver.rings.used, &[0; 600])
            .unwrap();
        assert!(driver.guest.set_up_queue(BLK, 0, driver.rings));
        driver.guest.mmio_write(BLK + 0x70, 0xf);
    }
    assert_eq!(handed_out, DISK_DEPTH);
    // What comes of those that were forgotten is told to nobody, and makes room.
    let memory = driver.guest.bytes(0x10_0000, 0x20_0000);
    for number in 1..=DISK_DEPTH as u64 {
        driver.done(number, Status::Good, &[1; 512]).unwrap();
    }
    assert_eq!(driver.guest.bytes(0x10_0000, 0x20_0000), memory);
    driver.next = 0;
    driver.ask(READ, 0, DATA, 512);
    assert_eq!(driver.notify().len(), 1);
}

#[test]
fn the_bytes_under_way_are_bounded() {
    let mut driver = Driver::new();
    let length = DATA_MAX as u32 / 2;
    for n in 0..6 {
        driver.ask(READ, u64::from(length / 512) * n, 0x10_0000, length);
    }
    let requests = driver.notify();
    let bytes: usize = requests.iter().map(Request::length).sum();
    assert_eq!(bytes, DISK_BYTES_MAX);
}

#[test]
fn an_answer_that_does_not_fit_changes_nothing() {
    let mut driver = Driver::new();
    driver.ask(READ, 0, DATA, 512);
    driver.notify();
    let before = driver.guest.board.clone();
    let unknown = driver.done(2, Status::Good, &[0; 512]);
    assert!(matches!(unknown, Err(DeviceError::Unexpected { .. })));
    for (status, length) in [
        (Status::Good, 0),
        (Status::Good, 1024),
        (Status::Error, 512),
    ] {
        let wrong = driver.done(1, status, &vec![0; length]);
        assert!(matches!(wrong, Err(DeviceError::WrongData { .. })));
    }
    assert_eq!(driver.guest.board, before);
    let mut without = Guest::new();
    let done = Input::Disk(Done {
        number: RequestNumber(1),
        status: Status::Good,
        data: Data::default(),
    });
    let Guest { board, ram } = &mut without;
    assert!(board.apply(ram, &done).is_err());
}

#[test]
fn a_chain_that_goes_back_and_forth_stops_the_device() {
    let mut driver = Driver::new();
    let rings = driver.rings;
    let guest = &mut driver.guest;
    guest.descriptor(rings, 0, (HEADERS, 16, NEXT, 1));
    guest.descriptor(rings, 1, (STATUSES, 1, WRITE | NEXT, 2));
    guest.descriptor(rings, 2, (DATA, 512, 0, 0));
    guest.offer(rings, 0);
    guest.notify(BLK, 0);
    let faults: Vec<_> = guest.board.faults().collect();
    assert_eq!(faults.len(), 1);
    assert_eq!(faults[0].1.fault, QueueFault::Direction);
    assert_eq!(guest.mmio_read(BLK + 0x70) & 64, 64);
}

#[test]
fn a_request_without_header_or_place_for_its_status_is_given_back() {
    let mut driver = Driver::new();
    let rings = driver.rings;
    let guest = &mut driver.guest;
    guest.offer_buffer(rings, 0, HEADERS, 15, 0);
    guest.offer_buffer(rings, 1, HEADERS, 16, 0);
    guest.offer_buffer(rings, 2, STATUSES, 1, WRITE);
    guest.notify(BLK, 0);
    assert_eq!(guest.used_index(rings), 3);
    assert!(!guest.board.has_outputs());
    assert_eq!(guest.bytes(STATUSES, 1), [1]);
}

#[test]
fn a_state_with_requests_under_way_survives_and_an_impossible_one_does_not() {
    let mut driver = Driver::new();
    driver.guest.ram.write(DATA, &[3; 512]).unwrap();
    driver.ask(WRITES, 4, DATA, 512);
    driver.ask(READ, 8, DATA, 512);
    driver.notify();
    let saved = driver.guest.board.save();
    let fresh = Guest::with(Some(config(false))).board;
    let restored = fresh.restored(&saved).unwrap();
    assert_eq!(restored, driver.guest.board);
    let requests: Vec<_> = restored.disk_requests().cloned().collect();
    assert_eq!(requests[0].written(), [3; 512]);
    driver.guest.board = restored;
    driver.done(2, Status::Good, &[9; 512]).unwrap();
    assert_eq!(driver.status(1), 0);
    let text = String::from_utf8(saved).unwrap();
    for (from, to) in [
        ("\"sector\":4,", "\"sector\":4096,"),
        ("\"length\":512", "\"length\":513"),
        ("\"length\":512", "\"length\":1048576"),
        ("\"number\":2,\"held_back\"", "\"number\":1,\"held_back\""),
        ("{\"number\":1,", "{\"number\":7,"),
    ] {
        assert!(text.contains(from), "{from} not in {text}");
        let bad = text.replacen(from, to, 1);
        let error = fresh.restored(bad.as_bytes()).unwrap_err();
        assert!(
            matches!(error, BadDevices::Impossible { device: "disk" }),
            "{from} {to}: {error}"
        );
    }
    for disk in [None, Some(config(true))] {
        let other = Guest::with(disk).board;
        assert_eq!(
            other.restored(text.as_bytes()).unwrap_err(),
            BadDevices::Foreign
        );
    }
}

/// As many requests as can be under way, each of the longest chain there is and with as many bytes to be written as all may have: a
/// checkpoint takes it, or a guest that writes could have no backup.
#[test]
fn the_largest_state_fits_into_a_checkpoint() {
    let mut driver = Driver::new();
    let rings = driver.rings;
    let length = DISK_BYTES_MAX / DISK_DEPTH;
    driver.guest.descriptor(rings, 0, (HEADERS, 16, NEXT, 1));
    let data = (DATA, length as u32, NEXT, 2);
    driver.guest.descriptor(rings, 1, data);
    for index in 2..rings.size {
        let next = (index + 1) % rings.size;
        let flags = if next == 0 { WRITE } else { WRITE | NEXT };
        let place = (STATUSES, 1, flags, next);
        driver.guest.descriptor(rings, index, place);
    }
    for turn in 0..DISK_DEPTH {
        let sector = (turn * length) as u64 / 512;
        driver.guest.ram.write_obj(HEADERS, WRITES).unwrap();
        driver.guest.ram.write_obj(HEADERS + 8, sector).unwrap();
        driver.guest.offer(rings, 0);
        assert_eq!(driver.notify().len(), 1, "{turn}");
    }
    let saved = driver.guest.board.save();
    assert!(saved.len() > 2 * DISK_BYTES_MAX, "{}", saved.len());
    let room = crate::checkpoint::DEVICES_MAX;
    assert!(saved.len() as u64 <= room, "{} of {room}", saved.len());
    let fresh = Guest::with(Some(config(false))).board;
    assert_eq!(fresh.restored(&saved).unwrap(), driver.guest.board);
}

#[derive(Clone, Debug)]
enum Step {
    Descriptor(u16, (u64, u32, u16, u16)),
    Header(u32, u64),
    Offer(u16),
    Notify,
    Halt,
    Answer(usize, bool),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let address = prop_oneof![
        6 => HEADERS..DATA + 0x1000,
        2 => 0x10_c000u64..0x10_f000,
        1 => any::<u64>(),
    ];
    let length =
        prop_oneof![3 => Just(16u32), 3 => Just(512u32), 2 => Just(1u32), 1 => any::<u32>()];
    let flags = prop_oneof![
        Just(0),
        Just(NEXT),
        Just(WRITE),
        Just(WRITE | NEXT),
        0u16..8
    ];
    let kind = prop_oneof![
        Just(READ),
        Just(WRITES),
        Just(FLUSH),
        Just(ID),
        any::<u32>()
    ];
    let sector = prop_oneof![8 => 0u64..16, 1 => any::<u64>()];
    prop_oneof![
        6 => (0u16..8, (address, length, flags, 0u16..9))
            .prop_map(|(index, descriptor)| Step::Descriptor(index, descriptor)),
        3 => (kind, sector).prop_map(|(kind, sector)| Step::Header(kind, sector)),
        5 => (0u16..9).prop_map(Step::Offer),
        4 => Just(Step::Notify),
        2 => Just(Step::Halt),
        4 => (0usize..8, any::<bool>()).prop_map(|(which, good)| Step::Answer(which, good)),
        1 => Just(Step::Reset),
    ]
}

/// Does a step; what was handed out by it.
fn perform(driver: &mut Driver, step: &Step) -> Vec<Request> {
    let rings = driver.rings;
    match step {
        Step::Descriptor(index, descriptor) => driver.guest.descriptor(rings, *index, *descriptor),
        Step::Header(kind, sector) => {
            driver.guest.ram.write_obj(HEADERS, *kind).unwrap();
            driver.guest.ram.write_obj(HEADERS + 8, *sector).unwrap();
        }
        Step::Offer(head) => driver.guest.offer(rings, *head),
        Step::Notify => driver.guest.notify(BLK, 0),
        Step::Halt => {
            driver.guest.halt();
            driver.guest.resume(5);
        }
        Step::Answer(which, good) => {
            let request = driver.guest.board.disk_requests().nth(*which).cloned();
            if let Some(request) = request {
                let read = matches!(request.operation, Operation::Read { .. });
                let length = if read && *good { request.length() } else { 0 };
                let status = if *good { Status::Good } else { Status::Error };
                driver
                    .done(request.number.0, status, &vec![6; length])
                    .unwrap();
            }
            assert!(
                !driver.guest.board.has_outputs(),
                "an input makes no output"
            );
        }
        Step::Reset => {
            driver.guest.mmio_write(BLK + 0x70, 0);
            driver.guest.negotiate(BLK, 1 << 32 | F_FLUSH);
            driver.guest.set_up_queue(BLK, 0, rings);
            driver.guest.mmio_write(BLK + 0x70, 0xf);
        }
    }
    driver.handed_out()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever a driver does: requests stay within the disk and the bounds, none is handed out beside one that it conflicts with, two
    /// boards stay equal, and one that was saved and restored in the middle goes on as the other does.
    #[test]
    fn a_hostile_driver_does_no_harm(steps in prop::collection::vec(step(), 0..150)) {
        let (mut one, mut two) = (Driver::new(), Driver::new());
        for (turn, step) in steps.iter().enumerate() {
            let before: Vec<Request> = one.guest.board.disk_requests().cloned().collect();
            let requests = perform(&mut one, step);
            prop_assert_eq!(&requests, &perform(&mut two, step));
            let mut under_way = before;
            for request in requests {
                prop_assert!(request.length() <= DATA_MAX);
                if let Some(extent) = request.extent() {
                    prop_assert!(extent.is_within(SECTORS));
                    let mut others = under_way.iter().filter_map(Request::extent);
                    prop_assert!(!others.any(|other| other.conflicts(extent)));
                }
                under_way.push(request);
            }
            let under_way: Vec<_> = one.guest.board.disk_requests().collect();
            prop_assert!(under_way.len() <= DISK_DEPTH);
            prop_assert!(under_way.iter().map(|r| r.length()).sum::<usize>() <= DISK_BYTES_MAX);
            if turn == steps.len() / 2 {
                two.guest.board = two.guest.board.restored(&two.guest.board.save()).unwrap();
            }
        }
        prop_assert_eq!(&one.guest.board, &two.guest.board);
        prop_assert_eq!(one.guest.bytes(0, 4 << 20), two.guest.bytes(0, 4 << 20));
    }
}
