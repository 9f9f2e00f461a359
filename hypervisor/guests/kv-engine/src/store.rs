//! The databases, what they share, and the rules for memory and time.
use alloc::collections::BinaryHeap;
use alloc::vec::Vec;
use core::cmp::Reverse;
use core::mem;

use siphasher::sip::SipHasher13;

use crate::keyspace::{Deadline, Due, Entry, Keyspace, copy};
use crate::session::{Peer, Session};
use crate::settings::{DATABASES, Settings};
use crate::{Now, OutOfMemory};

/// Items that the expiry heap may hold beyond twice what it needs before it is cleared of those that stand for nothing
/// (their keys were deleted, or got another deadline). Less: small heaps are cleared all the time.
const HEAP_SLACK: usize = 4096;
/// The most that a value grows beyond what it needs when it is appended to (Redis: the same).
const APPEND_SLACK: usize = 1 << 20;

/// How a [`Store`] begins.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Seeds the hash function and the run id. It should be unpredictable: who knows it can make keys collide.
    pub seed: [u64; 2],
    /// Bytes of memory beyond which commands that need more are refused; 0 for no bound. Clients can change it by
    /// `CONFIG SET maxmemory`.
    pub maxmemory: u64,
    /// A bound on memory in bytes that clients cannot change; 0 for none.
    pub memory_ceiling: u64,
    /// How many clients the caller lets connect at once. It is only shown: who comes beyond it is the caller's to
    /// [turn away](Store::turn_away).
    pub maxclients: u16,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            seed: [0x646f_7070_656c, 0x6b76],
            maxmemory: 0,
            memory_ceiling: 0,
            maxclients: 10_000,
        }
    }
}

/// What [`Store::expire_cycle`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expired {
    /// Keys removed.
    pub removed: usize,
    /// Whether more are due: call again.
    pub more: bool,
}

/// Counters shown by INFO.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stats {
    pub(crate) connections: u64,
    pub(crate) rejected: u64,
    pub(crate) commands: u64,
    pub(crate) input_bytes: u64,
    pub(crate) output_bytes: u64,
    pub(crate) expired_keys: u64,
    pub(crate) hits: u64,
    pub(crate) misses: u64,
    pub(crate) errors: u64,
    pub(crate) changes: u64,
}

/// A value on its way into the store.
pub(crate) enum Value<'a> {
    /// To be copied.
    Copy(&'a [u8]),
    /// To be taken over.
    Own(Vec<u8>),
}

impl Value<'_> {
    fn into_vec(self) -> Result<Vec<u8>, OutOfMemory> {
        match self {
            Self::Copy(bytes) => copy(bytes),
            Self::Own(bytes) => Ok(bytes),
        }
    }

    /// Replaces the content of `old`, in its memory when that fits well.
    fn replace(self, old: &mut Vec<u8>) -> Result<(), OutOfMemory> {
        match self {
            Self::Copy(bytes) if (bytes.len()..=bytes.len() * 2 + 64).contains(&old.capacity()) => {
                old.clear();
                old.extend_from_slice(bytes);
            }
            Self::Copy(bytes) => *old = copy(bytes)?,
            Self::Own(bytes) => *old = bytes,
        }
        Ok(())
    }
}

/// All databases of a server, and its settings and counters.
#[derive(Debug)]
pub struct Store {
    databases: Vec<Keyspace>,
    /// When to look at which key: (deadline, hash, database). An item may stand for nothing any more.
    deadlines: BinaryHeap<Reverse<(Deadline, u64, u8)>>,
    hasher: SipHasher13,
    ceiling: u64,
    /// The sum of the databases' memory.
    data: usize,
    /// Bytes that sessions hold for unfinished commands.
    buffers: usize,
    peak: usize,
    pub(crate) seed: [u64; 2],
    pub(crate) settings: Settings,
    pub(crate) stats: Stats,
    pub(crate) clients: usize,
    pub(crate) started: Now,
    last_client: u64,
    watches: Vec<Watch>,
}

/// A key that a client watches. Two keys of one hash count as one.
#[derive(Debug)]
struct Watch {
    client: u64,
    database: usize,
    hash: u64,
    /// The key was changed since.
    touched: bool,
}

