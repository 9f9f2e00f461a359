//! COMMAND: what the commands are.
use super::table::{COMMANDS, Keys, Spec, find};
use super::{Call, Failure, Outcome, look_up};
use crate::glob;
use crate::output::Reply;

/// The lines of a HELP subcommand, framed as Redis frames them.
pub(super) fn help_lines(call: &mut Call<'_, '_>, lines: &[&str]) -> Outcome {
    let mut name = [0; 32];
    let name = &mut name[..call.args[0].len().min(32)];
    name.copy_from_slice(&call.args[0][..name.len()]);
    name.make_ascii_uppercase();
    call.reply.array(lines.len() + 3);
    call.reply.simple_parts(&[
        name,
        b" <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
    ]);
    for line in lines {
        call.reply.simple(line);
    }
    call.reply.simple("HELP");
    call.reply.simple("    Prints this help.");
    Ok(())
}

pub(super) fn help(call: &mut Call<'_, '_>) -> Outcome {
    help_lines(
        call,
        &[
            "(no subcommand)",
            "    Properties of all commands.",
            "COUNT",
            "    The number of commands.",
            "DOCS [<command-name> ...]",
            "    Documentation of these commands, or of all.",
            "GETKEYS <full-command>",
            "    The keys among the arguments of a command.",
            "INFO [<command-name> ...]",
            "    Properties of these commands, or of all.",
            "LIST [FILTERBY (MODULE <module>|ACLCAT <category>|PATTERN <pattern>)]",
            "    The names of commands.",
        ],
    )
}

/// Finds a command by its full name.
fn by_name(name: &[u8]) -> Option<&'static Spec> {
    let mut parts = name.splitn(2, |&byte| byte == b'|');
    let spec = find(COMMANDS, parts.next()?)?;
    match parts.next() {
        Some(subcommand) => find(spec.subcommands, subcommand),
        None => Some(spec),
    }
}

pub(super) fn command(call: &mut Call<'_, '_>) -> Outcome {
    call.reply.array(COMMANDS.len());
    for spec in COMMANDS {
        properties(call.reply, spec);
    }
    Ok(())
}

pub(super) fn count(call: &mut Call<'_, '_>) -> Outcome {
    call.reply.count(COMMANDS.len());
    Ok(())
}

pub(super) fn command_info(call: &mut Call<'_, '_>) -> Outcome {
    if call.len() == 2 {
        return command(call);
    }
    call.reply.array(call.len() - 2);
    for index in 2..call.len() {
        match by_name(&call.args[index]) {
            Some(spec) => properties(call.reply, spec),
            None => call.reply.null(),
        }
    }
    Ok(())
}

/// A set of the words of a list, as simple strings.
fn words(reply: &mut Reply<'_>, words: &str) {
    reply.set(words.split_whitespace().count());
    for word in words.split_whitespace() {
        reply.simple(word);
    }
}

fn has(words: &str, word: &str) -> bool {
    words.split_whitespace().any(|other| other == word)
}

/// The categories of a command: those that follow from its flags, and its own.
fn categories(spec: &Spec) -> impl Iterator<Item = &'static str> {
    let flag = |flag, category| has(spec.flags, flag).then_some(category);
    let speed = flag("fast", "@fast").unwrap_or("@slow");
    [
        flag("write", "@write"),
        flag("readonly", "@read"),
        flag("admin", "@admin"),
        flag("admin", "@dangerous"),
        Some(speed),
    ]
    .into_iter()
    .flatten()
    .chain(spec.categories.split_whitespace())
}

fn properties(reply: &mut Reply<'_>, spec: &Spec) {
    let (first, last, step) = spec.key_range();
    reply.array(10);
    reply.bulk(spec.name.as_bytes());
    reply.integer(spec.arity.into());
    words(reply, spec.flags);
    for number in [first, last, step] {
        reply.integer(number);
    }
    reply.set(categories(spec).count());
    for category in categories(spec) {
        reply.simple(category);
    }
    reply.set(spec.tips.split_whitespace().count());
    for tip in spec.tips.split_whitespace() {
        reply.bulk(tip.as_bytes());
    }
    key_specifications(reply, spec);
    // Redis too sends an empty set but a full array.
    match spec.subcommands.len() {
        0 => reply.set(0),
        count => reply.array(count),
    }
    for subcommand in spec.subcommands {
        properties(reply, subcommand);
    }
}

