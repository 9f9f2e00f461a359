//! The kernel's own table of its symbols (CONFIG_KALLSYMS), which is in its data even where everything else was stripped.
//!
//! Names are strings of tokens; `kallsyms_token_table` has the 256 tokens and `kallsyms_token_index` where each starts
//! (scripts/kallsyms.c). Nothing says where these tables are, so they are known by what must hold: the index ascends and each
//! of its steps is a string's length; the names are as many as the number before them says; and every 256th starts where
//! `kallsyms_markers` says. Chance does not pass that.

use super::elf::word;

/// Tables are aligned to this (`ALGN`), and the oldest that is read here has it too.
const ALIGN: usize = 8;
const TOKENS: usize = 256;
/// No token is longer: a name has at most 512 bytes.
const TOKEN_MAX: usize = 512;
/// Where a kernel's image may lie: the last 2 GiB (Documentation/arch/x86/x86_64/mm.rst).
const KERNEL: u64 = 0xffff_ffff_8000_0000;
/// Names between two markers.
const STRIDE: usize = 256;
/// A kernel has some 150,000 symbols. Fewer than this are no kernel's.
const SYMBOLS: std::ops::Range<usize> = 16..4 << 20;
/// Names that must make sense before all are looked at.
const TRIED: usize = 8;
/// Tables of names that make sense at first and then do not: more than a few are made up.
const TRIES: usize = 512;
/// Steps that may be taken for each byte of the data, and in any case. A kernel's take less than one; where more is promising, it was
/// made to be, and the search would be one for hours.
const STEPS: usize = 16;
const STEPS_ANYWAY: usize = 1 << 20;

/// How much more is looked at.
#[derive(Debug)]
struct Patience {
    tries: usize,
    steps: usize,
}

impl Patience {
    fn of(data: &[u8]) -> Self {
        Self {
            tries: TRIES,
            steps: (STEPS * data.len()).max(STEPS_ANYWAY),
        }
    }

    /// None when it is at its end.
    fn step(&mut self) -> Option<()> {
        self.steps = self.steps.checked_sub(1)?;
        Some(())
    }
}

/// The addresses and names of those that `wanted` takes, in the order of addresses; `data` is a section of the kernel's.
pub(super) fn read(data: &[u8], wanted: impl Fn(u64) -> bool) -> Option<Vec<(u64, String)>> {
    let mut patience = Patience::of(data);
    for index in (0..data.len().saturating_sub(2 * TOKENS)).step_by(4) {
        let Some((table, tokens)) = tokens(data, index) else {
            continue;
        };
        let Some(names) = names(data, table, &tokens, &mut patience) else {
            if patience.steps == 0 {
                return None;
            }
            continue;
        };
        if let Some(addresses) = addresses(data, index, &names) {
            let symbols = addresses
                .into_iter()
                .zip(&names.at)
                .filter(|&(address, _)| wanted(address));
            return Some(
                symbols
                    .filter_map(|(address, &at)| Some((address, expand(data, at, &tokens)?.0)))
                    .collect(),
            );
        }
    }
    None
}

/// The tokens, if an index of them starts here, and where their table starts.
fn tokens(data: &[u8], index: usize) -> Option<(usize, Vec<&[u8]>)> {
    let starts: Vec<usize> = (0..TOKENS)
        .map_while(|number| word(data, index + 2 * number, 2).map(|start| start as usize))
        .take_while({
            let mut last = None;
            move |&start| {
                // The first starts at nothing, and each has a letter and a NUL at least.
                let ascends = last.map_or(start == 0, |last| {
                    start >= last + 2 && start <= last + TOKEN_MAX
                });
                last = Some(start);
                ascends
            }
        })
        .collect();
    if starts.len() < TOKENS {
        return None;
    }
    // The last token ends before the padding.
    let end = data[..index].iter().rposition(|&byte| byte != 0)? + 1;
    let last = data[..end].iter().rposition(|&byte| byte == 0)? + 1;
    let table = last.checked_sub(starts[TOKENS - 1])?;
    if index - end > ALIGN {
        return None;
    }
    let mut tokens = Vec::with_capacity(TOKENS);
    for (number, &start) in starts.iter().enumerate() {
        let until = starts.get(number + 1).map_or(end, |next| table + next - 1);
        let token = data.get(table + start..until)?;
        if data.get(until) != Some(&0) || token.contains(&0) {
            return None;
        }
        tokens.push(token);
    }
    Some((table, tokens))
}

#[derive(Debug)]
struct Names {
    /// Where the number of names stands.
    count_at: usize,
    /// Where each name starts.
    at: Vec<usize>,
}

