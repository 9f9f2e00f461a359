//! What the rest relies on, over the fake card or, where `DOPPEL_VERBS` names the library, the machine's own; and errors.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use super::abi::{Completion, Step};
use super::*;
use crate::region::Region;

const LONG: Duration = Duration::from_secs(20);

fn verbs() -> Verbs {
    if std::env::var_os("DOPPEL_VERBS").is_some() {
        Verbs::load().unwrap()
    } else {
        fake::verbs()
    }
}

fn connect(a: &mut Queue, b: &mut Queue, device: &Device) {
    let numbers = [b.limits().number, a.limits().number];
    for (from, to) in [a, b].into_iter().zip(numbers) {
        let port = device.port();
        let path = Path {
            gid: port.gid,
            number: to,
            psn: 7,
            own_psn: 7,
            lid: port.lid,
            mtu: port.mtu,
            timeout: 12,
            retries: 6,
            reserved: [0; 3],
        };
        from.connect(&path).unwrap();
    }
}

/// The foundation of the fence: when memory has been taken back, nothing changes in it any more, though writes to it are
/// under way and more are posted.
#[test]
fn memory_that_was_taken_back_does_not_change() {
    const LEN: usize = 256 << 10;
    for _ in 0..10 {
        let device = Arc::new(verbs().open(&Choice::default()).unwrap());
        let mut queues = [(); 2].map(|()| Queue::new(&device, 32, 4, 0).unwrap());
        let [from, to] = &mut queues;
        connect(from, to, &device);
        let [own, theirs] = [(); 2].map(|()| Region::locked(LEN).unwrap());
        let source = Registered::new(&device, &own, Writes::Own).unwrap();
        let mut target = Registered::new(&device, &theirs, Writes::Peer).unwrap();
        let remote = target.remote();
        let [view, _] = theirs.read_views(0, [LEN, 0]);
        let [mut bytes, _] = own.write_views(0, [LEN, 0]);
        let look = || {
            let mut copy = vec![0; LEN];
            view.copy_out(0, &mut copy);
            copy
        };
        let started = AtomicBool::new(false);
        let failure = thread::scope(|scope| {
            let writing = scope.spawn(|| {
                let until = Instant::now() + LONG;
                let (mut filling, mut posted, mut done) = (0_u8, 0, 0);
                let mut completions = [Completion::default(); 8];
                loop {
                    assert!(Instant::now() < until, "it is not refused");
                    if posted - done < 4 {
                        filling = filling.wrapping_add(1);
                        bytes.bytes_mut(0, LEN).fill(filling);
                        from.post([source.write(0, LEN, remote, 0)], posted)
                            .unwrap();
                        posted += 1;
                    }
                    let got = from.poll(&mut completions).unwrap();
                    for completion in &completions[..got] {
                        if completion.status != 0 {
                            return RdmaError::of_status(completion.status, 0);
                        }
                        done += 1;
                        started.store(true, SeqCst);
                    }
                }
            });
            while !started.load(SeqCst) {
                thread::yield_now();
            }
            target.deregister().unwrap();
            let at_once = look();
            let failure = writing.join().unwrap();
            assert!(
                look() == at_once,
                "bytes arrived after the memory was taken back"
            );
            failure
        });
        assert!(matches!(failure, RdmaError::Refused { .. }), "{failure}");
    }
}