fn key_specifications(reply: &mut Reply<'_>, spec: &Spec) {
    let (flags, last, step) = match spec.keys {
        Keys::Free => return reply.set(0),
        Keys::One(flags) => (flags, 0, 1),
        Keys::All(flags) => (flags, -1, 1),
        Keys::Pairs(flags) => (flags, -1, 2),
    };
    let text = |reply: &mut Reply<'_>, text: &str| reply.bulk(text.as_bytes());
    reply.set(1);
    reply.map(3);
    text(reply, "flags");
    words(reply, flags);
    text(reply, "begin_search");
    reply.map(2);
    text(reply, "type");
    text(reply, "index");
    text(reply, "spec");
    reply.map(1);
    text(reply, "index");
    reply.integer(1);
    text(reply, "find_keys");
    reply.map(2);
    text(reply, "type");
    text(reply, "range");
    text(reply, "spec");
    reply.map(3);
    for (name, number) in [("lastkey", last), ("keystep", step), ("limit", 0)] {
        text(reply, name);
        reply.integer(number);
    }
}

pub(super) fn docs(call: &mut Call<'_, '_>) -> Outcome {
    if call.len() == 2 {
        call.reply.map(COMMANDS.len());
        for spec in COMMANDS {
            documentation(call.reply, spec);
        }
        return Ok(());
    }
    let mark = call.reply.mark();
    let mut found = 0;
    for index in 2..call.len() {
        if let Some(spec) = by_name(&call.args[index]) {
            documentation(call.reply, spec);
            found += 1;
        }
    }
    call.reply.map_at(mark, found);
    Ok(())
}

/// The name of a command and the map that documents it.
fn documentation(reply: &mut Reply<'_>, spec: &Spec) {
    let facts = [
        ("summary", spec.summary),
        ("since", spec.since),
        ("group", spec.group),
        ("complexity", spec.complexity),
    ];
    let facts = facts.iter().filter(|(_, value)| !value.is_empty());
    let nested = !spec.subcommands.is_empty();
    reply.bulk(spec.name.as_bytes());
    reply.map(facts.clone().count() + usize::from(nested));
    for (name, value) in facts {
        reply.bulk(name.as_bytes());
        reply.bulk(value.as_bytes());
    }
    if nested {
        reply.bulk(b"subcommands");
        reply.map(spec.subcommands.len());
        for subcommand in spec.subcommands {
            documentation(reply, subcommand);
        }
    }
}

pub(super) fn getkeys(call: &mut Call<'_, '_>) -> Outcome {
    let args = call.args.from(2);
    let spec = look_up(&args).map_err(|_| Failure::Text("ERR Invalid command specified"))?;
    let step = match spec.keys {
        Keys::Free => return Err(Failure::Text("ERR The command has no key arguments")),
        Keys::One(_) => usize::MAX,
        Keys::All(_) => 1,
        Keys::Pairs(_) => 2,
    };
    if !spec.takes(args.len()) {
        return Err(Failure::Text(
            "ERR Invalid number of arguments specified for command",
        ));
    }
    let places = (1..args.len()).step_by(step);
    call.reply.array(places.len());
    for index in places {
        call.reply.bulk(&args[index]);
    }
    Ok(())
}

pub(super) fn list(call: &mut Call<'_, '_>) -> Outcome {
    let wanted: &dyn Fn(&Spec) -> bool = match call.len() {
        2 => &|_| true,
        5 if call.is(2, "filterby") && call.is(3, "module") => &|_| false,
        5 if call.is(2, "filterby") && call.is(3, "aclcat") => &|spec| {
            categories(spec)
                .any(|category| category.as_bytes()[1..].eq_ignore_ascii_case(&call.args[4]))
        },
        5 if call.is(2, "filterby") && call.is(3, "pattern") => {
            &|spec| glob::matches(&call.args[4], spec.name.as_bytes(), true)
        }
        _ => return Err(Failure::Syntax),
    };
    let mark = call.reply.mark();
    let mut found = 0;
    for spec in COMMANDS
        .iter()
        .flat_map(|spec| core::iter::once(spec).chain(spec.subcommands))
    {
        if wanted(spec) {
            call.reply.bulk(spec.name.as_bytes());
            found += 1;
        }
    }
    call.reply.array_at(mark, found);
    Ok(())
}