/// The names, which lie before the table of tokens.
fn names(data: &[u8], table: usize, tokens: &[&[u8]], patience: &mut Patience) -> Option<Names> {
    for count_at in (0..table).rev().filter(|at| at % 4 == 0) {
        patience.step()?;
        let count = word(data, count_at, 4)? as usize;
        if !SYMBOLS.contains(&count) || count > table - count_at {
            continue;
        }
        for from in [count_at + ALIGN, count_at + 4] {
            let few = count.min(TRIED);
            if walk(data, from, few, table, Some(tokens), patience).is_none() {
                continue;
            }
            patience.tries = patience.tries.checked_sub(1)?;
            let Some((at, end)) = walk(data, from, count, table, None, patience) else {
                continue;
            };
            if [ALIGN, 4]
                .iter()
                .any(|&align| markers(data, end.next_multiple_of(align), from, &at))
            {
                return Some(Names { count_at, at });
            }
        }
    }
    None
}

/// Steps over so many names; with `tokens` they must look like some.
fn walk(
    data: &[u8],
    from: usize,
    count: usize,
    end: usize,
    tokens: Option<&[&[u8]]>,
    patience: &mut Patience,
) -> Option<(Vec<usize>, usize)> {
    let mut at = Vec::with_capacity(count);
    let mut next = from;
    for _ in 0..count {
        if next >= end {
            return None;
        }
        at.push(next);
        patience.step()?;
        if let Some(tokens) = tokens {
            let expanded = expand(data, next, tokens);
            let letters = expanded.as_ref().map_or(TOKEN_MAX, |(name, _)| name.len());
            patience.steps = patience.steps.saturating_sub(letters);
            let (name, kind) = expanded?;
            let graphic = name.bytes().all(|byte| byte.is_ascii_graphic());
            if name.is_empty() || !graphic || !(kind.is_ascii_alphabetic() || kind == b'?') {
                return None;
            }
        }
        let (length, header) = length(data, next)?;
        if length == 0 {
            return None;
        }
        next += header + length;
    }
    Some((at, next))
}

/// How many tokens a name has, and the bytes that say so: one, or two since 6.1 where the first has its highest bit set.
fn length(data: &[u8], at: usize) -> Option<(usize, usize)> {
    let first = usize::from(*data.get(at)?);
    if first & 0x80 == 0 {
        return Some((first, 1));
    }
    let second = usize::from(*data.get(at + 1)?);
    Some((first & 0x7f | second << 7, 2))
}

/// A name, and the letter for its kind that stands before it.
fn expand(data: &[u8], at: usize, tokens: &[&[u8]]) -> Option<(String, u8)> {
    let (length, header) = length(data, at)?;
    let mut name = Vec::new();
    for &token in data.get(at + header..at + header + length)? {
        name.extend_from_slice(tokens[usize::from(token)]);
        if name.len() > TOKEN_MAX {
            return None;
        }
    }
    let (&kind, name) = name.split_first()?;
    Some((String::from_utf8_lossy(name).into_owned(), kind))
}

fn markers(data: &[u8], markers: usize, names: usize, at: &[usize]) -> bool {
    at.iter()
        .step_by(STRIDE)
        .enumerate()
        .all(|(number, start)| word(data, markers + 4 * number, 4) == Some((start - names) as u64))
}

