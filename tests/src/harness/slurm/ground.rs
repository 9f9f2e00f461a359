//! What promises do with a Slurm cluster of three nodes, wherever those are: in namespaces of this machine, or emulated.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// The nodes, in Slurm's order: an allocation's first one is the first of them.
pub const NODES: [&str; 3] = ["a", "b", "c"];

/// The batch script that is shipped.
pub const SCRIPT: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../scripts/slurm/doppel.sbatch"
);

/// Between two looks.
pub(super) const LOOK: Duration = Duration::from_millis(100);

/// A job, as `scontrol` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its state, such as RUNNING.
    pub state: String,
    /// Its nodes, as Slurm writes a list of them.
    pub nodes: String,
    /// How it came out: the code, and the signal.
    pub exit_code: String,
}

/// A controller and three nodes, and the calling thread in the world around them.
pub trait SlurmGround {
    /// The nodes' common directory, in which jobs are submitted, as this machine sees it.
    fn directory(&self) -> &Path;

    /// The batch script that is shipped, where `sbatch` finds it.
    ///
    /// # Errors
    /// If it has no such place.
    fn script(&self) -> Result<String>;

    /// The program, where nodes find it.
    ///
    /// # Errors
    /// If it was not built.
    fn program(&self) -> Result<String>;

    /// The directory of a node's temporary files, where that node finds it.
    fn temporary(&self) -> String;

    /// A configuration of roles: what they are to think of times.
    fn times(&self) -> &'static str;

    /// What tells `sacct` where this cluster's accounting is.
    fn accounting(&self) -> &'static [&'static str];

    /// A bound for what takes seconds on an idle machine.
    fn patience(&self) -> Duration;

    /// A bound for what Slurm does of itself: it finds a node lost, ends a job.
    fn slurm_within(&self) -> Duration;

    /// How long a client may wait for an answer.
    fn answer_within(&self) -> Duration;

    /// What a command of Slurm's printed, said from outside the nodes.
    ///
    /// # Errors
    /// If it does not end well.
    fn run(&self, program: &str, words: &[&str]) -> Result<String>;

    /// The node is lost, silently.
    ///
    /// # Errors
    /// If that cannot be done to it.
    fn lose(&mut self, at: usize) -> Result<()>;

    /// Waits until nothing that a job has started runs on a node.
    ///
    /// # Errors
    /// If something stays.
    fn until_nothing_runs(&self, at: usize) -> Result<()>;

    /// Whether every node waits for jobs.
    ///
    /// # Errors
    /// If the controller does not say.
    fn are_idle(&self) -> Result<bool> {
        let states = self.run("sinfo", &["--noheader", "--Node", "--format=%t"])?;
        let idle = states.split_whitespace().filter(|state| *state == "idle");
        Ok(idle.count() == NODES.len())
    }

    /// Submits the script that is shipped with these options and words; the job's number.
    ///
    /// # Errors
    /// If Slurm does not take it.
    fn submit(&self, options: &[&str], words: &[&str]) -> Result<String> {
        let script = self.script()?;
        let mut all = vec!["--parsable"];
        all.extend(options);
        all.push(&script);
        all.extend(words);
        Ok(self.run("sbatch", &all)?.trim().to_owned())
    }

    /// How a job is.
    ///
    /// # Errors
    /// If Slurm does not know it.
    fn job(&self, id: &str) -> Result<Job> {
        let line = self.run("scontrol", &["--oneliner", "show", "job", id])?;
        let field = |name: &str| {
            let found = line
                .split_whitespace()
                .find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            let found = found.with_context(|| format!("no {name} in {line}"));
            found.map(str::to_owned)
        };
        Ok(Job {
            state: field("JobState")?,
            nodes: field("NodeList")?,
            exit_code: field("ExitCode")?,
        })
    }

    /// Waits until a job is so.
    ///
    /// # Errors
    /// If it is not in time.
    fn until(&self, id: &str, longest: Duration, is_so: impl Fn(&Job) -> bool) -> Result<Job> {
        let until = Instant::now() + longest;
        loop {
            let job = self.job(id)?;
            if is_so(&job) {
                return Ok(job);
            }
            ensure!(Instant::now() < until, "the job is {job:?}");
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until Slurm's accounting has this of a job.
    ///
    /// # Errors
    /// If it has not in time.
    fn until_accounted(&self, job: &str, state: &str) -> Result<()> {
        let until = Instant::now() + self.patience();
        let words = ["--noheader", "--parsable2", "--format=jobid,state"];
        let words = [self.accounting(), &words, &["--jobs", job]].concat();
        let wanted = format!("{job}|{state}");
        loop {
            let told = self.run("sacct", &words)?;
            if told.lines().any(|line| line.starts_with(&wanted)) {
                return Ok(());
            }
            ensure!(Instant::now() < until, "the accounting says {told:?}");
            std::thread::sleep(LOOK);
        }
    }

    /// Where a job's node says what happens to it.
    fn log_of(&self, job: &str, at: usize) -> PathBuf {
        let directory = self.directory().join(format!("doppel-{job}"));
        directory.join(format!("{}.log", NODES[at]))
    }

    /// What a job's node has said.
    fn log(&self, job: &str, at: usize) -> String {
        fs::read_to_string(self.log_of(job, at)).unwrap_or_default()
    }

    /// Waits until a job's node has said this so many times.
    ///
    /// # Errors
    /// If it does not in time.
    fn until_said(&self, job: &str, at: usize, word: &str, times: usize) -> Result<()> {
        let until = Instant::now() + self.patience();
        while self.log(job, at).matches(word).count() < times {
            if Instant::now() >= until {
                bail!("node {} does not say {word:?}", NODES[at]);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// What everybody has said: for a failure's report.
    fn said(&self) -> String {
        let mut directories = vec![self.directory().to_owned()];
        let mut text = String::new();
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let path = entry.path();
                let ends = path.extension().and_then(|end| end.to_str());
                if path.is_dir() {
                    directories.push(path);
                } else if matches!(ends, Some("out" | "log"))
                    && let Ok(said) = fs::read_to_string(&path)
                {
                    text.push_str(&format!("== {}\n{said}\n", path.display()));
                }
            }
        }
        text
    }
}
