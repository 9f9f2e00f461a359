//! The ACPI tables: what the board has that a kernel does not find by itself.
//!
//! ```text
//! RSDP ─▶ XSDT ─▶ FADT ─▶ DSDT    FACS
//!              └▶ MADT
//! ```
//! The FADT gives the power-management timer, S5 and the reset register, and says that there is no keyboard controller and no VGA
//! (probing for them costs thousands of exits); the DSDT gives the windows of the virtio devices, which a distribution's kernel
//! takes from no command line, and the console. The MADT gives local APICs and the I/O APIC where KVM has them; without it there are one
//! processor, and the 8259s.
#![forbid(unsafe_code)]

use acpi_tables::aml::{self, Path};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink, facs::FACS};

use crate::devices::{self, acpi as ports, cmos, power};

const OEM: [u8; 6] = *b"DOPPEL";
const OEM_TABLE: [u8; 8] = *b"DOPPELVM";
const REVISION: u32 = 1;
/// The system control interrupt. Nothing raises it.
const SCI: u16 = 9;
/// FADT flags of IAPC_BOOT_ARCH: legacy devices there are (bit 0), a keyboard controller there is not (bit 1 clear), VGA there is
/// not (bit 2), and MSI must not be used (bit 3).
const BOOT_ARCH: u16 = 0b1101;

/// All tables, one behind the other from `base`; the RSDP comes first. The disk is named if there is one, and so many vCPUs if they
/// have local APICs.
pub(super) fn tables(base: u64, disk: bool, vcpus: Option<u8>) -> Vec<u8> {
    // Each begins at a multiple of 64, as the FACS must.
    let mut bytes = vec![0; 64];
    let mut add = |table: &dyn Aml| {
        let at = base + bytes.len() as u64;
        table.to_aml_bytes(&mut bytes as &mut dyn AmlSink);
        bytes.resize(bytes.len().next_multiple_of(64), 0);
        at
    };
    let dsdt = add(&dsdt(disk));
    let facs = add(&FACS::new());
    let fadt = add(&fadt(dsdt as u32, facs as u32));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    if let Some(count) = vcpus {
        xsdt.add_entry(add(&madt(count)));
    }
    let xsdt = add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    bytes
}

fn fadt(dsdt: u32, facs: u32) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_32(dsdt)
        .firmware_ctrl_32(facs)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // Neither button is one of the fixed registers, and the clock wakes nobody.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.sci_int = SCI.into();
    fadt.pm1a_evt_blk = u32::from(ports::EVENTS).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(power::PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = u32::from(ports::TIMER).into();
    fadt.pm_tmr_len = 4;
    // No C2 and C3: beyond what the specification lets mean anything.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.century = cmos::CENTURY;
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(ports::RESET),
    );
    fadt.reset_value = ports::RESET_VALUE;
    fadt.finalize()
}

/// KVM's controllers: line n of the 8259s is pin n of the I/O APIC, also for the timer.
fn madt(vcpus: u8) -> Sdt {
    const LOCAL_APICS: u32 = 0xfee0_0000;
    const IO_APIC: u32 = 0xfec0_0000;
    /// There are 8259s, too, to be turned off.
    const PC_COMPATIBLE: u32 = 1;
    /// Edge and level, high and low: of the system control interrupt, level and high.
    const LEVEL_HIGH: u16 = 0b1101;
    let mut madt = Sdt::new(*b"APIC", 36, 3, OEM, OEM_TABLE, REVISION);
    madt.append_slice(&LOCAL_APICS.to_le_bytes());
    madt.append_slice(&PC_COMPATIBLE.to_le_bytes());
    for number in 0..vcpus {
        const ENABLED: u8 = 1;
        madt.append_slice(&[0, 8, number, number, ENABLED, 0, 0, 0]);
    }
    madt.append_slice(&[1, 12, vcpus, 0]);
    madt.append_slice(&IO_APIC.to_le_bytes());
    madt.append_slice(&0u32.to_le_bytes());
    let [low, high] = LEVEL_HIGH.to_le_bytes();
    madt.append_slice(&[2, 10, 0, SCI as u8, SCI as u8, 0, 0, 0, low, high]);
    // A non-maskable interrupt comes by the second local pin of all.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt
}

