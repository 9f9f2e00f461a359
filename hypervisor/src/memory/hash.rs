//! A hash of all RAM that follows it cheaply.
//!
//! The hash is the wrapping sum over all pages of `xxh3_64(page, seed = page number)`, where a page of zeros
//! counts 0. A sum can be updated page by page; the seed makes the place of a page count as well as its
//! content; and because zeros count nothing, memory that was never touched costs nothing, so the time goes
//! with what the guest uses and not with what it could use. It finds accidents, not forgers.
#![forbid(unsafe_code)]

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::PAGE_SIZE;
use super::dirty::{DirtyPages, PageNumber};
use super::ram::{GuestRam, MemoryError};

static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// The hash of one RAM, and of each of its pages (8 bytes a page), so that it can be brought up to date.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryHash {
    sum: u64,
    pages: Vec<u64>,
}

impl MemoryHash {
    /// Hashes all of RAM, which must stand still meanwhile.
    ///
    /// # Errors
    /// [`MemoryError::Scan`] when the kernel does not say which parts were touched.
    pub fn full(ram: &GuestRam) -> Result<Self, MemoryError> {
        let mut hash = Self {
            sum: 0,
            pages: vec![0; ram.pages() as usize],
        };
        let mut from = PageNumber(0);
        while let Some(run) = ram.next_touched(from)? {
            for page in run.clone() {
                hash.refresh(ram, PageNumber(page))?;
            }
            from = PageNumber(run.end);
        }
        Ok(hash)
    }

    /// Brings the hash up to date with `ram`, of which only `dirty` pages changed since it was last right.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] for a page that `ram` does not have; the pages before it are up to date.
    pub fn update(&mut self, ram: &GuestRam, dirty: &DirtyPages) -> Result<(), MemoryError> {
        dirty.iter().try_for_each(|page| self.refresh(ram, page))
    }

    /// The hash of the whole RAM.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.sum
    }

    /// The first page on which two hashes differ, to name a difference; `None` when they are equal.
    #[must_use]
    pub fn first_difference(&self, other: &Self) -> Option<PageNumber> {
        let pages = self.pages.len().max(other.pages.len());
        (0..pages)
            .find(|&page| self.pages.get(page) != other.pages.get(page))
            .map(|page| PageNumber(page as u64))
    }

    fn refresh(&mut self, ram: &GuestRam, page: PageNumber) -> Result<(), MemoryError> {
        let mut content = [0; PAGE_SIZE];
        ram.read_page(page, &mut content)?;
        let now = page_hash(page, &content);
        // The RAM has the page; a hash made of a smaller RAM may not.
        let index = page.0 as usize;
        if index >= self.pages.len() {
            self.pages.resize(index + 1, 0);
        }
        let before = std::mem::replace(&mut self.pages[index], now);
        self.sum = self.sum.wrapping_sub(before).wrapping_add(now);
        Ok(())
    }
}

fn page_hash(page: PageNumber, content: &[u8; PAGE_SIZE]) -> u64 {
    if content == &ZEROS {
        0
    } else {
        xxh3_64_with_seed(content, page.0)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn empty_memory_counts_nothing_and_stays_unallocated() {
        let ram = GuestRam::new(64).unwrap();
        assert_eq!(MemoryHash::full(&ram).unwrap().value(), 0);
        assert_eq!(ram.memfd().metadata().unwrap().blocks(), 0);
    }

    #[test]
    fn it_is_the_sum_of_seeded_pages() {
        let ram = GuestRam::new(2).unwrap();
        let mut page = [0; PAGE_SIZE];
        page[100] = 7;
        ram.write(0, &page).unwrap();
        ram.write(9 * 4096, &page).unwrap();
        let expected = xxh3_64_with_seed(&page, 0).wrapping_add(xxh3_64_with_seed(&page, 9));
        assert_eq!(MemoryHash::full(&ram).unwrap().value(), expected);
        ram.write(100, &[0]).unwrap();
        ram.write(9 * 4096 + 100, &[0]).unwrap();
        assert_eq!(MemoryHash::full(&ram).unwrap().value(), 0);
    }

    #[test]
    fn the_place_of_a_page_counts_and_is_named() {
        let (a, b) = (GuestRam::new(2).unwrap(), GuestRam::new(2).unwrap());
        a.write(4 * 4096, &[1]).unwrap();
        b.write(5 * 4096, &[1]).unwrap();
        let (a, b) = (MemoryHash::full(&a).unwrap(), MemoryHash::full(&b).unwrap());
        assert_ne!(a.value(), b.value());
        assert_eq!(a.first_difference(&b), Some(PageNumber(4)));
        assert_eq!(a.first_difference(&a), None);
    }

    #[test]
    fn a_page_that_is_not_there_is_an_error() {
        let ram = GuestRam::new(2).unwrap();
        let mut hash = MemoryHash::full(&ram).unwrap();
        let before = hash.clone();
        let beyond = [PageNumber(512)].into_iter().collect();
        hash.update(&ram, &beyond).unwrap_err();
        assert_eq!(hash, before);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn updated_equals_full(
            rounds in prop::collection::vec(
                prop::collection::vec((0u64..(2 << 20) - 300, 0usize..300, any::<u8>()), 0..12),
                1..6,
            )
        ) {
            let ram = GuestRam::new(2).unwrap();
            let mut followed = MemoryHash::full(&ram).unwrap();
            for writes in rounds {
                for (address, len, byte) in writes {
                    // Zeros are common, so that pages become zero again.
                    ram.write(address, &vec![byte & 1; len]).unwrap();
                }
                followed.update(&ram, &ram.take_dirty()).unwrap();
                prop_assert_eq!(&followed, &MemoryHash::full(&ram).unwrap());
            }
        }
    }
}
