//! Commands about values.
use alloc::vec::Vec;

use super::{Call, Failure, Outcome};
use crate::keyspace::Deadline;
use crate::number::parse_i64;
use crate::store::Value;

const TOO_LONG: Failure =
    Failure::Text("ERR string exceeds maximum allowed size (proto-max-bulk-len)");

/// Which keys SET may set.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Only {
    All,
    Missing,
    Present,
}

/// A time given with a key: how many milliseconds its unit has, and whether it counts from now.
#[derive(Clone, Copy)]
struct Unit {
    millis: i64,
    from_now: bool,
}

const EX: Unit = Unit {
    millis: 1000,
    from_now: true,
};
const PX: Unit = Unit {
    millis: 1,
    from_now: true,
};
const EXAT: Unit = Unit {
    millis: 1000,
    from_now: false,
};
const PXAT: Unit = Unit {
    millis: 1,
    from_now: false,
};

impl Unit {
    fn parse(word: &[u8]) -> Option<Self> {
        let unit = |name: &[u8]| word.eq_ignore_ascii_case(name);
        if unit(b"ex") {
            Some(EX)
        } else if unit(b"px") {
            Some(PX)
        } else if unit(b"exat") {
            Some(EXAT)
        } else if unit(b"pxat") {
            Some(PXAT)
        } else {
            None
        }
    }

    fn same(self, other: Self) -> bool {
        self.millis == other.millis && self.from_now == other.from_now
    }

    /// The end that argument `index` gives.
    fn deadline(self, call: &Call<'_, '_>, index: usize) -> Result<Deadline, Failure> {
        let time = call.integer(index)?;
        if time <= 0 {
            return Err(Failure::ExpireTime);
        }
        let base = if self.from_now {
            call.now.millis() as i64
        } else {
            0
        };
        time.checked_mul(self.millis)
            .and_then(|time| time.checked_add(base))
            .map(|time| Deadline::at(time as u64))
            .ok_or(Failure::ExpireTime)
    }
}

/// What SET and GETEX are asked for besides.
struct Options {
    only: Only,
    get: bool,
    keep: bool,
    persist: bool,
    /// The unit of a time and the argument that holds it.
    time: Option<(Unit, usize)>,
}

impl Options {
    /// Reads the options from argument `first` on; those of SET, or those of GETEX.
    fn parse(call: &Call<'_, '_>, first: usize, set: bool) -> Result<Self, Failure> {
        let mut options = Self {
            only: Only::All,
            get: false,
            keep: false,
            persist: false,
            time: None,
        };
        let mut index = first;
        while index < call.len() {
            let alone = options.time.is_none();
            if set && call.is(index, "nx") && options.only != Only::Present {
                options.only = Only::Missing;
            } else if set && call.is(index, "xx") && options.only != Only::Missing {
                options.only = Only::Present;
            } else if set && call.is(index, "get") {
                options.get = true;
            } else if set && call.is(index, "keepttl") && alone {
                options.keep = true;
            } else if !set && call.is(index, "persist") && alone {
                options.persist = true;
            } else if let Some(unit) = Unit::parse(call.args.word(index))
                && options.time.is_none_or(|(other, _)| unit.same(other))
                && !options.keep
                && !options.persist
                && index + 1 < call.len()
            {
                index += 1;
                options.time = Some((unit, index));
            } else {
                return Err(Failure::Syntax);
            }
            index += 1;
        }
        Ok(options)
    }

    /// The end they give a key, if any.
    fn deadline(&self, call: &Call<'_, '_>) -> Result<Option<Deadline>, Failure> {
        self.time
            .map(|(unit, index)| unit.deadline(call, index))
            .transpose()
    }
}

/// Replies with the value of the key; whether there is one.
fn reply_value(call: &mut Call<'_, '_>) -> Result<bool, Failure> {
    let entry = call
        .store
        .read(call.client.database, &call.args[1], call.now);
    let found = match entry {
        Some(entry) => {
            call.reply.bulk(&entry.value);
            true
        }
        None => {
            call.reply.null();
            false
        }
    };
    // Nothing is changed before it is certain that the old value can be sent.
    call.reply.check()?;
    Ok(found)
}

/// Sets key `key` to argument `value`, without a copy if that can be.
fn store_value(
    call: &mut Call<'_, '_>,
    key: usize,
    value: usize,
    deadline: Option<Deadline>,
) -> Outcome {
    let owned = call.args.take(value);
    let value = match owned {
        Some(bytes) => Value::Own(bytes),
        None => Value::Copy(&call.args[value]),
    };
    let database = call.client.database;
    call.store
        .set(database, &call.args[key], value, deadline, call.now)?;
    Ok(())
}

fn is_present(call: &mut Call<'_, '_>, key: usize) -> bool {
    call.store
        .get(call.client.database, &call.args[key], call.now)
        .is_some()
}

