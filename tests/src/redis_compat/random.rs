//! Random sequences of commands, and random bytes, that follow from a seed.
use super::CompatError;
use super::pair::{How, Pair, encode};

/// Commands in each of the sequences sent one by one.
const SINGLE: usize = 1500;
/// Pipelines, and the most commands in each.
const PIPELINES: (usize, u64) = (40, 120);
/// Broken requests.
const BROKEN: usize = 150;

/// A script that follows from a seed.
type Script = fn(&mut Pair, u64) -> Result<(), CompatError>;

/// The scripts, by name.
pub(super) const SCRIPTS: &[(&str, Script)] = &[
    ("random commands", commands),
    ("random pipelines", pipelines),
    ("broken requests", broken),
];

/// A small generator of random numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn pick<'a, T: ?Sized>(&mut self, list: &[&'a T]) -> &'a T {
        list[self.below(list.len() as u64) as usize]
    }

    /// True once in `times`.
    fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// The keys that random commands are about.
const KEYS: &[&str] = &["a", "b", "c", "d", "e", "", "a*", "key:1", "\0"];

fn key(random: &mut Random) -> Vec<u8> {
    random.pick(KEYS).as_bytes().to_vec()
}

fn integer(random: &mut Random) -> Vec<u8> {
    match random.below(8) {
        0 => random
            .pick(&[
                "9223372036854775807",
                "-9223372036854775808",
                "9223372036854775808",
                "0",
                "-0",
                "01",
                "x",
                "",
                "1.5",
                " 1",
            ])
            .as_bytes()
            .to_vec(),
        1 => (random.next() as i64).to_string().into_bytes(),
        _ => (random.below(2000) as i64 - 1000).to_string().into_bytes(),
    }
}

fn value(random: &mut Random) -> Vec<u8> {
    match random.below(6) {
        0 => Vec::new(),
        1 | 2 => integer(random),
        3 => {
            let length = random.below(200);
            (0..length).map(|_| random.next() as u8).collect()
        }
        4 if random.one_in(10) => vec![b'L'; random.below(100_000) as usize],
        _ => format!("value {}", random.below(100)).into_bytes(),
    }
}

/// A time far enough away that no key goes during the test, or long past, or nonsense.
fn time(random: &mut Random, unit: &str) -> Vec<u8> {
    if random.one_in(6) {
        let odd = [
            "0",
            "-1",
            "-1000",
            "x",
            "",
            "1.5",
            "9223372036854775807",
            "-9223372036854775808",
            "9223372036854775808",
        ];
        return random.pick(&odd).as_bytes().to_vec();
    }
    if unit.ends_with("AT") && random.one_in(6) {
        return random.below(1000).to_string().into_bytes();
    }
    let far = match unit {
        "EX" => 100_000 + random.below(1000),
        "PX" => 100_000_000 + random.below(1_000_000),
        "EXAT" => 33_177_117_000 + random.below(1000),
        _ => 33_177_117_000_000 + random.below(1_000_000),
    };
    far.to_string().into_bytes()
}

fn case(random: &mut Random, word: &str) -> Vec<u8> {
    match random.below(4) {
        0 => word.to_ascii_lowercase().into_bytes(),
        1 => word
            .bytes()
            .map(|byte| {
                if random.one_in(2) {
                    byte.to_ascii_lowercase()
                } else {
                    byte
                }
            })
            .collect(),
        _ => word.as_bytes().to_vec(),
    }
}

fn set_options(random: &mut Random, words: &mut Vec<Vec<u8>>) {
    for _ in 0..random.below(4) {
        let option = random.pick(&[
            "NX", "XX", "GET", "KEEPTTL", "EX", "PX", "EXAT", "PXAT", "bogus",
        ]);
        // Options that contradict each other are errors, and errors teach little: fewer of them.
        if option == "bogus" && !random.one_in(8) {
            continue;
        }
        words.push(case(random, option));
        if matches!(option, "EX" | "PX" | "EXAT" | "PXAT") && !random.one_in(20) {
            words.push(time(random, option));
        }
    }
}

