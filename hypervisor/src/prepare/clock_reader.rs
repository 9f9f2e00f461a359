//! The kernel's reader of KVM's clock page is given another body, which counts its reads down and asks the hypervisor at the last.
//!
//! A page that is read without an exit shows a time that stands between two of the guest's exits, and a guest that waits for it to go on
//! would wait for ever. So the page holds a count ([`crate::devices::pvclock`]): a read takes one off, and the one that goes below zero reads
//! [`TSC_PORT`], which is an exit, renews page and count, and is a place for whatever is due.
//!
//! ```text
//!   entry:  jmp room            room:  sub dword ptr [rdi+4], 1      the count
//!           (never executed)           jns 1f
//!           rdtsc                      in eax, TSC_PORT
//!           (padding)           1:     mov rax, [rdi+16]             the time: the scale makes nothing of any time stamp
//!   room:   …                          ret
//! ```
//! The first bytes cannot hold it: the kernel patches what is at RDTSC when it boots. Behind that is the arithmetic of the scale, which nobody
//! patches.

use std::ops::Range;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic};

use super::TSC_PORT;

/// Functions that are such readers begin with this: later kernels have two.
pub(super) const NAME: &str = "pvclock_clocksource_read";

/// The new body, with the page's address in RDI as C has it.
pub(super) const BODY: [u8; 13] = [
    0x83, 0x6f, 0x04, 0x01, // sub dword ptr [rdi+4], 1
    0x79, 0x02, // jns
    0xe5, TSC_PORT, // in eax, TSC_PORT
    0x48, 0x8b, 0x47, 0x10, // mov rax, [rdi+16]
    0xc3, // ret
];
/// `JMP rel8`.
const JMP_REL8: u8 = 0xeb;
const JMP_BYTES: usize = 2;
/// `JUMP_LABEL_NOP_SIZE`, of what may be patched while the kernel runs.
const KEY_BYTES: usize = 5;
/// What is left of an instruction that was cut is never executed.
const INT3: u8 = 0xcc;

/// Where a reader takes its new body, counted from its first byte: whole instructions of the old one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    entry: Range<usize>,
    room: Range<usize>,
}

impl Plan {
    /// Looks for room in a function's bytes; none if it does not read the counter, or is not made as such a reader is.
    pub(super) fn of(function: &[u8]) -> Option<Self> {
        let mut decoder = Decoder::new(64, function, DecoderOptions::NONE);
        let mut entry: Option<Range<usize>> = None;
        let mut has_read = false;
        let mut room: Option<usize> = None;
        while decoder.can_decode() {
            let at = decoder.position();
            let decoded = decoder.decode();
            if decoded.is_invalid() {
                return None;
            }
            let end = decoder.position();
            // Both are the kernel's to patch, at the entry and as padding behind RDTSC.
            let is_patched =
                decoded.code() == Code::Endbr64 || matches!(decoded.mnemonic(), Mnemonic::Nop);
            match &mut entry {
                None if is_patched => continue,
                // A tracer's.
                None if leaves(&decoded) => return None,
                None => entry = Some(at..end),
                Some(entry) if entry.len() < JMP_BYTES && entry.end == at => entry.end = end,
                Some(_) => {}
            }
            if !has_read {
                has_read = decoded.code() == Code::Rdtsc;
                continue;
            }
            if leaves(&decoded) || is_anothers(&decoded) {
                room = None;
            } else if room.is_some() || !is_patched {
                let start = *room.get_or_insert(at);
                let entry = entry.clone()?;
                let distance = start.checked_sub(entry.start + JMP_BYTES)?;
                if end - start >= BODY.len() && distance <= i8::MAX as usize {
                    return Some(Self {
                        entry,
                        room: start..end,
                    });
                }
            }
        }
        None
    }

    /// The bytes that change, and what they become.
    pub(super) fn changes(&self) -> [(Range<usize>, Vec<u8>); 2] {
        let distance = self.room.start - self.entry.start - JMP_BYTES;
        let filled = |bytes: &[u8], range: &Range<usize>| {
            let mut bytes = bytes.to_vec();
            bytes.resize(range.len(), INT3);
            bytes
        };
        let jump = filled(&[JMP_REL8, distance as u8], &self.entry);
        let body = filled(&BODY, &self.room);
        [(self.entry.clone(), jump), (self.room.clone(), body)]
    }
}

