//! The fixed scripts: what each command does, with all options and errors.
use super::CompatError;
use super::pair::{How, Pair};

/// The scripts in `scripts.txt`, in the language of [`Pair::script`], by name.
pub(super) fn written() -> impl Iterator<Item = (&'static str, &'static str)> {
    let scripts = include_str!("scripts.txt").split("\n## ").skip(1);
    scripts.filter_map(|script| script.split_once('\n'))
}

/// A script in Rust.
type Script = fn(&mut Pair) -> Result<(), CompatError>;

/// Scripts in Rust, by name.
pub(super) const CODED: &[(&str, Script)] = &[
    ("keys go when their time has come", expiring),
    ("two clients", two_clients),
    ("out of memory", out_of_memory),
    ("large values", large_values),
    ("a long pipeline", long_pipeline),
    ("inline commands", inline),
    ("protocol errors", protocol_errors),
    ("INFO", info),
];

fn expiring(pair: &mut Pair) -> Result<(), CompatError> {
    pair.script(
        "SET a 1 PX 30\nSET b 1\nPEXPIRE b 20\nSET c 1 PX 60000\nSET d 1 PX 20\nSET d 2 KEEPTTL",
    )?;
    for key in ["a", "b", "d"] {
        pair.wait_until_gone(key)?;
    }
    pair.script(
        "GET a\nTTL b\nSET d 3 KEEPTTL\nTTL d\n~1 TTL c\nAPPEND b x\nTTL b\nINCR a\nTTL a\n% KEYS *\nDBSIZE",
    )?;
    pair.script("SET w 1 PX 20\nWATCH w")?;
    pair.wait_until_gone("w")?;
    pair.script("MULTI\nPING\nEXEC")
}

fn two_clients(pair: &mut Pair) -> Result<(), CompatError> {
    let second = pair.connect()?;
    pair.switch(0);
    pair.script("SELECT 1\nCLIENT SETNAME first\nSET k v\nWATCH k")?;
    pair.switch(second);
    pair.script("CLIENT GETNAME\nGET k\nSET k v\nSELECT 1\nGET k")?;
    pair.switch(0);
    pair.script("MULTI\nGET k\nEXEC\nWATCH k\nMULTI\nINCR k")?;
    pair.switch(second);
    pair.script("SET k 5")?;
    pair.switch(0);
    pair.script("EXEC\nGET k\nWATCH k\nMULTI\nINCR k\nEXEC")
}

fn out_of_memory(pair: &mut Pair) -> Result<(), CompatError> {
    let before = pair.compare(How::Names, &["CONFIG", "GET", "maxmemory"])?;
    pair.script(
        r#"
        SET k v
        SET n 1
        CONFIG SET maxmemory 1
        SET k w
        SET new v
        GET k
        APPEND k x
        INCR n
        MSET a 1 b 2
        SETNX a 1
        GETSET k x
        SETEX k 10 v
        SETRANGE k 0 x
        EXPIRE k 100
        GETEX k PERSIST
        SET k
        GET
        DBSIZE
        ECHO hello
        DEL n
        MULTI
        SET k w
        GET k
        EXEC
        CONFIG SET maxmemory 1gb
        CONFIG GET maxmemory
        MULTI
        SET k w
        CONFIG SET maxmemory 1
        EXEC
        GET k
        CONFIG SET maxmemory 1gb
        MULTI
        GET k
        EXEC
        FLUSHALL
        "#,
    )?;
    // Either server gets its own limit back.
    let values = before.each_ref().map(|reply| {
        let value = reply
            .items()
            .get(1)
            .map_or(&b"0"[..], |value| value.bytes());
        value.to_vec()
    });
    pair.each(&values.map(|value| {
        vec![
            b"CONFIG".to_vec(),
            b"SET".to_vec(),
            b"maxmemory".to_vec(),
            value,
        ]
    }))
}

fn value(length: usize, salt: u8) -> Vec<u8> {
    (0..length)
        .map(|index| (index as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0] ^ salt)
        .collect()
}

