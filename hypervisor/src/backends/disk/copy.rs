//! A copy of an image that is in use: its blocks in rounds while the guest writes on, then the rest at one place in the order of requests.
//!
//! ```text
//!  image's thread   w w │some│ w │some│ w w │some│ … │some│ w │rest│ w w        w: the guest's requests, in their order
//!                        all blocks, once       written meanwhile   └ what is owed still: here the copy is the image, exactly
//! ```
//! Blocks are read by the thread that writes them, between two requests: none is torn, and whether one is owed again is known without a
//! race. So the guest's requests wait for [`AT_ONCE`] blocks at most. The rest is asked for by the thread that makes requests, at the place at
//! which the new log begins: it holds all that was asked before and nothing that was asked behind it.
#![forbid(unsafe_code)]

use std::io;

use super::image::Image;
use crate::disk::SECTOR;

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// Blocks that are read at once: a few milliseconds of the slowest disk, and a message or two.
pub const AT_ONCE: usize = 64;

/// Some blocks of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blocks {
    /// Their numbers, ascending, but for those that hold nothing but zeros.
    pub numbers: Vec<u64>,
    /// Their contents, in that order. That of the last block of an image ends in zeros if it has no whole blocks.
    pub contents: Vec<u8>,
    /// Those that hold nothing but zeros.
    pub zeros: Vec<u64>,
    /// Where the round goes on; none: it is over.
    pub next: Option<u64>,
}

impl Blocks {
    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.numbers.len() + self.zeros.len()
    }
}

/// Blocks of a disk of so many sectors.
#[must_use]
pub fn blocks_of(sectors: u64) -> u64 {
    sectors.div_ceil(BLOCK as u64 / SECTOR)
}

/// Which blocks the copy has not, or not as they are now.
#[derive(Debug)]
pub(super) struct Owed {
    sectors: u64,
    words: Vec<u64>,
}

impl Owed {
    /// All of them.
    pub(super) fn all(sectors: u64) -> Self {
        let blocks = blocks_of(sectors);
        let mut words = vec![u64::MAX; blocks.div_ceil(64) as usize];
        if let Some(last) = words.last_mut()
            && !blocks.is_multiple_of(64)
        {
            *last = (1 << (blocks % 64)) - 1;
        }
        Self { sectors, words }
    }

    /// So many bytes from there on were written, or may have been.
    pub(super) fn note(&mut self, at: u64, length: usize) {
        let end = at + length as u64;
        for block in at / BLOCK as u64..end.div_ceil(BLOCK as u64) {
            if let Some(word) = self.words.get_mut((block / 64) as usize) {
                *word |= 1 << (block % 64);
            }
        }
    }

    /// The first one that is owed from `from` on.
    fn next(&self, from: u64) -> Option<u64> {
        let first = (from / 64) as usize;
        let mut mask = u64::MAX << (from % 64);
        for (index, word) in self.words.iter().enumerate().skip(first) {
            let left = word & mask;
            if left != 0 {
                return Some(index as u64 * 64 + u64::from(left.trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }

    /// Reads what is owed from `from` on, at most so many, which are then not owed any more.
    ///
    /// # Errors
    /// The disk's; all are owed still that were not read.
    pub(super) fn read(
        &mut self,
        image: &mut impl Image,
        mut from: u64,
        most: usize,
    ) -> io::Result<Blocks> {
        let mut blocks = Blocks::default();
        let bytes = self.sectors * SECTOR;
        while blocks.count() < most {
            let Some(block) = self.next(from) else {
                return Ok(blocks);
            };
            let at = block * BLOCK as u64;
            let length = (bytes - at).min(BLOCK as u64) as usize;
            let mut content = [0; BLOCK];
            image.read(&mut content[..length], at)?;
            self.words[(block / 64) as usize] &= !(1 << (block % 64));
            if content == [0; BLOCK] {
                blocks.zeros.push(block);
            } else {
                blocks.numbers.push(block);
                blocks.contents.extend_from_slice(&content);
            }
            from = block + 1;
        }
        blocks.next = self.next(from);
        Ok(blocks)
    }
}

/// Whoever puts a copy's blocks into an image of its own.
pub trait Incoming {
    /// Blocks of the image.
    fn blocks(&self) -> u64;
    /// Puts a block in place.
    ///
    /// # Errors
    /// The disk's.
    fn put(&mut self, block: u64, content: &[u8; BLOCK]) -> io::Result<()>;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backends::disk::mark::Mark;

    struct Platter(Vec<u8>);

    impl Image for Platter {
        fn read(&mut self, data: &mut [u8], at: u64) -> io::Result<()> {
            data.copy_from_slice(&self.0[at as usize..at as usize + data.len()]);
            Ok(())
        }

        fn write(&mut self, data: &[u8], at: u64) -> io::Result<()> {
            self.0[at as usize..at as usize + data.len()].copy_from_slice(data);
            Ok(())
        }

        fn sync(&mut self) -> io::Result<()> {
            Ok(())
        }

        fn mark(&mut self, _: &Mark) -> io::Result<()> {
            Ok(())
        }
    }

    fn take(copy: &mut [u8], blocks: &Blocks) {
        let put = |copy: &mut [u8], block: u64, content: &[u8]| {
            let at = block as usize * BLOCK;
            let length = content.len().min(copy.len() - at);
            copy[at..at + length].copy_from_slice(&content[..length]);
        };
        for (&block, content) in blocks.numbers.iter().zip(blocks.contents.chunks(BLOCK)) {
            put(copy, block, content);
        }
        for &block in &blocks.zeros {
            put(copy, block, &[0; BLOCK]);
        }
    }

    proptest! {
        /// Whatever is written between two reads, the copy is the image at the last.
        #[test]
        fn a_copy_is_the_image_at_the_rest(
            sectors in 1u64..2000,
            steps in prop::collection::vec((any::<u64>(), 1u64..40, any::<u8>(), 0usize..20), 0..60),
            before in any::<u8>(),
        ) {
            let length = (sectors * SECTOR) as usize;
            let mut image = Platter(vec![before & 1; length]);
            // What was on the other disk before.
            let mut copy = vec![9; length];
            let mut owed = Owed::all(sectors);
            let mut from = 0;
            for (place, count, byte, most) in steps {
                let sector = place % sectors;
                let count = count.min(sectors - sector);
                let data = vec![byte & 3; (count * SECTOR) as usize];
                image.write(&data, sector * SECTOR).unwrap();
                owed.note(sector * SECTOR, data.len());
                let blocks = owed.read(&mut image, from, most).unwrap();
                prop_assert!(blocks.count() <= most);
                from = blocks.next.unwrap_or(0);
                take(&mut copy, &blocks);
            }
            let rest = owed.read(&mut image, 0, usize::MAX).unwrap();
            prop_assert_eq!(rest.next, None);
            take(&mut copy, &rest);
            prop_assert!(copy == image.0);
            prop_assert_eq!(owed.read(&mut image, 0, usize::MAX).unwrap().count(), 0);
        }
    }
}
