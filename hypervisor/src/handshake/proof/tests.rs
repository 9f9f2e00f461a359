//! Proofs over a wire that the test holds in its hands.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::thread;

use super::*;
use crate::handshake::VERSION;

fn secret(byte: u8) -> Trust {
    Trust::holders(Secret::from_bytes([byte; 32]))
}

/// The legs of a proof, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leg {
    Greeting,
    Plea,
    Verdict,
}

const LEGS: [(Leg, usize); 3] = [
    (Leg::Greeting, GREETING),
    (Leg::Plea, CLAIM),
    (Leg::Verdict, VERDICT),
];

/// Both sides' outcomes, and the wire between them: its ends at the primary and at the backup.
struct Met {
    primary: Result<Channel, HandshakeError>,
    backup: Result<Channel, HandshakeError>,
    wire: [UnixStream; 2],
    /// What passed, leg by leg.
    passed: Vec<Vec<u8>>,
}

/// Lets two sides meet; `meddle` may change what passes. A leg of nothing ends the connection.
fn meet(trust: [&Trust; 2], mut meddle: impl FnMut(Leg, &mut Vec<u8>)) -> Met {
    let (ours, at_primary) = UnixStream::pair().unwrap();
    let (theirs, at_backup) = UnixStream::pair().unwrap();
    let mut passed = Vec::new();
    thread::scope(|scope| {
        let primary = scope.spawn(move || prove(Stream::Unix(ours), trust[0]));
        let backup = scope.spawn(move || admit(Stream::Unix(theirs), trust[1]));
        for (leg, length) in LEGS {
            let (mut from, mut to) = match leg {
                Leg::Plea => (&at_primary, &at_backup),
                _ => (&at_backup, &at_primary),
            };
            let mut bytes = vec![0; length];
            let read = from.read_exact(&mut bytes);
            if read.is_ok() {
                meddle(leg, &mut bytes);
                passed.push(bytes.clone());
            }
            // A side that has heard enough is gone.
            if read.is_err() || bytes.len() < length || to.write_all(&bytes).is_err() {
                let _ = to.write_all(if read.is_ok() { &bytes } else { &[] });
                for end in [&at_primary, &at_backup] {
                    let _ = end.shutdown(std::net::Shutdown::Both);
                }
                break;
            }
        }
        Met {
            primary: primary.join().unwrap(),
            backup: backup.join().unwrap(),
            wire: [at_primary, at_backup],
            passed,
        }
    })
}

fn honest(trust: &Trust) -> Met {
    meet([trust, trust], |_, _| {})
}

fn pair(trust: &Trust) -> (Channel, Channel, [UnixStream; 2]) {
    let met = honest(trust);
    (met.primary.unwrap(), met.backup.unwrap(), met.wire)
}

/// Takes one record off the wire, as it is.
fn record(mut wire: &UnixStream) -> Vec<u8> {
    let mut head = [0; 2];
    wire.read_exact(&mut head).unwrap();
    let mut record = head.to_vec();
    record.resize(2 + usize::from(u16::from_le_bytes(head)), 0);
    wire.read_exact(&mut record[2..]).unwrap();
    record
}

#[test]
fn two_sides_with_the_same_secret_talk_and_nobody_else_understands() {
    let (primary, backup, [mut at_primary, mut at_backup]) = pair(&secret(1));
    assert!(primary.is_sealed() && backup.is_sealed());
    for said in [&b"a key of a memory region"[..], &[7; 200_000]] {
        (&primary)
            .write_all(&said[..said.len().min(40_000)])
            .unwrap();
        let sealed = record(&at_primary);
        assert!(!sealed.windows(8).any(|window| window == &said[..8]));
        at_backup.write_all(&sealed).unwrap();
        let mut heard = vec![0; said.len().min(40_000)];
        (&backup).read_exact(&mut heard).unwrap();
        assert_eq!(heard, said[..heard.len()]);
    }
    (&backup).write_all(b"welcome").unwrap();
    let sealed = record(&at_backup);
    at_primary.write_all(&sealed).unwrap();
    let mut heard = [0; 7];
    (&primary).read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"welcome");
}

#[test]
fn without_a_secret_the_kernel_says_who_it_is() {
    let (primary, backup, _) = pair(&Trust::same_user());
    assert!(!primary.is_sealed() && !backup.is_sealed());
}