fn words(words: &[&[u8]]) -> Vec<Vec<u8>> {
    words.iter().map(|word| word.to_vec()).collect()
}

fn large_values(pair: &mut Pair) -> Result<(), CompatError> {
    const MIB: usize = 1 << 20;
    let large = value(MIB, 1);
    pair.command(&words(&[b"SET", b"large", &large]))?;
    pair.command(&["GET", "large"])?;
    pair.command(&["STRLEN", "large"])?;
    pair.command(&words(&[b"SET", b"large", &value(MIB, 2), b"GET"]))?;
    pair.command(&words(&[b"APPEND", b"large", &value(100_000, 3)]))?;
    pair.command(&["GETRANGE", "large", "1048570", "1048586"])?;
    pair.command(&["SETRANGE", "large", "2000000", "end"])?;
    pair.command(&["GETDEL", "large"])?;
    pair.command(&[b"ECHO", &large[..]])?;
    pair.command(&[&b"PING"[..], &large])?;
    pair.command(&[&large[..], &large])?;
    pair.command(&[b"SET", &large[..], b"a large key"])?;
    pair.command(&[b"GET", &large[..]])?;
    let sets: Vec<_> = (0..8u8)
        .map(|index| words(&[b"SET", &[index], &value(MIB + usize::from(index), index)]))
        .collect();
    pair.pipeline(&sets, |_| Vec::new())?;
    let gets: Vec<_> = (0..8u8).map(|index| words(&[b"GET", &[index]])).collect();
    pair.pipeline(&gets, |_| Vec::new())?;
    pair.command(&[&b"MGET"[..], &[0], &[7], b"none", &[3]])?;
    // Lengths around those at which servers change their ways.
    for length in [
        0, 1, 44, 45, 16_383, 16_384, 32_767, 32_768, 32_769, 65_535, 65_536, 65_537,
    ] {
        let pairs = [
            words(&[b"SET", b"k", &value(length, 9)]),
            words(&[b"GET", b"k"]),
        ];
        pair.pipeline(&pairs, |bytes| vec![bytes.len() / 2, 1, 1, 1])?;
    }
    pair.command(&["FLUSHALL"])
}

fn long_pipeline(pair: &mut Pair) -> Result<(), CompatError> {
    let command = |index: u32| {
        let key = format!("key:{}", index % 100);
        let number = index.to_string();
        match index % 5 {
            0 => words(&[b"SET", key.as_bytes(), number.as_bytes()]),
            1 => words(&[b"GET", key.as_bytes()]),
            2 => words(&[b"INCR", b"counter"]),
            3 => words(&[b"PING", number.as_bytes()]),
            _ => words(&[b"nonsense", number.as_bytes()]),
        }
    };
    let commands: Vec<_> = (0..10_000).map(command).collect();
    pair.pipeline(&commands, |_| Vec::new())?;
    // The same, a few bytes at a time.
    pair.pipeline(&commands[..200], |bytes| {
        (0..bytes.len() / 7).map(|_| 7).collect()
    })
}