/// A random command, and how its answers are to be compared.
fn command(random: &mut Random) -> (How, Vec<Vec<u8>>) {
    let name = random.pick(&[
        "SET",
        "SET",
        "SET",
        "GET",
        "GET",
        "DEL",
        "INCR",
        "DECR",
        "INCRBY",
        "DECRBY",
        "MGET",
        "MSET",
        "APPEND",
        "EXISTS",
        "EXPIRE",
        "PEXPIRE",
        "EXPIREAT",
        "PEXPIREAT",
        "PERSIST",
        "TTL",
        "PTTL",
        "EXPIRETIME",
        "PEXPIRETIME",
        "KEYS",
        "DBSIZE",
        "STRLEN",
        "SETNX",
        "GETSET",
        "GETDEL",
        "GETEX",
        "SETEX",
        "PSETEX",
        "MSETNX",
        "SETRANGE",
        "GETRANGE",
        "TYPE",
        "UNLINK",
        "TOUCH",
        "SELECT",
        "FLUSHDB",
        "PING",
        "ECHO",
        "MULTI",
        "EXEC",
        "DISCARD",
        "WATCH",
        "nonsense",
    ]);
    let mut how = How::Exact;
    let mut words = vec![case(random, name)];
    match name {
        "SET" => {
            words.extend([key(random), value(random)]);
            set_options(random, &mut words);
        }
        "GET" | "INCR" | "DECR" | "PERSIST" | "STRLEN" | "GETDEL" | "TYPE" | "WATCH" => {
            words.push(key(random));
        }
        "TTL" | "PTTL" | "EXPIRETIME" | "PEXPIRETIME" => {
            how = How::Within(2000);
            words.push(key(random));
        }
        "INCRBY" | "DECRBY" => words.extend([key(random), integer(random)]),
        "APPEND" | "SETNX" | "GETSET" => words.extend([key(random), value(random)]),
        "MGET" | "DEL" | "EXISTS" | "UNLINK" | "TOUCH" => {
            words.extend((0..=random.below(4)).map(|_| key(random)));
        }
        "MSET" | "MSETNX" => {
            for _ in 0..=random.below(3) {
                words.extend([key(random), value(random)]);
            }
        }
        "EXPIRE" | "PEXPIRE" | "EXPIREAT" | "PEXPIREAT" => {
            let unit = match name {
                "EXPIRE" => "EX",
                "PEXPIRE" => "PX",
                "EXPIREAT" => "EXAT",
                _ => "PXAT",
            };
            words.extend([key(random), time(random, unit)]);
            for _ in 0..random.below(3) {
                let option = random.pick(&["NX", "XX", "GT", "LT"]);
                words.push(case(random, option));
            }
        }
        "GETEX" => {
            words.push(key(random));
            let option = random.pick(&["EX", "PX", "EXAT", "PXAT", "PERSIST", ""]);
            if !option.is_empty() {
                words.push(case(random, option));
            }
            if !matches!(option, "PERSIST" | "") {
                words.push(time(random, option));
            }
        }
        "SETEX" | "PSETEX" => {
            let unit = if name == "SETEX" { "EX" } else { "PX" };
            words.extend([key(random), time(random, unit), value(random)]);
        }
        "SETRANGE" => {
            let offset = random.below(300).to_string().into_bytes();
            words.extend([key(random), offset, value(random)]);
        }
        "GETRANGE" => words.extend([key(random), integer(random), integer(random)]),
        "KEYS" => {
            how = How::Unordered;
            words.push(
                random
                    .pick(&["*", "?", "a*", "[a-c]", "[^a]*", "a\\*", "*1", ""])
                    .into(),
            );
        }
        "SELECT" => words.push(random.pick(&["0", "0", "0", "1", "16"]).into()),
        // Keys whose time has passed are counted until they are found.
        "DBSIZE" => how = How::Shape,
        "ECHO" => words.push(value(random)),
        // Too often, and there would never be anything to work on.
        "FLUSHDB" if !random.one_in(10) => words = vec![b"PING".to_vec()],
        _ => {}
    }
    if random.one_in(40) {
        words.pop();
        if words.is_empty() {
            words.push(b"PING".to_vec());
        }
    } else if random.one_in(60) {
        words.push(value(random));
    }
    (how, words)
}