#[test]
fn another_secret_or_none_is_refused_on_both_sides_in_words() {
    let met = meet([&secret(1), &secret(2)], |_, _| {});
    assert!(matches!(met.primary, Err(HandshakeError::Secret)));
    assert!(matches!(met.backup, Err(HandshakeError::Secret)));
    for (trust, ours) in [
        ([secret(1), Trust::same_user()], true),
        ([Trust::same_user(), secret(1)], false),
    ] {
        let [primary, backup] = &trust;
        let met = meet([primary, backup], |_, _| {});
        match met.primary.unwrap_err() {
            HandshakeError::Proof { ours: found } => assert_eq!(found, ours),
            other => panic!("{other}"),
        }
        match met.backup.unwrap_err() {
            HandshakeError::Proof { ours: found } => assert_eq!(found, !ours),
            other => panic!("{other}"),
        }
    }
    for error in [
        HandshakeError::Secret,
        HandshakeError::Proof { ours: true },
        HandshakeError::Proof { ours: false },
    ] {
        assert!(error.to_string().contains("doppel secret"), "{error}");
    }
}

#[test]
fn another_version_is_named_on_both_sides() {
    let older = |leg: Leg, at: Leg, bytes: &mut Vec<u8>| {
        if leg == at {
            bytes[8..12].copy_from_slice(&(VERSION + 4).to_le_bytes());
            bytes[13] = 1;
        }
    };
    let met = meet([&secret(1); 2], |leg, bytes| older(leg, Leg::Plea, bytes));
    assert!(met.primary.unwrap_err().to_string().contains("version"));
    match met.backup {
        Err(HandshakeError::Version { theirs, ours }) => {
            assert_eq!(theirs.newest(), Version(VERSION + 4));
            assert_eq!(ours, Versions::OURS);
        }
        other => panic!("{other:?}"),
    }
    let met = meet([&secret(1); 2], |leg, bytes| {
        older(leg, Leg::Greeting, bytes)
    });
    assert!(matches!(met.primary, Err(HandshakeError::Version { .. })));
    // A range that begins below zero is none.
    let met = meet([&secret(1); 2], |leg, bytes| {
        if leg == Leg::Greeting {
            bytes[13] = u8::MAX;
        }
    });
    assert!(matches!(met.primary, Err(HandshakeError::NotDoppel)));
}

#[test]
fn two_sides_speak_the_newest_version_that_both_do() {
    let versions = |oldest, newest| Versions::new(Version(oldest), Version(newest)).unwrap();
    for trust in [secret(1), Trust::same_user()] {
        for (primary, backup, spoken) in [
            (versions(3, 4), versions(3, 4), 4),
            (versions(3, 4), versions(3, 3), 3),
            (versions(3, 4), versions(4, 5), 4),
        ] {
            for [primary, backup] in [[primary, backup], [backup, primary]] {
                let [one, other] = [primary, backup].map(|spoken| trust.clone().speaking(spoken));
                let met = meet([&one, &other], |_, _| {});
                let (met, at_backup) = (met.primary.unwrap(), met.backup.unwrap());
                assert_eq!(met.version(), Version(spoken), "{primary}, {backup}");
                assert_eq!(at_backup.version(), Version(spoken), "{primary}, {backup}");
                assert_eq!(met.spoken().theirs, backup);
            }
        }
        let (old, new) = (versions(1, 2), versions(3, 4));
        for [primary, backup] in [[old, new], [new, old]] {
            let [one, other] = [primary, backup].map(|spoken| trust.clone().speaking(spoken));
            let met = meet([&one, &other], |_, _| {});
            for (error, theirs) in [
                (met.primary.unwrap_err(), backup),
                (met.backup.unwrap_err(), primary),
            ] {
                let said = error.to_string();
                let older = if theirs == old {
                    "the other side is"
                } else {
                    "this side is"
                };
                assert!(said.contains(older) && said.contains("upgrade"), "{said}");
            }
        }
    }
}

#[test]
fn nobody_in_between_makes_a_pair_speak_an_older_version() {
    for at in [Leg::Greeting, Leg::Plea] {
        let met = meet([&secret(1); 2], |leg, bytes| {
            if leg == at {
                bytes[8..12].copy_from_slice(&Version::OLDEST.0.to_le_bytes());
                bytes[13] = 0;
            }
        });
        assert!(met.primary.is_err() && met.backup.is_err(), "{at:?}");
    }
}

#[test]
fn every_bit_that_is_flipped_on_the_way_ends_it_and_no_key_is_had() {
    for (leg, length) in LEGS {
        for at in 0..length {
            let bit = 1 << (at % 8);
            let met = meet([&secret(1); 2], |passing, bytes| {
                if passing == leg {
                    bytes[at] ^= bit;
                }
            });
            assert!(
                met.primary.is_err(),
                "{leg:?} byte {at}: the primary believes it"
            );
            // A backup has no word of the primary's after its verdict yet, and says nothing before that.
            if leg != Leg::Verdict {
                assert!(
                    met.backup.is_err(),
                    "{leg:?} byte {at}: the backup believes it"
                );
            }
        }
    }
}

