//! The image behind the guest's disk, in the steps of a side's life.
//!
//! ```text
//!  primary:  open, lock ─▶ judge by the arbiter's record ─▶ mark "will lead" ─▶ swap ─▶ mark "leads" ─▶ the guest runs
//!  backup:   open, lock ─▶ same content as the primary's? ─▶ mark "follows" ─▶ replay … drain ─▶ all written, durable,
//!            marked "will lead" ─▶ (drained: the protocol may go live) ─▶ what is not known is asked again ─▶ mark "leads"
//! ```
//! One that both sides share has other steps, which `backends/disk/shared.rs` draws.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::SessionError;
use super::io::Io;
use super::recruit::Recruiter;
use crate::backends::disk::mark::Stamp;
use crate::backends::disk::{Disk, DiskError, OpenImage, Opening};
use crate::config::{Config, Transport};
use crate::handshake::{DiskMisfit, HandshakeError, Hello};
use crate::machine::MachineSpec;
use crate::protocol::{Identity, Record};

/// Opens the image, if the pair's machine is to have a disk, and locks it, unless it is the primary's as well and this side follows.
pub(super) fn open(config: &Config, leads: bool) -> Result<Option<OpenImage>, SessionError> {
    if !config.disk.is_shared() {
        return opened(config);
    }
    // Two processes of one host have its cache in common.
    let through = config.pair.transport != Transport::Shm;
    let image = config.disk.image.as_ref();
    // A disk that is reserved tells hosts apart and not processes: of each host one has it.
    let locks = leads || config.disk.reservations;
    let shared = Opening::Shared {
        leads: locks,
        through,
    };
    let opened = image.map(|image| OpenImage::open(image, shared));
    Ok(opened.transpose()?)
}

fn opened(config: &Config) -> Result<Option<OpenImage>, SessionError> {
    let disk = &config.disk;
    let opening = if disk.read_only {
        Opening::Read
    } else {
        Opening::Own
    };
    let image = disk.image.as_ref();
    let opened = image.map(|image| OpenImage::open(image, opening));
    Ok(opened.transpose()?)
}

/// The same for a machine without a pair.
pub(super) fn open_alone(config: &Config) -> Result<Option<OpenImage>, SessionError> {
    let image = opened(config)?;
    if let Some(image) = &image {
        image.judge_alone()?;
    }
    Ok(image)
}

/// The machine with this disk.
pub(super) fn described(spec: &MachineSpec, image: Option<&OpenImage>) -> MachineSpec {
    let mut spec = spec.clone();
    spec.disk = image.map(OpenImage::config);
    spec
}

/// The content, as two sides compare it that have an image each.
pub(super) fn content(image: Option<&OpenImage>) -> Result<Option<u64>, SessionError> {
    let own = image.filter(|image| !image.config().is_shared());
    Ok(own.map(OpenImage::hash).transpose()?)
}

/// This side's own image, which it changes as its primary does.
pub(super) fn own(image: Option<&OpenImage>) -> Option<&OpenImage> {
    image.filter(|image| !image.config().is_shared())
}

/// Starts the image's thread.
pub(super) fn start(
    image: Option<&OpenImage>,
    config: &Config,
    io: &Io,
) -> Result<Option<Arc<Disk>>, SessionError> {
    let Some(image) = image else { return Ok(None) };
    let (wake, sandbox) = (Arc::clone(&io.wake), io.sandbox.clone());
    let shared = image.config().is_shared();
    Disk::start(image.clone(), &config.name, wake, sandbox)
        .map(|disk| Some(Arc::new(disk.shared(shared))))
        .map_err(SessionError::host("start the disk's thread"))
}

/// A backup that joins gets this disk, too.
pub(super) fn copy_with(
    recruiter: Option<&Recruiter>,
    disk: Option<&Arc<Disk>>,
    spec: &MachineSpec,
) {
    if let (Some(recruiter), Some(disk), Some(config)) = (recruiter, disk, spec.disk)
        && !config.read_only
        && !config.is_shared()
    {
        recruiter.copies(disk, config.sectors);
    }
}

