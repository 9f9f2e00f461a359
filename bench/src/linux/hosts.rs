//! Who runs the guest.
#![forbid(unsafe_code)]

/// One of those that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// `doppel run` with the host's CPU.
    Alone,
    /// A pair that is replicated by checkpoints.
    Checkpoint,
    /// `doppel run` of the prepared kernel, its clock in a page.
    Page,
    /// The same with the power-management timer for a clock.
    Timer,
    /// A pair that replays the prepared kernel.
    Replay,
    /// `doppel record`. This and what follows only boots: a recording of the whole work has no other kind of event in it.
    Record,
    /// `doppel replay` of that.
    Again,
    /// QEMU over the same KVM.
    Qemu,
    /// QEMU's recording, under its own emulation of the processor.
    QemuRecord,
    /// Its replay.
    QemuAgain,
}

impl Host {
    /// All, in the order in which they run: who replays after who recorded.
    pub const ALL: [Self; 10] = [
        Self::Alone,
        Self::Checkpoint,
        Self::Page,
        Self::Timer,
        Self::Replay,
        Self::Record,
        Self::Again,
        Self::Qemu,
        Self::QemuRecord,
        Self::QemuAgain,
    ];

    /// What it is called in the tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Alone => "doppel run, the host's CPU",
            Self::Checkpoint => "protected by checkpoints",
            Self::Page => "doppel run, prepared kernel, clock in a page",
            Self::Timer => "doppel run, prepared kernel, clock at a port",
            Self::Replay => "protected by replay, prepared kernel",
            Self::Record => "doppel record, prepared kernel",
            Self::Again => "doppel replay of that",
            Self::Qemu => "QEMU, -accel kvm,kernel-irqchip=off",
            Self::QemuRecord => "QEMU, -icount shift=5,rr=record",
            Self::QemuAgain => "QEMU, rr=replay of that",
        }
    }

    /// What it is called on the command line.
    pub fn key(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Checkpoint => "checkpoint",
            Self::Page => "page",
            Self::Timer => "timer",
            Self::Replay => "replay",
            Self::Record => "record",
            Self::Again => "again",
            Self::Qemu => "qemu",
            Self::QemuRecord => "qemu-record",
            Self::QemuAgain => "qemu-again",
        }
    }

    /// Whether the guest does its work there; otherwise it only boots.
    pub fn works(self) -> bool {
        self.recording().is_none() && !matches!(self, Self::Record | Self::QemuRecord)
    }

    /// Whether it is QEMU, with devices of its own.
    pub fn is_qemu(self) -> bool {
        matches!(self, Self::Qemu | Self::QemuRecord | Self::QemuAgain)
    }

    /// Whether its guest is the one that can be replayed.
    pub fn is_prepared(self) -> bool {
        matches!(
            self,
            Self::Page | Self::Timer | Self::Replay | Self::Record | Self::Again
        )
    }

    /// Whose recording it replays.
    pub fn recording(self) -> Option<Self> {
        match self {
            Self::Again => Some(Self::Record),
            Self::QemuAgain => Some(Self::QemuRecord),
            _ => None,
        }
    }

    /// What its time is compared with: the same kernel under Doppel alone.
    pub fn base(self) -> Self {
        if self.is_prepared() {
            Self::Page
        } else {
            Self::Alone
        }
    }

    /// The file of its recording, or of the one that it replays.
    pub fn log(self) -> &'static str {
        if self.is_qemu() {
            "qemu.log"
        } else {
            "doppel.log"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_replays_comes_after_who_recorded() {
        let at = |host| Host::ALL.iter().position(|&other| other == host);
        for host in Host::ALL {
            if let Some(recording) = host.recording() {
                assert!(at(recording) < at(host), "{host:?}");
                assert_eq!(recording.log(), host.log());
                assert!(!recording.works() && !host.works());
            }
            assert!(host.base().works());
        }
    }
}
