//! The cables between hosts: a learning switch in this process, whose every direction can be cut or slowed.
//!
//! Each network card of a host is a Unix stream on which QEMU puts Ethernet frames, each behind its length in four bytes,
//! big-endian. One thread serves all cards. A host that does not read (it is frozen) loses frames beyond a queue of
//! [`QUEUE`] bytes, as at any switch.
#![forbid(unsafe_code)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// Bytes that wait for one card before frames are dropped: about 10 ms of a 1 Gb/s link, as cheap switches have it.
pub const QUEUE: usize = 1024 * 1024;

/// The largest frame that QEMU hands over.
pub const MAX_FRAME: usize = 4096 + 65_536;

/// Numbers of those who are plugged in without being a host.
const OUTSIDE: RangeInclusive<u8> = 100..=u8::MAX;

/// A network card: the number of its host, from 1, and of its network, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Card {
    /// The host.
    pub host: u8,
    /// The network.
    pub network: u8,
}

/// What is wrong with a cable in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Trouble {
    /// Nothing comes through.
    pub cut: bool,
    /// How much later everything comes.
    pub delay: Duration,
    /// How many of a million frames are lost.
    pub lost_per_million: u32,
}

/// The switch without its sockets: frames and the time in, frames out.
#[derive(Debug, Default)]
pub struct Switch {
    /// What is wrong, by network, sender and receiver.
    troubles: BTreeMap<(u8, u8, u8), Trouble>,
    /// Behind which card an address was seen, by network.
    seen: BTreeMap<(u8, [u8; 6]), Card>,
    cards: Vec<Card>,
    /// Whose frames are shown to whom besides.
    shown: Vec<(Card, Card)>,
    late: BinaryHeap<Reverse<Late>>,
    order: u64,
    dice: u64,
    /// What was cut or lost by order, for the status.
    pub dropped: u64,
    /// What went through.
    pub passed: u64,
    /// What came faster than its receiver took it, for the status.
    pub overflowed: u64,
}

/// A frame that is on its way, ordered by when it arrives and then by when it was sent.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Late {
    due: Instant,
    order: u64,
    to: Card,
    frame: Vec<u8>,
}

impl Switch {
    /// A switch with these cards, all cables sound.
    #[must_use]
    pub fn new(cards: Vec<Card>) -> Self {
        Self {
            cards,
            dice: 0x9e37_79b9_7f4a_7c15,
            ..Self::default()
        }
    }

    /// Changes what is wrong between two hosts in one direction.
    pub fn set(&mut self, network: u8, from: u8, to: u8, trouble: Trouble) {
        if trouble == Trouble::default() {
            self.troubles.remove(&(network, from, to));
        } else {
            self.troubles.insert((network, from, to), trouble);
        }
    }

    /// What is wrong between two hosts in one direction.
    #[must_use]
    pub fn trouble(&self, network: u8, from: u8, to: u8) -> Trouble {
        self.troubles
            .get(&(network, from, to))
            .copied()
            .unwrap_or_default()
    }

    /// Everything that is wrong: network, sender, receiver, what.
    pub fn troubles(&self) -> impl Iterator<Item = (u8, u8, u8, Trouble)> + '_ {
        self.troubles
            .iter()
            .map(|(&(network, from, to), &trouble)| (network, from, to, trouble))
    }

    /// Plugs in somebody who is no host: as a card, or, where a host is named, to be shown every frame that it sends and nothing
    /// else. `None` if too many are plugged in.
    pub fn plug(&mut self, network: u8, shown: Option<u8>) -> Option<Card> {
        let used = |host: &u8| {
            let showing = self.shown.iter().map(|&(_, to)| to);
            self.cards
                .iter()
                .copied()
                .chain(showing)
                .any(|card| card.host == *host)
        };
        let host = OUTSIDE.into_iter().find(|host| !used(host))?;
        let card = Card { host, network };
        match shown {
            Some(host) => self.shown.push((Card { host, network }, card)),
            None => self.cards.push(card),
        }
        Some(card)
    }

    /// Unplugs who was plugged in by [`Switch::plug`].
    pub fn unplug(&mut self, card: Card) {
        self.cards.retain(|&each| each != card);
        self.shown.retain(|&(_, to)| to != card);
        self.forget(card.host);
    }

    /// Takes a frame from a card, and hands it to `deliver` for each card that gets it now.
    pub fn frame(
        &mut self,
        from: Card,
        frame: &[u8],
        now: Instant,
        mut deliver: impl FnMut(Card, &[u8]),
    ) {
        let Some((to, sender)) = addresses(frame) else {
            return;
        };
        for &(shown, viewer) in &self.shown {
            if shown == from {
                deliver(viewer, frame);
            } else if viewer == from {
                return;
            }
        }
        self.seen.insert((from.network, sender), from);
        let known = self.seen.get(&(from.network, to)).copied();
        let receivers: Vec<Card> = match known {
            Some(card) if to[0] & 1 == 0 => vec![card],
            _ => self.cards.clone(),
        };
        for card in receivers {
            if card.network != from.network || card.host == from.host {
                continue;
            }
            let trouble = self.trouble(from.network, from.host, card.host);
            if trouble.cut || self.loses(trouble) {
                self.dropped += 1;
            } else if trouble.delay.is_zero() {
                self.passed += 1;
                deliver(card, frame);
            } else {
                self.order += 1;
                self.late.push(Reverse(Late {
                    due: now + trouble.delay,
                    order: self.order,
                    to: card,
                    frame: frame.to_vec(),
                }));
            }
        }
    }

    /// Hands over what is due.
    pub fn due(&mut self, now: Instant, mut deliver: impl FnMut(Card, &[u8])) {
        while let Some(Reverse(late)) = self.late.peek()
            && late.due <= now
        {
            if let Some(Reverse(late)) = self.late.pop() {
                self.passed += 1;
                deliver(late.to, &late.frame);
            }
        }
    }

    /// When something is due next.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.late.peek().map(|Reverse(late)| late.due)
    }

    /// A host has vanished: what was on its way to it arrives nowhere.
    pub fn forget(&mut self, host: u8) {
        self.late.retain(|Reverse(late)| late.to.host != host);
        self.seen.retain(|_, card| card.host != host);
    }
}