#[test]
fn what_is_missing_is_said_with_what_to_do() {
    let open = |device: &str| {
        let choice = Choice {
            device: Some(device.to_owned()),
            ..Choice::default()
        };
        fake::verbs().open(&choice).map(drop).unwrap_err()
    };
    assert_eq!(open("none"), RdmaError::NoDevice);
    let unknown = open("mlx5_7");
    let have = vec!["fake".to_owned()];
    let name = "mlx5_7".to_owned();
    assert_eq!(unknown, RdmaError::UnknownDevice { name, have });
    assert!(matches!(
        open(&"x".repeat(80)),
        RdmaError::UnknownDevice { .. }
    ));
    assert!(matches!(open("fake-no-port"), RdmaError::NoPort { .. }));
    assert!(matches!(open("fake-no-gid"), RdmaError::NoGid { .. }));
    let refused = open("fake-forbidden");
    assert!(matches!(
        refused,
        RdmaError::Permission {
            errno: libc::EACCES,
            ..
        }
    ));
    let choice = Choice {
        device: Some("fake-memlock".to_owned()),
        ..Choice::default()
    };
    let device = Arc::new(fake::verbs().open(&choice).unwrap());
    let region = Region::locked(8192).unwrap();
    let refused = Registered::new(&device, &region, Writes::Own).unwrap_err();
    let errno = libc::ENOMEM;
    assert_eq!(refused, RdmaError::LockedMemory { bytes: 8192, errno });
    for (error, advice) in [
        (RdmaError::NoDevice, "rdma link add"),
        (unknown, "set rdma.device"),
        (open("fake-no-port"), "bring its link up"),
        (open("fake-no-gid"), "rdma.gid_index"),
        (open("fake-forbidden"), "/dev/infiniband"),
        (refused, "ulimit -l"),
        (RdmaError::of_status(12, 0), "path MTU"),
        (RdmaError::of_status(10, 0), "ask the arbiter"),
        (RdmaError::of_status(5, 0), "make a new one"),
    ] {
        let text = error.to_string();
        assert!(text.contains(advice), "{text}");
    }
}

#[test]
fn what_a_device_refuses_later_is_said_with_what_to_do() {
    let device = |name: &str| {
        let choice = Choice {
            device: Some(name.to_owned()),
            ..Choice::default()
        };
        Arc::new(fake::verbs().open(&choice).unwrap())
    };
    let full = Queue::new(&device("fake-full"), 32, 4, 0).map(drop);
    let full = full.unwrap_err();
    assert!(matches!(
        full,
        RdmaError::NoRoom {
            errno: libc::ENOMEM,
            ..
        }
    ));
    let region = Region::locked(8192).unwrap();
    let gone = Registered::new(&device("fake-gone"), &region, Writes::Own).map(drop);
    let gone = gone.unwrap_err();
    assert!(matches!(
        gone,
        RdmaError::DeviceGone {
            errno: libc::ENODEV,
            ..
        }
    ));
    let lonely = device("fake-no-path");
    let mut queue = Queue::new(&lonely, 32, 4, 0).unwrap();
    let mut gid = [0; 16];
    gid[10..].copy_from_slice(&[0xff, 0xff, 192, 0, 2, 7]);
    let path = Path {
        gid,
        number: 1,
        psn: 0,
        own_psn: 0,
        lid: 0,
        mtu: 3,
        timeout: 14,
        retries: 6,
        reserved: [0; 3],
    };
    let no_path = queue.connect(&path).unwrap_err();
    let errno = libc::EINVAL;
    let gid = "::ffff:192.0.2.7".to_owned();
    assert_eq!(
        no_path,
        RdmaError::NoPath {
            gid,
            mtu: 1024,
            errno
        }
    );
    for (error, advice) in [
        (full, "ulimit -l"),
        (gone, "rdma link"),
        (no_path, "rdma.gid_index"),
        (RdmaError::of_status(2, 0), "queue pair"),
        (RdmaError::of_status(7, 0), "driver"),
        (RdmaError::of_status(11, 0), "dmesg"),
        (RdmaError::of_status(13, 0), "receiver not ready"),
        (RdmaError::of_status(21, 0), "reset"),
        (RdmaError::of_status(99, 0), "ibv_wc_status"),
    ] {
        let text = error.to_string();
        assert!(text.contains(advice), "{text}");
    }
}

/// Every step that the table can name has words, and an errno is told.
#[test]
fn every_failure_of_the_table_has_words() {
    for step in Step::ALL {
        let failure = Failure::of(step, libc::EIO);
        let text = RdmaError::of(failure, &Context::default()).to_string();
        assert!(text.len() > 20, "{step:?}: {text}");
    }
    let unheard_of = Failure {
        step: 999,
        errno: 5,
    };
    let text = RdmaError::of(unheard_of, &Context::default()).to_string();
    assert!(text.contains("does not name"), "{text}");
}

#[test]
#[should_panic(expected = "the bytes lie in the registered memory")]
fn no_request_reaches_beyond_registered_memory() {
    let device = Arc::new(fake::verbs().open(&Choice::default()).unwrap());
    let region = Region::locked(4096).unwrap();
    let memory = Registered::new(&device, &region, Writes::Own).unwrap();
    let remote = memory.remote();
    let _ = memory.write(4000, 200, remote, 0);
}
