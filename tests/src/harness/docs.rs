//! The commands of the documentation: blocks of shell, and words in the text that begin as a command of ours does.
//!
//! ```text
//! <!-- not-run: why -->        the block that follows is not run: it needs what a test does not have. Its words are looked at all the same
//! <!-- serves: words -->       its last command goes on until it is stopped; it is, once the block has said these words
//! ```
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// What is to become of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It runs to its end, and ends well.
    Runs,
    /// It runs until it has said this.
    Serves(String),
    /// It does not run, for this reason.
    NotRun(String),
}

/// The languages of blocks that are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    /// Lines to type.
    Shell,
    /// A configuration.
    Toml,
}

/// A block of the documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// What it is written in.
    pub language: Language,
    /// Where it stands, for people.
    pub place: String,
    /// What is to become of it.
    pub fate: Fate,
    /// Its lines.
    pub text: String,
}

/// Words in the text, as code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where they stand, for people.
    pub place: String,
    /// The words.
    pub text: String,
}

/// The project's pages for people: README.md, results/README.md and all below docs.
///
/// # Errors
/// If a directory cannot be read.
pub fn pages(project: &Path) -> Result<Vec<PathBuf>> {
    let mut pages = vec![project.join("README.md"), project.join("results/README.md")];
    let mut directories = vec![project.join("docs")];
    while let Some(directory) = directories.pop() {
        let entries =
            fs::read_dir(&directory).with_context(|| format!("list {}", directory.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|ending| ending == "md") {
                pages.push(path);
            }
        }
    }
    pages.sort();
    Ok(pages)
}

/// What a page has of both.
///
/// # Errors
/// A mark that says nothing, or that no block follows; a fence that is not closed.
pub fn read(name: &str, text: &str) -> Result<(Vec<Block>, Vec<Span>)> {
    let (mut blocks, mut spans) = (Vec::new(), Vec::new());
    let mut marked: Option<(usize, Fate)> = None;
    let mut lines = text.lines().enumerate();
    while let Some((at, line)) = lines.next() {
        let place = |at: usize| format!("{name}:{}", at + 1);
        if let Some(fate) = mark(line) {
            ensure!(marked.is_none(), "{}: two marks for one block", place(at));
            marked = Some((at, fate.with_context(|| place(at))?));
            continue;
        }
        if let Some(language) = line.strip_prefix("```") {
            let mut inside = Vec::new();
            loop {
                match lines.next() {
                    Some((_, "```")) => break,
                    Some((_, line)) => inside.push(line),
                    None => bail!("{}: the block is not closed", place(at)),
                }
            }
            let language = match language {
                "sh" => Some(Language::Shell),
                "toml" if marked.is_none() => Some(Language::Toml),
                _ => None,
            };
            if let Some(language) = language {
                let (_, fate) = marked.take().unwrap_or((at, Fate::Runs));
                blocks.push(Block {
                    language,
                    place: place(at),
                    fate,
                    text: inside.join("\n"),
                });
            }
            continue;
        }
        if let Some((at, _)) = marked.take_if(|_| !line.trim().is_empty()) {
            bail!("{}: no block of sh follows the mark", place(at));
        }
        // Every other piece between backticks.
        spans.extend(line.split('`').skip(1).step_by(2).map(|text| Span {
            place: place(at),
            text: text.to_owned(),
        }));
    }
    if let Some((at, _)) = marked {
        bail!("{name}:{}: no block of sh follows the mark", at + 1);
    }
    Ok((blocks, spans))
}

fn mark(line: &str) -> Option<Result<Fate>> {
    let inside = line.strip_prefix("<!-- ")?.strip_suffix(" -->")?;
    let (word, rest) = inside.split_once(':')?;
    let said = rest.trim();
    let fate = match word {
        "not-run" => Fate::NotRun(said.to_owned()),
        "serves" => Fate::Serves(said.to_owned()),
        _ => return None,
    };
    Some(if said.is_empty() {
        Err(anyhow::anyhow!("the mark does not say why, or what"))
    } else {
        Ok(fate)
    })
}

/// The commands in lines of shell, each as its words: as far as the documentation's simple lines need it.
#[must_use]
pub fn commands(text: &str) -> Vec<Vec<String>> {
    let text = text.replace("\\\n", " ");
    let mut commands = Vec::new();
    for line in text.lines() {
        let (mut command, mut word, mut has_word) = (Vec::new(), String::new(), false);
        let mut quote = None;
        for next in line.chars() {
            if let Some(end) = quote {
                if next == end {
                    quote = None;
                } else {
                    word.push(next);
                }
                continue;
            }
            match next {
                '\'' | '"' => (quote, has_word) = (Some(next), true),
                '#' if !has_word => break,
                ' ' | ';' | '&' | '|' => {
                    if has_word {
                        command.push(std::mem::take(&mut word));
                    }
                    has_word = false;
                    if next != ' ' && !command.is_empty() {
                        commands.push(std::mem::take(&mut command));
                    }
                }
                other => {
                    word.push(other);
                    has_word = true;
                }
            }
        }
        if has_word {
            command.push(word);
        }
        if !command.is_empty() {
            commands.push(command);
        }
    }
    for command in &mut commands {
        let before = command.iter().take_while(|word| {
            **word == "sudo"
                || word
                    .split_once('=')
                    .is_some_and(|(name, _)| is_variable(name))
        });
        let before = before.count();
        command.drain(..before);
    }
    commands.retain(|command| !command.is_empty());
    commands
}

