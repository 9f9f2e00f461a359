//! A guest's own reader of the clock page, in ring 0 on real KVM, wherever it is stopped.

use super::*;
use crate::prepare::TSC_PORT;

/// In the guest's memory, behind its image.
const PAGE: u64 = crate::boot::IMAGE_BASE + 0x2000;
const PAGE_BYTES: [u8; 4] = (PAGE as u32).to_le_bytes();

/// Places the page, and then, over and over, reads it by `reader`, which has its address in RDI and leaves the time in RAX, and tells it by OUT.
fn guest(reader: &[u8]) -> Machine {
    let [a, b, c, d] = PAGE_BYTES;
    let mut code = vec![
        0xb9,
        0x01,
        0x4d,
        0x56,
        0x4b, // mov ecx, 0x4b564d01
        0xb8,
        a | 1,
        b,
        c,
        d, // mov eax, page + 1
        0x31,
        0xd2, // xor edx, edx
        0x0f,
        0x30, // wrmsr
        0xbf,
        a,
        b,
        c,
        d, // mov edi, page
    ];
    code.extend(reader);
    code.extend([0xe6, 0x80]); // out 0x80, al
    code.extend([0xeb, (-(reader.len() as i8 + 4)) as u8]); // back to the reader
    guest_of(&code)
}

/// As a prepared kernel has it (`prepare/clock_reader.rs`), but for its RET.
const COUNTS: [u8; 12] = [
    0x83, 0x6f, 0x04, 0x01, // sub dword ptr [rdi+4], 1
    0x79, 0x02, // jns
    0xe5, TSC_PORT, // in eax, TSC_PORT
    0x48, 0x8b, 0x47, 0x10, // mov rax, [rdi+16]
];

/// As Linux's, inlined where `prepare` does not know it: its RDTSC is a read of the port, between two looks at the version.
const LOOKS_TWICE: [u8; 15] = [
    0x8b, 0x37, // mov esi, [rdi]
    0x83, 0xe6, 0xfe, // and esi, -2
    0xe5, TSC_PORT, // in eax, TSC_PORT
    0x48, 0x8b, 0x47, 0x10, // mov rax, [rdi+16]
    0x39, 0x37, // cmp [rdi], esi
    0x75, 0xf1, // jne, back to its first
];

const MICROSECOND: u64 = 1_000;

/// To the next exit; what it waits for is given, a microsecond later each time. Whether it was the telling.
fn run_on(machine: &mut Machine, now: &mut u64) -> bool {
    while machine.step().unwrap() != Stepped::SyncPoint {}
    machine.outputs().for_each(drop);
    if machine.phase() == Phase::Needs(Need::Clock) {
        *now += MICROSECOND;
        machine.supply(&Input::Clock(GuestTime(*now))).unwrap();
        return false;
    }
    true
}

/// What the guest tells next.
fn told(machine: &mut Machine, now: &mut u64) -> u64 {
    for _ in 0..8 {
        if run_on(machine, now) {
            return machine.cpus.one().regs().rax;
        }
    }
    panic!("it reads and reads");
}

#[test]
fn a_reader_that_looks_twice_at_the_version_comes_to_an_end() {
    let (mut machine, mut now) = (guest(&LOOKS_TWICE), 0);
    for _ in 0..5 {
        assert_eq!(told(&mut machine, &mut now), now);
    }
}

#[test]
fn a_counted_clock_goes_on_and_never_back() {
    let (mut machine, mut now) = (guest(&COUNTS), 0);
    let (mut last, mut exits) = (0, 0);
    for _ in 0..1000 {
        let before = now;
        let time = told(&mut machine, &mut now);
        exits += u64::from(now > before);
        assert!((last..=now).contains(&time), "{last} {time} {now}");
        last = time;
    }
    assert!((10..40).contains(&exits), "{exits}");
    assert_eq!(last, now);
}

/// A guest that is preempted stands between any two of the reader's instructions, is given the time and goes on, here or, from a checkpoint
/// of it, elsewhere: with the same exits and the same times.
#[test]
fn a_reader_that_is_stopped_anywhere_reads_on_and_so_does_its_copy() {
    for steps in 0..14 {
        let (mut one, mut now) = (guest(&COUNTS), 0);
        // With a count that is not used up, and one that is.
        for _ in 0..5 {
            told(&mut one, &mut now);
        }
        one.debug(true, &[]).unwrap();
        for _ in 0..steps {
            match one.step().unwrap() {
                Stepped::SyncPoint if one.phase() != Phase::Ready => {
                    now += MICROSECOND;
                    one.supply(&Input::Clock(GuestTime(now))).unwrap();
                }
                _ => {}
            }
        }
        one.debug(false, &[]).unwrap();
        one.stop_between();
        let mut other = guest(&COUNTS);
        let saved = one.save(Pages::All, Base::default(), Vec::new()).unwrap();
        other.restore(&saved).unwrap();
        now += MICROSECOND;
        let mut last = now;
        let mut nows = [now; 2];
        for (machine, now) in [&mut one, &mut other].into_iter().zip(&mut nows) {
            machine.stop_between();
            machine.supply(&Input::Clock(GuestTime(*now))).unwrap();
        }
        for round in 0..70 {
            let [here, there] =
                [(&mut one, 0), (&mut other, 1)].map(|(machine, at)| told(machine, &mut nows[at]));
            assert_eq!(here, there, "{steps} {round}");
            assert_eq!(one.digest(), other.digest(), "{steps} {round}");
            // The one that was under way may have been read before.
            assert!(here >= last || round == 0, "{steps} {round}: {here} {last}");
            last = here.max(last);
        }
        assert_eq!(
            one.memory_hash_full().unwrap(),
            other.memory_hash_full().unwrap()
        );
    }
}
