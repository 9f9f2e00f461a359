//! Which pages were written.
#![forbid(unsafe_code)]

/// A page of guest RAM: its guest-physical address divided by [`PAGE_SIZE`](super::PAGE_SIZE).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageNumber(pub u64);

impl PageNumber {
    /// The guest-physical address at which the page begins.
    #[must_use]
    pub fn address(self) -> u64 {
        self.0 * super::PAGE_SIZE as u64
    }
}

/// A set of written pages: bit `n % 64` of word `n / 64` stands for page `n`, the layout of
/// `KVM_GET_DIRTY_LOG` for a slot that begins at address 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtyPages {
    words: Vec<u64>,
}

impl DirtyPages {
    /// The set that a bitmap describes, such as KVM's dirty log.
    #[must_use]
    pub fn from_bitmap(words: Vec<u64>) -> Self {
        Self { words }
    }

    /// Adds the pages of another set: those the guest wrote to those that we wrote.
    pub fn merge(&mut self, other: &Self) {
        if other.words.len() > self.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// Those of them that are in another set, too.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let words = self.words.iter().zip(&other.words);
        Self {
            words: words.map(|(word, other)| word & other).collect(),
        }
    }

    /// Those of them that are not in another set.
    #[must_use]
    pub fn without(mut self, other: &Self) -> Self {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= !other;
        }
        self
    }

    /// The pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PageNumber> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                (rest != 0).then(|| {
                    let bit = u64::from(rest.trailing_zeros());
                    rest &= rest - 1;
                    PageNumber(index as u64 * 64 + bit)
                })
            })
        })
    }

    /// Those of them from this page on, a multiple of 64, as many words of 64 as hold so many of them; and the page after the
    /// last word, if there is more.
    #[must_use]
    pub fn part(&self, from: PageNumber, pages: usize) -> (Self, Option<PageNumber>) {
        let first = ((from.0 / 64) as usize).min(self.words.len());
        let mut count = 0;
        let end = self.words[first..]
            .iter()
            .position(|word| {
                count += word.count_ones() as usize;
                count >= pages
            })
            .map_or(self.words.len(), |last| first + last + 1);
        let mut words = vec![0; first];
        words.extend_from_slice(&self.words[first..end]);
        let next = self.words[end..].iter().any(|&word| word != 0);
        (Self { words }, next.then_some(PageNumber(end as u64 * 64)))
    }

    /// The bitmap from this page on, a multiple of 64.
    #[must_use]
    pub fn bitmap_from(&self, from: PageNumber) -> &[u64] {
        self.words.get((from.0 / 64) as usize..).unwrap_or_default()
    }

    /// How many pages there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Whether no page was written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&w| w == 0)
    }
}

/// Who wants to know which pages were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consumer {
    /// The memory's hash.
    Hash,
    /// Checkpoints.
    Checkpoint,
    /// A copy of the running machine.
    Copy,
}

/// The dirty log of several consumers. KVM's log and ours forget a page when they are read, so whatever one consumer
/// reads is noted for the others as well.
#[derive(Clone, Debug, Default)]
pub struct DirtyLedger {
    owed: [Option<DirtyPages>; 3],
}

impl DirtyLedger {
    /// Whether this consumer is told.
    #[must_use]
    pub fn has(&self, consumer: Consumer) -> bool {
        self.owed[consumer as usize].is_some()
    }

    /// From now on this consumer is told.
    pub fn open(&mut self, consumer: Consumer) {
        self.owed[consumer as usize] = Some(DirtyPages::default());
    }

    /// From now on this consumer is not told.
    pub fn close(&mut self, consumer: Consumer) {
        self.owed[consumer as usize] = None;
    }

    /// Notes pages for everybody.
    pub fn note(&mut self, written: &DirtyPages) {
        for owed in self.owed.iter_mut().flatten() {
            owed.merge(written);
        }
    }

    /// What was written since this consumer last asked.
    #[must_use]
    pub fn take(&mut self, consumer: Consumer) -> DirtyPages {
        self.owed[consumer as usize]
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }
}

