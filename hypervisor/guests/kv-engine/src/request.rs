//! The request protocol: RESP arrays of bulk strings, and inline commands, out of a stream cut anywhere.
//!
//! ```text
//!            '*'                         count > 0                 "$n"
//!  Start ──────────▶ Count ─────────────────────▶ Length ◀─────────────────▶ Body
//!    │ ▲               │ count <= 0                 ▲   next argument          │
//!    │ └───────────────┘                            └──────────────────────────┤
//!    │ other ▶ Inline ──────────────────────────────────▶ command ◀────────────┘ last argument
//! ```
//!
//! Arguments are read in place from the caller's bytes. Only when those end in the middle of a command is what came so
//! far copied, once; large arguments are collected in a buffer of their own, which a command may take over as a
//! value. Nothing is ever scanned twice, so the cost of a command is linear in its length however it was cut.
//!
//! Odd things that Redis does are done here too: the byte after a carriage return and the two bytes after a bulk
//! string are skipped unread; a zero byte hides the rest of a header line, which then ends by becoming too long.
mod inline;

use alloc::vec::Vec;
use core::mem;
use core::ops::{Index, Range};

use memchr::{memchr, memchr2};

use crate::OutOfMemory;
use crate::keyspace::copy;
use crate::number::parse_i64;
use inline::{Unbalanced, Words};

/// The longest header or inline line without its end, as in Redis (`PROTO_INLINE_MAX_SIZE`).
const LINE_MAX: usize = 64 << 10;
/// An argument from this length on, if it does not come in one piece, gets a buffer of its own (Redis: the same).
const LARGE: usize = 32 << 10;
/// How much is reserved for a large argument on the strength of its announcement alone. More: a client could take
/// memory by mere words. Less: more copying while the argument grows.
const LARGE_FIRST: usize = 1 << 20;
/// Buffers that are empty and larger than this are given back.
const KEEP: usize = 16 << 10;
/// What an argument costs besides its bytes.
const ARGUMENT: usize = mem::size_of::<Argument>();

/// An error in the protocol, after which Redis closes the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProtocolError {
    InlineTooBig,
    CountTooBig,
    LengthTooBig,
    InvalidCount,
    InvalidLength,
    UnbalancedQuotes,
    /// A `$` should stand where this byte stands.
    ExpectedDollar(u8),
}

impl ProtocolError {
    /// The words of the reply, around the byte it shows if it shows one.
    pub(crate) fn text(self) -> (&'static str, Option<u8>) {
        match self {
            Self::InlineTooBig => ("ERR Protocol error: too big inline request", None),
            Self::CountTooBig => ("ERR Protocol error: too big mbulk count string", None),
            Self::LengthTooBig => ("ERR Protocol error: too big bulk count string", None),
            Self::InvalidCount => ("ERR Protocol error: invalid multibulk length", None),
            Self::InvalidLength => ("ERR Protocol error: invalid bulk length", None),
            Self::UnbalancedQuotes => ("ERR Protocol error: unbalanced quotes in request", None),
            Self::ExpectedDollar(byte) => ("ERR Protocol error: expected '$', got '", Some(byte)),
        }
    }
}

/// What the parser found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The bytes are used up; the command goes on in the next ones.
    More,
    /// A whole command: see [`Parser::arguments`]; then call [`Parser::next`].
    Command,
    /// A whole command, which there was no memory to hold.
    Lost,
}

/// Bounds that the parser keeps to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// The longest bulk string (`proto-max-bulk-len`).
    pub(crate) bulk: u64,
    /// How many bytes may be held back for commands that are not complete; beyond it they are read and dropped.
    pub(crate) held: usize,
}

