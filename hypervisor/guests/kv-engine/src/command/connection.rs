//! Commands about the connection.
use alloc::vec::Vec;
use core::fmt::{self, Write};

use super::{Call, Failure, Outcome, transaction};
use crate::OutOfMemory;
use crate::keyspace::copy;
use crate::number::parse_i64;
use crate::output::Reply;
use crate::settings::DATABASES;

/// The version of Redis whose behaviour this is.
pub(super) const REDIS_VERSION: &str = "7.0.15";

/// Text under construction, which fails instead of aborting when memory runs out.
#[derive(Default)]
pub(super) struct Text(pub(super) Vec<u8>);

impl Write for Text {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        self.0.try_reserve(part.len()).map_err(|_| fmt::Error)?;
        self.0.extend_from_slice(part.as_bytes());
        Ok(())
    }
}

impl From<fmt::Error> for Failure {
    fn from(_: fmt::Error) -> Self {
        Self::OutOfMemory
    }
}

pub(super) fn ping(call: &mut Call<'_, '_>) -> Outcome {
    match call.len() {
        1 => call.reply.simple("PONG"),
        2 => call.reply.bulk(&call.args[1]),
        _ => return Err(Failure::Arity),
    }
    Ok(())
}

pub(super) fn echo(call: &mut Call<'_, '_>) -> Outcome {
    call.reply.bulk(&call.args[1]);
    Ok(())
}

pub(super) fn auth(call: &mut Call<'_, '_>) -> Outcome {
    match call.len() {
        2 => Err(Failure::Text(
            "ERR AUTH <password> called without any password configured for the default user. \
             Are you sure your configuration is correct?",
        )),
        3 => authenticate(&call.args[1]).map(|()| call.reply.ok()),
        _ => Err(Failure::Syntax),
    }
}

/// The default user needs no password, and there is no other user.
fn authenticate(user: &[u8]) -> Outcome {
    if user == b"default" {
        return Ok(());
    }
    Err(Failure::Text(
        "WRONGPASS invalid username-password pair or user is disabled.",
    ))
}

pub(super) fn select(call: &mut Call<'_, '_>) -> Outcome {
    let index = call.integer(1)?;
    if i32::try_from(index).is_err() {
        return Err(Failure::Text(
            "ERR value is out of range, value must between -2147483648 and 2147483647",
        ));
    }
    match usize::try_from(index) {
        Ok(index) if index < DATABASES => call.client.database = index,
        _ => return Err(Failure::Text("ERR DB index is out of range")),
    }
    call.reply.ok();
    Ok(())
}

pub(super) fn quit(call: &mut Call<'_, '_>) -> Outcome {
    call.client.closing = true;
    call.reply.ok();
    Ok(())
}

pub(super) fn reset(call: &mut Call<'_, '_>) -> Outcome {
    transaction::clear(call.client, call.store);
    call.client.database = 0;
    call.client.name = Vec::new();
    call.client.resp3 = false;
    call.reply.set_resp3(false);
    call.reply.simple("RESET");
    Ok(())
}

pub(super) fn hello(call: &mut Call<'_, '_>) -> Outcome {
    let mut resp3 = call.client.resp3;
    if call.len() >= 2 {
        resp3 = match parse_i64(&call.args[1]) {
            Some(2) => false,
            Some(3) => true,
            Some(_) => return Err(Failure::Text("NOPROTO unsupported protocol version")),
            None => {
                return Err(Failure::Text(
                    "ERR Protocol version is not an integer or out of range",
                ));
            }
        };
    }
    let mut index = 2;
    while index < call.len() {
        let more = call.len() - 1 - index;
        if call.is(index, "auth") && more >= 2 {
            authenticate(&call.args[index + 1])?;
            index += 3;
        } else if call.is(index, "setname") && more >= 1 {
            set_name(call, index + 1)?;
            index += 2;
        } else {
            let option = call.args.word(index);
            call.reply
                .error_parts(&[b"ERR Syntax error in HELLO option '", option, b"'"]);
            return Ok(());
        }
    }
    call.client.resp3 = resp3;
    call.reply.set_resp3(resp3);
    let id = call.client.id;
    let reply = &mut call.reply;
    reply.map(7);
    let pair = |reply: &mut Reply<'_>, name: &str, value: &str| {
        reply.bulk(name.as_bytes());
        reply.bulk(value.as_bytes());
    };
    pair(reply, "server", "redis");
    pair(reply, "version", REDIS_VERSION);
    reply.bulk(b"proto");
    reply.integer(if resp3 { 3 } else { 2 });
    reply.bulk(b"id");
    reply.integer(id as i64);
    pair(reply, "mode", "standalone");
    pair(reply, "role", "master");
    reply.bulk(b"modules");
    reply.array(0);
    Ok(())
}