impl FromIterator<PageNumber> for DirtyPages {
    fn from_iter<I: IntoIterator<Item = PageNumber>>(pages: I) -> Self {
        let mut words = Vec::new();
        for PageNumber(page) in pages {
            let index = (page / 64) as usize;
            if index >= words.len() {
                words.resize(index + 1, 0);
            }
            words[index] |= 1 << (page % 64);
        }
        Self { words }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bit_order_is_kvms() {
        let pages = DirtyPages::from_bitmap(vec![1 << 63 | 1, 0, 2]);
        let numbers: Vec<_> = pages.iter().map(|p| p.0).collect();
        assert_eq!(numbers, [0, 63, 129]);
        assert_eq!(pages.len(), 3);
        assert!(!pages.is_empty());
        assert_eq!(PageNumber(129).address(), 129 * 4096);
    }

    #[test]
    fn sets_of_different_lengths_meet() {
        let long = DirtyPages::from_bitmap(vec![0b1110, 0, 1]);
        let short = DirtyPages::from_bitmap(vec![0b0111]);
        let pages = |set: DirtyPages| set.iter().map(|page| page.0).collect::<Vec<_>>();
        assert_eq!(pages(long.and(&short)), [1, 2]);
        assert_eq!(pages(short.and(&long)), [1, 2]);
        assert_eq!(pages(long.clone().without(&short)), [3, 128]);
        assert_eq!(pages(short.without(&long)), [0]);
    }

    #[test]
    fn what_one_consumer_reads_the_other_still_gets() {
        let pages = |numbers: &[u64]| {
            numbers
                .iter()
                .copied()
                .map(PageNumber)
                .collect::<DirtyPages>()
        };
        let mut ledger = DirtyLedger::default();
        ledger.note(&pages(&[1]));
        ledger.open(Consumer::Hash);
        ledger.note(&pages(&[2]));
        ledger.open(Consumer::Checkpoint);
        ledger.note(&pages(&[70]));
        assert_eq!(ledger.take(Consumer::Hash), pages(&[2, 70]));
        assert!(ledger.take(Consumer::Hash).is_empty());
        ledger.note(&pages(&[3]));
        assert_eq!(ledger.take(Consumer::Checkpoint), pages(&[3, 70]));
        assert_eq!(ledger.take(Consumer::Hash), pages(&[3]));
        ledger.close(Consumer::Hash);
        ledger.note(&pages(&[4]));
        assert!(!ledger.has(Consumer::Hash) && ledger.take(Consumer::Hash).is_empty());
    }

    proptest! {
        #[test]
        fn parts_are_the_whole_each_page_once(
            pages in prop::collection::btree_set(0u64..20_000, 0..400),
            at_once in 1usize..200,
        ) {
            let set: DirtyPages = pages.iter().copied().map(PageNumber).collect();
            let (mut from, mut found) = (PageNumber(0), Vec::new());
            loop {
                let (part, next) = set.part(from, at_once);
                let numbers: Vec<u64> = part.iter().map(|p| p.0).collect();
                let within = |page: &u64| *page >= from.0 && next.is_none_or(|next| *page < next.0);
                prop_assert!(numbers.iter().all(within));
                // A word more than asked for at most.
                prop_assert!(numbers.len() < at_once + 64);
                prop_assert_eq!(part.bitmap_from(from).iter().map(|w| w.count_ones() as usize).sum::<usize>(), numbers.len());
                found.extend(numbers);
                match next {
                    Some(next) => from = next,
                    None => break,
                }
            }
            prop_assert_eq!(found, pages.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn a_set_is_what_was_put_in(
            a in prop::collection::btree_set(0u64..5000, 0..60),
            b in prop::collection::btree_set(0u64..9000, 0..60),
        ) {
            let mut set: DirtyPages = a.iter().copied().map(PageNumber).collect();
            set.merge(&b.iter().copied().map(PageNumber).collect());
            let expected: BTreeSet<u64> = a.union(&b).copied().collect();
            prop_assert_eq!(set.len(), expected.len());
            prop_assert_eq!(set.is_empty(), expected.is_empty());
            let found: Vec<u64> = set.iter().map(|p| p.0).collect();
            prop_assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
        }
    }
}