/// Where the bytes of an argument are.
#[derive(Debug)]
pub(crate) enum Argument {
    /// In the caller's bytes.
    Input(Range<usize>),
    /// In the parser's buffer.
    Saved(Range<usize>),
    /// In a buffer of its own.
    Large(Vec<u8>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Start,
    Count,
    Length,
    /// So many bytes are missing of the last argument, its line end included.
    Body {
        left: usize,
    },
    Inline,
}

/// Reads one client's stream of commands.
#[derive(Debug)]
pub(crate) struct Parser {
    stage: Stage,
    /// Arguments of the current command that have not begun.
    missing: u32,
    arguments: Vec<Argument>,
    saved: Vec<u8>,
    /// The beginning of a line whose end has not come.
    line: Vec<u8>,
    /// How many bytes of that line have come, when a zero byte hides its end.
    hidden: Option<usize>,
    /// Bytes in `Argument::Large` buffers.
    large: usize,
    /// The current command did not fit into memory.
    lost: bool,
}

/// A line of the protocol.
enum Line {
    /// In the caller's bytes.
    Here(Range<usize>),
    /// In `Parser::line`.
    Collected,
    /// Its end has not come.
    More,
    TooLong,
}

impl Parser {
    pub(crate) const fn new() -> Self {
        Self {
            stage: Stage::Start,
            missing: 0,
            arguments: Vec::new(),
            saved: Vec::new(),
            line: Vec::new(),
            hidden: None,
            large: 0,
            lost: false,
        }
    }

    /// Bytes of memory held for the client's unfinished command.
    pub(crate) fn held(&self) -> usize {
        self.saved.capacity()
            + self.line.capacity()
            + self.large
            + self.arguments.capacity() * ARGUMENT
    }

    /// The arguments of the command that [`Parser::step`] reported.
    pub(crate) fn arguments<'a>(&'a mut self, input: &'a [u8]) -> Arguments<'a> {
        Arguments {
            input,
            saved: &self.saved,
            list: &mut self.arguments,
        }
    }

    /// Forgets the command that was reported; the next [`Parser::step`] begins another.
    pub(crate) fn next(&mut self) {
        self.arguments.clear();
        self.saved.clear();
        self.large = 0;
        self.lost = false;
        if self.saved.capacity() > KEEP {
            self.saved = Vec::new();
        }
        if self.arguments.capacity() * ARGUMENT > KEEP {
            self.arguments = Vec::new();
        }
    }

    /// Reads on in `input` from `at`, which moves, until a command is complete or `input` ends.
    pub(crate) fn step(
        &mut self,
        input: &[u8],
        at: &mut usize,
        bounds: Bounds,
    ) -> Result<Step, ProtocolError> {
        loop {
            let done = match self.stage {
                Stage::Start => match input.get(*at) {
                    None => return Ok(Step::More),
                    Some(b'*') => {
                        self.stage = Stage::Count;
                        false
                    }
                    Some(_) => {
                        self.stage = Stage::Inline;
                        false
                    }
                },
                Stage::Count => {
                    let count = match self.line(input, at, b'\r') {
                        Line::More => return Ok(self.more(input, bounds)),
                        Line::TooLong => return Err(ProtocolError::CountTooBig),
                        Line::Here(range) => parse_i64(&input[range][1..]),
                        Line::Collected => parse_i64(&self.line[1..]),
                    };
                    self.line_done();
                    match count {
                        Some(count @ 1..=0x7fff_ffff) => {
                            self.missing = count as u32;
                            self.stage = Stage::Length;
                        }
                        Some(..=0) => self.stage = Stage::Start,
                        _ => return Err(ProtocolError::InvalidCount),
                    }
                    false
                }
                Stage::Length => {
                    let length = match self.line(input, at, b'\r') {
                        Line::More => return Ok(self.more(input, bounds)),
                        Line::TooLong => return Err(ProtocolError::LengthTooBig),
                        Line::Here(range) => bulk_length(&input[range], bounds),
                        Line::Collected => bulk_length(&self.line, bounds),
                    }?;
                    self.line_done();
                    self.missing -= 1;
                    self.begin(length, input, at, bounds)
                }
                Stage::Body { left } => {
                    let left = self.collect(left, input, at, bounds);
                    self.stage = Stage::Body { left };
                    if left > 0 {
                        return Ok(Step::More);
                    }
                    true
                }
                Stage::Inline => {
                    let words = match self.line(input, at, b'\n') {
                        Line::More => return Ok(self.more(input, bounds)),
                        Line::TooLong => return Err(ProtocolError::InlineTooBig),
                        Line::Here(range) => self.split(&input[range], bounds)?,
                        Line::Collected => {
                            let line = mem::take(&mut self.line);
                            let words = self.split(&line, bounds);
                            self.line = line;
                            words?
                        }
                    };
                    self.line_done();
                    self.missing = 0;
                    self.stage = Stage::Start;
                    words > 0
                }
            };
            if !done {
                continue;
            }
            if self.missing > 0 {
                self.stage = Stage::Length;
                continue;
            }
            self.stage = Stage::Start;
            return Ok(if self.lost { Step::Lost } else { Step::Command });
        }
    }

