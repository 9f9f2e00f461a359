//! Every command of the documentation is one that there is, and its blocks of shell are run as they stand (issue 8, 5): each in namespaces
//! and a directory of its own, with the program that was built with these tests. A block that needs what a test does not have says so in a
//! mark before it, and its words are looked at all the same.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hypervisor::agent::config::AgentConfig;
use hypervisor::config::Config;

use crate::harness::docs::{self, Block, Fate, Language};
use crate::harness::program;
use crate::promise::{Figures, Promise, Run};

/// The promise.
pub const PROMISE: Promise = Promise {
    name: "docs-commands",
    line: "every command and option that README and docs name is there, and their blocks of shell run as they stand, or say why not",
    short: Duration::from_secs(25),
    full: Duration::from_secs(25),
    show,
};

/// A block may take so long; the longest, the demonstration, takes some seconds.
const LONGEST: Duration = Duration::from_secs(90);

fn show(run: &Run) -> Result<Figures> {
    let project = project()?;
    let mut programs = Programs::default();
    let (mut looked_at, mut ran, mut left, mut configurations) = (0, 0, 0, 0);
    let mut wrong = Vec::new();
    for page in docs::pages(&project)? {
        let name = page
            .strip_prefix(&project)
            .unwrap_or(&page)
            .display()
            .to_string();
        let text = fs::read_to_string(&page).with_context(|| format!("read {name}"))?;
        let (blocks, spans) = docs::read(&name, &text)?;
        let mut judge = |place: &str, words: &[String], typed: bool| {
            looked_at += 1;
            if let Err(error) = programs.check(&project, words, typed) {
                wrong.push(format!("{place}: {}: {error:#}", words.join(" ")));
            }
        };
        for span in &spans {
            if let words @ [_, ..] = &*docs::words(&span.text) {
                judge(&span.place, words, false);
            }
        }
        let (shell, toml): (Vec<_>, Vec<_>) = blocks
            .iter()
            .partition(|block| block.language == Language::Shell);
        for block in &shell {
            for words in docs::commands(&block.text) {
                judge(&block.place, &words, true);
            }
        }
        for block in toml {
            configurations += 1;
            if let Err(error) = configures(&block.text) {
                wrong.push(format!("{}: {error:#}", block.place));
            }
        }
        for block in shell {
            if let Fate::NotRun(why) = &block.fate {
                left += 1;
                run.say(format!("{} is not run: {why}", block.place));
                continue;
            }
            ran += 1;
            let began = Instant::now();
            match run_block(&project, block) {
                Ok(()) => run.say(format!("{}: {:.1?}", block.place, began.elapsed())),
                Err(error) => wrong.push(format!("{}: {error:#}", block.place)),
            }
        }
    }
    ensure!(
        wrong.is_empty(),
        "in the documentation:\n  {}",
        wrong.join("\n  ")
    );
    ensure!(
        ran > 2 && looked_at > 100,
        "{ran} blocks, {looked_at} commands"
    );
    let mut figures = Figures::default();
    figures.add("commands_that_exist", looked_at);
    figures.add("configurations_that_are_read", configurations);
    figures.add("blocks_run", ran);
    figures.add("blocks_not_run", left);
    Ok(figures)
}

/// Whether it is a role's configuration, or an agent's.
fn configures(text: &str) -> Result<()> {
    let Err(role) = Config::parse(text) else {
        return Ok(());
    };
    let work = tempfile::tempdir().context("make a directory")?;
    let path = work.path().join("agent.toml");
    fs::write(&path, text).context("write a configuration")?;
    match AgentConfig::read(&path) {
        Ok(_) => Ok(()),
        Err(agent) => bail!("neither a role's configuration: {role}; nor an agent's: {agent}"),
    }
}

fn project() -> Result<PathBuf> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    Ok(project.context("the project's directory")?.to_owned())
}

/// What our other programs say of themselves, asked once.
#[derive(Debug, Default)]
struct Programs {
    help: BTreeMap<String, String>,
}

