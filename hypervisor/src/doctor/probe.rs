//! A tiny guest that measures this KVM: what an exit costs, what a kick takes, what is emulated, what can be trapped.
//!
//! Each measurement has a machine of its own, since some of them end with a KVM that cannot go on (SSE that it does not
//! emulate). Each has a time limit too: a watchdog kicks a guest that does not come back. All of them together take about
//! half a second where an exit costs 12 µs.
#![forbid(unsafe_code)]

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_fpu, kvm_regs};
use serde::Serialize;

use crate::boot::{self, BootError, IMAGE_BASE, Image};
use crate::kvm::{Exit, Kick, KvmError, KvmSource, Told, Vcpu, Vm};
use crate::memory::{GuestRam, MemoryError};

/// When a guest that does not come back is given up. All that these guests do takes milliseconds.
const LIMIT: Duration = Duration::from_millis(500);
/// How long exits are counted at most: it bounds the whole where exits are slow.
const COUNTED: Duration = Duration::from_millis(60);
/// Exits over which a cost is averaged: 12 ms where one takes 12 µs, and enough to drown the first, slow ones.
const EXITS: u32 = 1000;
/// Turns of the counting loop, two instructions each: 20 ms where an instruction is emulated in 1 µs.
const TURNS: u64 = 10_000;
/// Kicks of which the median and the worst are taken.
const KICKS: usize = 60;

const MIB: u32 = 2;
/// An address without memory, in the window that the boot page tables map.
const MMIO: u64 = 0xd000_0000;
/// A page of memory that nothing else uses.
const SCRATCH: u64 = 0x18_0000;

/// `out 0x80, al; jmp` back.
const PORT: &[u8] = &[0xe6, 0x80, 0xeb, 0xfc];
/// `mov [rdi], eax; jmp` back.
const STORE: &[u8] = &[0x89, 0x07, 0xeb, 0xfc];
/// `dec rcx; jnz` back; `out 0x80, al`.
const COUNT: &[u8] = &[0x48, 0xff, 0xc9, 0x75, 0xfb, 0xe6, 0x80];
/// `jmp` to itself.
const SPIN: &[u8] = &[0xeb, 0xfe];
/// `pxor xmm0, xmm0; out 0x80, al`.
const SSE: &[u8] = &[0x66, 0x0f, 0xef, 0xc0, 0xe6, 0x80];
/// `mov ecx, 0x10; rdmsr; out 0x80, al`: the time-stamp counter's MSR, which the filter denies.
const READ_MSR: &[u8] = &[0xb9, 0x10, 0, 0, 0, 0x0f, 0x32, 0xe6, 0x80];
/// `rdtsc; out 0x80, al`.
const RDTSC: &[u8] = &[0x0f, 0x31, 0xe6, 0x80];
/// `mov eax, 1; xor ecx, ecx; cpuid; out 0x80, al`.
const CPUID_1: &[u8] = &[0xb8, 1, 0, 0, 0, 0x31, 0xc9, 0x0f, 0xa2, 0xe6, 0x80];
/// `mov [rdi], eax; out 0x80, al`.
const DIRTY: &[u8] = &[0x89, 0x07, 0xe6, 0x80];

/// Why a measurement gave nothing.
#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("the probe guest did not come back within {} ms", LIMIT.as_millis())]
    TooLong,
    #[error("the probe guest made an unexpected exit: {0:?}")]
    Unexpected(Exit),
    #[error("the thread of the probe guest could not be started: {0}")]
    Thread(std::io::Error),
}

/// A measurement, or in words why there is none.
pub type Measured<T> = Result<T, String>;

/// The same thing in both rings.
#[derive(Clone, Debug, Serialize)]
pub struct Rings<T> {
    /// In ring 0.
    pub ring0: T,
    /// In ring 3, where guests of ours work.
    pub ring3: T,
}

/// How long a kick takes to stop a vCPU, in nanoseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct KickTime {
    /// The median.
    pub p50_ns: u64,
    /// The worst of a few dozen.
    pub max_ns: u64,
}