    /// Begins an argument of `length` bytes at `at`; whether it is complete.
    fn begin(&mut self, length: usize, input: &[u8], at: &mut usize, bounds: Bounds) -> bool {
        let whole = length + 2;
        if !self.lost && self.arguments.try_reserve(1).is_err() {
            self.lose();
        }
        if input.len() - *at >= whole {
            if !self.lost {
                self.arguments.push(Argument::Input(*at..*at + length));
            }
            *at += whole;
            return true;
        }
        // The caller's bytes end inside this argument: what came before must be kept too.
        self.save(input, bounds);
        if !self.lost {
            if length >= LARGE {
                let mut bytes = Vec::new();
                let first = length.min(LARGE_FIRST);
                if self.over(length, bounds) || bytes.try_reserve_exact(first).is_err() {
                    self.lose();
                } else {
                    self.large += bytes.capacity();
                    self.arguments.push(Argument::Large(bytes));
                }
            } else {
                let end = self.saved.len();
                if self.over(length, bounds) || self.saved.try_reserve(length).is_err() {
                    self.lose();
                } else {
                    self.arguments.push(Argument::Saved(end..end));
                }
            }
        }
        self.stage = Stage::Body { left: whole };
        false
    }

    /// Adds bytes to the last argument, of which `left` are missing; how many still are.
    fn collect(&mut self, left: usize, input: &[u8], at: &mut usize, bounds: Bounds) -> usize {
        let take = left.min(input.len() - *at);
        // The line end after the argument, two bytes, is not kept.
        let wanted = left.saturating_sub(2);
        let bytes = &input[*at..*at + take.min(wanted)];
        *at += take;
        if !self.lost {
            let room = bounds.held.saturating_sub(self.held() - self.large);
            let kept = match self.arguments.last_mut() {
                Some(Argument::Saved(range)) => {
                    // Room was made when the argument began.
                    self.saved.extend_from_slice(bytes);
                    range.end += bytes.len();
                    Ok(())
                }
                Some(Argument::Large(buffer)) => {
                    self.large -= buffer.capacity();
                    let kept = extend(buffer, bytes, wanted, room);
                    self.large += buffer.capacity();
                    kept
                }
                Some(Argument::Input(_)) | None => Ok(()),
            };
            if kept.is_err() {
                self.lose();
            }
        }
        left - take
    }

    /// The caller's bytes end here: keeps what the current command needs of them.
    fn more(&mut self, input: &[u8], bounds: Bounds) -> Step {
        self.save(input, bounds);
        Step::More
    }

    /// Copies the arguments that are in the caller's bytes.
    fn save(&mut self, input: &[u8], bounds: Bounds) {
        let mut needed = 0usize;
        for argument in &self.arguments {
            if let Argument::Input(range) = argument {
                needed += range.len();
            }
        }
        if self.over(needed, bounds) || self.saved.try_reserve(needed).is_err() {
            self.lose();
            return;
        }
        for argument in &mut self.arguments {
            if let Argument::Input(range) = argument {
                let begin = self.saved.len();
                self.saved.extend_from_slice(&input[range.clone()]);
                *argument = Argument::Saved(begin..self.saved.len());
            }
        }
    }

