//! Checkpoints: whole, in parts, and what they hold of the devices.
#![forbid(unsafe_code)]

use hypervisor::checkpoint::{Image, Shadow};
use hypervisor::devices::{Bus, Devices, DevicesConfig};
use hypervisor::event::{Effect, GuestTime, Input, Need};
use hypervisor::kvm::CpuState;
use hypervisor::memory::GuestRam;

use super::Target;
use super::source::Source;

pub(super) const TARGET: Target = Target {
    name: "checkpoint",
    line: "a checkpoint with length and checksum made good, in parts; and device states: put in place whole, or refused",
    run,
    seeds,
};

const RAM_MIB: u32 = 2;
const PAGES: u64 = (RAM_MIB as u64) << 8;
const HEADER: usize = 96;

thread_local! {
    static RAM: GuestRam = GuestRam::new(RAM_MIB).expect("memory");
}

fn board() -> Devices {
    Devices::new(&DevicesConfig {
        mac: [2; 6],
        mtu: 1500,
        disk: None,
        wall_clock_ns: 0,
        firmware: false,
    })
}

/// A byte: 0 a checkpoint, 1 the devices' state; then the bytes.
fn run(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let choice = source.u8();
    if choice & 1 != 0 {
        devices(source.rest());
        return;
    }
    let mut whole = source.rest().to_vec();
    if choice & 2 == 0 && whole.len() >= HEADER {
        let length = whole.len() as u64 + 4;
        whole[16..24].copy_from_slice(&length.to_le_bytes());
        whole[24..32].copy_from_slice(&PAGES.to_le_bytes());
        let checksum = crc32c::crc32c(&whole);
        whole.extend_from_slice(&checksum.to_le_bytes());
    }
    in_parts(&whole, usize::from(choice >> 2) + HEADER);
    match Image::parse(&whole, PAGES) {
        Ok(image) => {
            let mut last = None;
            for (page, content) in image.pages() {
                assert!(page.0 < PAGES && content.len() == 4096);
                assert!(last.is_none_or(|last| last < page.0));
                last = Some(page.0);
                assert!(!image.zeros().iter().any(|run| run.contains(&page.0)));
            }
            assert!(image.zeros().iter().all(|run| run.end <= PAGES));
            patches(&image);
            let _ = CpuState::from_bytes(&image.state.cpu);
            devices(&image.state.devices);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Patches are for pages that are in no other list, and change nothing else.
fn patches(image: &Image<'_>) {
    let mut last = None;
    for patch in image.patches() {
        let page = patch.page();
        assert!(page.0 < PAGES && last.is_none_or(|last| last < page.0));
        last = Some(page.0);
        assert!(!image.zeros().iter().any(|run| run.contains(&page.0)));
        assert!(!image.pages().any(|(whole, _)| whole == page));
        let _ = patch.apply(&mut [0; 4096]);
    }
}

fn in_parts(whole: &[u8], size: usize) {
    let mut shadow = Shadow::new(PAGES);
    for (number, part) in (0..).zip(whole.chunks(size)) {
        if shadow.add(number, part).is_err() {
            return;
        }
        assert!(shadow.add(number, part).is_err(), "a part came twice");
        return_to(&mut shadow, whole, size, number);
    }
    assert_eq!(shadow.take(), whole);
}

/// After a refusal an area is of no use: another one, filled up to the same part.
fn return_to(shadow: &mut Shadow, whole: &[u8], size: usize, number: u32) {
    *shadow = Shadow::new(PAGES);
    for (again, part) in (0..=number).zip(whole.chunks(size)) {
        shadow.add(again, part).expect("it was taken before");
    }
}

/// A state that is taken for good is one that accesses do not break.
fn devices(bytes: &[u8]) {
    let mut board = match board().restored(bytes) {
        Ok(board) => board,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let saved = board.save();
    let again = board.restored(&saved).expect("what was saved is sound");
    assert_eq!(board, again);
    RAM.with(|ram| use_everything(&mut board, ram));
}

fn use_everything(board: &mut Devices, ram: &GuestRam) {
    for port in [
        0x20, 0x21, 0xa0, 0xa1, 0x40, 0x41, 0x42, 0x61, 0x3f8, 0x3fa, 0x3fd,
    ] {
        access(board, ram, Bus::Port, port, 1, false);
    }
    for base in [0xd000_1000u64, 0xd000_2000] {
        for register in [0x10, 0x34, 0x44, 0x60, 0x70] {
            access(board, ram, Bus::Mmio, base + register, 4, false);
        }
        for queue in [0, 1] {
            access(board, ram, Bus::Mmio, base + 0x50, 4, queue == 1);
        }
    }
    access(board, ram, Bus::Mmio, 0xd000_0000, 8, false);
    let _ = board.ticks_due(GuestTime(u64::MAX));
    let _ = (board.next_tick(), board.tick_plan(), board.frame_room(ram));
    for input in [
        Input::Tick(1),
        Input::Frame(vec![0; 60]),
        Input::Console(vec![1]),
    ] {
        let _ = board.apply(ram, &input);
    }
    for _ in 0..8 {
        if let Some(Need::Random(count)) = board.pending() {
            let _ = board.apply(ram, &Input::Random(vec![0; count]));
        }
        if board.interrupt_pending() {
            board.acknowledge_interrupt();
        }
    }
    let _ = (board.digest(), board.faults().count());
    drop(board.outputs());
}

fn access(board: &mut Devices, ram: &GuestRam, bus: Bus, at: u64, length: usize, write: bool) {
    let mut data = vec![0; length];
    let effect = if write {
        board.write(ram, bus, at, &data)
    } else {
        board.read(ram, bus, at, &mut data)
    };
    let answer = match effect {
        Effect::Done | Effect::PowerOff(_) | Effect::Reset | Effect::Crash => return,
        Effect::Halt | Effect::Needs(Need::Clock) => Input::Clock(GuestTime(u64::MAX / 2)),
        Effect::Needs(Need::Random(count)) => Input::Random(vec![0; count]),
    };
    board.answer(&answer, &mut data).expect("what it asked for");
}

fn seeds() -> Vec<Vec<u8>> {
    let state = board().save();
    let mut devices = vec![1];
    devices.extend(&state);
    let mut whole = vec![0; HEADER];
    whole[..8].copy_from_slice(b"DOPLCKPT");
    whole[8] = 3;
    // A machine: CPU, devices, one frame, one run of zeros, one page.
    whole[68..72].copy_from_slice(&64u32.to_le_bytes());
    whole[72..76].copy_from_slice(&(state.len() as u32).to_le_bytes());
    whole[76] = 1;
    whole[80] = 1;
    whole[88] = 1;
    whole.extend([0; 64]);
    whole.extend(&state);
    whole.extend(3u32.to_le_bytes());
    whole.extend([1, 2, 3]);
    for word in [5u64, 2, 9] {
        whole.extend(word.to_le_bytes());
    }
    whole.extend([7; 4096]);
    let mut sealed = vec![0];
    sealed.extend(&whole);
    let mut raw = vec![2];
    raw.extend(&whole);
    // A delta with a patch of one word, of a page behind the run and the page.
    let mut patched = vec![0];
    patched.extend(&whole[..HEADER]);
    (patched[9], patched[13]) = (4, 1);
    patched.extend(1u64.to_le_bytes());
    patched.extend(17u64.to_le_bytes());
    let (before, page) = whole[HEADER..].split_at(whole.len() - HEADER - 4096);
    patched.extend(before);
    patched.extend(11u64.to_le_bytes());
    patched.extend(0u32.to_le_bytes());
    patched.extend(page);
    patched.extend(1u64.to_le_bytes());
    patched.extend([1; 9]);
    vec![devices, sealed, raw, patched]
}
