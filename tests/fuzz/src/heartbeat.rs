//! Heartbeats: datagrams that anybody may send; and what the protocol makes of those that are well sealed.
#![forbid(unsafe_code)]

use std::time::Duration;

use hypervisor::position::Position;
use hypervisor::protocol::Moment;
use hypervisor::protocol::backup::Event as BackupEvent;
use hypervisor::protocol::heartbeat::{Heartbeat, MachineId, PairKey, Progress, SIZE};
use hypervisor::protocol::primary::Event as PrimaryEvent;
use hypervisor::protocol::record::{Configuration, Epoch, Identity, Record};
use hypervisor::protocol::{Backup, Pair, Primary, Timing};

use super::Target;
use super::source::Source;

pub(super) const TARGET: Target = Target {
    name: "heartbeat",
    line: "UDP datagrams, raw and well sealed with mad contents: dropped, or taken by the protocol without harm",
    run,
    seeds,
};

const KEY: PairKey = PairKey::from_bytes([7; 16]);
const MACHINE: &str = "machine";

fn me() -> Identity {
    Identity::from_bytes([1; 16])
}

fn peer() -> Identity {
    Identity::from_bytes([2; 16])
}

fn run(bytes: &[u8]) {
    if let Ok(beat) = Heartbeat::decode(bytes, KEY) {
        assert_eq!(beat.encode(KEY)[..], *bytes);
    }
    // The checksum made good for what was sent: then only the protocol's own checks are left.
    let mut source = Source::new(bytes);
    let mut sides = Sides::new();
    while !source.is_over() {
        let choice = source.u8();
        let after = Duration::from_micros(u64::from(source.u16()));
        match choice & 3 {
            0 => sides.tick(after, progress(&mut source)),
            1 => sides.log_traffic(after),
            _ => {
                let beat = beat(choice, &mut source);
                let datagram = beat.encode(KEY);
                assert_eq!(Heartbeat::decode(&datagram, KEY), Ok(beat));
                assert!(Heartbeat::decode(&datagram[1..], KEY).is_err());
                sides.heard(after, beat);
            }
        }
    }
}

fn progress(source: &mut Source<'_>) -> Progress {
    Progress {
        position: Position(source.u64()),
        turns: source.u64(),
        owes: source.u8() & 1 != 0,
        stood: Duration::from_micros(u64::from(source.u16())),
    }
}

/// Of the right machine, process and reign unless the choice says otherwise.
fn beat(choice: u8, source: &mut Source<'_>) -> Heartbeat {
    let wild = |bit: u8, good: u64, source: &mut Source<'_>| {
        if choice & bit == 0 {
            good
        } else {
            source.u64()
        }
    };
    Heartbeat {
        machine: MachineId(wild(4, MachineId::of(MACHINE).0, source)),
        epoch: Epoch(wild(8, 1, source)),
        configuration: Configuration(wild(16, 1, source)),
        sender: if choice & 32 == 0 {
            peer()
        } else {
            Identity::from_bytes(source.array())
        },
        sequence: source.u64(),
        clock: Moment(source.u64()),
        progress: progress(source),
    }
}

/// Both roles, each hearing the same.
struct Sides {
    now: Moment,
    primary: Primary,
    backup: Backup,
}

impl Sides {
    fn new() -> Self {
        let pair = Pair {
            machine: MachineId::of(MACHINE),
            me: me(),
            peer: peer(),
        };
        let (timing, now) = (Timing::default(), Moment(1));
        let ours = Record::cold_start(None, me(), Some(peer()));
        let theirs = Record::cold_start(None, peer(), Some(me()));
        Self {
            now,
            primary: Primary::protected(pair, ours, timing, now),
            backup: Backup::new(pair, theirs, timing, now).expect("it is entitled"),
        }
    }

    fn both(&mut self, after: Duration, primary: PrimaryEvent, backup: BackupEvent) {
        self.now = self.now + after;
        let (mut asked, mut done) = (Vec::new(), Vec::new());
        self.primary.handle(self.now, primary, &mut asked);
        self.backup.handle(self.now, backup, &mut done);
        assert!(asked.len() + done.len() < 16, "{asked:?} {done:?}");
        let _ = (self.primary.deadline(), self.backup.deadline());
        // No number of heartbeats makes a backup live: only the arbiter's answer does, and it was not asked here.
        assert!(
            !done.contains(&hypervisor::protocol::backup::Action::OpenGate),
            "{done:?}"
        );
    }

    fn tick(&mut self, after: Duration, progress: Progress) {
        self.both(
            after,
            PrimaryEvent::Tick(progress),
            BackupEvent::Tick(progress),
        );
    }

    fn log_traffic(&mut self, after: Duration) {
        self.both(after, PrimaryEvent::LogTraffic, BackupEvent::LogTraffic);
    }

    fn heard(&mut self, after: Duration, beat: Heartbeat) {
        self.both(
            after,
            PrimaryEvent::Heartbeat(beat),
            BackupEvent::Heartbeat(beat),
        );
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let datagram = Heartbeat {
        machine: MachineId::of(MACHINE),
        epoch: Epoch(1),
        configuration: Configuration(1),
        sender: peer(),
        sequence: 1,
        clock: Moment(5),
        progress: Progress::default(),
    }
    .encode(KEY);
    let mut story = Vec::new();
    for sequence in 1..20u64 {
        story.extend_from_slice(&[2, 0x88, 0x13]);
        story.extend_from_slice(&sequence.to_le_bytes());
        story.extend_from_slice(&[0; 27]);
        story.extend_from_slice(&[0, 0x88, 0x13]);
        story.extend_from_slice(&[0; 19]);
    }
    vec![datagram.to_vec(), story, vec![0xff; SIZE]]
}