    /// Whether holding `more` bytes would be more than is allowed.
    fn over(&self, more: usize, bounds: Bounds) -> bool {
        // A small command may always be held, so that a full store can be asked to free memory.
        self.held().saturating_add(more) > bounds.held.max(KEEP)
    }

    /// Gives the current command up for want of memory; the rest of it is read and dropped.
    fn lose(&mut self) {
        self.lost = true;
        self.large = 0;
        self.arguments = Vec::new();
        self.saved = Vec::new();
    }

    /// Takes a line ended by `end`; after a carriage return one more byte belongs to the end.
    fn line(&mut self, input: &[u8], at: &mut usize, end: u8) -> Line {
        let tail = usize::from(end == b'\r');
        let rest = &input[*at..];
        if let Some(seen) = &mut self.hidden {
            *seen = seen.saturating_add(rest.len());
            *at = input.len();
            return if *seen > LINE_MAX {
                Line::TooLong
            } else {
                Line::More
            };
        }
        if tail == 1 && self.line.last() == Some(&b'\r') {
            // Only the byte after the carriage return is missing.
            if rest.is_empty() {
                return Line::More;
            }
            *at += 1;
            self.line.pop();
            return Line::Collected;
        }
        let found = memchr2(end, 0, rest);
        match found {
            Some(length) if self.line.len() + length > LINE_MAX => return Line::TooLong,
            Some(length) if rest[length] == 0 => {
                let seen = self.line.len() + rest.len();
                self.hidden = Some(seen);
                *at = input.len();
                return if seen > LINE_MAX {
                    Line::TooLong
                } else {
                    Line::More
                };
            }
            Some(length) if self.line.is_empty() && length + tail < rest.len() => {
                let begin = *at;
                *at += length + 1 + tail;
                return Line::Here(begin..begin + length);
            }
            Some(_) => {}
            None if self.line.len() + rest.len() > LINE_MAX => return Line::TooLong,
            None => {}
        }
        // The line is not whole here: collect it, its carriage return included.
        let take = found.map_or(rest.len(), |length| length + 1);
        if self.line.try_reserve(take).is_err() {
            // No memory for 64 KiB: the connection cannot go on.
            return Line::TooLong;
        }
        self.line.extend_from_slice(&rest[..take]);
        *at += take;
        match found {
            Some(_) if tail == 0 => {
                self.line.pop();
                Line::Collected
            }
            Some(length) if length + 1 < rest.len() => {
                *at += 1;
                self.line.pop();
                Line::Collected
            }
            _ => Line::More,
        }
    }

    fn line_done(&mut self) {
        self.line.clear();
        if self.line.capacity() > KEEP {
            self.line = Vec::new();
        }
    }

    /// Splits an inline command into words; how many there are.
    fn split(&mut self, line: &[u8], bounds: Bounds) -> Result<usize, ProtocolError> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let mut words = Words::new(line);
        // A word is never longer than its source.
        if self.over(line.len(), bounds) || self.saved.try_reserve(line.len()).is_err() {
            self.lose();
        }
        let mut count = 0;
        let mut scratch = Vec::new();
        loop {
            let word = if self.lost {
                &mut scratch
            } else {
                &mut self.saved
            };
            let begin = word.len();
            match words.next(word) {
                Ok(true) => {}
                Ok(false) => return Ok(count),
                Err(Unbalanced::Quotes) => return Err(ProtocolError::UnbalancedQuotes),
                Err(Unbalanced::Memory) => self.lose(),
            }
            count += 1;
            if !self.lost {
                if self.arguments.try_reserve(1).is_err() {
                    self.lose();
                } else {
                    let end = self.saved.len();
                    self.arguments.push(Argument::Saved(begin..end));
                }
            }
            scratch.clear();
        }
    }
}

