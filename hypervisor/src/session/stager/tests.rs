use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rdma_log::transport::tcp;
use rdma_log::{RingConfig, RingReader, RingWriter};

use super::*;
use crate::backends::link;
use crate::backends::wait::Wake;

/// More than are sent together, and no multiple of it.
const FRAMES: usize = 2 * TOGETHER + 3;

fn over_loopback() -> (RingWriter, RingReader) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (here, _) = listener.accept().unwrap();
    let accepting = std::thread::spawn(move || {
        tcp::accept(here, &RingConfig::default(), Duration::ZERO).unwrap()
    });
    let writer = tcp::connect(there).unwrap();
    (writer, accepting.join().unwrap().0)
}

fn frame(number: usize) -> Vec<u8> {
    vec![number as u8 + 1; 60 + number]
}

/// What is read over a stream has been sent, whole and in order, by the time that the guest may see it, without anybody pushing.
#[test]
fn frames_that_are_staged_have_been_sent_whatever_the_number() {
    let (writer, mut reader) = over_loopback();
    let (outside, port) = link::pair().unwrap();
    let stage = Arc::new(Stage::new(Arc::new(Wake::new().unwrap())));
    let mut stager = Stager::new(Some(port), Arc::clone(&stage), Arc::default());
    stager.attach((writer.inputs, Epoch(1), None));
    for number in 0..FRAMES {
        assert!(outside.write(&frame(number)).unwrap());
    }
    stager.pump().unwrap();
    for number in 0..FRAMES {
        let staged = stage.pop().expect("all were read");
        assert_eq!(staged.seq, Seq(number as u64 + 1));
        assert_eq!(staged.bytes, frame(number));
    }
    let until = Instant::now() + Duration::from_secs(10);
    let mut came = 0;
    while came < FRAMES {
        assert!(Instant::now() < until, "only {came} frames were sent");
        match reader.inputs.next().unwrap() {
            Some(entry) => {
                assert_eq!(entry.payload()[0], INPUT_FRAME);
                assert_eq!(entry.payload()[1..], frame(came));
                came += 1;
            }
            None => drop(reader.inputs.wait(Duration::from_millis(100)).unwrap()),
        }
    }
}

/// A stage that fills up in the middle of what is sent together takes what was read, and nothing is read beyond it.
#[test]
fn nothing_is_read_for_which_the_stage_has_no_room() {
    let (writer, _reader) = over_loopback();
    let (outside, port) = link::pair().unwrap();
    let stage = Arc::new(Stage::new(Arc::new(Wake::new().unwrap())));
    let mut stager = Stager::new(Some(port), Arc::clone(&stage), Arc::default());
    stager.attach((writer.inputs, Epoch(1), None));
    while stage.has_room(3) {
        let full = stage.frame(Seq::ZERO, &[0]);
        stage.push(full).unwrap();
    }
    for number in 0..FRAMES {
        assert!(outside.write(&frame(number)).unwrap());
    }
    stager.pump().unwrap();
    assert!(!stage.has_room(0) && stager.published() == Seq(3));
    assert!(stager.wants().is_none());
    let staged = stage.take_all();
    assert_eq!(staged[staged.len() - 3..], [frame(0), frame(1), frame(2)]);
    stager.pump().unwrap();
    assert_eq!(stage.take_all().len(), FRAMES - 3);
}