#[test]
fn every_cut_ends_it_at_once() {
    let started = Instant::now();
    for (leg, length) in LEGS {
        for cut in (0..length).step_by(5) {
            let met = meet([&secret(1); 2], |passing, bytes| {
                if passing == leg {
                    bytes.truncate(cut);
                }
            });
            assert!(met.primary.is_err(), "{leg:?} cut at {cut}");
        }
    }
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn what_was_recorded_does_not_open_again() {
    let trust = secret(1);
    let before = honest(&trust);
    let [greeting, claim, verdict] = [0, 1, 2].map(|leg| before.passed[leg].clone());
    // To a backup, whose challenge is another one now.
    let met = meet([&trust; 2], |leg, bytes| {
        if leg == Leg::Plea {
            bytes.clone_from(&claim);
        }
    });
    assert!(matches!(met.backup, Err(HandshakeError::Secret)));
    // To a primary, whose key is another one now: by a whole false backup.
    let met = meet([&trust; 2], |leg, bytes| match leg {
        Leg::Greeting => bytes.clone_from(&greeting),
        Leg::Verdict => bytes.clone_from(&verdict),
        Leg::Plea => {}
    });
    assert!(met.primary.is_err() && met.backup.is_err());
}

#[test]
fn a_side_does_not_prove_itself_to_its_own_echo() {
    // Whoever has no secret says to a primary what it said, or what another primary says.
    let met = meet([&secret(1); 2], |leg, bytes| {
        if leg == Leg::Greeting {
            bytes[..8].copy_from_slice(&PRIMARY);
        }
    });
    assert!(matches!(met.primary, Err(HandshakeError::NotDoppel)));
    let met = meet([&secret(1); 2], |leg, bytes| {
        if leg == Leg::Plea {
            bytes[..8].copy_from_slice(&BACKUP);
        }
    });
    assert!(matches!(met.backup, Err(HandshakeError::NotDoppel)));
}

/// A change to three records in a row.
type Meddling = fn(&mut Vec<Vec<u8>>);

#[test]
fn records_that_are_changed_repeated_left_out_or_swapped_are_refused() {
    let cases: [(&str, Meddling); 9] = [
        ("a bit of the text", |records| records[0][2] ^= 1),
        ("a bit of the tag", |records| {
            *records[0].last_mut().unwrap() ^= 0x80
        }),
        ("repeated", |records| records.insert(0, records[0].clone())),
        ("left out", |records| drop(records.remove(0))),
        ("swapped", |records| records.swap(0, 1)),
        ("a shorter one", |records| {
            records[0].pop();
            records[0][0] -= 1;
        }),
        ("none in it", |records| records[0] = vec![16, 0]),
        ("a tag alone", |records| {
            records[0].truncate(18);
            records[0][..2].copy_from_slice(&[16, 0]);
        }),
        ("another's", |records| {
            let (primary, _backup, [wire, _]) = pair(&secret(1));
            (&primary).write_all(b"one").unwrap();
            records[0] = record(&wire);
        }),
    ];
    for (name, meddle) in cases {
        let (primary, backup, [at_primary, mut at_backup]) = pair(&secret(1));
        let mut records = Vec::new();
        for said in [b"one", b"two", b"thr"] {
            (&primary).write_all(said).unwrap();
            records.push(record(&at_primary));
        }
        meddle(&mut records);
        at_backup.write_all(&records.concat()).unwrap();
        at_backup.shutdown(std::net::Shutdown::Write).unwrap();
        let mut heard = Vec::new();
        let error = (&backup).read_to_end(&mut heard).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{name}");
        assert!(b"one".starts_with(&heard[..]), "{name}: heard {heard:?}");
        assert!(matches!(
            HandshakeError::from(error),
            HandshakeError::Forged
        ));
        // Nor is anything that comes later taken, or said over a connection that somebody meddles with.
        assert!((&backup).read(&mut [0]).is_err(), "{name}");
        assert!((&backup).write(b"a key").is_err(), "{name}");
    }
}

#[test]
fn a_record_that_drips_is_over_in_time_and_one_in_pieces_is_waited_for() {
    let (primary, backup, [at_primary, mut at_backup]) = pair(&secret(1));
    (&primary).write_all(b"one").unwrap();
    let sealed = record(&at_primary);
    backup.set_nonblocking(true).unwrap();
    for byte in &sealed {
        let error = (&backup).read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        at_backup.write_all(&[*byte]).unwrap();
    }
    let mut heard = [0; 2];
    assert_eq!((&backup).read(&mut heard).unwrap(), 2);
    assert!(backup.has_more());
    assert_eq!((&backup).read(&mut heard).unwrap(), 1);
    assert!(!backup.has_more());

    backup.set_nonblocking(false).unwrap();
    backup
        .set_patience(Some(Duration::from_millis(60)))
        .unwrap();
    let started = Instant::now();
    thread::scope(|scope| {
        scope.spawn(move || {
            // A long record, a byte now and then.
            at_backup.write_all(&[0xff, 0xff]).unwrap();
            while at_backup.write_all(&[0]).is_ok() && started.elapsed() < Duration::from_secs(2) {
                thread::sleep(Duration::from_millis(10));
            }
        });
        let error = (&backup).read(&mut heard).unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock),
            "{error}"
        );
        assert!(started.elapsed() < Duration::from_secs(1));
    });
}

