//! Tells the switches of the guest's network where the guest is now, when it starts or goes live on a host.
//!
//! A switch sends frames where it saw their receiver's address last. The guest's clients are often the ones who have to speak
//! first; what they send then goes to the host that is gone, until somebody gives up waiting. So the new primary sends a
//! frame of its own from the guest's address: a reverse ARP request (RFC 903), which nobody answers, as other hypervisors do
//! after they have moved a machine.
#![forbid(unsafe_code)]

use std::io;
use std::time::{Duration, Instant};

use crate::backends::NetPort;

/// The shortest Ethernet frame, without its checksum.
const FRAME: usize = 60;
const REVERSE_ARP: [u8; 2] = [0x80, 0x35];

/// Between the first announcement and the second; each gap is twice the one before. One frame may be lost, and an old primary that
/// is thawed may send a frame that had committed before, by which switches look for the guest there again.
const FIRST_GAP: Duration = Duration::from_millis(250);
/// After a gap of this length there are no more: the whole takes a minute.
const LAST_GAP: Duration = Duration::from_secs(32);

/// Announces the guest, once it is told to.
pub(super) struct Announcer {
    port: NetPort,
    frame: [u8; FRAME],
    /// The next announcement, and the gap after it.
    next: Option<(Instant, Duration)>,
}

impl Announcer {
    /// For the guest of this address behind the port. It keeps silent until [`Announcer::begin`].
    pub(super) fn new(port: &NetPort, mac: [u8; 6]) -> io::Result<Self> {
        Ok(Self {
            port: port.try_clone()?,
            frame: announcement(mac),
            next: None,
        })
    }

    /// The guest is here from now on.
    pub(super) fn begin(&mut self, now: Instant) {
        self.next = Some((now, FIRST_GAP));
        self.turn(now);
    }

    /// Sends what is due.
    pub(super) fn turn(&mut self, now: Instant) {
        let Some((due, gap)) = self.next else { return };
        if now < due {
            return;
        }
        // A port that is full or broken carries nothing of the guest's either, which is said elsewhere.
        let _ = self.port.write(&self.frame);
        self.next = (gap <= LAST_GAP).then(|| (now + gap, gap * 2));
    }
}

/// A reverse ARP request of this address for itself.
fn announcement(mac: [u8; 6]) -> [u8; FRAME] {
    let mut frame = [0; FRAME];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    frame[12..14].copy_from_slice(&REVERSE_ARP);
    // Ethernet, IPv4, address lengths, request reverse.
    frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 3]);
    frame[22..28].copy_from_slice(&mac);
    frame[32..38].copy_from_slice(&mac);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::link;

    const MAC: [u8; 6] = [2, 1, 2, 3, 4, 5];

    #[test]
    fn it_announces_again_and_again_and_then_no_more() {
        let (ours, theirs) = link::pair().unwrap();
        let mut announcer = Announcer::new(&ours, MAC).unwrap();
        let begun = Instant::now();
        let mut sent = Vec::new();
        let mut slot = [0; 128];
        let mut look = |announcer: &mut Announcer, after: Duration| {
            announcer.turn(begun + after);
            while let Some(length) = theirs.read_into(&mut slot).unwrap() {
                assert_eq!(slot[..length], announcement(MAC));
                sent.push(after);
            }
        };
        look(&mut announcer, Duration::from_secs(1));
        announcer.begin(begun);
        for millis in (0..200_000).step_by(10) {
            look(&mut announcer, Duration::from_millis(millis));
        }
        let seconds = [0.0, 0.25, 0.75, 1.75, 3.75, 7.75, 15.75, 31.75, 63.75];
        assert_eq!(sent, seconds.map(Duration::from_secs_f64));
    }

    #[test]
    fn it_is_a_frame_from_the_guest_to_everybody() {
        let frame = announcement(MAC);
        assert_eq!(
            frame[..14],
            [255, 255, 255, 255, 255, 255, 2, 1, 2, 3, 4, 5, 0x80, 0x35]
        );
        assert_eq!(frame[20..28], [0, 3, 2, 1, 2, 3, 4, 5]);
    }
}