/// What the probe guest found.
#[derive(Clone, Debug, Serialize)]
pub struct Probe {
    /// A port exit and back, in nanoseconds.
    pub port_exit_ns: Rings<Measured<u64>>,
    /// An MMIO exit and back, in nanoseconds.
    pub mmio_exit_ns: Rings<Measured<u64>>,
    /// A plain instruction, in nanoseconds.
    pub instruction_ns: Rings<Measured<f64>>,
    /// From a kick to the stop.
    pub kick: Measured<KickTime>,
    /// Whether SSE works in ring 0.
    pub sse_in_ring0: Measured<bool>,
    /// Whether the debugger can go instruction by instruction.
    pub single_step: Rings<Measured<bool>>,
    /// Whether a filtered MSR comes to us.
    pub msr_exits: Measured<bool>,
    /// Whether CPUID as the guest sees it has neither a time-stamp counter nor hardware random numbers.
    pub template_holds: Rings<Measured<bool>>,
    /// Whether RDTSC runs in the guest although CPUID hides it.
    pub rdtsc_runs: Measured<bool>,
    /// Whether the dirty log shows a page that the guest wrote.
    pub dirty_log: Measured<bool>,
    /// All of it, in milliseconds.
    pub took_ms: u64,
}

/// Measures. Some of it may fail; that is in the result.
#[must_use]
pub fn measure(source: &KvmSource) -> Probe {
    let started = Instant::now();
    let bench = |code: &'static [u8], ring3| Bench {
        source,
        code,
        ring3,
        rdi: SCRATCH,
        rcx: 0,
    };
    let both = |code: &'static [u8]| Rings {
        ring0: bench(code, false),
        ring3: bench(code, true),
    };
    let exits = |rings: Rings<Bench<'_>>| Rings {
        ring0: words(rings.ring0.exit_cost()),
        ring3: words(rings.ring3.exit_cost()),
    };
    let count = both(COUNT);
    Probe {
        port_exit_ns: exits(both(PORT)),
        mmio_exit_ns: exits(Rings {
            ring0: bench(STORE, false).rdi(MMIO),
            ring3: bench(STORE, true).rdi(MMIO),
        }),
        instruction_ns: Rings {
            ring0: words(count.ring0.instruction_cost()),
            ring3: words(count.ring3.instruction_cost()),
        },
        kick: words(bench(SPIN, true).kick_time()),
        sse_in_ring0: words(bench(SSE, false).reaches_port()),
        single_step: Rings {
            ring0: words(bench(COUNT, false).single_steps()),
            ring3: words(bench(COUNT, true).single_steps()),
        },
        msr_exits: words(bench(READ_MSR, false).msr_exits()),
        template_holds: Rings {
            ring0: words(bench(CPUID_1, false).template_holds()),
            ring3: words(bench(CPUID_1, true).template_holds()),
        },
        rdtsc_runs: words(bench(RDTSC, false).reaches_port()),
        dirty_log: words(bench(DIRTY, false).dirty_log()),
        took_ms: started.elapsed().as_millis() as u64,
    }
}

fn words<T>(outcome: Result<T, ProbeError>) -> Measured<T> {
    outcome.map_err(|error| error.to_string())
}

/// One measurement's machine, before it is built.
struct Bench<'a> {
    source: &'a KvmSource,
    code: &'static [u8],
    ring3: bool,
    rdi: u64,
    rcx: u64,
}

/// One measurement's machine.
struct Running {
    // Dropped in this order: the vCPU and the VM before the memory they point into.
    vcpu: Vcpu,
    vm: Vm,
    ram: GuestRam,
}