impl Programs {
    /// Whether words that begin as a command of ours are one; those that are to be typed as they stand, with all that it needs. Others are
    /// nobody's business here.
    fn check(&mut self, project: &Path, words: &[String], typed: bool) -> Result<()> {
        let first = words[0].as_str();
        if first == "doppel" {
            docs::check_doppel(words)?;
            let stands_for_itself =
                |word: &String| !word.contains(['…', '[', '|']) && !docs::is_placeholder(word);
            // What is spelt out is what the program takes, values and all.
            return if typed && words.iter().all(stands_for_itself) {
                docs::would_take(words)
            } else {
                Ok(())
            };
        }
        if let Some(at) = words.iter().position(|word| word == "--")
            && first == "cargo"
            && words[1] == "run"
            && !words.iter().any(|word| word == "-p" || word == "--example")
        {
            let words = [&["doppel".to_owned()], &words[at + 1..]].concat();
            return docs::check_doppel(&words);
        }
        if let Some(name) = first.strip_prefix("scripts/") {
            ensure!(project.join(first).exists(), "there is no {first}");
            return match name {
                "" | "monitoring/" => Ok(()),
                "prove" => promise(words),
                "lab" => self.options(&program::beside("lab")?, words, true),
                _ if name.starts_with("monitoring/") => Ok(()),
                _ => script(project, first, words),
            };
        }
        if first == "target/release/bench" || first == "bench" && words.len() > 1 {
            return self.options(&program::beside("bench")?, words, true);
        }
        Ok(())
    }

    /// Whether a program's help knows the options, and the command that comes first.
    fn options(&mut self, program: &Path, words: &[String], has_commands: bool) -> Result<()> {
        let command = words
            .get(1)
            .filter(|word| has_commands && !word.starts_with('-') && !docs::is_placeholder(word));
        let mut help = Command::new(program);
        help.args(command).arg("--help");
        let key = format!("{help:?}");
        if !self.help.contains_key(&key) {
            let output = help.output().with_context(|| format!("start {key}"))?;
            ensure!(
                output.status.success(),
                "there is no such command: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            self.help.insert(key.clone(), text);
        }
        let help = &self.help[&key];
        // What a command that runs another passes on is not its own.
        let passes_on = words.get(1).is_some_and(|word| word == "run");
        let own = words
            .iter()
            .skip(2)
            .take_while(|word| !passes_on || word.starts_with('-'));
        for option in own.filter(|word| word.starts_with("--")) {
            let name = option.split_once('=').map_or(&**option, |(name, _)| name);
            ensure!(help.contains(name), "it has no option {name}");
        }
        Ok(())
    }
}

fn promise(words: &[String]) -> Result<()> {
    for word in &words[1..] {
        let word = word.trim_matches(['[', ']']);
        let known = ["--short", "--full", "--brief", "--seed", "--json"].contains(&word)
            || docs::is_placeholder(word)
            || word.chars().all(|digit| digit.is_ascii_digit())
            || crate::promises::ALL
                .iter()
                .any(|promise| promise.name == word);
        ensure!(known, "there is no promise or option {word}");
    }
    Ok(())
}

/// Whether a script's text knows the options.
fn script(project: &Path, name: &str, words: &[String]) -> Result<()> {
    let options: Vec<_> = words.iter().filter(|word| word.starts_with("--")).collect();
    if options.is_empty() {
        return Ok(());
    }
    let text = fs::read_to_string(project.join(name)).with_context(|| format!("read {name}"))?;
    for option in options {
        let option = option.trim_matches(['[', ']']);
        let mut words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
        ensure!(
            words.any(|word| word == option),
            "it has no option {option}"
        );
    }
    Ok(())
}

/// Runs a block as it stands, in namespaces and a directory of its own; whatever it started is gone when this returns.
fn run_block(project: &Path, block: &Block) -> Result<()> {
    let work = tempfile::tempdir().context("make a directory")?;
    let (home, tools) = (work.path().join("home"), work.path().join("bin"));
    for directory in [&home, &tools] {
        fs::create_dir(directory).context("make a directory")?;
    }
    symlink(project.join("scripts"), home.join("scripts")).context("link the scripts")?;
    symlink(program::doppel()?, tools.join("doppel")).context("link doppel")?;
    let cargo = tools.join("cargo");
    fs::write(&cargo, CARGO).context("write a script")?;
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).context("make it a program")?;
    let said = work.path().join("said");
    let output = File::create(&said).context("make a file")?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut child = Command::new("unshare")
        .args([
            "--net",
            "--mount",
            "--pid",
            "--ipc",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ])
        .args(["bash", "-c", SETTING, "block", &block.text])
        .current_dir(&home)
        .env(
            "PATH",
            format!("{}:{path}:/usr/sbin:/sbin", tools.display()),
        )
        .env("HOME", &home)
        .env_remove("XDG_RUNTIME_DIR")
        .stdin(Stdio::null())
        .stdout(output.try_clone().context("share a file")?)
        .stderr(output)
        .spawn()
        .context("start unshare (needs root)")?;
    let words = || fs::read_to_string(&said).unwrap_or_default();
    match &block.fate {
        Fate::Serves(wanted) => {
            let outcome = until_said(&mut child, wanted, &words);
            // With the first process of the namespace all others go.
            child.kill().context("end a block")?;
            child.wait().context("wait for a block's end")?;
            outcome
        }
        _ => {
            let Some(status) = program::await_end(&mut child, LONGEST)? else {
                child.kill().context("end a block")?;
                child.wait().context("wait for a block's end")?;
                bail!("it has not ended within {LONGEST:?}: {}", words());
            };
            ensure!(status.success(), "it ended by {status}: {}", words());
            Ok(())
        }
    }
}

