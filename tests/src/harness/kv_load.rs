//! Load for the key-value guest: real TCP connections, random commands of every sort, random pipelines.
//!
//! What the answers say is no business of this load's, only that each request has its answer: it makes a guest do
//! different things, so that a replay has something to repeat.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::random::Random;

/// Far longer than a loaded host takes for one answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Keys that the commands are about.
const KEYS: u64 = 200;

/// Requests in one go at most; mostly it is one, which makes the guest wake and halt.
const PIPELINE: u64 = 12;

/// Asks for so many answers over so many connections; how many came.
///
/// # Errors
/// If a connection breaks, or an answer is none.
pub fn run(address: SocketAddrV4, connections: u64, requests: u64, seed: u64) -> Result<u64> {
    let mut random = Random::new(seed);
    std::thread::scope(|scope| {
        let mut clients = Vec::new();
        for _ in 0..connections {
            let (seed, share) = (random.next(), requests.div_ceil(connections));
            clients.push(scope.spawn(move || client(address, share, seed)));
        }
        clients
            .into_iter()
            .map(|client| client.join().expect("a client does not panic"))
            .sum()
    })
}

fn client(address: SocketAddrV4, requests: u64, seed: u64) -> Result<u64> {
    let mut random = Random::new(seed);
    let mut answered = 0;
    while answered < requests {
        // A new connection now and then: they are made and ended by frames like any other.
        let mut stream = BufReader::new(connect(address)?);
        let until = requests.min(answered + 1 + random.below(2000));
        while answered < until {
            let count = match random.below(8) {
                0 => 1 + random.below(PIPELINE.min(until - answered)),
                _ => 1,
            };
            let mut bytes = Vec::new();
            for _ in 0..count {
                command(&mut random, &mut bytes);
            }
            stream
                .get_mut()
                .write_all(&bytes)
                .context("send requests")?;
            for _ in 0..count {
                answer(&mut stream).with_context(|| format!("answer {answered}"))?;
                answered += 1;
            }
        }
    }
    Ok(answered)
}

/// Tries for as long as the guest may need to start.
fn connect(address: SocketAddrV4) -> Result<TcpStream> {
    let until = Instant::now() + PATIENCE;
    loop {
        match TcpStream::connect_timeout(&address.into(), Duration::from_secs(1)) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(error) if Instant::now() >= until => {
                return Err(error).context("connect to the guest");
            }
            // Refused: it boots. There is nothing to wait on but time.
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn command(random: &mut Random, to: &mut Vec<u8>) {
    let mut key = || format!("key:{}", random.below(KEYS)).into_bytes();
    let (key, other) = (key(), key());
    let value = value(random);
    let seconds = random.below(20).to_string().into_bytes();
    let word = |text: &str| text.as_bytes().to_vec();
    let words = match random.below(20) {
        0..4 => vec![word("SET"), key, value],
        4..8 => vec![word("GET"), key],
        8 => vec![
            word("SET"),
            key,
            value,
            word("EX"),
            (1 + random.below(20)).to_string().into_bytes(),
        ],
        9 => vec![word("INCR"), word("counter")],
        10 => vec![word("APPEND"), key, word("and more")],
        11 => vec![word("DEL"), key, other],
        12 => vec![word("MSET"), key, value.clone(), other, value],
        13 => vec![word("MGET"), key, other, word("counter")],
        14 => vec![word("EXPIRE"), key, seconds],
        15 => vec![word("TTL"), key],
        16 => vec![word("EXISTS"), key, other],
        17 => vec![word("TIME")],
        18 => vec![word("INFO")],
        _ => vec![word("DBSIZE")],
    };
    to.extend(format!("*{}\r\n", words.len()).into_bytes());
    for word in words {
        to.extend(format!("${}\r\n", word.len()).into_bytes());
        to.extend(word);
        to.extend(b"\r\n");
    }
}

/// Mostly short, sometimes of many frames.
fn value(random: &mut Random) -> Vec<u8> {
    let length = match random.below(100) {
        0 => random.below(60_000),
        1..10 => random.below(4000),
        _ => random.below(300),
    };
    vec![b'a' + random.below(26) as u8; length as usize]
}

/// Reads one answer, whatever it is.
fn answer(stream: &mut BufReader<TcpStream>) -> Result<()> {
    let mut line = String::new();
    stream.read_line(&mut line).context("wait for an answer")?;
    let line = line.trim_end();
    ensure!(!line.is_empty(), "the connection was closed");
    let (kind, rest) = line.split_at(1);
    match kind {
        "+" | ":" | "-" => {}
        "$" if rest == "-1" => {}
        "$" => {
            let mut bytes = vec![0; rest.parse::<usize>()? + 2];
            stream.read_exact(&mut bytes).context("wait for a value")?;
        }
        "*" => {
            for _ in 0..rest.parse::<u64>()? {
                answer(stream)?;
            }
        }
        _ => bail!("the guest says {line:?}"),
    }
    Ok(())
}
