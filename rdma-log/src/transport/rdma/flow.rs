//! What waits to be sent, and what is in flight: pure accounting.
//!
//! A real card has a queue of fixed length and frees a place of it only when a later *signalled* request was completed. So
//! the places are counted here ([`Window`]), and nothing is posted that has none; what must wait stays in the ring's memory
//! as a few numbers ([`Gather`]).
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use crate::entry::{LINE, Seq};
use crate::transport::Range;

/// Bytes that neighbouring entries may become one request with: the cost of a request is far below that of so many bytes,
/// and the first entry of it does not wait long for the last. A longer entry is a request of its own.
pub(super) const TOGETHER: u64 = 32 << 10;

/// A piece of a lane that goes in one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it starts, in bytes since the start of the connection.
    pub(super) from: u64,
    /// Bytes to send.
    pub(super) len: u64,
    /// All up to here is sent with it and what went before.
    pub(super) to: u64,
    /// The last entry that is sent whole with it and what went before.
    pub(super) seq: Seq,
}

/// Posted ranges that were not sent yet.
#[derive(Debug)]
pub(super) struct Gather {
    size: u64,
    pieces: VecDeque<Piece>,
}

impl Gather {
    /// For a lane of so many bytes.
    pub(super) fn new(size: u64) -> Gather {
        Gather {
            size,
            pieces: VecDeque::new(),
        }
    }

    /// Takes a range over. Of a pad only its first line is sent: the rest says nothing.
    pub(super) fn add(&mut self, range: Range) {
        let end_of_lap = (range.from / self.size + 1) * self.size;
        let mut from = range.from;
        if range.to > end_of_lap {
            self.append(Piece {
                from,
                len: LINE as u64,
                to: end_of_lap,
                seq: Seq(range.seq.0 - 1),
            });
            from = end_of_lap;
        }
        self.append(Piece {
            from,
            len: range.to - from,
            to: range.to,
            seq: range.seq,
        });
    }

    fn append(&mut self, piece: Piece) {
        if let Some(last) = self.pieces.back_mut()
            && last.from + last.len == piece.from
            && !piece.from.is_multiple_of(self.size)
            && last.len + piece.len <= TOGETHER
        {
            last.len += piece.len;
            last.to = piece.to;
            last.seq = piece.seq;
            return;
        }
        self.pieces.push_back(piece);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.pieces.len()
    }

    /// The piece with so many before it; it is there.
    pub(super) fn get(&self, index: usize) -> Piece {
        self.pieces[index]
    }

    /// Takes out the next pieces, so many at the most.
    pub(super) fn take(&mut self, most: usize) -> impl Iterator<Item = Piece> + '_ {
        let most = most.min(self.pieces.len());
        self.pieces.drain(..most)
    }
}

/// The places of a send queue, and what is in them. Each posting is one chain of requests whose last is signalled.
#[derive(Debug)]
pub(super) struct Window<T> {
    depth: u32,
    used: u32,
    next: u64,
    posted: VecDeque<Posted<T>>,
}

#[derive(Debug)]
struct Posted<T> {
    id: u64,
    requests: u32,
    what: T,
}

impl<T> Window<T> {
    /// For a queue of so many places.
    pub(super) fn new(depth: u32) -> Window<T> {
        Window {
            depth,
            used: 0,
            next: 1,
            posted: VecDeque::new(),
        }
    }

    /// Places that are free.
    pub(super) fn room(&self) -> u32 {
        self.depth - self.used
    }

    pub(super) fn is_empty(&self) -> bool {
        self.posted.is_empty()
    }

    /// The id that the next posting is to carry.
    pub(super) fn next_id(&self) -> u64 {
        self.next
    }

    /// Notes a posting of so many requests, for which there was room.
    pub(super) fn post(&mut self, requests: u32, what: T) {
        assert!(
            requests > 0 && requests <= self.room(),
            "the send queue has room"
        );
        self.used += requests;
        self.posted.push_back(Posted {
            id: self.next,
            requests,
            what,
        });
        self.next += 1;
    }

