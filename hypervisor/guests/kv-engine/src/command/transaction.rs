//! MULTI, EXEC and WATCH.
use alloc::vec::Vec;

use super::table::Spec;
use super::{Call, Failure, Outcome, call};
use crate::OutOfMemory;
use crate::keyspace::copy;
use crate::output::Reply;
use crate::request::{Argument, Arguments};
use crate::session::Client;
use crate::store::Store;

/// The commands between MULTI and EXEC.
#[derive(Debug, Default)]
pub(crate) struct Transaction {
    commands: Vec<(&'static Spec, Vec<Argument>)>,
    bytes: usize,
    spoilt: bool,
}

impl Transaction {
    /// Bytes of memory that the commands take.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes + self.commands.capacity() * size_of::<(&Spec, Vec<Argument>)>()
    }

    /// How many commands wait.
    pub(super) fn len(&self) -> usize {
        self.commands.len()
    }

    /// A command was refused: EXEC will be too.
    pub(super) fn spoil(&mut self) {
        self.spoilt = true;
    }

    /// Whether any of the commands is refused when memory is short.
    pub(super) fn denies_oom(&self) -> bool {
        self.commands.iter().any(|(spec, _)| spec.deny_oom)
    }

    pub(super) fn queue(
        &mut self,
        spec: &'static Spec,
        args: &mut Arguments<'_>,
    ) -> Result<(), OutOfMemory> {
        let queued = self.commands.try_reserve(1).map_err(OutOfMemory::from);
        match queued.and_then(|()| args.detach()) {
            Ok((list, bytes)) => {
                self.bytes += bytes;
                self.commands.push((spec, list));
                Ok(())
            }
            Err(error) => {
                self.spoilt = true;
                Err(error)
            }
        }
    }
}

/// Whether a command within a transaction waits for EXEC.
pub(super) fn queues(spec: &Spec) -> bool {
    !matches!(
        spec.name,
        "exec" | "discard" | "multi" | "watch" | "quit" | "reset"
    )
}

pub(super) fn is_exec(spec: &Spec) -> bool {
    spec.name == "exec"
}

/// Ends the transaction and the watches of a client.
pub(super) fn clear(client: &mut Client, store: &mut Store) {
    client.transaction = None;
    forget_watches(client, store);
}

/// Ends the watches of a client.
pub(crate) fn forget_watches(client: &mut Client, store: &mut Store) {
    if !client.watched.is_empty() {
        store.unwatch(client.id);
        client.watched = Vec::new();
    }
}

/// EXEC itself is refused.
pub(super) fn abort(
    client: &mut Client,
    store: &mut Store,
    reply: &mut Reply<'_>,
    reason: &[&[u8]],
) {
    clear(client, store);
    let mut parts: [&[u8]; 4] = [
        b"EXECABORT Transaction discarded because of: ",
        b"",
        b"",
        b"",
    ];
    for (part, reason) in parts[1..].iter_mut().zip(reason) {
        *part = reason;
    }
    reply.error_parts(&parts);
}

pub(super) fn multi(call: &mut Call<'_, '_>) -> Outcome {
    if call.client.transaction.is_some() {
        return Err(Failure::Text("ERR MULTI calls can not be nested"));
    }
    call.client.transaction = Some(Transaction::default());
    call.reply.ok();
    Ok(())
}

pub(super) fn discard(call: &mut Call<'_, '_>) -> Outcome {
    if call.client.transaction.is_none() {
        return Err(Failure::Text("ERR DISCARD without MULTI"));
    }
    clear(call.client, call.store);
    call.reply.ok();
    Ok(())
}

pub(super) fn exec(outer: &mut Call<'_, '_>) -> Outcome {
    let Some(transaction) = outer.client.transaction.take() else {
        return Err(Failure::Text("ERR EXEC without MULTI"));
    };
    let mut touched = false;
    for (database, key) in &outer.client.watched {
        // A key whose time has passed in the meantime has changed.
        outer.store.get(*database, key, outer.now);
    }
    if !outer.client.watched.is_empty() {
        touched = outer.store.is_touched(outer.client.id);
    }
    forget_watches(outer.client, outer.store);
    if transaction.spoilt {
        return Err(Failure::Text(
            "EXECABORT Transaction discarded because of previous errors.",
        ));
    }
    if touched {
        outer.reply.null_array();
        return Ok(());
    }
    outer.reply.array(transaction.commands.len());
    for (spec, mut list) in transaction.commands {
        call(Call {
            store: outer.store,
            client: outer.client,
            args: Arguments::detached(&mut list),
            reply: outer.reply,
            spec,
            now: outer.now,
        });
    }
    Ok(())
}

pub(super) fn watch(call: &mut Call<'_, '_>) -> Outcome {
    if call.client.transaction.is_some() {
        return Err(Failure::Text("ERR WATCH inside MULTI is not allowed"));
    }
    for index in 1..call.len() {
        let key = &call.args[index];
        let database = call.client.database;
        let known = |(watched, name): &(usize, Vec<u8>)| *watched == database && name == key;
        if call.client.watched.iter().any(known) {
            continue;
        }
        call.client
            .watched
            .try_reserve(1)
            .map_err(OutOfMemory::from)?;
        let name = copy(key)?;
        call.store.watch(call.client.id, database, key, call.now)?;
        call.client.watched.push((database, name));
    }
    call.reply.ok();
    Ok(())
}

pub(super) fn unwatch(call: &mut Call<'_, '_>) -> Outcome {
    forget_watches(call.client, call.store);
    call.reply.ok();
    Ok(())
}