/// The words of a span, which is no line of shell: `a|b` in it is one word.
#[must_use]
pub fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn is_variable(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c == '_')
}

/// Whether a word stands for others.
#[must_use]
pub fn is_placeholder(word: &str) -> bool {
    let bare = word.trim_matches(['[', ']', '.', '…', '<', '>']);
    bare.is_empty() || bare.chars().next().is_some_and(|c| c.is_ascii_uppercase())
}

/// Checks words that begin with `doppel` against the command line's own description: each command, each option and each value
/// that is one of a few. Words that stand for others count as any.
///
/// # Errors
/// The word that is none.
pub fn check_doppel(words: &[String]) -> Result<()> {
    let mut root = hypervisor::cli::command();
    root.build();
    let mut command = &root;
    let mut words = words[1..].iter();
    while let Some(word) = words.next() {
        let word = word.trim_matches(['[', ']', ',']);
        if is_placeholder(word) {
            continue;
        }
        if let Some(option) = word.strip_prefix("--") {
            let (name, value) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (option, None),
            };
            let found = command.get_arguments().find(|argument| {
                argument.get_long() == Some(name)
                    || argument
                        .get_all_aliases()
                        .is_some_and(|aliases| aliases.contains(&name))
            });
            let argument = match found {
                Some(argument) => argument,
                None if name == "help" => continue,
                None => bail!("`doppel {}` has no option --{name}", command.get_name()),
            };
            let values = argument.get_possible_values();
            let takes = argument.get_action().takes_values();
            ensure!(takes || value.is_none(), "--{name} takes no value");
            let value = match value {
                None if takes => words.next().map(String::as_str),
                other => other,
            };
            let is_one = |value: &str| values.iter().any(|known| known.matches(value, false));
            if let Some(value) = value
                && !values.is_empty()
                && !is_placeholder(value)
            {
                for value in value.trim_matches(['[', ']', ',']).split('|') {
                    ensure!(is_one(value), "{value} is nothing that --{name} takes");
                }
            }
            continue;
        }
        if word.starts_with('-') {
            let short = word.chars().nth(1);
            let known = command.get_arguments().any(|one| one.get_short() == short);
            ensure!(known || word == "-h", "`doppel` has no option {word}");
            continue;
        }
        if command.has_subcommands() {
            // `create|list|show` is one of them.
            let mut next = None;
            for name in word.split('|') {
                let found = command.find_subcommand(name);
                next =
                    Some(found.with_context(|| {
                        format!("`{}` has no command {name}", command.get_name())
                    })?);
            }
            command = next.expect("a word has a part");
            continue;
        }
        let places = command.get_positionals().count();
        ensure!(
            places > 0,
            "`doppel {}` takes no {word}",
            command.get_name()
        );
    }
    Ok(())
}

/// Whether `doppel` would take these very words; nothing is done.
///
/// # Errors
/// What it would say.
pub fn would_take(words: &[String]) -> Result<()> {
    match hypervisor::cli::command().try_get_matches_from(words) {
        Ok(_) => Ok(()),
        Err(error) if !error.use_stderr() => Ok(()),
        Err(error) => bail!("{}", error.to_string().lines().next().unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_and_their_marks_are_found() {
        let page = "text `doppel top`\n<!-- not-run: two hosts -->\n```sh\ndoppel demo\n```\n\n```sh\nls\n```\n```toml\n[a]\n```\n";
        let (blocks, spans) = read("page", page).unwrap();
        assert_eq!(blocks.len(), 3);
        assert_eq!(blocks[2].language, Language::Toml);
        assert_eq!(blocks[0].fate, Fate::NotRun("two hosts".into()));
        assert_eq!(
            (&*blocks[0].text, &*blocks[0].place),
            ("doppel demo", "page:3")
        );
        assert_eq!(blocks[1].fate, Fate::Runs);
        assert_eq!(spans[0].text, "doppel top");
        for bad in [
            "<!-- not-run: -->\n```sh\n```\n",
            "<!-- not-run: why -->\ntext\n",
            "<!-- not-run: why -->\n```toml\n```\n",
            "```sh\nls\n",
        ] {
            assert!(read("page", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn lines_of_shell_fall_into_words() {
        assert_eq!(
            commands("a b; c && d 'e f' # g\nX=1 sudo h \\\n  i &\n# all of it"),
            [vec!["a", "b"], vec!["c"], vec!["d", "e f"], vec!["h", "i"]]
        );
    }

    #[test]
    fn a_command_or_an_option_that_does_not_exist_is_noticed() {
        for good in [
            "doppel demo --kills 5",
            "doppel backup … --recorder recording,size=2G",
            "doppel primary --transport tcp --connect 192.0.2.2:7700",
            "doppel migrate-backup NAME [--to ADDRESS]",
            "doppel vm create|list|show",
            "doppel run --help",
            "doppel demo --transport shm|tcp",
        ] {
            check_doppel(&words(good)).unwrap_or_else(|error| panic!("{good}: {error}"));
        }
        for bad in [
            "doppel dmeo",
            "doppel demo --kill 5",
            "doppel primary --transport udp",
            "doppel vm destroy NAME",
            "doppel top --json --frob",
            "doppel doctor now",
        ] {
            assert!(check_doppel(&words(bad)).is_err(), "{bad}");
        }
        would_take(&words("doppel replay boot.log --to 120000")).unwrap();
        assert!(would_take(&words("doppel replay boot.log --to soon")).is_err());
        assert!(would_take(&words("doppel secret")).is_err());
    }
}