impl Store {
    /// An empty store.
    pub fn new(config: Config, now: Now) -> Self {
        let databases: Vec<_> = (0..DATABASES).map(|_| Keyspace::new()).collect();
        Self {
            data: databases.iter().map(Keyspace::memory).sum(),
            databases,
            deadlines: BinaryHeap::new(),
            hasher: SipHasher13::new_with_keys(config.seed[0], config.seed[1]),
            ceiling: config.memory_ceiling,
            buffers: 0,
            peak: 0,
            seed: config.seed,
            settings: Settings {
                maxmemory: config.maxmemory,
                proto_max_bulk_len: 512 << 20,
                maxclients: config.maxclients,
            },
            stats: Stats::default(),
            clients: 0,
            started: now,
            last_client: 0,
            watches: Vec::new(),
        }
    }

    /// A session for a new connection. End it with [`Session::close`].
    pub fn connect(&mut self, peer: Option<Peer>, now: Now) -> Session {
        self.clients += 1;
        self.last_client += 1;
        self.stats.connections += 1;
        Session::new(self.last_client, peer, now)
    }

    /// What a client is told for which there is no room; close its connection when it is sent.
    pub fn turn_away(&mut self) -> &'static [u8] {
        self.stats.rejected += 1;
        b"-ERR max number of clients reached\r\n"
    }

    /// Removes keys whose time has passed, looking at no more than `budget` of them.
    ///
    /// Nobody can see such keys in any case; this frees their memory and makes DBSIZE right.
    pub fn expire_cycle(&mut self, now: Now, budget: usize) -> Expired {
        let mut removed = 0;
        for _ in 0..budget {
            let Some(&Reverse((scheduled, hash, database))) = self.deadlines.peek() else {
                break;
            };
            if !scheduled.passed(now.millis()) {
                break;
            }
            self.deadlines.pop();
            let due = self.change(usize::from(database), |keys| {
                keys.due(hash, scheduled, now.millis())
            });
            match due {
                Due::Gone => {}
                Due::Removed => {
                    removed += 1;
                    self.touch(usize::from(database), hash);
                }
                // There is room: an item was just popped.
                Due::Later(deadline) => self.deadlines.push(Reverse((deadline, hash, database))),
            }
        }
        self.stats.expired_keys += removed as u64;
        let more = self.next_deadline().is_some_and(|next| next < now.millis());
        Expired { removed, more }
    }

    /// When [`Store::expire_cycle`] should be called next at the latest to be on time: milliseconds of Unix time, after
    /// which a key may be due.
    pub fn next_deadline(&self) -> Option<u64> {
        let Reverse((deadline, ..)) = self.deadlines.peek()?;
        deadline.millis()
    }

    /// Bytes of memory that keys, values and unfinished commands take, by an estimate of what the allocator needs.
    pub fn used_memory(&self) -> usize {
        let heap = self.deadlines.capacity() * size_of::<Reverse<(Deadline, u64, u8)>>();
        size_of::<Self>() + self.data + self.buffers + heap
    }

    /// How many keys database 0 … 15 holds.
    pub fn len(&self, database: usize) -> usize {
        self.databases[database].len()
    }

    /// Whether no database holds any key.
    pub fn is_empty(&self) -> bool {
        self.databases.iter().all(|keys| keys.len() == 0)
    }

    /// The most memory ever seen in use.
    pub(crate) fn peak_memory(&mut self) -> usize {
        self.peak = self.peak.max(self.used_memory());
        self.peak
    }

    /// Memory in use when the store is empty.
    pub(crate) fn startup_memory(&self) -> usize {
        size_of::<Self>() + DATABASES * Keyspace::EMPTY
    }

    /// The bound that clients cannot change, in bytes; 0 for none.
    pub(crate) fn ceiling(&self) -> u64 {
        self.ceiling
    }

    /// The bound on memory in force, in bytes.
    fn limit(&self) -> u64 {
        let bound = |bytes| if bytes == 0 { u64::MAX } else { bytes };
        bound(self.settings.maxmemory).min(bound(self.ceiling))
    }

    /// Whether `more` bytes, or the memory already in use, go beyond what is allowed.
    pub(crate) fn is_full(&self, more: usize) -> bool {
        let limit = self.limit();
        limit != u64::MAX && self.used_memory().saturating_add(more) as u64 > limit
    }

    /// How many bytes may still be taken.
    pub(crate) fn room(&self) -> usize {
        let room = self.limit().saturating_sub(self.used_memory() as u64);
        usize::try_from(room).unwrap_or(usize::MAX)
    }

    /// A session now holds `after` bytes instead of `before`.
    pub(crate) fn account_buffers(&mut self, before: usize, after: usize) {
        self.buffers = self.buffers - before + after;
    }

    pub(crate) fn database(&self, database: usize) -> &Keyspace {
        &self.databases[database]
    }

    /// Lets `change` at a database and keeps the sum of memory.
    fn change<T>(&mut self, database: usize, change: impl FnOnce(&mut Keyspace) -> T) -> T {
        let keys = &mut self.databases[database];
        let before = keys.memory();
        let result = change(keys);
        self.data = self.data - before + keys.memory();
        result
    }

    /// Begins to watch a key for a client.
    pub(crate) fn watch(
        &mut self,
        client: u64,
        database: usize,
        key: &[u8],
        now: Now,
    ) -> Result<(), OutOfMemory> {
        let hash = self.hasher.hash(key);
        self.purge(database, hash, key, now);
        self.watches.try_reserve(1)?;
        self.watches.push(Watch {
            client,
            database,
            hash,
            touched: false,
        });
        Ok(())
    }

    /// Ends all watches of a client.
    pub(crate) fn unwatch(&mut self, client: u64) {
        self.watches.retain(|watch| watch.client != client);
    }

    /// Whether a key that the client watches was changed.
    pub(crate) fn is_touched(&self, client: u64) -> bool {
        self.watches
            .iter()
            .any(|watch| watch.client == client && watch.touched)
    }

    /// A key was changed.
    fn touch(&mut self, database: usize, hash: u64) {
        self.stats.changes += 1;
        for watch in &mut self.watches {
            watch.touched |= watch.database == database && watch.hash == hash;
        }
    }

    /// Removes the key if its time has passed.
    fn purge(&mut self, database: usize, hash: u64, key: &[u8], now: Now) {
        let keys = &self.databases[database];
        if keys.expiring() > 0
            && keys
                .get(hash, key)
                .is_some_and(|entry| entry.deadline.passed(now.millis()))
        {
            self.change(database, |keys| keys.remove(hash, key));
            self.stats.expired_keys += 1;
            self.touch(database, hash);
        }
    }

    /// The entry of a key.
    pub(crate) fn get(&mut self, database: usize, key: &[u8], now: Now) -> Option<&Entry> {
        let hash = self.hasher.hash(key);
        self.purge(database, hash, key, now);
        self.databases[database].get(hash, key)
    }

    /// Like [`Store::get`], counted as a hit or a miss.
    pub(crate) fn read(&mut self, database: usize, key: &[u8], now: Now) -> Option<&Entry> {
        let hash = self.hasher.hash(key);
        self.purge(database, hash, key, now);
        let entry = self.databases[database].get(hash, key);
        match entry {
            Some(_) => self.stats.hits += 1,
            None => self.stats.misses += 1,
        }
        entry
    }

    /// Sets a key. Without a deadline it keeps the one it has.
    pub(crate) fn set(
        &mut self,
        database: usize,
        key: &[u8],
        value: Value<'_>,
        deadline: Option<Deadline>,
        now: Now,
    ) -> Result<(), OutOfMemory> {
        let hash = self.hasher.hash(key);
        self.purge(database, hash, key, now);
        if deadline.is_some_and(|deadline| deadline != Deadline::NEVER) {
            self.deadlines.try_reserve(1)?;
        }
        let mut value = Some(value);
        let replaced: Option<Result<_, OutOfMemory>> = self.change(database, |keys| {
            keys.update(hash, key, |entry| {
                if let Some(value) = value.take() {
                    value.replace(&mut entry.value)?;
                }
                if let Some(deadline) = deadline {
                    entry.deadline = deadline;
                }
                Ok(reschedule(entry))
            })
        });
        let schedule = match (replaced, value) {
            (Some(replaced), _) => replaced?,
            (None, None) => None,
            (None, Some(value)) => {
                let mut entry = Entry::new(hash, key, value.into_vec()?)?;
                entry.deadline = deadline.unwrap_or(Deadline::NEVER);
                let schedule = reschedule(&mut entry);
                self.change(database, |keys| keys.insert(entry))?;
                schedule
            }
        };
        self.schedule(database, hash, schedule);
        self.touch(database, hash);
        Ok(())
    }

    /// Gives a key another deadline; whether the key is there.
    pub(crate) fn set_deadline(
        &mut self,
        database: usize,
        key: &[u8],
        deadline: Deadline,
        now: Now,
    ) -> Result<bool, OutOfMemory> {
        let hash = self.hasher.hash(key);
        self.purge(database, hash, key, now);
        self.deadlines.try_reserve(1)?;
        let changed = self.change(database, |keys| {
            keys.update(hash, key, |entry| {
                entry.deadline = deadline;
                reschedule(entry)
            })
        });
        let Some(schedule) = changed else {
            return Ok(false);
        };
        self.schedule(database, hash, schedule);
        self.touch(database, hash);
        Ok(true)
    }

    /// Removes a key.
    pub(crate) fn remove(&mut self, database: usize, key: &[u8], now: Now) -> Option<Entry> {
        let hash = self.hasher.hash(key);
        self.purge(database, hash, key, now);
        let entry = self.change(database, |keys| keys.remove(hash, key))?;
        self.touch(database, hash);
        Some(entry)
    }

    /// Makes the value of a key that is there `length` bytes long, filled up with zeros, and writes `bytes` at `offset`.
    pub(crate) fn write_at(
        &mut self,
        database: usize,
        key: &[u8],
        offset: usize,
        bytes: &[u8],
    ) -> Result<usize, OutOfMemory> {
        let hash = self.hasher.hash(key);
        let most = self.room().min(APPEND_SLACK);
        let written = self.change(database, |keys| {
            keys.update(hash, key, |entry| {
                let value = &mut entry.value;
                let length = value.len().max(offset + bytes.len());
                if length > value.capacity() {
                    let slack = length.min(most);
                    value.try_reserve_exact(length + slack - value.len())?;
                }
                value.resize(length, 0);
                value[offset..offset + bytes.len()].copy_from_slice(bytes);
                Ok(length)
            })
        });
        self.touch(database, hash);
        written.unwrap_or(Ok(0))
    }

    /// Empties one database.
    pub(crate) fn flush(&mut self, database: usize) {
        let mut watches = mem::take(&mut self.watches);
        for watch in &mut watches {
            watch.touched |=
                watch.database == database && self.databases[database].contains_hash(watch.hash);
        }
        self.watches = watches;
        self.change(database, Keyspace::clear);
        self.stats.changes += 1;
    }

    /// Empties all databases.
    pub(crate) fn flush_all(&mut self) {
        for database in 0..DATABASES {
            if self.databases[database].len() > 0 {
                self.flush(database);
            }
        }
        self.deadlines = BinaryHeap::new();
    }

    /// Puts an item into the expiry heap, where room was made for it.
    fn schedule(&mut self, database: usize, hash: u64, deadline: Option<Deadline>) {
        let Some(deadline) = deadline else {
            return;
        };
        self.deadlines
            .push(Reverse((deadline, hash, database as u8)));
        let needed: usize = self.databases.iter().map(Keyspace::expiring).sum();
        if self.deadlines.len() > needed * 2 + HEAP_SLACK {
            let mut deadlines = mem::take(&mut self.deadlines);
            deadlines.retain(|&Reverse((scheduled, hash, database))| {
                self.databases[usize::from(database)].keep_scheduled(hash, scheduled)
            });
            self.deadlines = deadlines;
        }
    }
}

/// Brings an entry's `scheduled` in line with its deadline; the time of the item that the heap must get, if any.
fn reschedule(entry: &mut Entry) -> Option<Deadline> {
    if entry.scheduled <= entry.deadline {
        // The item it has comes up earlier and is put in again then.
        return None;
    }
    entry.scheduled = entry.deadline;
    Some(entry.deadline)
}

#[cfg(test)]
mod tests;
