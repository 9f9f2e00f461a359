//! Pages told by what has changed in them. A guest that serves writes a few words in each of many pages, so an interval's pages are mostly
//! what the other side has already; where bytes have a price, a page goes as a *patch* to what went before.
//!
//! ```text
//!   0  lines that have changed (u64): bit n for the 64 bytes at 64 n
//!   8  for each of them, ascending: words that have changed (u8): bit n for the 8 bytes at 8 n; then those words, as they are now
//! ```
//! A patch holds what is new, not a difference: putting it in place twice does what putting it in place once does. What it yields is told by a
//! checksum of the whole page, beside it, so that two sides that are not at one about a page find out before anything is changed.
//!
//! What went before is in the other side's memory, where that side does not run the guest, and pages that are as they were need not be told. A side that
//! runs it remembers what it was sent as this side does, page by page alike ([`Remembered::complete`]): its memory has gone on since.
#![forbid(unsafe_code)]

use super::format::{FormatError, Image};
use crate::memory::{PAGE_SIZE, PageNumber};

const WORD: usize = 8;
const LINE: usize = 64;
const HEAD: usize = 8;
const _: () = assert!(PAGE_SIZE == LINE * 64 && LINE == WORD * 8);

/// A page's content.
pub(super) type Page = [u8; PAGE_SIZE];

/// The patch of a page that is as it was.
const NOTHING: [u8; HEAD] = [0; HEAD];

/// The longest patch: at that, the page itself is sent.
pub(super) const PATCH_MAX: usize = PAGE_SIZE - 1;

/// Pages that are remembered at most, of each of which there is a copy: 64 MiB. It bounds what a protected guest costs its host in memory, and the pages that a guest
/// writes in a second of intervals are fewer; those that it does not hold go whole.
const REMEMBERED_MAX: u64 = 16_384;

/// Appends what makes `new` of `old`, and makes it that: a line that is as it was is not touched. If that is no shorter than the page nothing is appended, and the
/// answer is no.
fn encode(old: &mut Page, new: &Page, to: &mut Vec<u8>) -> bool {
    let at = to.len();
    let mut lines = 0u64;
    to.extend_from_slice(&lines.to_le_bytes());
    for (number, (old, new)) in old
        .chunks_exact_mut(LINE)
        .zip(new.chunks_exact(LINE))
        .enumerate()
    {
        if old == new {
            continue;
        }
        lines |= 1 << number;
        let words = to.len();
        to.push(0);
        for (bit, (was, new)) in old
            .chunks_exact(WORD)
            .zip(new.chunks_exact(WORD))
            .enumerate()
        {
            if was != new {
                to[words] |= 1 << bit;
                to.extend_from_slice(new);
            }
        }
        old.copy_from_slice(new);
    }
    if to.len() - at > PATCH_MAX {
        to.truncate(at);
        return false;
    }
    to[at..at + HEAD].copy_from_slice(&lines.to_le_bytes());
    true
}

/// How many bytes the patch has that these begin with. None if it has more than there are, names a line that has no changed word, or is
/// longer than a page.
pub(super) fn length(bytes: &[u8]) -> Option<usize> {
    let (lines, _) = bytes.split_first_chunk()?;
    let mut length = HEAD;
    for _ in 0..u64::from_le_bytes(*lines).count_ones() {
        let words = *bytes.get(length)?;
        if words == 0 {
            return None;
        }
        length += 1 + words.count_ones() as usize * WORD;
    }
    (length <= bytes.len().min(PATCH_MAX)).then_some(length)
}

/// A patch that was checked, and the page that it is for.
#[derive(Clone, Copy, Debug)]
pub struct Patch<'a> {
    pub(super) page: PageNumber,
    pub(super) checksum: u32,
    /// As many as [`length`] said.
    pub(super) bytes: &'a [u8],
}

