//! Exits of the vCPU in our own words.
#![forbid(unsafe_code)]

/// Why KVM_RUN returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Port access of `count` elements of `size` bytes; the bytes are in [`super::Vcpu::data`].
    Port {
        /// Port number.
        port: u16,
        /// Bytes of an element: 1, 2 or 4.
        size: u8,
        /// Number of elements (more than one for string instructions).
        count: u32,
        /// The guest writes.
        write: bool,
    },
    /// Access to an address without memory; the bytes are in [`super::Vcpu::data`].
    Mmio {
        /// Guest physical address.
        address: u64,
        /// Bytes, 1 to 8.
        size: u8,
        /// The guest writes.
        write: bool,
    },
    /// HLT.
    Hlt,
    /// Read of a filtered MSR; answered by [`super::Vcpu::answer_msr`].
    ReadMsr {
        /// MSR number.
        index: u32,
    },
    /// Write of a filtered MSR; answered by [`super::Vcpu::answer_msr`].
    WriteMsr {
        /// MSR number.
        index: u32,
        /// Value written.
        value: u64,
    },
    /// Triple fault.
    Shutdown,
    /// A signal or `immediate_exit` ended the run. Not a sync point: no state may be read or changed by it.
    Interrupted,
    /// A debugger's breakpoint, or the end of its single step. Not a sync point either.
    Debug,
}

impl Exit {
    /// Whether this exit is a deterministic function of guest state.
    #[must_use]
    pub fn is_sync_point(self) -> bool {
        !matches!(self, Self::Interrupted | Self::Debug)
    }

    /// Whether inputs and interrupts may be handed to the guest here. MSR exits are no place to inject: KVM completes
    /// them in the middle of an instruction whose fault we may yet decide.
    #[must_use]
    pub fn may_inject(self) -> bool {
        matches!(self, Self::Port { .. } | Self::Mmio { .. } | Self::Hlt)
    }
}