/// Reads the header of a bulk string.
fn bulk_length(line: &[u8], bounds: Bounds) -> Result<usize, ProtocolError> {
    match line {
        [b'$', digits @ ..] => match parse_i64(digits) {
            Some(length @ 0..) if length as u64 <= bounds.bulk => Ok(length as usize),
            _ => Err(ProtocolError::InvalidLength),
        },
        // An empty line shows its own end.
        _ => Err(ProtocolError::ExpectedDollar(
            line.first().copied().unwrap_or(b'\r'),
        )),
    }
}

/// Appends `bytes` to a large argument of which `wanted` bytes are missing in all, growing it by doubling.
fn extend(
    buffer: &mut Vec<u8>,
    bytes: &[u8],
    wanted: usize,
    room: usize,
) -> Result<(), OutOfMemory> {
    if buffer.capacity() - buffer.len() < bytes.len() {
        let grow = bytes.len().max(buffer.len()).min(wanted);
        if buffer.len() + grow > room {
            return Err(OutOfMemory);
        }
        buffer.try_reserve_exact(grow)?;
    }
    buffer.extend_from_slice(bytes);
    Ok(())
}

/// The arguments of one command; number 0 is its name.
pub(crate) struct Arguments<'a> {
    input: &'a [u8],
    saved: &'a [u8],
    list: &'a mut [Argument],
}

impl<'a> Arguments<'a> {
    /// Arguments that [`Arguments::detach`] kept.
    pub(crate) fn detached(list: &'a mut [Argument]) -> Self {
        Self {
            input: &[],
            saved: &[],
            list,
        }
    }

    /// Copies the arguments, or takes them over where that can be, to keep them beyond the request; and their size in
    /// memory.
    pub(crate) fn detach(&mut self) -> Result<(Vec<Argument>, usize), OutOfMemory> {
        let mut list = Vec::new();
        list.try_reserve_exact(self.len())?;
        let mut size = self.len() * ARGUMENT;
        for index in 0..self.len() {
            let bytes = match self.take(index) {
                Some(bytes) => bytes,
                None => copy(&self[index])?,
            };
            size += bytes.capacity();
            list.push(Argument::Large(bytes));
        }
        Ok((list, size))
    }

    /// How many there are, the name included.
    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    /// Argument `index`, if there is one.
    pub(crate) fn get(&self, index: usize) -> Option<&[u8]> {
        (index < self.len()).then(|| &self[index])
    }

    /// Argument `index` as an option or a name to show: as in C, a zero byte ends it.
    pub(crate) fn word(&self, index: usize) -> &[u8] {
        let bytes = &self[index];
        memchr(0, bytes).map_or(bytes, |end| &bytes[..end])
    }

    /// The arguments from number `first` on, as a command of their own.
    pub(crate) fn from(&mut self, first: usize) -> Arguments<'_> {
        Arguments {
            input: self.input,
            saved: self.saved,
            list: &mut self.list[first..],
        }
    }

    /// Takes argument `index` over without copying it, where it has a buffer of its own; it is empty afterwards.
    pub(crate) fn take(&mut self, index: usize) -> Option<Vec<u8>> {
        match &mut self.list[index] {
            Argument::Large(bytes) => Some(mem::take(bytes)),
            Argument::Input(_) | Argument::Saved(_) => None,
        }
    }

    /// The sum of the lengths of those that are not in buffers of the parser.
    pub(crate) fn uncounted(&self) -> usize {
        let length = |argument: &Argument| match argument {
            Argument::Input(range) => range.len(),
            Argument::Saved(_) | Argument::Large(_) => 0,
        };
        self.list.iter().map(length).sum()
    }
}

impl Index<usize> for Arguments<'_> {
    type Output = [u8];

    fn index(&self, index: usize) -> &[u8] {
        match &self.list[index] {
            Argument::Input(range) => &self.input[range.clone()],
            Argument::Saved(range) => &self.saved[range.clone()],
            Argument::Large(bytes) => bytes,
        }
    }
}

#[cfg(test)]
mod tests;