impl Patch<'_> {
    /// The page that it is for.
    #[must_use]
    pub fn page(&self) -> PageNumber {
        self.page
    }

    /// Makes of the page as it was what it is now. Whether that is what the sender has.
    #[must_use]
    pub fn apply(&self, page: &mut Page) -> bool {
        let (lines, mut rest) = self.bytes.split_at(HEAD);
        let lines = u64::from_le_bytes(lines.try_into().expect("eight bytes"));
        for line in (0..LINE).filter(|line| lines & 1 << line != 0) {
            let words = rest[0];
            rest = &rest[1..];
            for word in (0..8).filter(|word| words & 1 << word != 0) {
                let (new, after) = rest.split_at(WORD);
                let at = line * LINE + word * WORD;
                page[at..at + WORD].copy_from_slice(new);
                rest = after;
            }
        }
        rdma_log::crc32c(page) == self.checksum
    }
}

/// What the other side has of some pages: their content as it was sent last.
pub struct Remembered {
    /// Which page a place holds, and one more; 0 if none.
    pages: Vec<u64>,
    contents: Vec<u8>,
    /// The checksum of a place's content, if that was needed: a page that is as it was is told at each turn.
    checksums: Vec<Option<u32>>,
    /// Of the checkpoint that is being made.
    patches: Vec<u8>,
}

impl std::fmt::Debug for Remembered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remembered")
            .field("places", &self.pages.len())
            .finish_non_exhaustive()
    }
}

/// How the pages of a checkpoint are told.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// Those that go whole.
    pub whole: Vec<PageNumber>,
    /// The others, each with the checksum of what it holds.
    pub patched: Vec<(PageNumber, u32)>,
    /// Bytes of their patches, which are the last of the contents.
    pub patch_bytes: usize,
    /// Pages that hold what they held when they were sent last, and are not told; and those of which that is not known.
    pub unwritten: Vec<PageNumber>,
}

impl Remembered {
    /// Nothing yet, for a machine with so much RAM. It takes memory as it is used.
    #[must_use]
    pub fn new(ram_pages: u64) -> Self {
        let places = ram_pages.min(REMEMBERED_MAX) as usize;
        Self {
            pages: vec![0; places],
            contents: vec![0; places * PAGE_SIZE],
            checksums: vec![None; places],
            patches: Vec::new(),
        }
    }

    /// Puts into `contents` what tells these pages, whose content is `now`, in their order: those that go whole, then patches. Where the other side runs
    /// the guest, also those that are as they were.
    pub(super) fn tell(
        &mut self,
        pages: &[PageNumber],
        now: &[u8],
        contents: &mut Vec<u8>,
        runs: bool,
    ) -> Told {
        let mut told = Told::default();
        contents.clear();
        self.patches.clear();
        let (nows, _) = now.as_chunks::<PAGE_SIZE>();
        for (&page, now) in pages.iter().zip(nows) {
            let place = self.place(page);
            let held = std::mem::replace(&mut self.pages[place], page.0 + 1) == page.0 + 1;
            let before: &mut Page = self.contents[place * PAGE_SIZE..]
                .first_chunk_mut()
                .expect("each place has a page");
            let is_as_it_was = held && before == now;
            if is_as_it_was || !held {
                told.unwritten.push(page);
            }
            if is_as_it_was && !runs {
                continue;
            }
            let known = &mut self.checksums[place];
            if is_as_it_was {
                self.patches.extend_from_slice(&NOTHING);
                let checksum = *known.get_or_insert_with(|| rdma_log::crc32c(now));
                told.patched.push((page, checksum));
                continue;
            }
            if held && encode(before, now, &mut self.patches) {
                let checksum = rdma_log::crc32c(now);
                *known = Some(checksum);
                told.patched.push((page, checksum));
            } else {
                *known = None;
                told.whole.push(page);
                contents.extend_from_slice(now);
                // Of another page, perhaps.
                before.copy_from_slice(now);
            }
        }
        told.patch_bytes = self.patches.len();
        contents.extend_from_slice(&self.patches);
        told
    }

    fn place(&self, page: PageNumber) -> usize {
        (page.0 % self.pages.len() as u64) as usize
    }

