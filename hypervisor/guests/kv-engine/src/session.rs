//! One client's connection: its stream of requests, and what the server remembers about it.
use alloc::vec::Vec;
use core::net::SocketAddr;

use crate::Now;
use crate::command::{self, Transaction};
use crate::output::{Output, Reply};
use crate::request::{Bounds, Parser, Step};
use crate::store::Store;

/// The two ends of a connection, for CLIENT INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The client's end.
    pub remote: SocketAddr,
    /// The server's end.
    pub local: SocketAddr,
}

/// When [`Session::run`] pauses.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Start no command while so many bytes or more wait to be sent. One reply can go beyond it by its whole length.
    pub output: usize,
    /// Start no more than so many commands.
    pub commands: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            output: 256 << 10,
            commands: 1024,
        }
    }
}

/// Why [`Session::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The input is used up.
    NeedInput,
    /// [`Limits::output`] is reached: send, then call again with the input that was not consumed.
    OutputFull,
    /// [`Limits::commands`] is reached: call again with the input that was not consumed.
    Paused,
    /// Send what is in the output, then close the connection. Further input is of no interest.
    Close,
}

/// What [`Session::run`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the input that are done with. The others must be handed in again, followed by newer ones.
    pub consumed: usize,
    /// Commands executed.
    pub commands: usize,
    /// What comes next.
    pub state: State,
}

/// What the server remembers about a client, apart from its unfinished request.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) id: u64,
    pub(crate) peer: Option<Peer>,
    pub(crate) created: Now,
    pub(crate) name: Vec<u8>,
    pub(crate) database: usize,
    pub(crate) resp3: bool,
    pub(crate) closing: bool,
    /// What was replied but not handed over is not to be sent.
    pub(crate) silent: bool,
    /// The commands since MULTI.
    pub(crate) transaction: Option<Transaction>,
    /// The watched keys and their databases.
    pub(crate) watched: Vec<(usize, Vec<u8>)>,
}

impl Client {
    /// Bytes of memory held for a transaction.
    pub(crate) fn held(&self) -> usize {
        self.transaction.as_ref().map_or(0, Transaction::bytes)
    }
}

/// One client's connection.
#[derive(Debug)]
pub struct Session {
    parser: Parser,
    client: Client,
}

impl Session {
    pub(crate) fn new(id: u64, peer: Option<Peer>, now: Now) -> Self {
        Self {
            parser: Parser::new(),
            client: Client {
                id,
                peer,
                created: now,
                name: Vec::new(),
                database: 0,
                resp3: false,
                closing: false,
                silent: false,
                transaction: None,
                watched: Vec::new(),
            },
        }
    }

    /// Executes the commands in `input`, the client's bytes in order, and appends the replies to `out`.
    ///
    /// Commands may be cut anywhere: the session remembers the beginning of one that is not complete, so all of
    /// `input` is consumed unless a limit is reached or the connection is to be closed.
    pub fn run(
        &mut self,
        store: &mut Store,
        now: Now,
        input: &[u8],
        out: &mut Output,
        limits: Limits,
    ) -> Progress {
        let mut consumed = 0;
        let mut commands = 0;
        let waiting = out.len();
        let state = loop {
            if self.client.closing {
                if self.client.silent {
                    out.truncate(waiting);
                }
                break State::Close;
            }
            if out.len() >= limits.output.max(1) {
                break State::OutputFull;
            }
            if commands >= limits.commands {
                break State::Paused;
            }
            let Ok(mut reply) = Reply::new(out, self.client.resp3) else {
                // There is not even memory for an error. With replies to send there may be some later.
                break if out.is_empty() {
                    State::Close
                } else {
                    State::OutputFull
                };
            };
            let held = self.held();
            let bounds = Bounds {
                bulk: store.settings.proto_max_bulk_len,
                held: store.room().saturating_add(held),
            };
            let step = self.parser.step(input, &mut consumed, bounds);
            store.account_buffers(held, self.held());
            let held = self.held();
            match step {
                Ok(Step::More) => break State::NeedInput,
                Ok(Step::Command) => {
                    let arguments = self.parser.arguments(input);
                    command::execute(store, &mut self.client, arguments, &mut reply, now);
                }
                Ok(Step::Lost) => command::refuse(&mut self.client, &mut reply),
                Err(error) => {
                    match error.text() {
                        (text, None) => reply.error(text),
                        (text, Some(byte)) => reply.error_parts(&[text.as_bytes(), &[byte], b"'"]),
                    }
                    self.client.closing = true;
                }
            }
            store.stats.errors += reply.finish();
            self.parser.next();
            store.account_buffers(held, self.held());
            commands += 1;
        };
        store.stats.commands += commands as u64;
        store.stats.input_bytes += consumed as u64;
        store.stats.output_bytes += out.len().saturating_sub(waiting) as u64;
        Progress {
            consumed,
            commands,
            state,
        }
    }

    /// Bytes of memory held for the client.
    fn held(&self) -> usize {
        self.parser.held() + self.client.held()
    }

    /// Whether the connection is to be closed once the output is sent.
    pub fn should_close(&self) -> bool {
        self.client.closing
    }

    /// Ends the session: the connection is gone.
    pub fn close(mut self, store: &mut Store) {
        store.account_buffers(self.held(), 0);
        command::forget_watches(&mut self.client, store);
        store.clients -= 1;
    }
}

#[cfg(test)]
mod tests;
