//! What a machine is: all that both sides must agree on before the first instruction.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::VCPUS_MOST;
use crate::boot::linux::SEED_BYTES;
use crate::boot::{Image, ImageError};
use crate::devices::pvclock::Keeping;
use crate::devices::{DevicesConfig, DiskConfig};
use crate::kvm::{CLOCK_SOURCE_2, CLOCK_SOURCE_STABLE, CpuModel};
use crate::version::Version;

/// Bytes of an encoded description, images included: a distribution's kernel has 65 MiB unpacked, its initial RAM disk as many.
pub const ENCODED_MAX: u32 = 256 << 20;

/// Bytes of a kernel or an initial RAM disk.
const FILE_MAX: u64 = 120 << 20;

/// Where a Linux guest reads the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClockSource {
    /// At a port, the power-management timer: each read is an exit, and so a place for what is due.
    #[default]
    Timer,
    /// In a page of its memory, KVM's paravirtual clock: a read costs nothing, and time goes on only at exits, ticks and preemptions.
    Page,
}

/// What becomes of a machine whose guest resets it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReset {
    /// It is off, with status 0. The only way that descriptions knew before there was another.
    #[default]
    End,
    /// It starts anew: memory, vCPU and devices as at power-on, the image loaded again.
    Reboot,
}

/// What a guest finds in a machine, its devices and CPU as they behave: whoever changes that gives it another number, and keeps what older
/// machines have. A machine keeps the number with which it was started, whoever serves it.
pub const MODEL: u32 = 4;

fn first_model() -> u32 {
    1
}

/// A locally administered address.
const MAC: [u8; 6] = [0x02, 0xd0, 0x99, 0xe1, 0, 1];
const MTU: u16 = 1500;

/// How a guest is loaded and started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootProtocol {
    /// The guest ABI (docs/guest-abi.md).
    #[default]
    Bare,
    /// Linux's 64-bit boot protocol.
    Linux,
}

/// A machine's description. It travels in the handshake and stands at the head of a log file, so a backup and a replay
/// need nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// What its guest finds: [`MODEL`], or an older one.
    #[serde(default = "first_model")]
    pub model: u32,
    /// Of a recording: the newest version that its entries may be in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entries: Option<u32>,
    /// How it is loaded.
    pub boot: BootProtocol,
    /// Name of the guest: built in, or the path it was read from.
    pub guest: String,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// The guest's command line.
    pub command_line: String,
    /// Wall clock (Unix time, nanoseconds) at which the guest's clock reads 0.
    pub wall_clock_ns: u64,
    /// MAC address of the network device.
    pub mac: [u8; 6],
    /// MTU of the network device.
    pub mtu: u16,
    /// The disk, if it has one. What is on it is not part of the description.
    #[serde(default)]
    pub disk: Option<DiskConfig>,
    /// Where a Linux guest reads the time; a bare-metal one has a clock of its own.
    pub clock: ClockSource,
    /// So many vCPUs with the host's CPU and KVM's own interrupt controller, which cannot be replayed; none: one by the deterministic
    /// template.
    #[serde(default)]
    pub vcpus: Option<u8>,
    /// Seeds a Linux kernel's random pool; a bare-metal guest does not see it.
    pub seed: [u8; SEED_BYTES],
    /// Where a recording of it was made: it is replayed on the same model, and on no other. A pair's sides tell each other theirs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuModel>,
    /// What becomes of it when its guest resets it.
    #[serde(default)]
    pub on_reset: OnReset,
    /// A guest that does not exit is stopped by a checkpoint, by whoever serves it: it may know of its time by that alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub preempted: bool,
    /// Bytes of the image; the initial RAM disk follows it.
    image_bytes: u64,
    /// The guest: an ELF file, or a Linux kernel.
    #[serde(skip)]
    pub image: Arc<Vec<u8>>,
    /// A Linux kernel's initial RAM disk.
    #[serde(skip)]
    pub initrd: Arc<Vec<u8>>,
}

/// What a kernel with KVM's clock page is told besides, if it is to be replayed: not to begin `ptp_kvm`. That asks KVM for the host's time by a
/// hypercall (KVM_HC_CLOCK_PAIRING), which no KVM can be told to refuse, and which writes it into the guest's memory. And not to let programs read the page,
/// which would take none of its reads off.
const NO_HOST_TIME: &str = "initcall_blacklist=ptp_kvm_init no-kvmclock-vsyscall";

/// The command line of a Linux guest with this clock: of one that is replayed, if there are no `vcpus` with the host's CPU.
#[must_use]
pub fn exact_line(command_line: &str, clock: ClockSource, vcpus: Option<u8>) -> String {
    match (clock, vcpus) {
        (ClockSource::Page, None) => format!("{NO_HOST_TIME} {command_line}"),
        _ => command_line.to_owned(),
    }
}