/// Whether these bytes read the counter.
pub(super) fn reads_counter(function: &[u8]) -> bool {
    let decoder = Decoder::new(64, function, DecoderOptions::NONE);
    let mut decoded = decoder.into_iter();
    decoded.any(|decoded| matches!(decoded.code(), Code::Rdtsc | Code::Rdtscp))
}

/// Whether this is somebody's to change: five bytes that do nothing are what the kernel keys a branch or a call with (jump labels, static calls), and
/// what reads the counter is a site of its own, of which the report tells.
fn is_anothers(decoded: &Instruction) -> bool {
    let is_key = decoded.mnemonic() == Mnemonic::Nop && decoded.len() == KEY_BYTES;
    is_key || super::code::family(decoded.code()).is_some()
}

/// Whether execution goes elsewhere from here, or comes from there: calls and returns are what the kernel patches.
fn leaves(decoded: &Instruction) -> bool {
    matches!(
        decoded.mnemonic(),
        Mnemonic::Call
            | Mnemonic::Jmp
            | Mnemonic::Ret
            | Mnemonic::Int
            | Mnemonic::Int3
            | Mnemonic::Ud2
            | Mnemonic::Hlt
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// As a compiler makes it of the kernel's source: the version, RDTSC with its padding, the scale, the version again.
    pub(in crate::prepare) const READER: &[u8] = &[
        0xf3, 0x0f, 0x1e, 0xfa, // endbr64
        0x8b, 0x37, // mov esi, [rdi]
        0x83, 0xe6, 0xfe, // and esi, -2
        0x0f, 0x31, 0x90, 0x90, 0x90, // rdtsc, which is patched
        0x48, 0xc1, 0xe2, 0x20, // shl rdx, 32
        0x48, 0x09, 0xd0, // or rax, rdx
        0x48, 0x2b, 0x47, 0x08, // sub rax, [rdi+8]
        0x0f, 0xbe, 0x4f, 0x1c, // movsx ecx, byte ptr [rdi+28]
        0x39, 0x37, // cmp [rdi], esi
        0x75, 0xe4, // jne
        0xe8, 0, 0, 0, 0, // call
        0xc3,
    ];

    #[test]
    fn a_reader_gets_a_body_behind_what_the_kernel_patches() {
        let plan = Plan::of(READER).expect("room");
        assert_eq!((plan.entry.clone(), plan.room.clone()), (4..6, 14..29));
        let mut new = READER.to_vec();
        for (range, bytes) in plan.changes() {
            new[range].copy_from_slice(&bytes);
        }
        assert_eq!(new[..4], READER[..4]);
        assert_eq!(new[4..6], [0xeb, 8], "to the room");
        assert_eq!(new[9..14], READER[9..14], "what the kernel patches");
        assert_eq!(new[14..27], BODY);
        assert_eq!(new[27..29], [0xcc, 0xcc]);
        assert_eq!(new[29..], READER[29..]);
    }

    #[test]
    fn what_is_no_such_reader_is_left_alone() {
        let traced = [&[0xe8, 0, 0, 0, 0], &READER[4..]].concat();
        assert_eq!(Plan::of(&traced), None, "a tracer patches its entry");
        let elsewhere: Vec<u8> = READER
            .iter()
            .map(|&byte| if byte == 0x31 { 0xa2 } else { byte })
            .collect();
        assert_eq!(Plan::of(&elsewhere), None, "it reads no counter");
        assert_eq!(Plan::of(&READER[..20]), None, "no room");
        let mut calls = READER.to_vec();
        calls[21..26].copy_from_slice(&[0xe8, 0, 0, 0, 0]);
        assert_eq!(Plan::of(&calls), None, "no room before a call");
        assert_eq!(Plan::of(&[0x06]), None, "no code");
    }

    #[test]
    fn what_others_change_or_tell_of_is_no_room() {
        let of = |other: &[u8]| {
            let reader = [&READER[..18], other, &READER[18..]].concat();
            Plan::of(&reader).map(|plan| plan.room)
        };
        let key = [0x0f, 0x1f, 0x44, 0, 0];
        assert_eq!(of(&key), Some(23..36), "behind the key");
        let again = [0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0];
        assert_eq!(of(&again), Some(20..34), "behind the second RDTSC");
        assert!(reads_counter(READER) && !reads_counter(&READER[..9]));
    }
}
