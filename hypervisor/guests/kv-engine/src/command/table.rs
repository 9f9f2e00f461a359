//! The table of commands: names, numbers of arguments, and what COMMAND tells about them.
//!
//! Names, flags, categories, tips and key positions are those of Redis 7.0.15 (CLIENT SETINFO: of 7.2), so that client
//! libraries and proxies see what they expect.
use super::{Call, Outcome, connection, docs, info, keys, server, strings, transaction};
use Keys::{All, Free, One, Pairs};

/// Which arguments are keys; with the words that say what is done to them.
#[derive(Clone, Copy, Debug)]
pub(super) enum Keys {
    /// None.
    Free,
    /// The first argument.
    One(&'static str),
    /// All arguments.
    All(&'static str),
    /// Every second argument, from the first on.
    Pairs(&'static str),
}

/// A command, or one of its subcommands. Lists are words with spaces between them.
#[derive(Debug)]
pub(super) struct Spec {
    /// The name; of a subcommand both names, with a bar between them.
    pub(super) name: &'static str,
    /// The last part of the name.
    own_name: &'static str,
    /// The number of arguments with the name; negative: at least so many.
    pub(super) arity: i32,
    pub(super) flags: &'static str,
    /// Whether it is refused when memory is short.
    pub(super) deny_oom: bool,
    /// Categories that do not follow from the flags.
    pub(super) categories: &'static str,
    pub(super) keys: Keys,
    pub(super) tips: &'static str,
    pub(super) group: &'static str,
    pub(super) since: &'static str,
    pub(super) complexity: &'static str,
    pub(super) summary: &'static str,
    /// What it does; nothing for a command that only has subcommands.
    pub(super) run: Option<fn(&mut Call<'_, '_>) -> Outcome>,
    pub(super) subcommands: &'static [Spec],
}

impl Spec {
    /// Whether a command of `count` arguments, the name included, is well-formed.
    pub(super) fn takes(&self, count: usize) -> bool {
        let arity = self.arity.unsigned_abs() as usize;
        if self.arity < 0 {
            count >= arity
        } else {
            count == arity
        }
    }

    /// The first and last key and the step between them, as COMMAND shows them: the last counted from the end if
    /// negative.
    pub(super) fn key_range(&self) -> (i64, i64, i64) {
        match self.keys {
            Free => (0, 0, 0),
            One(_) => (1, 1, 1),
            All(_) => (1, -1, 1),
            Pairs(_) => (1, -1, 2),
        }
    }
}

/// The command or subcommand of a sorted list with this name, in whatever case.
pub(super) fn find(list: &'static [Spec], name: &[u8]) -> Option<&'static Spec> {
    let mut lower = [0; 32];
    let lower = lower.get_mut(..name.len())?;
    lower.copy_from_slice(name);
    lower.make_ascii_lowercase();
    let index = list
        .binary_search_by(|spec| spec.own_name.as_bytes().cmp(lower))
        .ok()?;
    Some(&list[index])
}

const fn has_word(words: &str, word: &str) -> bool {
    let (words, word) = (words.as_bytes(), word.as_bytes());
    let mut at = 0;
    while at + word.len() <= words.len() {
        let mut same = 0;
        while same < word.len() && words[at + same] == word[same] {
            same += 1;
        }
        if same == word.len() {
            return true;
        }
        at += 1;
    }
    false
}

const fn after_bar(name: &str) -> &str {
    let mut at = 0;
    while at < name.len() {
        if name.as_bytes()[at] == b'|' {
            return name.split_at(at + 1).1;
        }
        at += 1;
    }
    name
}

macro_rules! spec {
    ($name:literal, $arity:literal, $flags:literal, $categories:literal, $keys:expr, $tips:literal, $group:literal,
     $since:literal, $complexity:literal, $summary:literal, $run:expr $(, $subcommand:expr)* $(,)?) => {
        Spec {
            name: $name,
            own_name: after_bar($name),
            arity: $arity,
            flags: $flags,
            deny_oom: has_word($flags, "denyoom"),
            categories: $categories,
            keys: $keys,
            tips: $tips,
            group: $group,
            since: $since,
            complexity: $complexity,
            summary: $summary,
            run: $run,
            subcommands: &[$($subcommand),*],
        }
    };
}

/// All commands, by name.
pub(super) static COMMANDS: &[Spec] = &[
    spec! { "append", 3, "write denyoom fast", "@string", One("RW insert"),
    "", "string", "2.0.0", "O(1)",
    "Appends to a value, or sets it if there is none.", Some(strings::append) },
    spec! { "auth", -2, "noscript loading stale fast no_auth allow_busy", "@connection", Free,
    "", "connection", "1.0.0", "O(N)",
    "Authenticates the connection.", Some(connection::auth) },
    spec! { "client", -2, "", "", Free,
        "", "connection", "2.4.0", "",
        "Commands about the connection itself.", None,
        spec! { "client|getname", 2, "noscript loading stale", "@connection", Free,
            "", "connection", "2.6.9", "O(1)",
            "The name of the connection.", Some(connection::client_getname) },
        spec! { "client|help", 2, "loading stale", "@connection", Free,
            "", "connection", "5.0.0", "O(1)",
            "Lists the subcommands.", Some(connection::client_help) },
        spec! { "client|id", 2, "noscript loading stale", "@connection", Free,
            "", "connection", "5.0.0", "O(1)",
            "The number of the connection.", Some(connection::client_id) },
        spec! { "client|info", 2, "noscript loading stale", "@connection", Free,
            "nondeterministic_output", "connection", "6.2.0", "O(1)",
            "What the server knows about the connection.", Some(connection::client_info) },
        spec! { "client|setinfo", 4, "noscript loading stale", "@connection", Free,
            "", "connection", "7.2.0", "O(1)",
            "Takes note of the client's library.", Some(connection::client_setinfo) },
        spec! { "client|setname", 3, "noscript loading stale", "@connection", Free,
            "", "connection", "2.6.9", "O(1)",
            "Names the connection.", Some(connection::client_setname) },
    },
    spec! { "command", -1, "loading stale", "@connection", Free,
        "nondeterministic_output_order", "server", "2.8.13", "O(N)",
        "Describes all commands.", Some(docs::command),
        spec! { "command|count", 2, "loading stale", "@connection", Free,
            "", "server", "2.8.13", "O(1)",
            "The number of commands.", Some(docs::count) },
        spec! { "command|docs", -2, "loading stale", "@connection", Free,
            "nondeterministic_output_order", "server", "7.0.0", "O(N)",
            "Documentation of commands.", Some(docs::docs) },
        spec! { "command|getkeys", -4, "loading stale", "@connection", Free,
            "", "server", "2.8.13", "O(N)",
            "The keys among the arguments of a command.", Some(docs::getkeys) },
        spec! { "command|help", 2, "loading stale", "@connection", Free,
            "", "server", "5.0.0", "O(1)",
            "Lists the subcommands.", Some(docs::help) },
        spec! { "command|info", -2, "loading stale", "@connection", Free,
            "nondeterministic_output_order", "server", "2.8.13", "O(N)",
            "Properties of commands.", Some(docs::command_info) },
        spec! { "command|list", -2, "loading stale", "@connection", Free,
            "nondeterministic_output_order", "server", "7.0.0", "O(N)",
            "The names of commands.", Some(docs::list) },
    },
    spec! { "config", -2, "", "", Free,
        "", "server", "2.0.0", "",
        "Commands about the server's settings.", None,
        spec! { "config|get", -3, "admin noscript loading stale", "", Free,
            "", "server", "2.0.0", "O(N)",
            "The values of settings.", Some(server::config_get) },
        spec! { "config|help", 2, "loading stale", "", Free,
            "", "server", "5.0.0", "O(1)",
            "Lists the subcommands.", Some(server::config_help) },
        spec! { "config|resetstat", 2, "admin noscript loading stale", "", Free,
            "", "server", "2.0.0", "O(1)",
            "Sets INFO's counters to zero.", Some(server::config_resetstat) },
        spec! { "config|rewrite", 2, "admin noscript loading stale", "", Free,
            "", "server", "2.8.0", "O(1)",
            "Writes the settings to the configuration file.", Some(server::config_rewrite) },
        spec! { "config|set", -4, "admin noscript loading stale", "", Free,
            "request_policy:all_nodes response_policy:all_succeeded", "server", "2.0.0", "O(N)",
            "Changes settings.", Some(server::config_set) },
    },
    spec! { "dbsize", 1, "readonly fast", "@keyspace", Free,
    "request_policy:all_shards response_policy:agg_sum", "server", "1.0.0", "O(1)",
    "The number of keys in the database.", Some(server::dbsize) },
    spec! { "decr", 2, "write denyoom fast", "@string", One("RW access update"),
    "", "string", "1.0.0", "O(1)",
    "Subtracts one from a number.", Some(strings::decr) },
    spec! { "decrby", 3, "write denyoom fast", "@string", One("RW access update"),
    "", "string", "1.0.0", "O(1)",
    "Subtracts from a number.", Some(strings::decrby) },
    spec! { "del", -2, "write", "@keyspace", All("RM delete"),
    "request_policy:multi_shard response_policy:agg_sum", "generic", "1.0.0", "O(N)",
    "Removes keys.", Some(keys::del) },
    spec! { "discard", 1, "noscript loading stale fast allow_busy", "@transaction", Free,
    "", "transactions", "2.0.0", "O(N)",
    "Gives a transaction up.", Some(transaction::discard) },
    spec! { "echo", 2, "loading stale fast", "@connection", Free,
    "", "connection", "1.0.0", "O(1)",
    "Sends its argument back.", Some(connection::echo) },
    spec! { "exec", 1, "noscript loading stale skip_slowlog", "@transaction", Free,
    "", "transactions", "1.2.0", "",
    "Executes the commands of a transaction.", Some(transaction::exec) },
    spec! { "exists", -2, "readonly fast", "@keyspace", All("RO"),
    "request_policy:multi_shard response_policy:agg_sum", "generic", "1.0.0", "O(N)",
    "How many of these keys are there.", Some(keys::exists) },
    spec! { "expire", -3, "write fast", "@keyspace", One("RW update"),
    "", "generic", "1.0.0", "O(1)",
    "Gives a key a time to live in seconds.", Some(keys::expire) },
    spec! { "expireat", -3, "write fast", "@keyspace", One("RW update"),
    "", "generic", "1.2.0", "O(1)",
    "Gives a key an end in seconds of Unix time.", Some(keys::expireat) },
    spec! { "expiretime", 2, "readonly fast", "@keyspace", One("RO access"),
    "", "generic", "7.0.0", "O(1)",
    "When a key ends, in seconds of Unix time.", Some(keys::expiretime) },
    spec! { "flushall", -1, "write", "@keyspace @dangerous", Free,
    "request_policy:all_shards response_policy:all_succeeded", "server", "1.0.0", "O(N)",
    "Removes all keys of all databases.", Some(server::flushall) },
    spec! { "flushdb", -1, "write", "@keyspace @dangerous", Free,
    "request_policy:all_shards response_policy:all_succeeded", "server", "1.0.0", "O(N)",
    "Removes all keys of the database.", Some(server::flushdb) },
    spec! { "get", 2, "readonly fast", "@string", One("RO access"),
    "", "string", "1.0.0", "O(1)",
    "The value of a key.", Some(strings::get) },
    spec! { "getdel", 2, "write fast", "@string", One("RW access delete"),
    "", "string", "6.2.0", "O(1)",
    "The value of a key, which is then removed.", Some(strings::getdel) },
    spec! { "getex", -2, "write fast", "@string", One("RW access update"),
    "", "string", "6.2.0", "O(1)",
    "The value of a key, whose time to live is then changed.", Some(strings::getex) },
    spec! { "getrange", 4, "readonly", "@string", One("RO access"),
    "", "string", "2.4.0", "O(N)",
    "Part of a value.", Some(strings::getrange) },
    spec! { "getset", 3, "write denyoom fast", "@string", One("RW access update"),
    "", "string", "1.0.0", "O(1)",
    "Sets a key and gives its old value.", Some(strings::getset) },
    spec! { "hello", -1, "noscript loading stale fast no_auth allow_busy", "@connection", Free,
    "", "connection", "6.0.0", "O(1)",
    "Greets the server and chooses the protocol.", Some(connection::hello) },
    spec! { "incr", 2, "write denyoom fast", "@string", One("RW access update"),
    "", "string", "1.0.0", "O(1)",
    "Adds one to a number.", Some(strings::incr) },
    spec! { "incrby", 3, "write denyoom fast", "@string", One("RW access update"),
    "", "string", "1.0.0", "O(1)",
    "Adds to a number.", Some(strings::incrby) },
    spec! { "info", -1, "loading stale", "@dangerous", Free,
    "nondeterministic_output request_policy:all_shards response_policy:special", "server", "1.0.0", "O(1)",
    "What the server is and does.", Some(info::info) },
    spec! { "keys", 2, "readonly", "@keyspace @dangerous", Free,
    "request_policy:all_shards nondeterministic_output_order", "generic", "1.0.0", "O(N)",
    "All keys that match a pattern.", Some(keys::keys) },
    spec! { "mget", -2, "readonly fast", "@string", All("RO access"),
    "request_policy:multi_shard", "string", "1.0.0", "O(N)",
    "The values of several keys.", Some(strings::mget) },
    spec! { "mset", -3, "write denyoom", "@string", Pairs("OW update"),
    "request_policy:multi_shard response_policy:all_succeeded", "string", "1.0.1", "O(N)",
    "Sets several keys.", Some(strings::mset) },
    spec! { "msetnx", -3, "write denyoom", "@string", Pairs("OW insert"),
    "request_policy:multi_shard response_policy:agg_min", "string", "1.0.1", "O(N)",
    "Sets several keys if none of them is there.", Some(strings::msetnx) },
    spec! { "multi", 1, "noscript loading stale fast allow_busy", "@transaction", Free,
    "", "transactions", "1.2.0", "O(1)",
    "Begins a transaction.", Some(transaction::multi) },
    spec! { "persist", 2, "write fast", "@keyspace", One("RW update"),
    "", "generic", "2.2.0", "O(1)",
    "Takes a key's time to live away.", Some(keys::persist) },
    spec! { "pexpire", -3, "write fast", "@keyspace", One("RW update"),
    "", "generic", "2.6.0", "O(1)",
    "Gives a key a time to live in milliseconds.", Some(keys::pexpire) },
    spec! { "pexpireat", -3, "write fast", "@keyspace", One("RW update"),
    "", "generic", "2.6.0", "O(1)",
    "Gives a key an end in milliseconds of Unix time.", Some(keys::pexpireat) },
    spec! { "pexpiretime", 2, "readonly fast", "@keyspace", One("RO access"),
    "", "generic", "7.0.0", "O(1)",
    "When a key ends, in milliseconds of Unix time.", Some(keys::pexpiretime) },
    spec! { "ping", -1, "fast", "@connection", Free,
    "request_policy:all_shards response_policy:all_succeeded", "connection", "1.0.0", "O(1)",
    "Answers.", Some(connection::ping) },
    spec! { "psetex", 4, "write denyoom", "@string", One("OW update"),
    "", "string", "2.6.0", "O(1)",
    "Sets a key with a time to live in milliseconds.", Some(strings::psetex) },
    spec! { "pttl", 2, "readonly fast", "@keyspace", One("RO access"),
    "nondeterministic_output", "generic", "2.6.0", "O(1)",
    "The time a key has to live, in milliseconds.", Some(keys::pttl) },
    spec! { "quit", -1, "noscript loading stale fast no_auth allow_busy", "@connection", Free,
    "", "connection", "1.0.0", "O(1)",
    "Closes the connection.", Some(connection::quit) },
    spec! { "reset", 1, "noscript loading stale fast no_auth allow_busy", "@connection", Free,
    "", "connection", "6.2.0", "O(1)",
    "Makes the connection as it was when it began.", Some(connection::reset) },
    spec! { "select", 2, "loading stale fast", "@connection", Free,
    "", "connection", "1.0.0", "O(1)",
    "Chooses the database.", Some(connection::select) },
    spec! { "set", -3, "write denyoom", "@string", One("RW access update variable_flags"),
    "", "string", "1.0.0", "O(1)",
    "Sets a key.", Some(strings::set) },
    spec! { "setex", 4, "write denyoom", "@string", One("OW update"),
    "", "string", "2.0.0", "O(1)",
    "Sets a key with a time to live in seconds.", Some(strings::setex) },
    spec! { "setnx", 3, "write denyoom fast", "@string", One("OW insert"),
    "", "string", "1.0.0", "O(1)",
    "Sets a key if it is not there.", Some(strings::setnx) },
    spec! { "setrange", 4, "write denyoom", "@string", One("RW update"),
    "", "string", "2.2.0", "O(1)",
    "Overwrites part of a value.", Some(strings::setrange) },
    spec! { "strlen", 2, "readonly fast", "@string", One("RO"),
    "", "string", "2.2.0", "O(1)",
    "The length of a value.", Some(strings::strlen) },
    spec! { "substr", 4, "readonly", "@string", One("RO access"),
    "", "string", "1.0.0", "O(N)",
    "Part of a value.", Some(strings::getrange) },
    spec! { "time", 1, "loading stale fast", "", Free,
    "nondeterministic_output", "server", "2.6.0", "O(1)",
    "The server's time.", Some(server::time) },
    spec! { "touch", -2, "readonly fast", "@keyspace", All("RO"),
    "request_policy:multi_shard response_policy:agg_sum", "generic", "3.2.1", "O(N)",
    "How many of these keys are there.", Some(keys::touch) },
    spec! { "ttl", 2, "readonly fast", "@keyspace", One("RO access"),
    "nondeterministic_output", "generic", "1.0.0", "O(1)",
    "The time a key has to live, in seconds.", Some(keys::ttl) },
    spec! { "type", 2, "readonly fast", "@keyspace", One("RO"),
    "", "generic", "1.0.0", "O(1)",
    "The type of a key's value.", Some(keys::type_of) },
    spec! { "unlink", -2, "write fast", "@keyspace", All("RM delete"),
    "request_policy:multi_shard response_policy:agg_sum", "generic", "4.0.0", "O(1)",
    "Removes keys.", Some(keys::del) },
    spec! { "unwatch", 1, "noscript loading stale fast allow_busy", "@transaction", Free,
    "", "transactions", "2.2.0", "O(1)",
    "Forgets the watched keys.", Some(transaction::unwatch) },
    spec! { "watch", -2, "noscript loading stale fast allow_busy", "@transaction", All("RO"),
    "", "transactions", "2.2.0", "O(1)",
    "Watches keys: if one changes, the next transaction does nothing.", Some(transaction::watch) },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorted_by_name() {
        assert!(COMMANDS.is_sorted_by(|a, b| a.name < b.name));
        for spec in COMMANDS {
            assert!(spec.subcommands.is_sorted_by(|a, b| a.name < b.name));
            assert!(spec.run.is_some() || !spec.subcommands.is_empty());
        }
    }

    #[test]
    fn found_in_any_case() {
        assert_eq!(find(COMMANDS, b"GeTeX").unwrap().name, "getex");
        let config = find(COMMANDS, b"config").unwrap();
        assert_eq!(find(config.subcommands, b"SET").unwrap().name, "config|set");
        assert!(find(COMMANDS, b"nonsense").is_none());
        assert!(find(COMMANDS, b"").is_none());
        assert!(find(COMMANDS, &[b'g'; 100]).is_none());
        assert!(find(COMMANDS, b"set").unwrap().deny_oom);
        assert!(!find(COMMANDS, b"get").unwrap().deny_oom);
    }
}