fn dsdt(disk: bool) -> Sdt {
    let mut sdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, REVISION);
    let mut body = Vec::new();
    // S5 is sleep type 0 in both PM1 control registers.
    let (zero, reserved) = (0u8, 0u8);
    let s5 = aml::Package::new(vec![&zero, &zero, &reserved, &reserved]);
    aml::Name::new("_S5_".into(), &s5).to_aml_bytes(&mut body);
    let disk = disk.then_some(devices::DISK_WINDOW);
    let windows = devices::WINDOWS.into_iter().chain(disk);
    for (index, (name, base, irq)) in windows.enumerate() {
        let (id, number) = ("LNRO0005", index as u8);
        let hardware = aml::Name::new("_HID".into(), &id);
        let unit = aml::Name::new("_UID".into(), &number);
        let memory = aml::Memory32Fixed::new(true, base as u32, devices::WINDOW_LEN as u32);
        // The 8259 takes edges here.
        let interrupt = aml::Interrupt::new(true, true, false, false, u32::from(irq));
        let resources = aml::ResourceTemplate::new(vec![&memory, &interrupt]);
        let current = aml::Name::new("_CRS".into(), &resources);
        let path: Path = format!("_SB_.{name}").as_str().into();
        aml::Device::new(path, vec![&hardware, &unit, &current]).to_aml_bytes(&mut body);
    }
    let uart = aml::EISAName::new("PNP0501");
    let hardware = aml::Name::new("_HID".into(), &uart);
    let io = aml::IO::new(devices::CONSOLE, devices::CONSOLE, 1, 8);
    let interrupt = aml::Interrupt::new(true, true, false, false, u32::from(devices::IRQ_CONSOLE));
    let resources = aml::ResourceTemplate::new(vec![&io, &interrupt]);
    let current = aml::Name::new("_CRS".into(), &resources);
    aml::Device::new("_SB_.COM1".into(), vec![&hardware, &current]).to_aml_bytes(&mut body);
    sdt.append_slice(&body);
    sdt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    #[test]
    fn every_table_is_found_from_the_first_and_sums_to_zero() {
        let base = 0xe_0000;
        let bytes = tables(base, true, Some(3));
        assert!(bytes.len() < 0x1_0000, "they fit below the BIOS's end");
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        let table = |at: usize| {
            let at = at - base as usize;
            &bytes[at..at + word(&bytes, at + 4)]
        };
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
        let xsdt = table(word(&bytes, 24));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let fadt = table(word(xsdt, 36));
        assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
        let madt = table(word(xsdt, 44));
        assert_eq!((&madt[..4], sum(madt)), (&b"APIC"[..], 0));
        let mut processors = Vec::new();
        let mut rest = &madt[44..];
        while let [kind, length, ..] = *rest {
            let (entry, after) = rest.split_at(length.into());
            if kind == 0 {
                processors.push((entry[2], entry[3], entry[4] & 1));
            }
            rest = after;
        }
        assert!(rest.is_empty(), "the lengths add up");
        assert_eq!(processors, [(0, 0, 1), (1, 1, 1), (2, 2, 1)]);
        let dsdt = table(word(fadt, 40));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        let facs = table(word(fadt, 36));
        assert_eq!((&facs[..4], word(fadt, 36) % 64), (&b"FACS"[..], 0));
        for name in [&b"_S5_"[..], b"NET0", b"RNG0", b"BLK0", b"COM1"] {
            assert!(dsdt.windows(4).any(|four| four == name), "{name:?}");
        }
    }
}