/// Whether this backup's image can follow the disk of the machine that the primary describes.
pub(super) fn fits(
    spec: &MachineSpec,
    (hello, primary): (&Hello, Identity),
    image: Option<&OpenImage>,
    (machine, ours): (&str, Option<u64>),
) -> Result<(), HandshakeError> {
    let (theirs, running) = (hello.disk, hello.running);
    let misfit = match (spec.disk, image.map(OpenImage::config)) {
        (None, None) => return Ok(()),
        (Some(_), None) => DiskMisfit::NoneHere,
        (None, Some(_)) => DiskMisfit::NoneThere,
        (Some(theirs), Some(ours)) if theirs.is_shared() != ours.is_shared() => {
            DiskMisfit::Arrangement {
                shared: theirs.is_shared(),
            }
        }
        (Some(theirs), Some(ours)) if theirs != ours => DiskMisfit::Shape {
            theirs: (theirs.sectors, theirs.read_only),
            ours: (ours.sectors, ours.read_only),
        },
        (Some(disk), Some(_)) if disk.is_shared() => {
            match image.map(|image| image.is_had_by(machine, primary)) {
                Some(Err(error)) => DiskMisfit::NotThePrimarys(error.to_string()),
                _ => return Ok(()),
            }
        }
        // What it held when the primary started says nothing of now: it is made a copy, if that destroys nothing of others.
        (Some(disk), Some(_)) if running && !disk.read_only => {
            match image.map(|image| may_be_overwritten(image, machine)) {
                Some(Err(misfit)) => misfit,
                _ => return Ok(()),
            }
        }
        _ if theirs != ours => DiskMisfit::Content,
        _ => return Ok(()),
    };
    Err(misfit.into())
}

/// Whether a running machine's disk may be copied over it.
fn may_be_overwritten(image: &OpenImage, machine: &str) -> Result<(), DiskMisfit> {
    match image.machine() {
        Some(of) if of == machine => Ok(()),
        Some(of) => Err(DiskMisfit::Foreign(of.to_owned())),
        None if image.is_empty() => Ok(()),
        None => Err(DiskMisfit::NotEmpty),
    }
}

/// Before a backup is met, a shared image says whose it is about to be: the backup knows by that that it has the same one.
pub(super) fn show(
    image: Option<&OpenImage>,
    machine: &str,
    before: Option<Stamp>,
    record: &Record,
) -> Result<(), SessionError> {
    if let Some(image) = image.filter(|image| image.config().is_shared()) {
        image.will_lead(machine, record, before)?;
    }
    Ok(())
}

/// No backup was met.
pub(super) fn call_off(image: Option<&OpenImage>) -> Result<(), DiskError> {
    match image.filter(|image| image.config().is_shared()) {
        Some(image) => image.will_not_lead(),
        None => Ok(()),
    }
}

/// The image before and after the swap that begins a reign: `swap` makes this record live, or says that it is not.
pub(super) fn begin<T>(
    image: Option<&OpenImage>,
    machine: &str,
    before: Option<Stamp>,
    record: &Record,
    swap: impl FnOnce() -> Result<T, SessionError>,
) -> Result<T, SessionError> {
    let Some(image) = image else { return swap() };
    image.will_lead(machine, record, before)?;
    let swapped = swap();
    match &swapped {
        Ok(_) => image.leads(machine, record)?,
        // No guest has run on it, and the record tells later whether it is the machine's; without a mark it would be nobody's.
        Err(error) if may_have_landed(error) => {}
        Err(_) => image.does_not_lead(before)?,
    }
    swapped
}

/// Whether the swap whose error this is may have come about.
fn may_have_landed(error: &SessionError) -> bool {
    match error {
        SessionError::Arbiter(error) => error.may_have_landed(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbiter::ArbiterError;

    /// The first start of a machine with a new disk. What the arbiter has decides; who starts it again need not know.
    #[test]
    fn a_first_start_whose_answer_is_lost_leaves_the_image_to_whoever_the_record_names() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, vec![0; 512]).unwrap();
        let open = || OpenImage::open(&path, Opening::Own).unwrap();
        let record = Record::cold_start(None, Identity::from_bytes([1; 16]), None);
        let begin = |error: ArbiterError| {
            let swap = || Err::<(), _>(error.into());
            begin(Some(&open()), "m", None, &record, swap).unwrap_err();
        };
        let missing = || ArbiterError::Missing {
            path: "/arbiter".into(),
        };
        begin(ArbiterError::Unsure {
            path: "/arbiter".into(),
            source: Box::new(missing()),
        });
        let found = open().judge("m", Some(&record)).unwrap();
        assert_eq!(found, Some(Stamp::of(&record)), "it has landed");
        assert_eq!(open().judge("m", None).unwrap(), None, "it has not");
        let other = Record::cold_start(None, Identity::from_bytes([2; 16]), None);
        open().judge("m", Some(&other)).unwrap_err();
        begin(missing());
        assert_eq!(open().judge("m", Some(&other)).unwrap(), None);
    }
}