impl Bench<'_> {
    fn rdi(self, rdi: u64) -> Self {
        Self { rdi, ..self }
    }

    fn build(&self) -> Result<Running, ProbeError> {
        let ram = GuestRam::new(MIB)?;
        let vm = Vm::new(self.source.open()?, &ram)?;
        let (vcpu, _) = vm.create_vcpu(0, &Told::default())?;
        let image = Image::parse("probe", elf(self.code)).map_err(BootError::from)?;
        boot::load(&ram, &vcpu, &image, "", 0)?;
        let mut sregs = vcpu.sregs()?;
        if self.ring3 {
            (sregs.cs.selector, sregs.cs.dpl) = (0x23, 3);
            for data in [
                &mut sregs.ds,
                &mut sregs.es,
                &mut sregs.fs,
                &mut sregs.gs,
                &mut sregs.ss,
            ] {
                (data.selector, data.dpl) = (0x1b, 3);
            }
        }
        let regs = kvm_regs {
            rip: IMAGE_BASE,
            rsp: SCRATCH,
            rdi: self.rdi,
            rcx: self.rcx,
            rflags: 2,
            ..Default::default()
        };
        let fpu = kvm_fpu {
            fcw: 0x37f,
            mxcsr: 0x1f80,
            ..Default::default()
        };
        vcpu.set(&regs, &sregs, &fpu)?;
        Ok(Running { vcpu, vm, ram })
    }

    /// Builds the machine and runs `work` with it; a guest that does not come back is kicked after [`LIMIT`].
    fn with<T>(
        &self,
        work: impl FnOnce(&mut Running) -> Result<T, ProbeError>,
    ) -> Result<T, ProbeError> {
        let mut running = self.build()?;
        let kick = Kick::this_thread();
        let (done, is_done) = channel::<()>();
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("watchdog".into())
                .spawn_scoped(scope, move || {
                    if is_done.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                        kick.kick();
                    }
                })
                .map_err(ProbeError::Thread)?;
            let outcome = work(&mut running);
            drop(done);
            outcome
        })
    }

    fn exit_cost(&self) -> Result<u64, ProbeError> {
        self.with(|running| {
            next(&mut running.vcpu)?;
            let started = Instant::now();
            let mut exits = 0;
            while exits < EXITS && started.elapsed() < COUNTED {
                match next(&mut running.vcpu)? {
                    Exit::Port { write: true, .. } | Exit::Mmio { write: true, .. } => {}
                    other => return Err(ProbeError::Unexpected(other)),
                }
                exits += 1;
            }
            Ok(started.elapsed().as_nanos() as u64 / u64::from(exits.max(1)))
        })
    }

    /// The difference of two runs, so that entry, exit and start-up do not count.
    fn instruction_cost(&self) -> Result<f64, ProbeError> {
        let time = |turns| {
            let bench = Self {
                rcx: turns,
                ..*self
            };
            bench.with(|running| {
                let started = Instant::now();
                expect_port(next(&mut running.vcpu)?)?;
                Ok(started.elapsed())
            })
        };
        let (short, long) = (time(1)?, time(TURNS)?);
        let nanos = long.saturating_sub(short).as_nanos() as f64;
        Ok(nanos / (2.0 * (TURNS - 1) as f64))
    }

    fn reaches_port(&self) -> Result<bool, ProbeError> {
        self.with(|running| match next(&mut running.vcpu) {
            Ok(Exit::Port { .. }) => Ok(true),
            Ok(_) | Err(ProbeError::Kvm(KvmError::Stopped { .. })) => Ok(false),
            Err(error) => Err(error),
        })
    }

    fn msr_exits(&self) -> Result<bool, ProbeError> {
        self.with(|running| {
            Ok(matches!(
                next(&mut running.vcpu)?,
                Exit::ReadMsr { index: 0x10 }
            ))
        })
    }

    fn template_holds(&self) -> Result<bool, ProbeError> {
        self.with(|running| {
            expect_port(next(&mut running.vcpu)?)?;
            let regs = running.vcpu.regs();
            let (tsc, rdrand) = (regs.rdx & 1 << 4, regs.rcx & 1 << 30);
            Ok(tsc == 0 && rdrand == 0)
        })
    }

    fn dirty_log(&self) -> Result<bool, ProbeError> {
        self.with(|running| {
            running.vm.track_dirty(&running.ram, true)?;
            expect_port(next(&mut running.vcpu)?)?;
            let wrote = running.vm.take_dirty()?;
            let page = crate::memory::PageNumber(SCRATCH / 4096);
            Ok(wrote.iter().any(|dirty| dirty == page))
        })
    }

    fn single_steps(&self) -> Result<bool, ProbeError> {
        let bench = Self { rcx: 3, ..*self };
        bench.with(|running| {
            for _ in 0..3 {
                if !running.vcpu.single_step()? {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    fn kick_time(&self) -> Result<KickTime, ProbeError> {
        let mut running = self.build()?;
        let kick = Kick::this_thread();
        let (go, going) = channel::<()>();
        let (stopped, has_stopped) = channel::<Instant>();
        let (tell, told) = channel::<Duration>();
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("kicker".into())
                .spawn_scoped(scope, move || {
                    for () in going {
                        // A kick that comes before the guest runs stops nothing and is no measurement: another follows.
                        let time = loop {
                            std::thread::sleep(Duration::from_millis(1));
                            let at = Instant::now();
                            kick.kick();
                            match has_stopped.recv_timeout(LIMIT / 8) {
                                Ok(stopped) => break stopped.saturating_duration_since(at),
                                Err(RecvTimeoutError::Timeout) => {}
                                Err(RecvTimeoutError::Disconnected) => return,
                            }
                        };
                        if tell.send(time).is_err() {
                            return;
                        }
                    }
                })
                .map_err(ProbeError::Thread)?;
            let mut times = Vec::with_capacity(KICKS);
            let started = Instant::now();
            while times.len() < KICKS && started.elapsed() < 4 * COUNTED {
                // The thread ends only after `go` and `stopped` are gone.
                let _ = go.send(());
                match running.vcpu.run()? {
                    Exit::Interrupted | Exit::Debug => {}
                    other => return Err(ProbeError::Unexpected(other)),
                }
                let _ = stopped.send(Instant::now());
                if let Ok(time) = told.recv() {
                    times.push(time.as_nanos() as u64);
                }
            }
            drop((go, stopped));
            times.sort_unstable();
            Ok(KickTime {
                p50_ns: times.get(times.len() / 2).copied().unwrap_or(0),
                max_ns: times.last().copied().unwrap_or(0),
            })
        })
    }
}

/// The next exit; a kick here is the watchdog's.
fn next(vcpu: &mut Vcpu) -> Result<Exit, ProbeError> {
    match vcpu.run()? {
        Exit::Interrupted | Exit::Debug => Err(ProbeError::TooLong),
        exit => Ok(exit),
    }
}

fn expect_port(exit: Exit) -> Result<(), ProbeError> {
    match exit {
        Exit::Port { .. } => Ok(()),
        other => Err(ProbeError::Unexpected(other)),
    }
}

/// The smallest ELF that the loader takes: one segment with this code at [`IMAGE_BASE`].
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |bytes: &mut Vec<u8>, values: &[u16]| {
        for value in values {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
    };
    let word = |bytes: &mut Vec<u8>, values: &[u64]| {
        for value in values {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
    };
    half(&mut bytes, &[2, 62, 1, 0]); // executable, x86-64, version
    word(&mut bytes, &[IMAGE_BASE, 64, 0]); // entry, program headers, no sections
    half(&mut bytes, &[0, 0, 64, 56, 1, 64, 0, 0]); // flags, sizes, one program header
    half(&mut bytes, &[1, 0, 5, 0]); // loadable; readable and executable
    let length = code.len() as u64;
    word(
        &mut bytes,
        &[HEADERS, IMAGE_BASE, IMAGE_BASE, length, length, 4096],
    );
    bytes.extend_from_slice(code);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_takes_the_probe() {
        let image = Image::parse("probe", elf(PORT)).unwrap();
        assert_eq!(image.name(), "probe");
    }

    /// The one real run: everything that any KVM must do, whatever its quirks.
    #[test]
    fn this_machine_is_measured_in_two_seconds() {
        let source = KvmSource::default();
        if let Err(error) = source.open() {
            eprintln!("skipped: {error}");
            return;
        }
        let probe = measure(&source);
        eprintln!("{probe:#?}");
        assert!(probe.took_ms < 2000, "{} ms", probe.took_ms);
        for cost in [&probe.port_exit_ns, &probe.mmio_exit_ns] {
            for ring in [&cost.ring0, &cost.ring3] {
                let nanos = *ring.as_ref().unwrap();
                assert!((200..1_000_000).contains(&nanos), "{nanos} ns an exit");
            }
        }
        assert!(probe.instruction_ns.ring3.as_ref().unwrap() < &1000.0);
        assert!(probe.kick.unwrap().p50_ns > 0);
        assert_eq!(probe.msr_exits, Ok(true));
        assert!(probe.template_holds.ring0.is_ok() && probe.template_holds.ring3.is_ok());
        assert_eq!(probe.dirty_log, Ok(true));
    }

    #[test]
    fn a_guest_that_never_exits_ends_the_measurement_not_the_program() {
        let source = KvmSource::default();
        if source.open().is_err() {
            eprintln!("skipped: no KVM");
            return;
        }
        let bench = Bench {
            source: &source,
            code: SPIN,
            ring3: true,
            rdi: 0,
            rcx: 0,
        };
        assert!(matches!(bench.exit_cost(), Err(ProbeError::TooLong)));
    }
}