fn inline(pair: &mut Pair) -> Result<(), CompatError> {
    for request in [
        &b"PING\r\n"[..],
        b"PING\n",
        b"  PING  \r\n",
        b"\r\n\r\nPING\r\n",
        b"\n\nPING\n",
        b"SET k \"a b\\x41\\n\\t\\\"\"\r\nGET k\r\n",
        b"SET k 'a b\\'c\\n'\r\nGET k\r\n",
        b"SET k \"\"\r\nGET k\r\n",
        b"SET k ab\"cd ef\"\r\nGET k\r\n",
        b"ECHO \"\\a\\b\\r\\q\\xzz\\x4\"\r\n",
        b"ECHO \"unbalanced\r\nPING\r\n",
        b"ECHO 'unbalanced\r\nPING\r\n",
        b"ECHO \"a\"b\r\nPING\r\n",
        b"ECHO 'a'b\r\nPING\r\n",
        b"ECHO \"a\\\"\r\n",
        b"ECHO a\tb\r\n",
        b"ECHO\ta\r\n",
        b"\tECHO\x0b\x0ca\r\n",
        b"ECHO a\x0bb\r\n",
        b"PING\rPING\r\n",
        b"PING\r\r\n",
        b"get\r\n",
        b"nonsense a b\r\n",
        b"\xff\xfe\r\nPING\r\n",
        b"PING\r\n*1\r\n$4\r\nPING\r\nPING\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nPING\r\n",
        b"POST / HTTP/1.1\r\nPING\r\n",
        b"PING",
        b"PING\0\r\nPING\r\n",
        b"QUIT\r\nPING\r\n",
        b"quit now\r\nPING\r\n",
        b"MULTI\r\nPING\r\nQUIT\r\nPING\r\n",
        b"\r\n",
        b"",
        b"$4\r\nPING\r\n",
        b"+PING\r\n",
    ] {
        pair.raw(request)?;
    }
    let mut long = b"ECHO ".to_vec();
    long.resize(60_000, b'x');
    long.extend_from_slice(b"\r\nPING\r\n");
    pair.raw(&long)?;
    pair.raw(&vec![b'x'; 300_000])
}

fn protocol_errors(pair: &mut Pair) -> Result<(), CompatError> {
    for request in [
        &b"*\r\n"[..],
        b"*x\r\n",
        b"*1x\r\n",
        b"*01\r\n",
        b"*+1\r\n",
        b"* 1\r\n",
        b"*2147483648\r\n",
        b"*99999999999999999999\r\n",
        b"*0\r\nPING\r\n",
        b"*-1\r\nPING\r\n",
        b"*-99999999999999999999\r\nPING\r\n",
        b"*1\r\nfoo\r\n",
        b"*1\r\n*1\r\n",
        b"*1\r\n:1\r\n",
        b"*1\r\n\r\n",
        b"*1\r\n\n\r\n",
        b"*1\r\n$\r\n",
        b"*1\r\n$x\r\n",
        b"*1\r\n$-1\r\n",
        b"*1\r\n$01\r\n",
        b"*1\r\n$536870913\r\n",
        b"*1\r\n$99999999999999999999\r\n",
        b"*2\r\n$3\r\nGET\r\nfoo\r\n",
        b"*2\r\n$3\r\nGET\r\n\xffoo\r\n",
        b"*1\r\n$4\r\nPINGxx*1\r\n$4\r\nPING\r\n",
        b"*1\rx$4\rxPINGxx",
        b"*1\r\n$4\r\nPI",
        b"*1\r\n$4",
        b"*1",
        b"*",
        b"*1\r\n$4\r\nPING\r\n*x\r\n*1\r\n$4\r\nPING\r\n",
        b"PING\r\n*1\r\nx\r\nPING\r\n",
        b"*1\0\r\n$4\r\nPING\r\n",
        b"*1\r\n$0\r\n\r\n",
        b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$0\r\n\r\n*2\r\n$3\r\nGET\r\n$1\r\nk\r\n",
    ] {
        pair.raw(request)?;
    }
    let long = |start: &[u8]| {
        let mut bytes = start.to_vec();
        bytes.resize(300_000, b'1');
        bytes
    };
    pair.raw(&long(b"*"))?;
    pair.raw(&long(b"*1\r\n$"))?;
    pair.raw(&long(b"*2\r\n$4\r\nECHO\r\n"))
}

fn info(pair: &mut Pair) -> Result<(), CompatError> {
    pair.script("SET k v\nSET l v EX 1000")?;
    pair.script("# INFO keyspace\n# INFO replication\n# INFO cluster\n# INFO nonsense\n# INFO cluster keyspace")?;
    // Everything the subject shows is something that Redis shows.
    for words in [
        &["INFO"][..],
        &["INFO", "all"],
        &["INFO", "memory", "Server"],
    ] {
        pair.subset(words)?;
    }
    Ok(())
}
