//! The commands: what they are called, what they need, what they do.
mod connection;
mod docs;
mod info;
mod keys;
mod server;
mod strings;
mod table;
mod transaction;

use alloc::vec::Vec;

use crate::number::parse_i64;
use crate::output::{OUT_OF_MEMORY, Reply};
use crate::request::Arguments;
use crate::session::Client;
use crate::store::Store;
use crate::{Now, OutOfMemory};
use table::{COMMANDS, Spec, find};
pub(crate) use transaction::{Transaction, forget_watches};

/// The longest part of what a client sent that an error shows, in bytes.
const SHOWN: usize = 128;

/// A command being executed.
struct Call<'c, 'o> {
    store: &'c mut Store,
    client: &'c mut Client,
    args: Arguments<'c>,
    reply: &'c mut Reply<'o>,
    spec: &'static Spec,
    now: Now,
}

/// Why a command was refused. What it replied until then is taken back.
#[derive(Clone, Copy, Debug)]
enum Failure {
    /// The whole error text, its code first.
    Text(&'static str),
    Syntax,
    NotAnInteger,
    Arity,
    ExpireTime,
    OutOfMemory,
}

impl From<OutOfMemory> for Failure {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

type Outcome = Result<(), Failure>;

impl Call<'_, '_> {
    /// The number of arguments, the name included.
    fn len(&self) -> usize {
        self.args.len()
    }

    /// Argument `index` as a number.
    fn integer(&self, index: usize) -> Result<i64, Failure> {
        parse_i64(&self.args[index]).ok_or(Failure::NotAnInteger)
    }

    /// Whether argument `index` is this option, in whatever case.
    fn is(&self, index: usize, word: &str) -> bool {
        self.args.word(index).eq_ignore_ascii_case(word.as_bytes())
    }
}

/// Executes one command and writes its reply.
pub(crate) fn execute<'c>(
    store: &'c mut Store,
    client: &'c mut Client,
    mut args: Arguments<'c>,
    reply: &'c mut Reply<'_>,
    now: Now,
) {
    let word = args.word(0);
    if word.eq_ignore_ascii_case(b"post") || word.eq_ignore_ascii_case(b"host:") {
        // A browser was made to send this: Redis hangs up without a word, so that what follows does no harm.
        client.closing = true;
        client.silent = true;
        return;
    }
    let refused = match look_up(&args) {
        Err(unknown) => {
            unknown.report(&args, reply);
            true
        }
        Ok(spec) if !spec.takes(args.len()) => {
            if transaction::is_exec(spec) {
                transaction::abort(client, store, reply, &wrong_arity_text(spec));
            } else {
                wrong_arity(spec, reply);
            }
            true
        }
        Ok(spec) if store.is_full(args.uncounted()) && needs_memory(spec, client) => {
            if transaction::is_exec(spec) {
                transaction::abort(client, store, reply, &[OUT_OF_MEMORY.as_bytes()]);
            } else {
                reply.error(OUT_OF_MEMORY);
            }
            true
        }
        Ok(spec) => match &mut client.transaction {
            Some(transaction) if transaction::queues(spec) => {
                match transaction.queue(spec, &mut args) {
                    Ok(()) => reply.simple("QUEUED"),
                    Err(OutOfMemory) => reply.error(OUT_OF_MEMORY),
                }
                false
            }
            _ => {
                call(Call {
                    store,
                    client,
                    args,
                    reply,
                    spec,
                    now,
                });
                false
            }
        },
    };
    if let (true, Some(transaction)) = (refused, &mut client.transaction) {
        transaction.spoil();
    }
}

/// Refuses a command that there was no memory to hold.
pub(crate) fn refuse(client: &mut Client, reply: &mut Reply<'_>) {
    reply.error(OUT_OF_MEMORY);
    if let Some(transaction) = &mut client.transaction {
        transaction.spoil();
    }
}

/// Whether a command is refused when memory is short: if it needs some, if it is to be kept for EXEC, or if it is EXEC and
/// a command kept needs some.
fn needs_memory(spec: &Spec, client: &Client) -> bool {
    match &client.transaction {
        Some(transaction) if transaction::is_exec(spec) => transaction.denies_oom(),
        Some(_) if transaction::queues(spec) => true,
        _ => spec.deny_oom,
    }
}

/// Runs a command, which was found well-formed, and makes an error of its failure.
fn call(call: Call<'_, '_>) {
    let mut call = call;
    let mark = call.reply.mark();
    let Some(run) = call.spec.run else {
        return;
    };
    let outcome = run(&mut call).and_then(|()| Ok(call.reply.check()?));
    let Err(failure) = outcome else {
        return;
    };
    let Call { reply, spec, .. } = call;
    reply.rewind(mark);
    match failure {
        Failure::Text(text) => reply.error(text),
        Failure::Syntax => reply.error("ERR syntax error"),
        Failure::NotAnInteger => reply.error("ERR value is not an integer or out of range"),
        Failure::Arity => wrong_arity(spec, reply),
        Failure::ExpireTime => reply.error_parts(&[
            b"ERR invalid expire time in '",
            spec.name.as_bytes(),
            b"' command",
        ]),
        Failure::OutOfMemory => reply.error(OUT_OF_MEMORY),
    }
}

fn wrong_arity_text(spec: &Spec) -> [&[u8]; 3] {
    let name = spec.name.as_bytes();
    [b"wrong number of arguments for '", name, b"' command"]
}

fn wrong_arity(spec: &Spec, reply: &mut Reply<'_>) {
    let [before, name, after] = wrong_arity_text(spec);
    reply.error_parts(&[b"ERR ", before, name, after]);
}

/// Why no command was found.
enum Unknown {
    Command,
    Subcommand,
}

/// Finds the command, and its subcommand if it has such.
fn look_up(args: &Arguments<'_>) -> Result<&'static Spec, Unknown> {
    let spec = find(COMMANDS, &args[0]).ok_or(Unknown::Command)?;
    match args.get(1) {
        Some(name) if !spec.subcommands.is_empty() => {
            find(spec.subcommands, name).ok_or(Unknown::Subcommand)
        }
        _ => Ok(spec),
    }
}

impl Unknown {
    fn report(&self, args: &Arguments<'_>, reply: &mut Reply<'_>) {
        match self {
            Self::Subcommand => {
                let mut name = [0; 32];
                let name = &mut name[..args[0].len()];
                name.copy_from_slice(&args[0]);
                name.make_ascii_uppercase();
                let subcommand = first(args.word(1), SHOWN);
                reply.error_parts(&[
                    b"ERR unknown subcommand '",
                    subcommand,
                    b"'. Try ",
                    name,
                    b" HELP.",
                ]);
            }
            Self::Command => {
                let mut beginning = Vec::new();
                // At most the 128 bytes, and quotes for each of them.
                if beginning.try_reserve(SHOWN * 4).is_err() {
                    return reply.error(OUT_OF_MEMORY);
                }
                for index in 1..args.len() {
                    if beginning.len() >= SHOWN {
                        break;
                    }
                    let part = first(args.word(index), SHOWN - beginning.len());
                    for piece in [b"'", part, b"' "] {
                        beginning.extend_from_slice(piece);
                    }
                }
                reply.error_parts(&[
                    b"ERR unknown command '",
                    first(args.word(0), SHOWN),
                    b"', with args beginning with: ",
                    &beginning,
                ]);
            }
        }
    }
}

/// The first `most` bytes.
fn first(bytes: &[u8], most: usize) -> &[u8] {
    &bytes[..bytes.len().min(most)]
}