    /// The posting with this id was completed.
    ///
    /// # Errors
    /// The id that should have come: completions come in order, and every posting has one.
    pub(super) fn complete(&mut self, id: u64) -> Result<T, u64> {
        match self.posted.pop_front() {
            Some(posted) if posted.id == id => {
                self.used -= posted.requests;
                Ok(posted.what)
            }
            Some(posted) => {
                let expected = posted.id;
                self.posted.push_front(posted);
                Err(expected)
            }
            None => Err(self.next),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lane::{Geometry, MIN_LANE};

    proptest! {
        /// Whatever is posted: every line of every entry is sent once and in order, within a lap, an entry in one request.
        #[test]
        fn every_entry_goes_whole_in_one_request(
            payloads in prop::collection::vec((0..1000usize, any::<bool>()), 1..200)
        ) {
            let geometry = Geometry::new(MIN_LANE).unwrap();
            let size = geometry.size();
            let mut gather = Gather::new(size);
            let (mut entries, mut sent) = (Vec::new(), Vec::new());
            let mut cursor = 0;
            for (i, (payload, flush)) in payloads.into_iter().enumerate() {
                let at = cursor + geometry.pad(cursor, payload);
                let to = at + Geometry::span(payload);
                let seq = Seq(i as u64 + 1);
                gather.add(Range { from: cursor, to, seq });
                entries.push((at, to, seq));
                cursor = to;
                if flush {
                    sent.extend(gather.take(3));
                }
            }
            sent.extend(gather.take(usize::MAX));
            prop_assert!(gather.is_empty());
            let mut reached = 0;
            let mut last = Seq::ZERO;
            for piece in &sent {
                prop_assert!(piece.from == reached && piece.len > 0 && piece.to >= piece.from + piece.len);
                prop_assert!(piece.from / size == (piece.from + piece.len - 1) / size, "within a lap");
                prop_assert!(piece.len <= TOGETHER && piece.seq >= last);
                reached = piece.to;
                last = piece.seq;
            }
            prop_assert_eq!(reached, cursor);
            for (at, to, seq) in entries {
                let carriers = sent.iter().filter(|p| p.from < to && at < p.from + p.len).collect::<Vec<_>>();
                prop_assert_eq!(carriers.len(), 1);
                let piece = carriers[0];
                prop_assert!(piece.from <= at && to <= piece.from + piece.len && piece.seq >= seq);
                // Complete up to here, not one entry too many: nothing that is not sent whole is said to be.
                prop_assert!(sent.iter().all(|p| p.to > at || p.seq < seq));
            }
        }

        #[test]
        fn a_window_never_overflows_and_frees_what_completed(steps in prop::collection::vec((1..5u32, any::<bool>()), 1..300)) {
            let mut window = Window::new(8);
            let mut model = VecDeque::new();
            for (requests, post) in steps {
                if post && requests <= window.room() {
                    model.push_back((window.next_id(), requests));
                    window.post(requests, requests);
                } else if let Some((id, requests)) = model.pop_front() {
                    prop_assert_eq!(window.complete(id + 1), Err(id), "out of turn");
                    prop_assert_eq!(window.complete(id), Ok(requests));
                }
                let used: u32 = model.iter().map(|(_, requests)| requests).sum();
                prop_assert!(used <= 8 && window.room() == 8 - used);
                prop_assert_eq!(window.is_empty(), model.is_empty());
            }
        }
    }

    #[test]
    fn a_completion_that_nobody_waits_for_is_refused() {
        let mut window = Window::<()>::new(4);
        assert_eq!(window.complete(1), Err(1));
        window.post(1, ());
        assert_eq!(window.complete(0), Err(1));
        assert_eq!(window.complete(1), Ok(()));
        assert_eq!(window.complete(1), Err(2));
    }

    #[test]
    #[should_panic(expected = "the send queue has room")]
    fn posting_without_room_is_a_fault() {
        Window::new(2).post(3, ());
    }
}
