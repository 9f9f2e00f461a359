//! Commands about keys, whatever their values: there or not, how long, which.

use super::{Call, Failure, Outcome};
use crate::glob;
use crate::keyspace::Deadline;

pub(super) fn del(call: &mut Call<'_, '_>) -> Outcome {
    let mut removed = 0;
    for index in 1..call.len() {
        let entry = call
            .store
            .remove(call.client.database, &call.args[index], call.now);
        removed += usize::from(entry.is_some());
    }
    call.reply.count(removed);
    Ok(())
}

pub(super) fn exists(call: &mut Call<'_, '_>) -> Outcome {
    let mut found = 0;
    for index in 1..call.len() {
        let entry = call
            .store
            .read(call.client.database, &call.args[index], call.now);
        found += usize::from(entry.is_some());
    }
    call.reply.count(found);
    Ok(())
}

pub(super) fn touch(call: &mut Call<'_, '_>) -> Outcome {
    exists(call)
}

pub(super) fn type_of(call: &mut Call<'_, '_>) -> Outcome {
    let entry = call
        .store
        .read(call.client.database, &call.args[1], call.now);
    call.reply
        .simple(if entry.is_some() { "string" } else { "none" });
    Ok(())
}

pub(super) fn keys(call: &mut Call<'_, '_>) -> Outcome {
    let pattern = &call.args[1];
    let now = call.now.millis();
    let mark = call.reply.mark();
    let mut found = 0;
    for entry in call.store.database(call.client.database).iter() {
        if (pattern == b"*" || glob::matches(pattern, &entry.key, false))
            && !entry.deadline.passed(now)
        {
            found += 1;
            call.reply.bulk(&entry.key);
        }
    }
    call.reply.array_at(mark, found);
    Ok(())
}

/// What EXPIRE's options ask for.
#[derive(Default)]
struct Condition {
    nx: bool,
    xx: bool,
    gt: bool,
    lt: bool,
}

impl Condition {
    fn parse(call: &mut Call<'_, '_>) -> Result<Option<Self>, Failure> {
        let mut condition = Self::default();
        for index in 3..call.len() {
            let option = match call.args.word(index) {
                word if word.eq_ignore_ascii_case(b"nx") => &mut condition.nx,
                word if word.eq_ignore_ascii_case(b"xx") => &mut condition.xx,
                word if word.eq_ignore_ascii_case(b"gt") => &mut condition.gt,
                word if word.eq_ignore_ascii_case(b"lt") => &mut condition.lt,
                word => {
                    call.reply.error_parts(&[b"ERR Unsupported option ", word]);
                    return Ok(None);
                }
            };
            *option = true;
        }
        if condition.nx && (condition.xx || condition.gt || condition.lt) {
            return Err(Failure::Text(
                "ERR NX and XX, GT or LT options at the same time are not compatible",
            ));
        }
        if condition.gt && condition.lt {
            return Err(Failure::Text(
                "ERR GT and LT options at the same time are not compatible",
            ));
        }
        Ok(Some(condition))
    }

    /// Whether a key that now ends at `old` may end at `new`, in milliseconds. One that stays ends later than any.
    fn allows(&self, old: Option<i64>, new: i64) -> bool {
        !(self.nx && old.is_some()
            || self.xx && old.is_none()
            || self.gt && old.is_none_or(|old| new <= old)
            || self.lt && old.is_some_and(|old| new >= old))
    }
}

/// EXPIRE and its kin: the argument counts `unit` milliseconds from `base`.
fn expire_from(call: &mut Call<'_, '_>, base: u64, unit: i64) -> Outcome {
    let Some(condition) = Condition::parse(call)? else {
        return Ok(());
    };
    let end = call
        .integer(2)?
        .checked_mul(unit)
        .and_then(|time| time.checked_add(base as i64))
        .ok_or(Failure::ExpireTime)?;
    let (database, now) = (call.client.database, call.now);
    let key = &call.args[1];
    let Some(entry) = call.store.get(database, key, now) else {
        call.reply.integer(0);
        return Ok(());
    };
    let old = entry.deadline.millis().map(|old| old as i64);
    if !condition.allows(old, end) {
        call.reply.integer(0);
        return Ok(());
    }
    if end <= now.millis() as i64 {
        call.store.remove(database, key, now);
    } else {
        call.store
            .set_deadline(database, key, Deadline::at(end as u64), now)?;
    }
    call.reply.integer(1);
    Ok(())
}

pub(super) fn expire(call: &mut Call<'_, '_>) -> Outcome {
    expire_from(call, call.now.millis(), 1000)
}

pub(super) fn expireat(call: &mut Call<'_, '_>) -> Outcome {
    expire_from(call, 0, 1000)
}

pub(super) fn pexpire(call: &mut Call<'_, '_>) -> Outcome {
    expire_from(call, call.now.millis(), 1)
}

pub(super) fn pexpireat(call: &mut Call<'_, '_>) -> Outcome {
    expire_from(call, 0, 1)
}

pub(super) fn persist(call: &mut Call<'_, '_>) -> Outcome {
    let (database, key) = (call.client.database, &call.args[1]);
    let expires = call
        .store
        .get(database, key, call.now)
        .is_some_and(|entry| entry.deadline != Deadline::NEVER);
    if expires {
        call.store
            .set_deadline(database, key, Deadline::NEVER, call.now)?;
    }
    call.reply.integer(expires.into());
    Ok(())
}

/// TTL and its kin: the milliseconds that `show` makes of a key's end.
fn time_of(call: &mut Call<'_, '_>, show: impl Fn(i64) -> i64) -> Outcome {
    let entry = call
        .store
        .read(call.client.database, &call.args[1], call.now);
    call.reply.integer(match entry {
        None => -2,
        Some(entry) => entry
            .deadline
            .millis()
            .map_or(-1, |end| show((end as i64).max(0))),
    });
    Ok(())
}

fn rounded_seconds(millis: i64) -> i64 {
    ((millis.unsigned_abs() + 500) / 1000) as i64
}

pub(super) fn ttl(call: &mut Call<'_, '_>) -> Outcome {
    let now = call.now.millis() as i64;
    time_of(call, |end| rounded_seconds((end - now).max(0)))
}

pub(super) fn pttl(call: &mut Call<'_, '_>) -> Outcome {
    let now = call.now.millis() as i64;
    time_of(call, |end| (end - now).max(0))
}

pub(super) fn expiretime(call: &mut Call<'_, '_>) -> Outcome {
    time_of(call, rounded_seconds)
}

pub(super) fn pexpiretime(call: &mut Call<'_, '_>) -> Outcome {
    time_of(call, |end| end)
}
