//! Ports: links in one process, across processes' descriptors, and a TAP in a namespace of its own.

use super::link::{self, LinkError, LinkListener};
use super::*;

fn frame(fill: u8, length: usize) -> Vec<u8> {
    vec![fill; length]
}

#[test]
fn a_link_keeps_frames_apart_and_in_order() {
    let (one, other) = link::pair().unwrap();
    let mut slot = [0; 2048];
    assert_eq!(other.read_into(&mut slot).unwrap(), None);
    assert!(one.write(&frame(1, 60)).unwrap());
    assert!(one.write(&frame(2, 1514)).unwrap());
    assert_eq!(other.read_into(&mut slot).unwrap(), Some(60));
    assert_eq!(slot[..60], frame(1, 60));
    assert_eq!(other.read_into(&mut slot).unwrap(), Some(1514));
    assert_eq!(slot[..1514], frame(2, 1514));
    assert_eq!(other.read_into(&mut slot).unwrap(), None);
}

#[test]
fn what_is_no_frame_is_dropped_and_counted() {
    let (one, other) = link::pair().unwrap();
    let mut slot = [0; 100];
    assert!(one.write(&[1, 2, 3]).unwrap());
    assert_eq!(one.dropped(), 1);
    assert!(one.write(&frame(1, 101)).unwrap());
    assert!(one.write(&frame(2, 100)).unwrap());
    assert_eq!(other.read_into(&mut slot).unwrap(), Some(100));
    assert_eq!(slot[0], 2);
    assert_eq!(other.dropped(), 1);
}

#[test]
fn a_full_link_refuses_and_loses_nothing() {
    let (one, other) = link::pair().unwrap();
    let mut sent = 0_u32;
    let mut next = frame(0, 1514);
    loop {
        next[..4].copy_from_slice(&sent.to_le_bytes());
        if !one.write(&next).unwrap() {
            break;
        }
        sent += 1;
    }
    assert!(sent >= 64, "the link holds only {sent} frames");
    let mut slot = [0; 2048];
    for number in 0..sent {
        assert_eq!(other.read_into(&mut slot).unwrap(), Some(1514));
        assert_eq!(slot[..4], number.to_le_bytes());
    }
    assert_eq!(other.read_into(&mut slot).unwrap(), None);
    assert!(one.write(&next).unwrap(), "room has come back");
}

#[test]
fn the_queue_outlives_one_of_its_holders() {
    let (one, other) = link::pair().unwrap();
    let inheritable = one.inheritable().unwrap();
    let heir = NetPort::inherited(inheritable.as_raw_fd()).unwrap();
    assert_eq!(heir.kind(), PortKind::Link);
    assert!(other.write(&frame(7, 60)).unwrap());
    drop(one);
    drop(inheritable);
    let mut slot = [0; 100];
    assert_eq!(heir.read_into(&mut slot).unwrap(), Some(60));
    assert!(heir.write(&frame(8, 60)).unwrap());
    assert_eq!(other.read_into(&mut slot).unwrap(), Some(60));

    drop(heir);
    let gone = other.read_into(&mut slot).unwrap_err();
    assert_eq!(gone.kind(), io::ErrorKind::UnexpectedEof);
    let gone = other.write(&frame(9, 60)).unwrap_err();
    assert_eq!(gone.kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn descriptors_that_are_no_ports_are_refused() {
    assert!(matches!(
        NetPort::inherited(1_000_000),
        Err(PortError::NotOpen { .. })
    ));
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(
        NetPort::inherited(file.as_raw_fd()),
        Err(PortError::NotAPort { .. })
    ));
    let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(matches!(
        NetPort::inherited(stream.as_raw_fd()),
        Err(PortError::NotAPort { .. })
    ));
}

#[test]
fn a_link_by_path_connects_and_cleans_up() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("link");
    assert!(matches!(
        link::connect(&path),
        Err(LinkError::NobodyThere { .. })
    ));
    let listener = LinkListener::bind(&path).unwrap();
    assert!(listener.accept().unwrap().is_none());
    let one = link::connect(&path).unwrap();
    let other = listener.accept().unwrap().expect("a connection waits");
    assert!(one.write(&frame(3, 60)).unwrap());
    let mut slot = [0; 100];
    assert_eq!(other.read_into(&mut slot).unwrap(), Some(60));

    assert!(matches!(
        LinkListener::bind(&path),
        Err(LinkError::Busy { .. })
    ));
    drop(listener);
    assert!(!path.exists());

    let long = directory.path().join("x".repeat(120));
    assert!(matches!(
        LinkListener::bind(&long),
        Err(LinkError::PathTooLong { limit: 107, .. })
    ));
}

#[test]
fn a_socket_left_by_a_dead_listener_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("link");
    let dead = LinkListener::bind(&path).unwrap();
    let aside = directory.path().join("aside");
    std::fs::rename(&path, &aside).unwrap();
    drop(dead);
    std::fs::rename(&aside, &path).unwrap();
    let listener = LinkListener::bind(&path).unwrap();
    let _one = link::connect(&path).unwrap();
    assert!(listener.accept().unwrap().is_some());
}