    /// Notes what a page holds.
    fn keep(&mut self, page: PageNumber, content: &[u8]) {
        let place = self.place(page);
        self.pages[place] = page.0 + 1;
        self.checksums[place] = None;
        self.contents[place * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(content);
    }

    /// Puts a patch to what is remembered of its page, and returns what that holds then; none if it is not what the patch is for.
    fn renew(&mut self, patch: &Patch<'_>) -> Option<&Page> {
        let place = self.place(patch.page);
        if self.pages[place] != patch.page.0 + 1 {
            return None;
        }
        let known = &mut self.checksums[place];
        let content: &mut Page = self.contents[place * PAGE_SIZE..].first_chunk_mut()?;
        let as_it_was = patch.bytes == NOTHING && *known == Some(patch.checksum);
        if !as_it_was && !patch.apply(content) {
            return None;
        }
        *known = Some(patch.checksum);
        Some(content)
    }

    /// On the other side, which runs the guest: notes what this delta tells, as the sender did. What comes back is the same checkpoint with all
    /// pages whole.
    ///
    /// # Errors
    /// It is no checkpoint of such a machine, or has a patch to what this side was not sent.
    pub fn complete<'a>(
        &mut self,
        checkpoint: &'a [u8],
        ram_pages: u64,
    ) -> Result<Image<'a>, FormatError> {
        let image = Image::parse(checkpoint, ram_pages)?;
        self.forget(image.zeros().iter().cloned().flatten());
        let mut pages = Vec::new();
        let mut contents = Vec::new();
        {
            let mut patches = image.patches().iter().peekable();
            let mut whole = image.pages().peekable();
            // In the order of their numbers, in which the sender has gone through them: two pages may have one place.
            loop {
                let next = whole.peek().map_or(u64::MAX, |(page, _)| page.0);
                if let Some(patch) = patches.next_if(|patch| patch.page.0 < next) {
                    let page = patch.page;
                    let content = self.renew(patch);
                    let content = content.ok_or(FormatError::Patched { page: page.0 })?;
                    pages.push(page);
                    contents.extend_from_slice(content);
                } else if let Some((page, content)) = whole.next() {
                    self.keep(page, content);
                    pages.push(page);
                    contents.extend_from_slice(content);
                } else {
                    break;
                }
            }
        }
        Ok(image.with_pages(&pages, contents))
    }

    /// These pages are zero on the other side now.
    pub(super) fn forget(&mut self, pages: impl Iterator<Item = u64>) {
        for page in pages {
            let place = self.place(PageNumber(page));
            if self.pages[place] == page + 1 {
                self.pages[place] = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::format;
    use super::*;

    /// A page, and what a guest makes of it: some places are written, with what was there or with something else.
    fn written() -> impl Strategy<Value = (Box<Page>, Box<Page>)> {
        let write = (0..PAGE_SIZE, 1..600_usize, any::<u8>(), any::<bool>());
        (any::<u8>(), proptest::collection::vec(write, 0..12)).prop_map(|(first, writes)| {
            let old: Box<Page> = Box::new(std::array::from_fn(|n| first.wrapping_mul(n as u8)));
            let mut new = old.clone();
            for (at, length, byte, long) in writes {
                let end = PAGE_SIZE.min(at + if long { length } else { length % 9 });
                new[at..end].fill(byte);
            }
            (old, new)
        })
    }

    fn patch(bytes: &[u8], of: &Page) -> Option<Page> {
        assert_eq!(length(bytes), Some(bytes.len()));
        let patch = Patch {
            page: PageNumber(1),
            checksum: rdma_log::crc32c(of),
            bytes,
        };
        let mut page = *of;
        patch.apply(&mut page).then_some(page)
    }

    proptest! {
        #[test]
        fn a_patch_makes_the_new_of_the_old((old, new) in written()) {
            let mut bytes = vec![7];
            let mut made = old.clone();
            if encode(&mut made, &new, &mut bytes) {
                prop_assert_eq!(&made, &new);
                let bytes = &bytes[1..];
                prop_assert!(bytes.len() < PAGE_SIZE);
                prop_assert_eq!(length(bytes), Some(bytes.len()));
                let patch = Patch { page: PageNumber(0), checksum: rdma_log::crc32c(&*new), bytes };
                let mut page = old.clone();
                for _ in 0..2 {
                    prop_assert!(patch.apply(&mut page));
                    prop_assert_eq!(&page, &new);
                }
                // Of any other page it makes something else, and says so; unless it writes all that differs.
                let mut other = old.clone();
                other[2049] ^= 1;
                prop_assert_eq!(patch.apply(&mut other), other == new);
            } else {
                prop_assert_eq!(bytes, [7]);
                let changed = old.chunks(8).zip(new.chunks(8)).filter(|(old, new)| old != new).count();
                prop_assert!(changed * 8 > PAGE_SIZE / 2);
            }
        }

        #[test]
        fn any_bytes_are_a_patch_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..5000), few in any::<bool>()) {
            let mut bytes = bytes;
            if few && bytes.len() >= 8 {
                bytes[2..8].fill(0);
            }
            if let Some(length) = length(&bytes) {
                let patch = Patch { page: PageNumber(0), checksum: 0, bytes: &bytes[..length] };
                let _ = patch.apply(&mut [0; PAGE_SIZE]);
            }
        }

        /// Whatever is sent in whatever order, the other side has what this side has.
        #[test]
        fn what_is_told_is_what_there_is(
            intervals in proptest::collection::vec(proptest::collection::btree_map(0..40_u64, any::<u8>(), 0..12), 1..12),
            places in 1..50_u64,
        ) {
            let mut remembered = Remembered::new(places);
            let (mut here, mut there) = (vec![0; 40 * PAGE_SIZE], vec![0; 40 * PAGE_SIZE]);
            let mut contents = Vec::new();
            for written in intervals {
                let (mut pages, mut now) = (Vec::new(), Vec::new());
                for (page, byte) in written {
                    let at = page as usize * PAGE_SIZE;
                    if byte < 8 {
                        here[at..at + PAGE_SIZE].fill(0);
                        there[at..at + PAGE_SIZE].fill(0);
                        remembered.forget(page..page + 1);
                        continue;
                    }
                    here[at + usize::from(byte) * 15..][..usize::from(byte)].fill(byte);
                    pages.push(PageNumber(page));
                    now.extend_from_slice(&here[at..at + PAGE_SIZE]);
                }
                let told = remembered.tell(&pages, &now, &mut contents, false);
                let (whole, mut patches) = contents.split_at(told.whole.len() * PAGE_SIZE);
                prop_assert_eq!(patches.len(), told.patch_bytes);
                for (page, content) in told.whole.iter().zip(whole.chunks(PAGE_SIZE)) {
                    there[page.0 as usize * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(content);
                }
                for (page, checksum) in told.patched {
                    let (bytes, rest) = patches.split_at(length(patches).unwrap());
                    patches = rest;
                    let at = page.0 as usize * PAGE_SIZE;
                    let page_there = there[at..].first_chunk_mut().unwrap();
                    let applied = Patch { page, checksum, bytes }.apply(page_there);
                    prop_assert!(applied);
                }
                prop_assert!(patches.is_empty());
                prop_assert!(here == there);
            }
        }
    }

    /// A side that runs the guest has other pages than it was sent; what it remembers makes the same checkpoint, page by page whole.
    #[test]
    fn what_was_sent_completes_a_checkpoint() {
        const RAM: u64 = 64;
        let state = format::tests::state();
        // Fewer places than pages: some are in each other's way.
        let [mut here, mut there] = [(); 2].map(|()| Remembered::new(50));
        let mut memory = vec![1; RAM as usize * PAGE_SIZE];
        let mut patched = 0;
        for round in 0..12_u64 {
            let pages: Vec<_> = (0..RAM)
                .filter(|page| (page * 7 + round) % 5 < 2)
                .map(PageNumber)
                .collect();
            let mut now = Vec::new();
            for page in &pages {
                let content = &mut memory[page.0 as usize * PAGE_SIZE..][..PAGE_SIZE];
                // One in three is as it was.
                if page.0 % 3 > 0 {
                    content[(page.0 + round * 8) as usize] = round as u8;
                }
                now.extend_from_slice(content);
            }
            let mut contents = Vec::new();
            let told = here.tell(&pages, &now, &mut contents, true);
            assert_eq!(told.whole.len() + told.patched.len(), pages.len());
            patched += told.patched.len();
            let last = RAM - 1..RAM;
            let cleared = round == 5 && !pages.contains(&PageNumber(RAM - 1));
            let zeros = if cleared {
                std::slice::from_ref(&last)
            } else {
                &[]
            };
            here.forget(zeros.iter().cloned().flatten());
            let head = |told| format::head(format::Scope::Delta, RAM, &state, zeros, told);
            let bytes = format::sealed(head(&told), &contents);
            let plain = Told {
                whole: pages,
                ..Told::default()
            };
            let whole = format::sealed(head(&plain), &now);
            let completed = there.complete(&bytes, RAM).unwrap();
            assert_eq!(completed.sealed(RAM), whole, "{round}");
        }
        assert!(patched > 20, "{patched}");
        // Somebody who came later cannot know.
        let page = [PageNumber(1)];
        let now = vec![7; PAGE_SIZE];
        here.tell(&page, &now, &mut Vec::new(), true);
        let mut contents = Vec::new();
        let told = here.tell(&page, &now, &mut contents, true);
        let head = format::head(format::Scope::Delta, RAM, &state, &[], &told);
        let late = format::sealed(head, &contents);
        let late = Remembered::new(50).complete(&late, RAM);
        assert_eq!(late.unwrap_err(), FormatError::Patched { page: 1 });
    }

    #[test]
    fn a_word_costs_seventeen_bytes_and_nothing_eight() {
        let old = [3; PAGE_SIZE];
        let mut new = old;
        let mut bytes = Vec::new();
        assert!(encode(&mut { old }, &new, &mut bytes));
        assert_eq!(bytes.len(), HEAD);
        assert_eq!(patch(&bytes, &old), Some(old));
        new[4090] = 0;
        bytes.clear();
        assert!(encode(&mut { old }, &new, &mut bytes));
        assert_eq!(bytes.len(), HEAD + 1 + WORD);
        assert_eq!(patch(&bytes, &old), None, "it is another page's checksum");
    }

    #[test]
    fn a_page_that_is_new_all_over_goes_whole() {
        let (old, new) = ([3; PAGE_SIZE], [4; PAGE_SIZE]);
        let mut bytes = Vec::new();
        assert!(!encode(&mut { old }, &new, &mut bytes));
        assert!(bytes.is_empty());
        // As long as the page, or longer.
        let mut almost = new;
        almost[..LINE].fill(3);
        assert!(!encode(&mut { old }, &almost, &mut bytes));
        almost[LINE..3 * LINE].fill(3);
        assert!(encode(&mut { old }, &almost, &mut bytes));
        assert_eq!(bytes.len(), HEAD + 61 * (1 + LINE));
    }

    #[test]
    fn what_is_no_patch_is_refused() {
        assert_eq!(length(&[]), None);
        assert_eq!(length(&[0; 7]), None);
        assert_eq!(length(&[0; 8]), Some(8));
        let mut bytes = vec![0; 17];
        bytes[0] = 1;
        assert_eq!(length(&bytes), None, "a line without a word");
        bytes[8] = 1;
        assert_eq!(length(&bytes), Some(17));
        assert_eq!(length(&bytes[..16]), None, "shorter than it says");
        let long = [0xff; 8 + 64 * 65];
        assert_eq!(length(&long), None, "longer than a page");
    }
}