/// Whether a name would make the list of clients hard to read.
fn is_plain(name: &[u8]) -> bool {
    name.iter().all(u8::is_ascii_graphic)
}

fn set_name(call: &mut Call<'_, '_>, index: usize) -> Outcome {
    let name = &call.args[index];
    if !is_plain(name) {
        return Err(Failure::Text(
            "ERR Client names cannot contain spaces, newlines or special characters.",
        ));
    }
    call.client.name = copy(name)?;
    Ok(())
}

pub(super) fn client_setname(call: &mut Call<'_, '_>) -> Outcome {
    set_name(call, 2)?;
    call.reply.ok();
    Ok(())
}

pub(super) fn client_getname(call: &mut Call<'_, '_>) -> Outcome {
    if call.client.name.is_empty() {
        call.reply.null();
    } else {
        call.reply.bulk(&call.client.name);
    }
    Ok(())
}

pub(super) fn client_id(call: &mut Call<'_, '_>) -> Outcome {
    call.reply.integer(call.client.id as i64);
    Ok(())
}

/// Checked as Redis 7.2 does, and not kept: nothing shows it.
pub(super) fn client_setinfo(call: &mut Call<'_, '_>) -> Outcome {
    let attribute = call.args.word(2);
    if !attribute.eq_ignore_ascii_case(b"lib-name") && !attribute.eq_ignore_ascii_case(b"lib-ver") {
        call.reply
            .error_parts(&[b"ERR Unrecognized option '", attribute, b"'"]);
    } else if !is_plain(&call.args[3]) {
        call.reply.error_parts(&[
            b"ERR ",
            attribute,
            b" cannot contain spaces, newlines or special characters.",
        ]);
    } else {
        call.reply.ok();
    }
    Ok(())
}

pub(super) fn client_info(call: &mut Call<'_, '_>) -> Outcome {
    let client = &call.client;
    let mut text = Text::default();
    write!(text, "id={} ", client.id)?;
    match &client.peer {
        Some(peer) => write!(text, "addr={} laddr={}", peer.remote, peer.local)?,
        None => write!(text, "addr=?:0 laddr=?:0")?,
    }
    text.write_str(" fd=8 name=")?;
    text.0
        .try_reserve(client.name.len())
        .map_err(OutOfMemory::from)?;
    text.0.extend_from_slice(&client.name);
    let age = call.now.seconds().saturating_sub(client.created.seconds());
    let multi = client
        .transaction
        .as_ref()
        .map_or(-1, |transaction| transaction.len() as i64);
    writeln!(
        text,
        " age={age} idle=0 flags={} db={} sub=0 psub=0 ssub=0 multi={multi} qbuf=0 qbuf-free=0 argv-mem={} multi-mem={} \
         rbs=0 rbp=0 obl=0 oll=0 omem=0 tot-mem=0 events=r cmd=client|info user=default redir=-1 resp={}",
        if multi < 0 { "N" } else { "x" },
        client.database,
        call.args.uncounted(),
        client.held(),
        if client.resp3 { 3 } else { 2 },
    )?;
    call.reply.verbatim(&text.0);
    Ok(())
}

pub(super) fn client_help(call: &mut Call<'_, '_>) -> Outcome {
    super::docs::help_lines(
        call,
        &[
            "GETNAME",
            "    The name of this connection.",
            "ID",
            "    The number of this connection.",
            "INFO",
            "    What the server knows about this connection.",
            "SETINFO <option> <value>",
            "    Take note of the client's library. Options: LIB-NAME, LIB-VER.",
            "SETNAME <name>",
            "    Name this connection.",
        ],
    )
}
