//! A machine that starts anew, where it stands: at its guest's wish or its operator's.
//!
//! Nothing is made again, as a confined thread could not: memory is filled with zeros and loaded as before the first instruction, the vCPU takes
//! the state that it had then, and the devices go to power-on. What goes on is what the world counts by: positions, the rolling digest, guest
//! time. All of it is a function of the machine's description and of the position, so both sides come to the same machine.
#![forbid(unsafe_code)]

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{BootProtocol, Machine, MachineError, MachineSpec, OnReset, Phase, lock};
use crate::boot::linux::{self, Linux, SEED_BYTES};
use crate::boot::{self, BootError, Image};
use crate::kvm::{CpuState, Vcpu};
use crate::memory::{GuestRam, PAGE_SIZE, PageNumber};

/// Pages between two words that it goes on: a few milliseconds of work.
const PAGES_AT_ONCE: u64 = 4096;

static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// What it takes.
pub(super) struct Reset {
    /// Its description, images included.
    spec: MachineSpec,
    /// The CPU before its first instruction.
    cpu: CpuState,
}

impl Reset {
    /// Of a machine that was just loaded.
    pub(super) fn of(spec: &MachineSpec, vcpu: &Vcpu) -> Result<Self, MachineError> {
        Ok(Self {
            spec: spec.clone(),
            cpu: vcpu.state()?,
        })
    }

    /// Whether a guest that resets the machine starts anew.
    pub(super) fn wanted(&self) -> bool {
        self.spec.on_reset == OnReset::Reboot
    }
}

/// Puts the guest into memory, and the vCPU at its entry.
pub(super) fn load(
    spec: &MachineSpec,
    seed: [u8; SEED_BYTES],
    ram: &GuestRam,
    vcpu: &Vcpu,
) -> Result<(), BootError> {
    match spec.boot {
        BootProtocol::Bare => {
            let image = Image::parse(&spec.guest, spec.image.to_vec())?;
            boot::load(ram, vcpu, &image, &spec.command_line, spec.wall_clock_ns)
        }
        BootProtocol::Linux => {
            let linux = Linux {
                name: &spec.guest,
                kernel: &spec.image,
                initrd: &spec.initrd,
                command_line: &spec.command_line,
                seed,
                disk: spec.disk.is_some(),
                vcpus: spec.vcpus,
            };
            linux::load(ram, vcpu, &linux)
        }
    }
}

impl Machine {
    /// Starts anew at the sync point where it stands; outputs that were made stay to be taken. `turn` is told now and then that it goes on:
    /// a large memory takes a while.
    ///
    /// # Errors
    /// [`MachineError`]; the machine is then of no further use.
    pub fn reset(&mut self, mut turn: impl FnMut()) -> Result<(), MachineError> {
        self.cpus.one().abandon()?;
        let mut content = [0; PAGE_SIZE];
        let mut from = PageNumber(0);
        while let Some(run) = self.ram.next_touched(from)? {
            for page in run.clone().map(PageNumber) {
                self.ram.read_page(page, &mut content)?;
                if content != ZEROS {
                    self.ram.write(page.address(), &ZEROS)?;
                }
                if page.0 % PAGES_AT_ONCE == 0 {
                    turn();
                }
            }
            from = PageNumber(run.end);
        }
        let Reset { spec, cpu } = self
            .again
            .as_ref()
            .expect("whoever resets it has asked whether it can be");
        let seed = seed_of(spec.seed, self.position.0);
        let vcpu = self.cpus.one();
        load(spec, seed, &self.ram, vcpu)?;
        turn();
        lock(&self.devices).reset(&spec.devices());
        vcpu.restore(cpu)?;
        (self.phase, self.injectable) = (Phase::Ready, false);
        Ok(())
    }
}

/// The seed of the start at this position: a kernel that was started twice by one seed would begin with the same random numbers.
fn seed_of(first: [u8; SEED_BYTES], position: u64) -> [u8; SEED_BYTES] {
    let mut seed = [0; SEED_BYTES];
    for (number, word) in (0_u64..).zip(seed.chunks_exact_mut(8)) {
        let value = xxh3_64_with_seed(&first, position.wrapping_mul(4).wrapping_add(number));
        word.copy_from_slice(&value.to_le_bytes());
    }
    seed
}
