//! One database: keys, values and their times to live.
//!
//! The hash table is split into parts by the hash, so that growing one part, which moves all its entries, is a
//! short pause and needs no large piece of memory at once. The order of iteration follows from the seed and the
//! history of the table alone.
use alloc::boxed::Box;
use alloc::vec::Vec;

use hashbrown::HashTable;
use hashbrown::hash_table;

use crate::OutOfMemory;

/// How many parts the table is split into: a table of a million keys grows by sixteen thousand at a time (under a
/// millisecond), and an empty database costs 2 KiB.
const PARTS: usize = 64;
/// A part that is empty and has room for more entries than this gives its memory back.
const KEEP: usize = 32;
/// What an allocator is assumed to add to each allocation.
const ALLOCATION: usize = 16;

/// The moment a key ceases to exist: it does so in the millisecond after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Deadline(u64);

impl Deadline {
    /// A key that stays.
    pub(crate) const NEVER: Self = Self(u64::MAX);

    /// From milliseconds of Unix time.
    pub(crate) const fn at(millis: u64) -> Self {
        Self(millis)
    }

    /// Milliseconds of Unix time; nothing for a key that stays.
    pub(crate) fn millis(self) -> Option<u64> {
        (self != Self::NEVER).then_some(self.0)
    }

    /// Whether the moment has passed at `millis`.
    pub(crate) fn passed(self, millis: u64) -> bool {
        self.0 < millis
    }
}

/// A key with its value.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) hash: u64,
    pub(crate) key: Box<[u8]>,
    pub(crate) value: Vec<u8>,
    pub(crate) deadline: Deadline,
    /// The time of the item in the expiry heap that stands for this entry; never later than `deadline`.
    pub(crate) scheduled: Deadline,
}

impl Entry {
    /// An entry that stays; the key is copied.
    pub(crate) fn new(hash: u64, key: &[u8], value: Vec<u8>) -> Result<Self, OutOfMemory> {
        Ok(Self {
            hash,
            key: copy(key)?.into_boxed_slice(),
            value,
            deadline: Deadline::NEVER,
            scheduled: Deadline::NEVER,
        })
    }

    /// Bytes of memory that belong to the entry, its place in the table not counted.
    pub(crate) fn cost(&self) -> usize {
        let block = |bytes: usize| if bytes == 0 { 0 } else { bytes + ALLOCATION };
        block(self.key.len()) + block(self.value.capacity())
    }

    fn is(&self, hash: u64, key: &[u8]) -> bool {
        self.hash == hash && *self.key == *key
    }
}

/// Copies bytes into a buffer of just their size.
pub(crate) fn copy(bytes: &[u8]) -> Result<Vec<u8>, OutOfMemory> {
    let mut copy = Vec::new();
    copy.try_reserve_exact(bytes.len())?;
    copy.extend_from_slice(bytes);
    Ok(copy)
}

/// The entries of one database.
#[derive(Debug)]
pub(crate) struct Keyspace {
    parts: Vec<HashTable<Entry>>,
    len: usize,
    expiring: usize,
    memory: usize,
}

impl Keyspace {
    pub(crate) fn new() -> Self {
        Self {
            parts: (0..PARTS).map(|_| HashTable::new()).collect(),
            len: 0,
            expiring: 0,
            memory: Self::EMPTY,
        }
    }

    /// Bytes of memory that no keys take.
    pub(crate) const EMPTY: usize = PARTS * size_of::<HashTable<Entry>>();

    /// Removes all keys. Asks for no memory.
    pub(crate) fn clear(&mut self) {
        for part in &mut self.parts {
            *part = HashTable::new();
        }
        self.len = 0;
        self.expiring = 0;
        self.memory = Self::EMPTY;
    }

    /// How many keys there are, those counted whose time has passed but that were not yet removed.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// How many keys have a deadline.
    pub(crate) fn expiring(&self) -> usize {
        self.expiring
    }

    /// Bytes of memory in use.
    pub(crate) fn memory(&self) -> usize {
        self.memory
    }

    /// The part that holds keys of this hash. Neither the lowest nor the highest bits choose it: those place a key
    /// within its part.
    fn part(hash: u64) -> usize {
        (hash >> 40) as usize % PARTS
    }

    pub(crate) fn get(&self, hash: u64, key: &[u8]) -> Option<&Entry> {
        self.parts[Self::part(hash)].find(hash, |entry| entry.is(hash, key))
    }

    /// Whether there is a key of this hash.
    pub(crate) fn contains_hash(&self, hash: u64) -> bool {
        self.parts[Self::part(hash)]
            .find(hash, |entry| entry.hash == hash)
            .is_some()
    }

    /// Changes the entry of a key, if there is one, and keeps the books.
    pub(crate) fn update<T>(
        &mut self,
        hash: u64,
        key: &[u8],
        change: impl FnOnce(&mut Entry) -> T,
    ) -> Option<T> {
        let entry = self.parts[Self::part(hash)].find_mut(hash, |entry| entry.is(hash, key))?;
        let (cost, expiring) = (entry.cost(), entry.deadline != Deadline::NEVER);
        let result = change(entry);
        self.memory = self.memory - cost + entry.cost();
        self.expiring =
            self.expiring - usize::from(expiring) + usize::from(entry.deadline != Deadline::NEVER);
        Some(result)
    }