/// What a newcomer's shell has that this one must be given: a loopback that is up, and a place for sockets that is nobody else's.
const SETTING: &str =
    "ip link set lo up && mount -t tmpfs none /run && exec bash -euo pipefail -c \"$1\"";

/// What cargo would build was built with these tests.
const CARGO: &str = "#!/bin/sh
case \"$*\" in
    'run --release -- '*) shift 3 && exec doppel \"$@\" ;;
    'build --release --workspace') ;;
    *) echo \"the documentation asks cargo for $*\" >&2 && exit 2 ;;
esac
";

fn until_said(child: &mut Child, wanted: &str, said: &impl Fn() -> String) -> Result<()> {
    let until = Instant::now() + LONGEST;
    while !said().contains(wanted) {
        if let Some(status) = child.try_wait().context("look after a block")? {
            bail!("it ended by {status} before it said {wanted:?}: {}", said());
        }
        ensure!(
            Instant::now() < until,
            "it did not say {wanted:?}: {}",
            said()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short() {
        PROMISE.test();
    }

    #[test]
    fn other_programs_commands_are_looked_at_too() {
        let project = project().unwrap();
        let mut programs = Programs::default();
        let mut check = |text: &str| programs.check(&project, &docs::words(text), false);
        for good in [
            "scripts/prove docs-commands --full",
            "scripts/test --quick",
            "scripts/package --out DIRECTORY",
            "cargo run --release -- demo --kills 5",
            "target/release/bench all --full",
            "ls --frob",
        ] {
            check(good).unwrap_or_else(|error| panic!("{good}: {error}"));
        }
        for bad in [
            "scripts/prove docs-comands",
            "scripts/test --quickly",
            "scripts/nothing",
            "cargo run --release -- demo --kill 5",
            "target/release/bench everything",
            "target/release/bench all --fully",
        ] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_block_that_fails_or_says_something_else_is_noticed() {
        let block = |fate, text: &str| Block {
            language: Language::Shell,
            place: "here".into(),
            fate,
            text: text.into(),
        };
        let project = project().unwrap();
        run_block(&project, &block(Fate::Runs, "test $$ -lt 100")).unwrap();
        run_block(&project, &block(Fate::Runs, "false | true")).unwrap_err();
        let serves = |word: &str| Fate::Serves(word.into());
        run_block(&project, &block(serves("up"), "echo up; sleep 1000")).unwrap();
        run_block(&project, &block(serves("up"), "echo down")).unwrap_err();
    }
}