/// What is in the databases at the end.
fn compare_all(pair: &mut Pair) -> Result<(), CompatError> {
    pair.command(&["RESET"])?;
    for database in ["0", "1"] {
        pair.command(&["SELECT", database])?;
        // This finds all keys whose time has passed.
        pair.command(&[&["EXISTS"], KEYS].concat())?;
        pair.command(&["DBSIZE"])?;
        let [keys, _] = pair.compare(How::Unordered, &["KEYS", "*"])?;
        for key in keys.items() {
            pair.command(&[b"GET", key.bytes()])?;
            pair.compare(How::Within(2000), &[b"PEXPIRETIME", key.bytes()])?;
        }
    }
    Ok(())
}

fn commands(pair: &mut Pair, seed: u64) -> Result<(), CompatError> {
    let mut random = Random(seed);
    let mut in_transaction = false;
    for _ in 0..SINGLE {
        let (how, words) = command(&mut random);
        let name = words[0].to_ascii_uppercase();
        // EXEC's answer as a whole is compared exactly, so nothing else may be in it.
        if in_transaction && how != How::Exact {
            continue;
        }
        in_transaction = match &name[..] {
            b"MULTI" => true,
            b"EXEC" | b"DISCARD" => false,
            _ => in_transaction,
        };
        pair.compare(how, &words)?;
        if pair.differs() {
            return Ok(());
        }
    }
    compare_all(pair)
}

fn pipelines(pair: &mut Pair, seed: u64) -> Result<(), CompatError> {
    let mut random = Random(!seed);
    for _ in 0..PIPELINES.0 {
        let count = 1 + random.below(PIPELINES.1);
        let commands: Vec<_> = (0..count)
            .map(|_| command(&mut random))
            .filter(|(how, _)| *how == How::Exact)
            .map(|(_, words)| words)
            .collect();
        let cuts: Vec<_> = (0..random.below(20))
            .map(|_| 1 + random.below(400) as usize)
            .collect();
        pair.pipeline(&commands, |_| cuts.clone())?;
        if pair.differs() {
            return Ok(());
        }
    }
    compare_all(pair)
}

fn broken(pair: &mut Pair, seed: u64) -> Result<(), CompatError> {
    let mut random = Random(seed.rotate_left(32));
    for _ in 0..BROKEN {
        let mut bytes: Vec<u8> = (0..1 + random.below(4))
            .map(|_| command(&mut random))
            // A line break within DISCARD would make it SCARD, which is a command of Redis that the subject need not know.
            .filter(|(how, words)| *how == How::Exact && !words[0].eq_ignore_ascii_case(b"DISCARD"))
            .flat_map(|(_, words)| encode(&words))
            .take(2000)
            .collect();
        bytes.push(b'*');
        for _ in 0..1 + random.below(3) {
            let at = random.below(bytes.len() as u64) as usize;
            let byte = *random.pick(&[
                &b'\r', &b'\n', &b'$', &b'*', &b'1', &b'-', &b' ', &b'"', &b'x', &0, &0xff,
            ]);
            match random.below(3) {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => {
                    bytes.remove(at);
                    if bytes.is_empty() {
                        bytes.push(byte);
                    }
                }
            }
        }
        pair.raw(&bytes)?;
        if pair.differs() {
            return Ok(());
        }
    }
    Ok(())
}
