//! Entries of the events lane: what the ring has found whole and the hypervisor gives a meaning.
#![forbid(unsafe_code)]

use hypervisor::digest::Digest;
use hypervisor::entry::{
    Body, Control, Decoder, Encoder, Entry, LoggedInput, OutputsDigest, Part, Step,
};
use hypervisor::event::GuestTime;
use hypervisor::position::Position;

use super::Target;
use super::source::Source;

pub(super) const TARGET: Target = Target {
    name: "entry",
    line: "entries of the log: decoded, and then encoded and decoded to the same, or refused",
    run,
    seeds,
};

fn run(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let mut decoder = Decoder::default();
    let (mut encoder, mut again) = (Encoder::default(), Decoder::default());
    while !source.is_over() {
        let length = usize::from(source.u16());
        let payload = source.bytes(length);
        let Ok(entry) = decoder.decode(payload) else {
            return;
        };
        assert_eq!(again.decode(encoder.encode(&entry)), Ok(entry));
        assert_eq!(decoder.base(), again.base());
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let at = |position, body| Entry {
        position: Position(position),
        body,
    };
    let inputs = vec![
        LoggedInput::Clock(GuestTime(1 << 40)),
        LoggedInput::Random(vec![7; 8]),
        LoggedInput::Tick(3),
        LoggedInput::Frames {
            count: 2,
            checksum: 5,
        },
        LoggedInput::Console(b"typed".to_vec()),
    ];
    let step = Step {
        digest: Digest(1),
        exit: None,
        outputs: Some(OutputsDigest {
            count: 1,
            checksum: 2,
        }),
        inputs,
    };
    let entries = [
        at(1, Body::Step(Step::default())),
        at(300, Body::Step(step)),
        at(300, Body::MemoryHash(9)),
        at(
            300,
            Body::Control {
                digest: Digest(1),
                what: Control::Share(512),
            },
        ),
        at(
            301,
            Body::Part(Part {
                number: 0,
                last: true,
                bytes: vec![1; 20],
            }),
        ),
        at(
            u64::from(u32::MAX),
            Body::End {
                digest: Digest(1),
                memory: 2,
                state: 3,
            },
        ),
    ];
    let mut encoder = Encoder::default();
    let mut seed = Vec::new();
    for entry in &entries {
        let payload = encoder.encode(entry);
        seed.extend_from_slice(&(payload.len() as u16).to_le_bytes());
        seed.extend_from_slice(payload);
    }
    // Every exit logged: the exit's record is a fixed number of bytes behind its tag.
    let mut with_exit = vec![1, 1];
    with_exit.extend_from_slice(&[0; 8]);
    with_exit.push(7);
    with_exit.extend_from_slice(&[1; hypervisor::digest::ExitRecord::SIZE]);
    let mut second = (with_exit.len() as u16).to_le_bytes().to_vec();
    second.extend(with_exit);
    vec![seed, second]
}