/// Why a description is refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not the bytes of a description.
    #[error("this is no machine description: {why}")]
    Malformed {
        /// What is wrong.
        why: String,
    },
    /// A machine of a newer program.
    #[error(
        "the machine is of model {found}, this program knows models up to {MODEL}: upgrade this side first (docs/formats.md)"
    )]
    Model {
        /// Its model.
        found: u32,
    },
    /// A recording of a newer program.
    #[error(
        "the entries of this recording are of version {found}, this program reads up to {}: replay it with the release that recorded \
         it, or a newer one",
        Version::NEWEST
    )]
    Entries {
        /// Their version.
        found: u32,
    },
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A file of a Linux guest.
    #[error("cannot read {path:?}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// A file that is too large for what it is said to be.
    #[error(
        "{path:?} has {bytes} bytes, more than a kernel or an initial RAM disk may have ({FILE_MAX})"
    )]
    Large {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
}

fn read(path: &Path) -> Result<Vec<u8>, SpecError> {
    let failed = |source| SpecError::File {
        path: path.to_owned(),
        source,
    };
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > FILE_MAX {
        return Err(SpecError::Large {
            path: path.to_owned(),
            bytes,
        });
    }
    std::fs::read(path).map_err(failed)
}

impl MachineSpec {
    /// A description of `guest` (a built-in name or a path).
    ///
    /// # Errors
    /// [`SpecError::Image`].
    pub fn new(
        guest: &str,
        memory_mib: u32,
        command_line: &str,
        wall_clock_ns: u64,
    ) -> Result<Self, SpecError> {
        let image = Image::find(guest)?;
        Ok(Self {
            model: MODEL,
            entries: None,
            boot: BootProtocol::Bare,
            clock: ClockSource::default(),
            vcpus: None,
            seed: [0; SEED_BYTES],
            guest: guest.to_owned(),
            memory_mib,
            command_line: command_line.to_owned(),
            wall_clock_ns,
            mac: MAC,
            mtu: MTU,
            disk: None,
            cpu: None,
            image_bytes: image.bytes().len() as u64,
            on_reset: OnReset::default(),
            preempted: false,
            image: Arc::new(image.bytes().to_vec()),
            initrd: Arc::default(),
        })
    }

    /// A description of a machine that boots the Linux kernel in this file.
    ///
    /// # Errors
    /// [`SpecError::File`], [`SpecError::Large`].
    pub fn linux(
        kernel: &Path,
        initrd: Option<&Path>,
        memory_mib: u32,
        command_line: &str,
        wall_clock_ns: u64,
        seed: [u8; SEED_BYTES],
    ) -> Result<Self, SpecError> {
        let image = read(kernel)?;
        Ok(Self {
            model: MODEL,
            entries: None,
            boot: BootProtocol::Linux,
            clock: ClockSource::default(),
            vcpus: None,
            guest: kernel.display().to_string(),
            memory_mib,
            command_line: command_line.to_owned(),
            wall_clock_ns,
            mac: MAC,
            mtu: MTU,
            disk: None,
            cpu: None,
            seed,
            image_bytes: image.len() as u64,
            on_reset: OnReset::default(),
            preempted: false,
            image: Arc::new(image),
            initrd: Arc::new(initrd.map_or_else(|| Ok(Vec::new()), read)?),
        })
    }

    /// The same, for a recording that is made on this CPU, by this program.
    #[must_use]
    pub fn recorded_on(&self, cpu: &CpuModel) -> Self {
        Self {
            cpu: Some(cpu.clone()),
            entries: Some(Version::NEWEST.0),
            ..self.clone()
        }
    }

    /// How it keeps the guest's clock page.
    pub(super) fn clock_keeping(&self) -> Keeping {
        match self.model {
            1 => Keeping::Plain,
            2 => Keeping::Counted,
            3 => Keeping::Steady,
            _ => Keeping::Stable,
        }
    }

    /// What its guest is told of KVM's features.
    pub(super) fn kvm_features(&self) -> u32 {
        match self.clock {
            ClockSource::Timer => 0,
            ClockSource::Page if self.clock_keeping() < Keeping::Stable => CLOCK_SOURCE_2,
            ClockSource::Page => CLOCK_SOURCE_2 | CLOCK_SOURCE_STABLE,
        }
    }

    /// The same, of a machine whose guest reads the time there.
    #[must_use]
    pub fn with_clock(mut self, clock: ClockSource) -> Self {
        self.clock = clock;
        self
    }

    /// With so many vCPUs, at most [`VCPUS_MOST`], of the host's CPU and with KVM's own interrupt controller. For a Linux guest.
    #[must_use]
    pub fn with_vcpus(mut self, vcpus: Option<u8>) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// The same, of a machine whose guest is stopped by a checkpoint if it does not exit.
    #[must_use]
    pub fn preempted(mut self, preempted: bool) -> Self {
        self.preempted = preempted;
        self
    }

