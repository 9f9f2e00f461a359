//! Compares a Redis-compatible server with the real one, answer by answer.
//!
//! [`run`] sends the same requests to a reference (`redis-server` 7.0) and to a subject and compares what comes back:
//! byte for byte, or by shape where the two must differ (times, texts that describe the server itself). A fixed list
//! of scripts covers commands, options, errors, pipelining, protocol errors and large values; then come seeded random
//! sequences. Each script has connections of its own and begins with empty databases: **both servers lose their data**.
//!
//! The servers' clocks must agree to within a second: keys are given absolute ends.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::net::SocketAddr;

mod pair;
mod random;
mod reply;
mod scripts;

use pair::Pair;

/// What was compared, all of it equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Scripts run, fixed and random.
    pub scripts: usize,
    /// Answers compared.
    pub answers: usize,
}

/// One answer that was not the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The script.
    pub script: String,
    /// What was sent.
    pub request: String,
    /// What the reference answered.
    pub expected: String,
    /// What the subject answered.
    pub found: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            script,
            request,
            expected,
            found,
        } = self;
        write!(
            f,
            "{script}: {request}\n  expected {expected}\n  found    {found}"
        )
    }
}

/// Why a comparison did not succeed.
#[derive(Debug)]
pub enum CompatError {
    /// The two servers answered differently.
    Differs(Vec<Difference>),
    /// A server could not be talked to.
    Io {
        /// Which of the two.
        server: &'static str,
        /// The script that was running.
        script: String,
        /// What was being sent or waited for.
        request: String,
        /// What went wrong.
        source: io::Error,
    },
}

impl fmt::Display for CompatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Differs(differences) => {
                writeln!(f, "{} answers differ from Redis:", differences.len())?;
                differences
                    .iter()
                    .try_for_each(|difference| writeln!(f, "{difference}"))
            }
            Self::Io {
                server,
                script,
                request,
                source,
            } => write!(f, "{script}: {request}: the {server} failed: {source}"),
        }
    }
}

impl std::error::Error for CompatError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Differs(_) => None,
            Self::Io { source, .. } => Some(source),
        }
    }
}

/// Sends all scripts, and random sequences that follow from `seed`, to both servers and compares the answers.
///
/// # Errors
/// [`CompatError::Differs`] with all differences (of a random sequence only the first ones), or [`CompatError::Io`] when a
/// server cannot be reached, closes a connection or leaves a request unanswered for half a minute.
pub fn run(reference: SocketAddr, subject: SocketAddr, seed: u64) -> Result<Report, CompatError> {
    let mut report = Report {
        scripts: 0,
        answers: 0,
    };
    let mut all = Vec::new();
    let mut finish = |pair: Pair| {
        let (answers, differences) = pair.finish()?;
        report.scripts += 1;
        report.answers += answers;
        all.extend(differences);
        Ok(())
    };
    for (name, script) in scripts::written() {
        let mut pair = Pair::new(reference, subject, name)?;
        pair.script(script)?;
        finish(pair)?;
    }
    for (name, script) in scripts::CODED {
        let mut pair = Pair::new(reference, subject, name)?;
        script(&mut pair)?;
        finish(pair)?;
    }
    for (name, script) in random::SCRIPTS {
        let mut pair = Pair::new(reference, subject, &format!("{name} (seed {seed})"))?;
        script(&mut pair, seed)?;
        finish(pair)?;
    }
    if all.is_empty() {
        Ok(report)
    } else {
        Err(CompatError::Differs(all))
    }
}