    /// Adds an entry whose key is not there yet.
    pub(crate) fn insert(&mut self, entry: Entry) -> Result<(), OutOfMemory> {
        let part = &mut self.parts[Self::part(entry.hash)];
        if part.len() == part.capacity() {
            let before = part.allocation_size();
            part.try_reserve(1, |entry| entry.hash)?;
            self.memory = self.memory - before + part.allocation_size();
        }
        self.len += 1;
        self.memory += entry.cost();
        self.expiring += usize::from(entry.deadline != Deadline::NEVER);
        part.insert_unique(entry.hash, entry, |entry| entry.hash);
        Ok(())
    }

    /// Removes a key.
    pub(crate) fn remove(&mut self, hash: u64, key: &[u8]) -> Option<Entry> {
        let found = self.parts[Self::part(hash)].find_entry(hash, |entry| entry.is(hash, key));
        let entry = found.ok()?.remove().0;
        self.removed(&entry);
        Some(entry)
    }

    fn removed(&mut self, entry: &Entry) {
        self.len -= 1;
        self.memory -= entry.cost();
        self.expiring -= usize::from(entry.deadline != Deadline::NEVER);
        let part = &mut self.parts[Self::part(entry.hash)];
        if part.is_empty() && part.capacity() > KEEP {
            self.memory -= part.allocation_size();
            *part = HashTable::new();
        }
    }

    /// Whether an item of the expiry heap is still needed. If not, no entry points to it any more.
    pub(crate) fn keep_scheduled(&mut self, hash: u64, scheduled: Deadline) -> bool {
        let found = self.parts[Self::part(hash)].find_mut(hash, |entry| {
            entry.hash == hash && entry.scheduled == scheduled
        });
        match found {
            Some(entry) if entry.deadline == Deadline::NEVER => {
                entry.scheduled = Deadline::NEVER;
                false
            }
            Some(_) => true,
            None => false,
        }
    }

    /// The time of an item of the expiry heap has come: removes the entry it stands for, if its deadline has passed;
    /// else the entry's new `scheduled`, if it needs an item again.
    pub(crate) fn due(&mut self, hash: u64, scheduled: Deadline, millis: u64) -> Due {
        let found = self.parts[Self::part(hash)].find_entry(hash, |entry| {
            entry.hash == hash && entry.scheduled == scheduled
        });
        let Ok(mut found) = found else {
            return Due::Gone;
        };
        let entry = found.get_mut();
        if entry.deadline.passed(millis) {
            let entry = found.remove().0;
            self.removed(&entry);
            return Due::Removed;
        }
        entry.scheduled = entry.deadline;
        match entry.deadline {
            Deadline::NEVER => Due::Gone,
            later => Due::Later(later),
        }
    }

    /// All entries, in an order that follows from the seed and the history.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.parts.iter().flat_map(hash_table::HashTable::iter)
    }
}

/// What became of an item of the expiry heap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// It stands for nothing any more.
    Gone,
    /// Its key was removed.
    Removed,
    /// Its key lives until then.
    Later(Deadline),
}

#[cfg(test)]
mod tests {
    use super::*;
    use siphasher::sip::SipHasher13;

    fn hash(key: &[u8]) -> u64 {
        SipHasher13::new_with_keys(1, 2).hash(key)
    }

    fn add(keys: &mut Keyspace, key: &[u8], value: &[u8]) {
        keys.insert(Entry::new(hash(key), key, copy(value).unwrap()).unwrap())
            .unwrap();
    }

    #[test]
    fn the_books_are_right() {
        let mut keys = Keyspace::new();
        let empty = keys.memory();
        assert_eq!(empty, Keyspace::EMPTY);
        for number in 0..1000u32 {
            add(&mut keys, &number.to_le_bytes(), b"value");
        }
        assert_eq!(keys.len(), 1000);
        assert_eq!(keys.iter().count(), 1000);
        let full = keys.memory();
        keys.update(hash(&5u32.to_le_bytes()), &5u32.to_le_bytes(), |entry| {
            entry.value = copy(&[0; 505]).unwrap();
            entry.deadline = Deadline::at(7);
        })
        .unwrap();
        assert_eq!((keys.memory(), keys.expiring()), (full + 500, 1));
        for number in 0..1000u32 {
            let key = number.to_le_bytes();
            assert!(keys.remove(hash(&key), &key).is_some());
            assert!(keys.remove(hash(&key), &key).is_none());
        }
        assert_eq!((keys.len(), keys.expiring()), (0, 0));
        let tables: usize = keys.parts.iter().map(HashTable::allocation_size).sum();
        assert_eq!(keys.memory(), empty + tables);
    }

    #[test]
    fn an_item_removes_reschedules_or_means_nothing() {
        let mut keys = Keyspace::new();
        add(&mut keys, b"k", b"v");
        let h = hash(b"k");
        let set = |keys: &mut Keyspace, deadline, scheduled| {
            keys.update(h, b"k", |entry| {
                entry.deadline = deadline;
                entry.scheduled = scheduled;
            });
        };
        set(&mut keys, Deadline::at(50), Deadline::at(10));
        assert_eq!(keys.due(h, Deadline::at(9), 100), Due::Gone);
        assert_eq!(
            keys.due(h, Deadline::at(10), 50),
            Due::Later(Deadline::at(50))
        );
        assert_eq!(keys.due(h, Deadline::at(50), 51), Due::Removed);
        assert_eq!(keys.len(), 0);
        add(&mut keys, b"k", b"v");
        set(&mut keys, Deadline::NEVER, Deadline::at(10));
        assert_eq!(keys.due(h, Deadline::at(10), 100), Due::Gone);
        assert_eq!(keys.get(h, b"k").unwrap().scheduled, Deadline::NEVER);
    }
}
