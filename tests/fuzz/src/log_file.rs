//! Log files: a header, a machine's description with its image, entries; with their checksums made good.
#![forbid(unsafe_code)]

use hypervisor::boot::Image;
use hypervisor::entry::Decoder;
use hypervisor::machine::MachineSpec;
use rdma_log::{Epoch, Lane, LogFileReader, LogFileWriter, Marks, Nonce};

use super::Target;
use super::source::Source;

pub(super) const TARGET: Target = Target {
    name: "log-file",
    line: "a log file, raw or well sealed around mad contents: read up to a byte that is named",
    run,
    seeds,
};

/// A byte: bit 0 means a raw file; else a description (length, bytes), then entries (lane, length, bytes), sealed.
fn run(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    if source.u8() & 1 != 0 {
        read(source.rest());
        return;
    }
    let length = usize::from(source.u16());
    let description = source.bytes(length);
    let mut file = LogFileWriter::create(Vec::new(), Nonce([3; 16]), description)
        .expect("a short description");
    let mut count = 0;
    while !source.is_over() {
        let choice = source.u8();
        let lane = Lane::ALL[usize::from(choice & 1)];
        let length = usize::from(source.u16());
        let marks = Marks {
            epoch: Epoch(u32::from(choice)),
            ..Marks::default()
        };
        file.append(lane, source.bytes(length), marks)
            .expect("a short entry");
        count += 1;
    }
    let file = file.finish().expect("memory takes everything");
    assert_eq!(read(&file), Some(count), "a whole file was not read whole");
    // Cut anywhere it is good up to there.
    let cut = file.len() * usize::from(bytes.first().copied().unwrap_or(0)) / 256;
    assert!(read(&file[..cut]).is_none_or(|found| found <= count));
}

/// How many entries there are before the file's end or fault.
fn read(file: &[u8]) -> Option<u64> {
    let mut reader = match LogFileReader::new(file) {
        Ok(reader) => reader,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return None;
        }
    };
    match MachineSpec::decode(reader.description()) {
        Ok(spec) => drop(Image::parse(&spec.guest, spec.image.to_vec())),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    let mut decoder = Decoder::default();
    let (mut count, mut sound) = (0, true);
    loop {
        let before = reader.offset();
        match reader.next() {
            Ok(Some(found)) => {
                assert_eq!(found.offset, before);
                if found.entry.lane() == Lane::Events && sound {
                    sound = decoder.decode(found.entry.payload()).is_ok();
                }
                count += 1;
            }
            Ok(None) => return Some(count),
            Err(error) => {
                assert!(!error.to_string().is_empty());
                assert_eq!(reader.offset(), before, "the good part ends before it");
                return Some(count);
            }
        }
        assert!(reader.offset() <= file.len() as u64);
    }
}

/// The smallest image that is one: an ELF header, one program header, one byte at 1 MiB.
fn image() -> Vec<u8> {
    let mut image = vec![0; 64 + 56 + 1];
    image[..6].copy_from_slice(b"\x7fELF\x02\x01");
    image[16] = 2;
    image[18] = 62;
    image[24..32].copy_from_slice(&(1u64 << 20).to_le_bytes());
    image[32] = 64;
    image[54] = 56;
    image[56] = 1;
    let segment = &mut image[64..];
    segment[0] = 1;
    segment[8] = 120;
    for at in [16, 24] {
        segment[at..at + 8].copy_from_slice(&(1u64 << 20).to_le_bytes());
    }
    segment[32] = 1;
    segment[40] = 1;
    image
}

/// A machine with that image.
pub(super) fn small_spec() -> MachineSpec {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), image()).expect("room for a hundred bytes");
    let path = file.path().to_str().expect("a plain name");
    let mut spec = MachineSpec::new(path, 4, "a=1", 1).expect("the seed is an image");
    spec.guest = "g".into();
    spec
}

fn seeds() -> Vec<Vec<u8>> {
    let spec = small_spec();
    let description = spec.encode();
    let mut sealed = vec![0x80];
    sealed.extend_from_slice(&(description.len() as u16).to_le_bytes());
    sealed.extend_from_slice(&description);
    for lane in [1u8, 0, 0] {
        sealed.extend([lane, 10, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
    let mut raw = vec![1];
    let mut file =
        LogFileWriter::create(Vec::new(), Nonce([3; 16]), &description).expect("a description");
    let _ = file.append(Lane::Events, &[1; 12], Marks::default());
    let _ = file.append(Lane::Inputs, &[1; 80], Marks::default());
    raw.extend(file.finish().expect("memory takes everything"));
    vec![sealed, raw]
}