/// The addresses: distances from a base, which stand before the number of names or, since 6.4, behind the tokens' index.
fn addresses(data: &[u8], index: usize, names: &Names) -> Option<Vec<u64>> {
    let count = names.at.len();
    let before = names.count_at.checked_sub(ALIGN).map(|base| {
        let distances = base.checked_sub((4 * count).next_multiple_of(ALIGN));
        (distances, base)
    });
    let from = (index + 2 * TOKENS).next_multiple_of(ALIGN);
    let behind = Some((Some(from), (from + 4 * count).next_multiple_of(ALIGN)));
    [before, behind]
        .into_iter()
        .flatten()
        .find_map(|(distances, base)| {
            let distances = data.get(distances?..)?.get(..4 * count)?;
            let base = word(data, base, 8)?;
            let distances = distances
                .chunks_exact(4)
                .map(|bytes| i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
            // With CONFIG_KALLSYMS_ABSOLUTE_PERCPU what is not negative is an address, and what is counts down from the base.
            let per_cpu = distances.clone().any(|distance| distance < 0);
            let addresses: Vec<u64> = distances
                .map(|distance| match (per_cpu, distance) {
                    (true, 0..) => distance as u64,
                    (true, _) => base
                        .wrapping_sub(1)
                        .wrapping_add_signed(-i64::from(distance)),
                    (false, _) => base.wrapping_add(distance as u64),
                })
                .collect();
            // A table of one address, or one that does not ascend, is something else.
            let ascends = addresses.is_sorted() && addresses.first() < addresses.last();
            (base >= KERNEL && ascends).then_some(addresses)
        })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A table of these symbols as a kernel has it, with tokens of one letter and one of two.
    pub(in crate::prepare) fn table(
        symbols: &[(u64, &str)],
        new_order: bool,
        junk: usize,
    ) -> Vec<u8> {
        let align = |data: &mut Vec<u8>| data.resize(data.len().next_multiple_of(ALIGN), 0);
        let base = 0xffff_ffff_8100_0000u64;
        let mut offsets = Vec::new();
        for (address, _) in symbols {
            let distance = match address.checked_sub(base) {
                Some(distance) => -1 - distance as i64,
                None => *address as i64,
            };
            offsets.extend((distance as i32).to_le_bytes());
        }
        align(&mut offsets);
        offsets.extend(base.to_le_bytes());
        let mut data = vec![0xcc; junk];
        if !new_order {
            data.extend(&offsets);
        }
        data.extend((symbols.len() as u64).to_le_bytes());
        let (names, mut markers) = (data.len(), Vec::new());
        for (number, (_, name)) in symbols.iter().enumerate() {
            if number % STRIDE == 0 {
                markers.extend(((data.len() - names) as u32).to_le_bytes());
            }
            // Token 1 is "Te".
            let tokens: Vec<u8> = match name.strip_prefix('e') {
                Some(rest) => [&[1], rest.as_bytes()].concat(),
                None => format!("T{name}").into_bytes(),
            };
            if tokens.len() < 0x80 {
                data.push(tokens.len() as u8);
            } else {
                data.extend([tokens.len() as u8 | 0x80, (tokens.len() >> 7) as u8]);
            }
            data.extend(tokens);
        }
        align(&mut data);
        data.extend(markers);
        align(&mut data);
        let mut index = Vec::new();
        let table = data.len();
        for token in 0..=255u8 {
            index.extend(((data.len() - table) as u16).to_le_bytes());
            match token {
                1 => data.extend(b"Te\0"),
                _ if token.is_ascii_graphic() => data.extend([token, 0]),
                _ => data.extend(format!("{token}~\0").bytes()),
            }
        }
        align(&mut data);
        data.extend(index);
        align(&mut data);
        if new_order {
            data.extend(offsets);
        }
        data.extend([0xcc; 40]);
        data
    }

    #[test]
    fn both_orders_are_read_wherever_they_lie() {
        let long = "x".repeat(200);
        let mut symbols = vec![
            (0, "__per_cpu_start"),
            (0x28, "cpu_number"),
            (0xffff_ffff_8100_0000, "_text"),
        ];
        let names: Vec<String> = (0..600)
            .map(|number| format!("e_function_{number}"))
            .collect();
        for (number, name) in names.iter().enumerate() {
            symbols.push((0xffff_ffff_8100_1000 + 16 * number as u64, name));
        }
        symbols.push((0xffff_ffff_8200_0000, &long));
        for new_order in [false, true] {
            for junk in [0, 24, 4096] {
                let data = table(&symbols, new_order, junk);
                let read = read(&data, |address| address >> 63 == 1).expect("a table");
                let expected: Vec<_> = symbols[2..]
                    .iter()
                    .map(|&(at, name)| (at, name.to_owned()))
                    .collect();
                assert_eq!(read, expected, "{new_order} {junk}");
            }
        }
    }

    #[test]
    fn a_table_with_one_wrong_marker_or_token_is_none() {
        let names: Vec<String> = (0..300).map(|number| format!("f{number}")).collect();
        let symbols: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(at, name)| (0xffff_ffff_8100_0000 + at as u64, name.as_str()))
            .collect();
        let data = table(&symbols, false, 0);
        assert!(read(&data, |_| true).is_some());
        let token = data
            .windows(5)
            .rposition(|bytes| bytes == b"Te\x002~")
            .expect("the second token");
        let mut wrong = data.clone();
        wrong[token] = 0;
        assert!(read(&wrong, |_| true).is_none());
        let last_name = data
            .windows(4)
            .position(|bytes| bytes == b"Tf29")
            .expect("a name");
        let mut wrong = data;
        wrong[last_name - 1] += 1;
        assert!(read(&wrong, |_| true).is_none());
    }
}