pub(super) fn get(call: &mut Call<'_, '_>) -> Outcome {
    reply_value(call)?;
    Ok(())
}

pub(super) fn set(call: &mut Call<'_, '_>) -> Outcome {
    let options = Options::parse(call, 3, true)?;
    let deadline = options.deadline(call)?;
    if options.get {
        reply_value(call)?;
    }
    let allowed = match options.only {
        Only::All => true,
        Only::Missing => !is_present(call, 1),
        Only::Present => is_present(call, 1),
    };
    if allowed {
        let deadline = if options.keep {
            None
        } else {
            Some(deadline.unwrap_or(Deadline::NEVER))
        };
        store_value(call, 1, 2, deadline)?;
    }
    match (options.get, allowed) {
        (true, _) => {}
        (false, true) => call.reply.ok(),
        (false, false) => call.reply.null(),
    }
    Ok(())
}

pub(super) fn setnx(call: &mut Call<'_, '_>) -> Outcome {
    let missing = !is_present(call, 1);
    if missing {
        store_value(call, 1, 2, Some(Deadline::NEVER))?;
    }
    call.reply.integer(missing.into());
    Ok(())
}

fn set_with(call: &mut Call<'_, '_>, unit: Unit) -> Outcome {
    let deadline = unit.deadline(call, 2)?;
    store_value(call, 1, 3, Some(deadline))?;
    call.reply.ok();
    Ok(())
}

pub(super) fn setex(call: &mut Call<'_, '_>) -> Outcome {
    set_with(call, EX)
}

pub(super) fn psetex(call: &mut Call<'_, '_>) -> Outcome {
    set_with(call, PX)
}

pub(super) fn getset(call: &mut Call<'_, '_>) -> Outcome {
    reply_value(call)?;
    store_value(call, 1, 2, Some(Deadline::NEVER))
}

pub(super) fn getdel(call: &mut Call<'_, '_>) -> Outcome {
    if reply_value(call)? {
        call.store
            .remove(call.client.database, &call.args[1], call.now);
    }
    Ok(())
}

pub(super) fn getex(call: &mut Call<'_, '_>) -> Outcome {
    let options = Options::parse(call, 2, false)?;
    let (database, now) = (call.client.database, call.now);
    let Some(entry) = call.store.get(database, &call.args[1], now) else {
        return get(call);
    };
    let expires = entry.deadline != Deadline::NEVER;
    let deadline = options.deadline(call)?;
    reply_value(call)?;
    let key = &call.args[1];
    match (deadline, options.time) {
        (Some(deadline), Some((unit, _)))
            if !unit.from_now && deadline <= Deadline::at(now.millis()) =>
        {
            call.store.remove(database, key, now);
        }
        (Some(deadline), _) => {
            call.store.set_deadline(database, key, deadline, now)?;
        }
        (None, _) if options.persist && expires => {
            call.store
                .set_deadline(database, key, Deadline::NEVER, now)?;
        }
        (None, _) => {}
    }
    Ok(())
}

pub(super) fn mget(call: &mut Call<'_, '_>) -> Outcome {
    call.reply.array(call.len() - 1);
    for index in 1..call.len() {
        let entry = call
            .store
            .read(call.client.database, &call.args[index], call.now);
        match entry {
            Some(entry) => call.reply.bulk(&entry.value),
            None => call.reply.null(),
        }
    }
    Ok(())
}

/// Sets all pairs. When memory runs out in the middle those before are set.
fn set_pairs(call: &mut Call<'_, '_>) -> Outcome {
    for index in (1..call.len()).step_by(2) {
        store_value(call, index, index + 1, Some(Deadline::NEVER))?;
    }
    Ok(())
}

pub(super) fn mset(call: &mut Call<'_, '_>) -> Outcome {
    if call.len().is_multiple_of(2) {
        return Err(Failure::Arity);
    }
    set_pairs(call)?;
    call.reply.ok();
    Ok(())
}

pub(super) fn msetnx(call: &mut Call<'_, '_>) -> Outcome {
    if call.len().is_multiple_of(2) {
        return Err(Failure::Arity);
    }
    let missing = (1..call.len())
        .step_by(2)
        .all(|index| !is_present(call, index));
    if missing {
        set_pairs(call)?;
    }
    call.reply.integer(missing.into());
    Ok(())
}

/// Adds to the number that a key holds.
fn add(call: &mut Call<'_, '_>, increment: i64) -> Outcome {
    let (database, now) = (call.client.database, call.now);
    let key = &call.args[1];
    let old = match call.store.get(database, key, now) {
        Some(entry) => parse_i64(&entry.value).ok_or(Failure::NotAnInteger)?,
        None => 0,
    };
    let new = old
        .checked_add(increment)
        .ok_or(Failure::Text("ERR increment or decrement would overflow"))?;
    let mut digits = itoa::Buffer::new();
    let value = Value::Copy(digits.format(new).as_bytes());
    call.store.set(database, key, value, None, now)?;
    call.reply.integer(new);
    Ok(())
}

