use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use super::*;

fn file(text: &str) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn text(fd: OwnedFd) -> String {
    let mut file = File::from(fd);
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn descriptors_arrive_in_order_with_their_message() {
    let (a, b) = UnixStream::pair().unwrap();
    let files: Vec<File> = (0..MAX_FDS).map(|i| file(&format!("file {i}"))).collect();
    let fds: Vec<BorrowedFd<'_>> = files.iter().map(File::as_fd).collect();
    send_with_fds(&a, b"hello", &fds).unwrap();
    send_with_fds(&a, b"world", &fds[..1]).unwrap();
    let mut bytes = [0; 5];
    let got = recv_with_fds(&b, &mut bytes, MAX_FDS).unwrap();
    for fd in &got {
        // SAFETY: the call takes a live descriptor and returns its flags.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) };
        assert_eq!(flags, libc::FD_CLOEXEC, "no child inherits it");
    }
    assert_eq!((&bytes, got.len()), (b"hello", MAX_FDS));
    for (i, fd) in got.into_iter().enumerate() {
        assert_eq!(text(fd), format!("file {i}"));
    }
    let got = recv_with_fds(&b, &mut bytes, 1).unwrap();
    assert_eq!((&bytes, got.len()), (b"world", 1));
}

#[test]
fn a_message_longer_than_the_socket_holds_arrives_whole() {
    let (a, b) = UnixStream::pair().unwrap();
    let sent: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    let keep = file("kept");
    std::thread::scope(|scope| {
        scope.spawn(|| send_with_fds(&a, &sent, &[keep.as_fd()]).unwrap());
        let mut bytes = vec![0; sent.len()];
        let mut fds = recv_with_fds(&b, &mut bytes, 1).unwrap();
        assert!(bytes == sent);
        assert_eq!(text(fds.pop().unwrap()), "kept");
    });
}

#[test]
fn surplus_descriptors_are_an_error() {
    // An even bound fills the control buffer to the byte, an odd one leaves room for a surplus one.
    for expected in 0..4 {
        let (a, b) = UnixStream::pair().unwrap();
        let file = file("x");
        send_with_fds(&a, b"12", &vec![file.as_fd(); expected + 1]).unwrap();
        let result = recv_with_fds(&b, &mut [0; 2], expected);
        assert!(matches!(result, Err(FdPassError::TooMany { max }) if max == expected));
    }
}

#[test]
fn requests_out_of_bounds_send_nothing() {
    let (a, b) = UnixStream::pair().unwrap();
    let file = file("x");
    let fds = [file.as_fd(); MAX_FDS + 1];
    assert!(matches!(
        send_with_fds(&a, b"1", &fds),
        Err(FdPassError::BadRequest { .. })
    ));
    assert!(matches!(
        send_with_fds(&a, b"", &fds[..1]),
        Err(FdPassError::BadRequest { .. })
    ));
    assert!(matches!(
        recv_with_fds(&b, &mut [0], MAX_FDS + 1),
        Err(FdPassError::BadRequest { .. })
    ));
    drop(a);
    let closed = recv_with_fds(&b, &mut [0; 4], 0);
    assert!(matches!(
        closed,
        Err(FdPassError::Closed { got: 0, wanted: 4 })
    ));
}

#[test]
fn a_time_limit_and_a_torn_message_are_errors() {
    let (a, b) = UnixStream::pair().unwrap();
    b.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
    send_with_fds(&a, b"to", &[]).unwrap();
    let slow = recv_with_fds(&b, &mut [0; 4], 0).unwrap_err();
    assert!(matches!(slow, FdPassError::Io(error) if error.kind() == io::ErrorKind::WouldBlock));
    send_with_fds(&a, b"rn", &[]).unwrap();
    drop(a);
    let torn = recv_with_fds(&b, &mut [0; 4], 0);
    assert!(matches!(
        torn,
        Err(FdPassError::Closed { got: 2, wanted: 4 })
    ));
}
