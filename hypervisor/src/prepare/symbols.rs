//! A System.map: what the build of a kernel says of where things are.

use super::error::PrepareError;

/// The addresses and names of those that `wanted` takes.
///
/// # Errors
/// [`PrepareError::Symbols`] names the line that is none, or says that nothing was wanted.
pub(super) fn system_map(
    text: &str,
    wanted: impl Fn(u64) -> bool,
) -> Result<Vec<(u64, String)>, PrepareError> {
    let mut symbols = Vec::new();
    let mut lines = 0;
    for (number, line) in text.lines().enumerate() {
        let mut words = line.split_whitespace();
        let (Some(address), Some(_kind), Some(name)) = (words.next(), words.next(), words.next())
        else {
            if line.trim().is_empty() {
                continue;
            }
            return Err(PrepareError::Symbols {
                why: format!("line {} is not \"ADDRESS KIND NAME\"", number + 1),
            });
        };
        let address = u64::from_str_radix(address, 16).map_err(|_| PrepareError::Symbols {
            why: format!("line {} starts with no address", number + 1),
        })?;
        lines += 1;
        if wanted(address) {
            symbols.push((address, name.to_owned()));
        }
    }
    if symbols.is_empty() {
        return Err(PrepareError::Symbols {
            why: format!("none of its {lines} symbols lies in the kernel's code"),
        });
    }
    Ok(symbols)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_address_kind_name() {
        let map = "0000000000000000 D __per_cpu_start\nffffffff81000000 T _text\n\nffffffff81000070 t early\n";
        let symbols = system_map(map, |address| address >= 0xffff_ffff_8100_0000).expect("a map");
        assert_eq!(
            symbols,
            [
                (0xffff_ffff_8100_0000, "_text".into()),
                (0xffff_ffff_8100_0070, "early".into())
            ]
        );
    }

    #[test]
    fn debians_placeholder_is_refused_in_words() {
        let map =
            "ffffffffffffffff B The real System.map is in the linux-image-<version>-dbg package\n";
        let said = system_map(map, |address| address < u64::MAX)
            .expect_err("no map")
            .to_string();
        assert!(
            said.contains("none of its 1 symbols") && said.contains("-dbg"),
            "{said}"
        );
        for bad in ["ffffffff81000000 T\n", "text T name\n"] {
            let said = system_map(bad, |_| true).expect_err("no map").to_string();
            assert!(said.contains("line 1"), "{said}");
        }
    }
}