#[test]
fn who_does_not_read_holds_nobody_who_writes() {
    let (primary, _backup, _wire) = pair(&secret(1));
    primary
        .set_patience(Some(Duration::from_millis(50)))
        .unwrap();
    let started = Instant::now();
    let error = (&primary).write_all(&vec![1; 16 << 20]).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock),
        "{error}"
    );
    assert!(started.elapsed() < Duration::from_secs(5));
    // Half a record is out: nothing more can follow it.
    assert_eq!(
        (&primary).write(b"more").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
}

#[test]
fn over_a_network_there_is_no_pair_without_a_secret() {
    let pair = |transport, secret| Pair {
        transport,
        secret,
        ..Pair::default()
    };
    for transport in [Transport::Tcp, Transport::Rdma] {
        let error = Trust::of(&pair(transport, None)).unwrap_err().to_string();
        assert!(
            error.contains("doppel secret") && error.contains("--secret"),
            "{error}"
        );
    }
    assert!(!Trust::of(&pair(Transport::Shm, None)).unwrap().has_secret());
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("secret");
    for transport in [Transport::Shm, Transport::Tcp, Transport::Rdma] {
        let named = pair(transport, Some(path.clone()));
        assert_eq!(Trust::of(&named).is_ok(), path.exists());
        let _ = Secret::create(&path);
        assert!(Trust::of(&named).unwrap().has_secret());
    }
}

#[test]
fn another_users_process_is_refused_on_both_sides_whatever_it_holds() {
    for trust in [secret(1), Trust::same_user()] {
        // As one who is another user, and not root, sees this process: which may be root, whom everybody believes.
        let other = Trust {
            user: trust.user + 1,
            ..trust.clone()
        };
        let expected = !is_believed(trust.user, other.user);
        let met = meet([&other, &trust], |_, _| {});
        assert_eq!(
            matches!(met.primary, Err(HandshakeError::User { .. })),
            expected
        );
        let met = meet([&trust, &other], |_, _| {});
        assert_eq!(
            matches!(met.backup, Err(HandshakeError::User { .. })),
            expected
        );
        assert_eq!(met.primary.is_err(), expected);
    }
}

/// A measurement for `docs/decisions/authentication.md`.
#[test]
#[ignore = "measures, and judges nothing"]
fn what_it_costs() {
    use crate::protocol::heartbeat::{Heartbeat, MachineId, PairKey, Progress};
    use crate::protocol::{Configuration, Epoch, Identity, Moment};

    const PROOFS: u32 = 300;
    const COPY: usize = 256 << 20;
    for trust in [Trust::same_user(), secret(1)] {
        let connect = || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            thread::scope(|scope| {
                let backup = scope.spawn(|| admit(Stream::Unix(theirs), &trust).unwrap());
                let primary = prove(Stream::Unix(ours), &trust).unwrap();
                (primary, backup.join().unwrap())
            })
        };
        let started = Instant::now();
        (0..PROOFS).for_each(|_| drop(connect()));
        let each = started.elapsed() / PROOFS;
        let (from, to) = connect();
        let piece = vec![7; 256 << 10];
        let started = Instant::now();
        thread::scope(|scope| {
            scope.spawn(move || {
                (0..COPY / piece.len()).for_each(|_| (&from).write_all(&piece).unwrap());
            });
            let mut heard = vec![0; 256 << 10];
            (0..COPY / heard.len()).for_each(|_| (&to).read_exact(&mut heard).unwrap());
        });
        let rate = COPY as f64 / started.elapsed().as_secs_f64() / 1e6;
        eprintln!(
            "sealed {}: both sides meet in {each:?}, {rate:.0} MB/s",
            to.is_sealed()
        );
    }
    let beat = Heartbeat {
        machine: MachineId::of("kv"),
        epoch: Epoch(1),
        configuration: Configuration(1),
        sender: Identity::from_bytes([9; 16]),
        sequence: 1,
        clock: Moment(0),
        progress: Progress::default(),
    };
    let key = PairKey::from_bytes([3; 16]);
    let started = Instant::now();
    const BEATS: u32 = 1_000_000;
    for sequence in 0..BEATS {
        let wire = Heartbeat {
            sequence: sequence.into(),
            ..beat
        }
        .encode(key);
        assert!(Heartbeat::decode(std::hint::black_box(&wire), key).is_ok());
    }
    eprintln!("a heartbeat made and read: {:?}", started.elapsed() / BEATS);
}