pub(super) fn incr(call: &mut Call<'_, '_>) -> Outcome {
    add(call, 1)
}

pub(super) fn decr(call: &mut Call<'_, '_>) -> Outcome {
    add(call, -1)
}

pub(super) fn incrby(call: &mut Call<'_, '_>) -> Outcome {
    let increment = call.integer(2)?;
    add(call, increment)
}

pub(super) fn decrby(call: &mut Call<'_, '_>) -> Outcome {
    let decrement = call.integer(2)?;
    let increment = decrement
        .checked_neg()
        .ok_or(Failure::Text("ERR decrement would overflow"))?;
    add(call, increment)
}

pub(super) fn strlen(call: &mut Call<'_, '_>) -> Outcome {
    let entry = call
        .store
        .read(call.client.database, &call.args[1], call.now);
    call.reply.count(entry.map_or(0, |entry| entry.value.len()));
    Ok(())
}

/// Checks that a value may become `length` bytes long.
fn check_length(call: &Call<'_, '_>, length: Option<usize>) -> Outcome {
    match length {
        Some(length) if length as u64 <= call.store.settings.proto_max_bulk_len => Ok(()),
        _ => Err(TOO_LONG),
    }
}

pub(super) fn append(call: &mut Call<'_, '_>) -> Outcome {
    let (database, now) = (call.client.database, call.now);
    let old = call
        .store
        .get(database, &call.args[1], now)
        .map(|entry| entry.value.len());
    let length = match old {
        None => {
            let length = call.args[2].len();
            store_value(call, 1, 2, None)?;
            length
        }
        Some(old) => {
            let bytes = &call.args[2];
            check_length(call, old.checked_add(bytes.len()))?;
            call.store.write_at(database, &call.args[1], old, bytes)?
        }
    };
    call.reply.count(length);
    Ok(())
}

pub(super) fn setrange(call: &mut Call<'_, '_>) -> Outcome {
    let Ok(offset) = usize::try_from(call.integer(2)?) else {
        return Err(Failure::Text("ERR offset is out of range"));
    };
    let (database, now) = (call.client.database, call.now);
    let (key, bytes) = (&call.args[1], &call.args[3]);
    let old = call
        .store
        .get(database, key, now)
        .map(|entry| entry.value.len());
    if bytes.is_empty() {
        call.reply.count(old.unwrap_or(0));
        return Ok(());
    }
    let end = offset.checked_add(bytes.len());
    check_length(call, end)?;
    // The bytes that are filled up with zeros did not come from the client: count them.
    let grow = end.unwrap_or(0).saturating_sub(old.unwrap_or(0));
    if call.store.is_full(grow) {
        return Err(Failure::OutOfMemory);
    }
    if old.is_none() {
        let value = Value::Own(Vec::new());
        call.store.set(database, key, value, None, now)?;
    }
    match call.store.write_at(database, key, offset, bytes) {
        Ok(length) => call.reply.count(length),
        Err(error) => {
            if old.is_none() {
                call.store.remove(database, key, now);
            }
            return Err(error.into());
        }
    }
    Ok(())
}

pub(super) fn getrange(call: &mut Call<'_, '_>) -> Outcome {
    let (start, end) = (call.integer(2)?, call.integer(3)?);
    let entry = call
        .store
        .read(call.client.database, &call.args[1], call.now);
    let value = entry.map_or(&[][..], |entry| &entry.value);
    call.reply.bulk(range(value, start, end));
    Ok(())
}

/// The bytes from `start` to `end`, both included, which count from the end if negative.
fn range(value: &[u8], start: i64, end: i64) -> &[u8] {
    if start < 0 && end < 0 && start > end {
        return &[];
    }
    let length = value.len() as i64;
    let place = |index: i64| {
        if index < 0 {
            index.saturating_add(length).max(0)
        } else {
            index
        }
    };
    let (start, end) = (place(start), place(end).min(length - 1));
    if start > end {
        return &[];
    }
    &value[start as usize..=end as usize]
}

#[cfg(test)]
mod tests {
    use super::range;

    #[test]
    fn ranges_as_redis_cuts_them() {
        for (start, end, expected) in [
            (0, -1, "hello"),
            (0, 0, "h"),
            (1, 3, "ell"),
            (-3, -1, "llo"),
            (-1, -3, ""),
            (-100, 100, "hello"),
            (3, 1, ""),
            (5, 10, ""),
            (i64::MIN, i64::MAX, "hello"),
            (-100, -50, "h"),
        ] {
            assert_eq!(
                range(b"hello", start, end),
                expected.as_bytes(),
                "{start} {end}"
            );
        }
        assert_eq!(range(b"", 0, -1), b"");
    }
}