    /// The same, of a machine that does this when its guest resets it.
    #[must_use]
    pub fn on_reset(mut self, what: OnReset) -> Self {
        self.on_reset = what;
        self
    }

    pub(super) fn devices(&self) -> DevicesConfig {
        DevicesConfig {
            mac: self.mac,
            mtu: self.mtu,
            disk: self.disk,
            wall_clock_ns: self.wall_clock_ns,
            firmware: self.boot == BootProtocol::Linux,
        }
    }

    /// Length of the text (u32, little-endian), the text (JSON), the image, the initial RAM disk.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let text = serde_json::to_vec(self).expect("plain fields always encode");
        let mut bytes = Vec::with_capacity(4 + text.len() + self.image.len() + self.initrd.len());
        bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&text);
        bytes.extend_from_slice(&self.image);
        bytes.extend_from_slice(&self.initrd);
        bytes
    }

    /// Reads what [`MachineSpec::encode`] wrote.
    ///
    /// # Errors
    /// [`SpecError::Malformed`].
    pub fn decode(bytes: &[u8]) -> Result<Self, SpecError> {
        let malformed = |why: &str| SpecError::Malformed {
            why: why.to_owned(),
        };
        if bytes.len() > ENCODED_MAX as usize {
            return Err(malformed("it is too large"));
        }
        let (length, rest) = bytes
            .split_first_chunk::<4>()
            .ok_or_else(|| malformed("it is cut short"))?;
        let length = u32::from_le_bytes(*length) as usize;
        let (text, files) = rest
            .split_at_checked(length)
            .ok_or_else(|| malformed("it is cut short"))?;
        let mut spec: Self =
            serde_json::from_slice(text).map_err(|error| SpecError::Malformed {
                why: error.to_string(),
            })?;
        if !(1..=MODEL).contains(&spec.model) {
            return Err(SpecError::Model { found: spec.model });
        }
        if let Some(found) = spec.entries.filter(|found| *found > Version::NEWEST.0) {
            return Err(SpecError::Entries { found });
        }
        if spec
            .vcpus
            .is_some_and(|count| !(1..=VCPUS_MOST).contains(&count))
        {
            return Err(malformed("it has more vCPUs than a machine can have"));
        }
        if spec.vcpus.is_some() && spec.boot == BootProtocol::Bare {
            return Err(malformed(
                "its guest does not know KVM's interrupt controller",
            ));
        }
        let (image, initrd) = usize::try_from(spec.image_bytes)
            .ok()
            .and_then(|length| files.split_at_checked(length))
            .ok_or_else(|| malformed("it is cut short"))?;
        if spec.boot == BootProtocol::Bare && !initrd.is_empty() {
            return Err(malformed("bytes follow its image"));
        }
        spec.image = Arc::new(image.to_vec());
        spec.initrd = Arc::new(initrd.to_vec());
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_the_wire_and_refuses_cut_bytes() {
        let spec = MachineSpec::new("kv", 64, "ip=10.0.0.2/24", 5).unwrap();
        let bytes = spec.encode();
        assert_eq!(MachineSpec::decode(&bytes).unwrap(), spec);
        for cut in 0..60 {
            assert!(MachineSpec::decode(&bytes[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn a_guest_that_is_replayed_is_kept_from_asking_kvm_for_the_host_s_time() {
        let line = |clock, vcpus| exact_line("quiet", clock, vcpus);
        assert_eq!(
            line(ClockSource::Page, None),
            "initcall_blacklist=ptp_kvm_init no-kvmclock-vsyscall quiet"
        );
        assert_eq!(line(ClockSource::Timer, None), "quiet");
        assert_eq!(line(ClockSource::Page, Some(1)), "quiet");
    }

    #[test]
    fn a_newer_programs_machine_and_recording_are_refused_in_words() {
        let spec = MachineSpec::new("kv", 64, "", 5).unwrap();
        let refused = |spec: &MachineSpec| {
            let error = MachineSpec::decode(&spec.encode()).unwrap_err();
            error.to_string()
        };
        let mut newer = spec.clone();
        newer.model = MODEL + 1;
        assert!(refused(&newer).contains("upgrade this side"));
        let mut newer = spec.clone();
        newer.entries = Some(Version::NEWEST.0 + 1);
        assert!(refused(&newer).contains("the release that recorded it"));
        // One that was written before there were models is of the first.
        let text = serde_json::to_string(&spec).unwrap();
        let older = text.replacen(&format!("\"model\":{MODEL},"), "", 1);
        assert_ne!(text, older);
        assert_eq!(
            serde_json::from_str::<MachineSpec>(&older).unwrap().model,
            1
        );
    }
}
