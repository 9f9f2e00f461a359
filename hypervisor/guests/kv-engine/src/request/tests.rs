use super::*;
use alloc::vec;
use std::format;
use std::string::String;

const BOUNDS: Bounds = Bounds {
    bulk: 512 << 20,
    held: usize::MAX,
};

/// Feeds the pieces to a parser; all commands in them, or the error at the end.
fn parse(pieces: &[&[u8]], bounds: Bounds) -> (Vec<Vec<Vec<u8>>>, Option<ProtocolError>) {
    let mut parser = Parser::new();
    let mut commands = Vec::new();
    for piece in pieces {
        let mut at = 0;
        loop {
            match parser.step(piece, &mut at, bounds) {
                Ok(Step::More) => break,
                Ok(Step::Lost) => commands.push(vec![b"lost".to_vec()]),
                Ok(Step::Command) => {
                    let arguments = parser.arguments(piece);
                    let words = (0..arguments.len()).map(|index| arguments[index].to_vec());
                    commands.push(words.collect());
                }
                Err(error) => return (commands, Some(error)),
            }
            parser.next();
        }
        assert_eq!(at, piece.len());
    }
    (commands, None)
}

fn words(commands: &[&[&str]]) -> Vec<Vec<Vec<u8>>> {
    let command = |words: &&[&str]| words.iter().map(|word| word.as_bytes().to_vec()).collect();
    commands.iter().map(command).collect()
}

#[test]
fn arrays_and_inline_commands_mixed() {
    let stream = b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n\r\nPING  x\r\n*0\r\n*-1\r\n*1\r\n$0\r\n\r\nGET 'a b' \"\\x41\\n\"\n";
    let expected = words(&[&["GET", "k"], &["PING", "x"], &[""], &["GET", "a b", "A\n"]]);
    assert_eq!(parse(&[stream], BOUNDS), (expected.clone(), None));
    for cut in 0..stream.len() {
        let (a, b) = stream.split_at(cut);
        assert_eq!(
            parse(&[a, b], BOUNDS),
            (expected.clone(), None),
            "cut at {cut}"
        );
    }
    let bytes: Vec<&[u8]> = stream.chunks(1).collect();
    assert_eq!(parse(&bytes, BOUNDS), (expected, None));
}

#[test]
fn bad_requests() {
    use ProtocolError::*;
    for (request, error) in [
        (&b"*x\r\n"[..], InvalidCount),
        (b"*2147483648\r\n", InvalidCount),
        (b"*1\r\n$-1\r\n", InvalidLength),
        (b"*1\r\n$536870913\r\n", InvalidLength),
        (b"*1\r\n:4\r\n", ExpectedDollar(b':')),
        (b"*1\r\n\r\n", ExpectedDollar(b'\r')),
        (b"GET \"x\r\n", UnbalancedQuotes),
        (b"GET 'x'y\r\n", UnbalancedQuotes),
    ] {
        let bytes: Vec<&[u8]> = request.chunks(1).collect();
        assert_eq!(parse(&[request], BOUNDS), (vec![], Some(error)));
        assert_eq!(parse(&bytes, BOUNDS), (vec![], Some(error)));
    }
}

#[test]
fn lines_end_within_64_kib() {
    for (start, error) in [
        ("", ProtocolError::InlineTooBig),
        ("*", ProtocolError::CountTooBig),
        ("*1\r\n$", ProtocolError::LengthTooBig),
        // What follows a zero byte is not looked at.
        ("PING\0\r\n", ProtocolError::InlineTooBig),
    ] {
        for chunk in [1000, 65_536, 200_000] {
            let stream = format!("{start}{}", "1".repeat(100_000));
            let pieces: Vec<&[u8]> = stream.as_bytes().chunks(chunk).collect();
            assert_eq!(parse(&pieces, BOUNDS), (vec![], Some(error)));
        }
    }
    let longest = "x".repeat(LINE_MAX);
    let stream = format!("{longest}\n");
    for chunk in [1000, 200_000] {
        let pieces: Vec<&[u8]> = stream.as_bytes().chunks(chunk).collect();
        assert_eq!(parse(&pieces, BOUNDS), (words(&[&[&longest]]), None));
    }
}

#[test]
fn a_large_argument_grows_as_it_comes_and_can_be_taken() {
    let value = vec![7; 5 << 20];
    let mut stream = format!("*2\r\n$3\r\nSET\r\n${}\r\n", value.len()).into_bytes();
    stream.extend_from_slice(&value);
    stream.extend_from_slice(b"\r\n");
    let mut parser = Parser::new();
    let mut most = 0;
    for piece in stream.chunks(1460) {
        let mut at = 0;
        match parser.step(piece, &mut at, BOUNDS).unwrap() {
            Step::More => most = parser.held().max(most),
            step => {
                assert_eq!(step, Step::Command);
                let mut arguments = parser.arguments(piece);
                assert_eq!(&arguments[0], b"SET");
                let taken = arguments.take(1).unwrap();
                assert_eq!(taken, value);
                assert_eq!(taken.capacity(), value.len());
                assert!(arguments.take(0).is_none());
            }
        }
    }
    parser.next();
    assert!(most < value.len() + 100_000, "{most}");
    assert!(parser.held() <= KEEP * 3, "{}", parser.held());
}

#[test]
fn announcing_much_takes_little() {
    let mut parser = Parser::new();
    let mut at = 0;
    let request = b"*1000000000\r\n$536870912\r\nx";
    assert_eq!(parser.step(request, &mut at, BOUNDS), Ok(Step::More));
    assert!(parser.held() <= LARGE_FIRST + KEEP);
}

#[test]
fn what_cannot_be_held_is_dropped_and_the_stream_goes_on() {
    let tight = Bounds {
        bulk: 512 << 20,
        held: 100_000,
    };
    let value = "v".repeat(200_000);
    let small = "s".repeat(900);
    let many: String = (0..300).map(|_| format!("$900\r\n{small}\r\n")).collect();
    let stream =
        format!("*2\r\n$3\r\nSET\r\n$200000\r\n{value}\r\n*301\r\n$4\r\nMSET\r\n{many}PING\r\n");
    for chunk in [1, 1000, 70_000] {
        let pieces: Vec<&[u8]> = stream.as_bytes().chunks(chunk).collect();
        let (commands, error) = parse(&pieces, tight);
        assert_eq!(error, None);
        assert_eq!(
            commands,
            words(&[&["lost"], &["lost"], &["PING"]]),
            "in chunks of {chunk}"
        );
    }
}