impl Switch {
    fn loses(&mut self, trouble: Trouble) -> bool {
        if trouble.lost_per_million == 0 {
            return false;
        }
        // Marsaglia's xorshift64: plain, and the same in every run.
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        self.dice % 1_000_000 < u64::from(trouble.lost_per_million)
    }
}

/// Receiver and sender of a frame; `None` for what is too short to be one.
fn addresses(frame: &[u8]) -> Option<([u8; 6], [u8; 6])> {
    let to = frame.get(..6)?.try_into().ok()?;
    let from = frame.get(6..12)?.try_into().ok()?;
    Some((to, from))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERYBODY: u8 = 0xff;

    fn card(host: u8) -> Card {
        Card { host, network: 0 }
    }

    fn frame(to: u8, from: u8) -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[..6].fill(if to == EVERYBODY { 0xff } else { to * 2 });
        frame[6..12].fill(from * 2);
        frame
    }

    fn switch() -> Switch {
        let mut cards: Vec<Card> = (1..=3).map(card).collect();
        cards.push(Card {
            host: 2,
            network: 1,
        });
        Switch::new(cards)
    }

    fn send(switch: &mut Switch, to: u8, from: u8, now: Instant) -> Vec<u8> {
        let mut got = Vec::new();
        switch.frame(card(from), &frame(to, from), now, |to, _| got.push(to.host));
        got
    }

    #[test]
    fn it_floods_what_it_does_not_know_and_learns() {
        let (mut switch, now) = (switch(), Instant::now());
        assert_eq!(send(&mut switch, 2, 1, now), [2, 3]);
        assert_eq!(send(&mut switch, 1, 2, now), [1]);
        assert_eq!(send(&mut switch, 2, 1, now), [2]);
        assert_eq!(send(&mut switch, EVERYBODY, 1, now), [2, 3]);
        switch.forget(2);
        assert_eq!(send(&mut switch, 2, 1, now), [2, 3]);
        switch.frame(card(1), &[0; 11], now, |_, _| panic!("no frame"));
    }

    #[test]
    fn a_cut_holds_in_its_direction_and_on_its_network_only() {
        let (mut switch, now) = (switch(), Instant::now());
        let cut = Trouble {
            cut: true,
            ..Trouble::default()
        };
        switch.set(0, 1, 2, cut);
        assert_eq!(send(&mut switch, EVERYBODY, 1, now), [3]);
        assert_eq!(send(&mut switch, EVERYBODY, 2, now), [1, 3]);
        assert_eq!(switch.trouble(1, 1, 2), Trouble::default());
        switch.set(0, 1, 2, Trouble::default());
        assert_eq!(send(&mut switch, EVERYBODY, 1, now), [2, 3]);
        assert_eq!(switch.troubles().count(), 0);
    }

    #[test]
    fn what_is_late_comes_in_its_order_when_it_is_due() {
        let (mut switch, now) = (switch(), Instant::now());
        let second = Duration::from_secs(1);
        let slow = Trouble {
            delay: second,
            ..Trouble::default()
        };
        switch.set(0, 1, 2, slow);
        assert_eq!(send(&mut switch, 2, 1, now), [3]);
        assert_eq!(send(&mut switch, EVERYBODY, 1, now), [3]);
        assert_eq!(switch.next_due(), Some(now + second));
        let mut got = Vec::new();
        switch.due(now + second / 2, |_, _| panic!("it is not due"));
        switch.due(now + second, |to, frame| got.push((to.host, frame[0])));
        assert_eq!(got, [(2, 4), (2, 0xff)]);
        assert_eq!(switch.next_due(), None);
    }

    #[test]
    fn who_is_plugged_in_is_a_card_or_is_shown_what_one_host_sends() {
        let (mut switch, now) = (switch(), Instant::now());
        let guest = switch.plug(0, None).unwrap();
        let viewer = switch.plug(0, Some(2)).unwrap();
        assert_ne!(guest, viewer);
        assert_eq!(send(&mut switch, 2, 1, now), [2, 3, guest.host]);
        assert_eq!(send(&mut switch, 1, 2, now), [viewer.host, 1]);
        let from = |switch: &mut Switch, card| {
            let mut got = Vec::new();
            switch.frame(card, &frame(2, 50), now, |to, _| got.push(to.host));
            got
        };
        assert_eq!(from(&mut switch, guest), [2]);
        assert_eq!(from(&mut switch, viewer), [0; 0], "a viewer says nothing");
        switch.unplug(viewer);
        switch.unplug(guest);
        assert_eq!(send(&mut switch, EVERYBODY, 2, now), [1, 3]);
        assert_eq!(
            switch.plug(0, None),
            Some(guest),
            "its number is free again"
        );
    }

    #[test]
    fn loss_is_about_what_was_ordered() {
        let (mut switch, now) = (switch(), Instant::now());
        let lossy = Trouble {
            lost_per_million: 250_000,
            ..Trouble::default()
        };
        switch.set(0, 1, 2, lossy);
        let through = (0..10_000)
            .filter(|_| send(&mut switch, EVERYBODY, 1, now).contains(&2))
            .count();
        assert!((7_200..7_800).contains(&through), "{through}");
    }
}
